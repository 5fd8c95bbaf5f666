"""Representations of a set of images, with their labels."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.analysis.embedding_run import by_first, finish, run
from torchprobe.analysis.embeddings_file import KIND, GrowingFile, Part, packed, require_alike, small, values
from torchprobe.analysis.reading import Source, stable_repr
from torchprobe.common import storage
from torchprobe.common.digest import digest
from torchprobe.common.ranks import Ranks
from torchprobe.datasets.labeled import check_groups

_BLOCK = 1 << 22  # numbers looked at at a time


@dataclass(repr=False)
class Embeddings:
    """What an encoder makes of images: one row each, before normalisation.

    Args:
        h: the representations, (n, d); kept in float32. Nan and inf stay in.
        y: the labels, rows of the head, (n,); kept in int64. −1 where it is not known.
        ids: what the images are called.
        skipped: images that could not be read, with the reason.
        classes: the rows of the head to choose from; None: all.
        groups: rows that stand for the same class, by label; see :class:`torchprobe.datasets.LabeledImages`.
        made: how they were made – encoder, data, batch size – as far as it is known.
        partial: it was stopped before the end.

    Raises:
        ValueError: shapes or types that do not fit.

    >>> Embeddings(torch.randn(3, 8), torch.tensor([0, 1, -1]), ["a", "b", "c"])
    Embeddings(3 × 8, 2 with a label)
    """

    h: Tensor
    y: Tensor
    ids: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    classes: tuple[int, ...] | None = None
    groups: dict[int, tuple[int, ...]] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    partial: bool = False

    def __post_init__(self) -> None:
        if self.h.dim() != 2 or not self.h.is_floating_point():
            raise ValueError(f"representations are floating point (n, d), got {self.h.dtype} {tuple(self.h.shape)}")
        if self.y.shape != (len(self.h),) or self.y.is_floating_point() or self.y.is_complex():
            raise ValueError(f"expected {len(self.h)} whole numbers as labels, got {self.y.dtype} {tuple(self.y.shape)}")
        if len(self.ids) != len(self.h):
            raise ValueError(f"expected {len(self.h)} ids, got {len(self.ids)}")
        if len(self.y) and int(self.y.min()) < -1:
            raise ValueError(f"a label is a row of the head, or -1 where it is not known, got {int(self.y.min())}")
        check_groups(self.groups)
        self.h, self.y = self.h.float(), self.y.long()
        self.classes = None if self.classes is None else tuple(self.classes)

    def __len__(self) -> int:
        return len(self.h)

    def __repr__(self) -> str:
        said = [f"{len(self)} × {self.features}", f"{int((self.y >= 0).sum())} with a label"]
        if self.classes is not None:
            said.append(f"{len(self.classes)} classes")
        if self.skipped:
            said.append(f"{len(self.skipped)} skipped")
        return f"Embeddings({', '.join(said)}{', partial' if self.partial else ''})"

    @property
    def features(self) -> int:
        """The width d of the representations."""
        return self.h.shape[1]

    @property
    def nonfinite(self) -> int:
        """Rows with nan or inf."""
        rows = max(1, _BLOCK // max(1, self.features))
        return sum(int((~block.isfinite().all(-1)).sum()) for block in self.h.split(rows)) if len(self) else 0

    def select(self, index: Tensor | Sequence[int] | Sequence[bool] | slice) -> Embeddings:
        """Some of the rows: by index, in that order, or a bool for each.

        A slice leaves memory-mapped representations mapped; anything else copies. What was skipped stays on the list.

        Raises:
            ValueError: not a bool for each row, or an index beyond the last.

        >>> e = Embeddings(torch.randn(3, 8), torch.tensor([0, 1, -1]), ["a", "b", "c"])
        >>> e.select(e.y > 0).ids, e.select([2, 0]).ids
        (['b'], ['c', 'a'])
        """
        if isinstance(index, slice):
            return self._with(self.h[index], self.y[index], self.ids[index])
        at = torch.as_tensor(index).cpu()
        if at.dtype == torch.bool:
            if at.shape != (len(self),):
                raise ValueError(f"expected a bool for each of the {len(self)} rows, got {tuple(at.shape)}")
            at = at.nonzero().flatten()
        if at.dim() != 1 or (len(at) and (at.is_floating_point() or int(at.min()) < -len(self) or int(at.max()) >= len(self))):
            raise ValueError(f"expected indices of the {len(self)} rows, got {at.dtype} {tuple(at.shape)} {at.flatten()[:3].tolist()} …")
        at = at.long() % max(1, len(self))
        return self._with(self.h[at.to(self.h.device)], self.y[at.to(self.y.device)], [self.ids[i] for i in at.tolist()])

    def labelled(self) -> Embeddings:
        """The rows with a label."""
        known = self.y >= 0
        return self if known.all() else self.select(known)

    def merge(self, other: Embeddings) -> Embeddings:
        """Adds, in place, the rows of other images by the same encoder; returns self.

        Raises:
            ValueError: another width, another encoder, other classes or groups, or images in common.
        """
        if other.features != self.features:
            raise ValueError(f"cannot merge embeddings of {self.features} and {other.features} features")
        for key in ("encoder", "weights", "preprocessing"):
            if key in self.made and key in other.made and self.made[key] != other.made[key]:
                raise ValueError(f"cannot merge embeddings of another {key}: {self.made[key]!r} and {other.made[key]!r}")
        if self.classes != other.classes or self.groups != other.groups:
            raise ValueError("cannot merge embeddings with other classes to choose from: set both to the same")
        if common := set(self.ids) & set(other.ids):
            raise ValueError(f"cannot merge embeddings with {len(common)} images in common, such as {min(common)!r}")
        self.h, self.y = torch.cat([self.h, other.h.to(self.h.device)]), torch.cat([self.y, other.y.to(self.y.device)])
        self.ids = [*self.ids, *other.ids]
        self.skipped = list(dict.fromkeys([*self.skipped, *other.skipped]))
        self.partial |= other.partial
        self.made = {key: value for key, value in self.made.items() if other.made.get(key) == value}
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; one of that name is replaced only when everything is on the disk.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: a label beyond 2³¹ − 1.
        """
        tensors = {"h": self.h, "y": small(self.y), "names": packed(self.ids, self.skipped)}
        storage.write(path, KIND, tensors, {"made": self.made, **values(self.classes, self.groups, self.partial)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Embeddings:
        """Reads a file of :meth:`save` or :func:`embed`; the representations stay on the disk and are read when they are used.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, or damaged; names the file and the part.
        """
        file = storage.File(path, KIND)
        h = file.tensor("h", torch.float32, (None, None))
        y = file.tensor("y", torch.int32, (len(h),)).clone()
        names = file.tensor("names", torch.uint8, (None,))
        try:
            content = json.loads(names.numpy().tobytes())
            ids, skipped = [str(name) for name in content["ids"]], [(str(name), str(reason)) for name, reason in content["skipped"]]
        except (ValueError, KeyError, TypeError) as error:
            raise file.error("names", f"is damaged ({error})") from error
        try:
            groups = file.values.get("groups")
            return cls(
                h, y, ids, skipped, None if file.values.get("classes") is None else tuple(map(int, file.values["classes"])),
                None if groups is None else {int(label): tuple(map(int, rows)) for label, rows in groups.items()},
                dict(file.value("made", dict)), bool(file.values.get("partial", False)),
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error

    def _with(self, h: Tensor, y: Tensor, ids: list[str]) -> Embeddings:
        return Embeddings(h, y, ids, list(self.skipped), self.classes, self.groups, dict(self.made), self.partial)


def embed(
    encoder: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 2,
    path: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Embeddings:
    """Runs images through an encoder and keeps its representations, float32, with their labels.

    With ``path`` they go to a safetensors file batch by batch and memory stays small; a run that was interrupted, even killed, goes on
    after its last whole batch. Where ``torch.distributed`` is initialised the ranks share the batches, rank r taking each batch i with
    i mod ranks = r, and every rank returns the whole: the same batches, so the same numbers, whatever their number. All must see ``path``.

    Args:
        encoder: a :class:`torchprobe.Encoder`, or any module: images → (N, d). It is run in eval mode and then put back.
        dataset: :class:`torchprobe.datasets.Images` or :class:`torchprobe.datasets.LabeledImages`; or a map-style PyTorch data set of
            (image, label) or images. PIL images go through ``encoder.preprocess``, tensors are taken as they are; a label is a row of
            the head. Items that cannot be read are skipped and counted; an item of a PyTorch data set is called by its index.
        batch_size: images in a batch. Part of the definition: a network gives slightly different numbers in batches of another size.
        device: where the encoder is moved to; default: where it is.
        workers: threads that decode files.
        path: of the file.
        resume: a file of the same encoder, data and batch size is gone on with, or just read if it is finished; what was skipped stays
            skipped. False begins anew and replaces it at the end.
        progress: told (images done, images in all) after every batch.
        stop: asked before every batch; True ends with what is there, marked as partial. So does KeyboardInterrupt.

    Raises:
        DatasetError: the data set is empty, not one image could be read, or items of a kind that cannot be used.
        ValueError: ``path`` is a file of another encoder, data set or batch size, which the message names, or no file of embeddings; the
            encoder gives no (N, d).

    >>> from torch.utils.data import TensorDataset
    >>> embed(nn.Flatten(), TensorDataset(torch.randn(5, 3, 2, 2), torch.arange(5)))
    Embeddings(5 × 12, 5 with a label)
    """
    source = Source(dataset, getattr(encoder, "preprocess", None), batch_size, workers)
    encoder = encoder if device is None else encoder.to(device)
    made = {
        "encoder": str(getattr(encoder, "name", type(encoder).__name__)),
        "weights": digest([*encoder.parameters(), *encoder.buffers()]),
        "preprocessing": stable_repr(source.preprocess),
        "data": source.identity(),
        "batch_size": batch_size,
    }
    file = None if path is None else GrowingFile(Path(path), made, values(source.classes, source.groups), len(source))
    with Ranks() as ranks, contextlib.ExitStack() as stack:
        if file is not None:
            stack.callback(file.close)
        done = by_first(ranks, lambda: 0 if file is None else _begin(file, resume))
        if done < 0:  # it is finished
            assert path is not None
            return Embeddings.load(path)
        kept: list[Part] = []
        partial = run(encoder, source, ranks, done, kept.append if file is None else file.append, progress, stop)
        whole = by_first(ranks, lambda: finish(kept, file, partial))
        if file is not None and not partial:
            ranks.barrier()
            return Embeddings.load(file.path)
    h = whole.h if file is None else file.so_far(len(whole.ids), whole.h.shape[1])
    y = torch.tensor(whole.y, dtype=torch.int64)
    return Embeddings(h, y, whole.ids, whole.skipped, source.classes, source.groups, made, partial)


def _begin(file: GrowingFile, resume: bool) -> int:
    """The batches that are there already; −1 when all are and the file is finished."""
    if file.path.exists():
        if not resume:
            storage.File(file.path, KIND)  # nothing else is replaced
        else:
            finished = Embeddings.load(file.path)
            require_alike(file.path, finished.made, file.made)
            if finished.partial:
                raise ValueError(f"{file.path} holds part of the embeddings only: give another path, or resume=False to begin anew")
            file.discard()
            return -1
    return file.open(resume)
