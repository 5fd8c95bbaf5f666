"""Representations of a set of images, with their labels, and the pass through an encoder that computes them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchprobe.analysis.embeddings_file import (
    KIND,
    START_OVER,
    GrowingFile,
    Part,
    labels_int32,
    metadata,
    names_tensor,
    read_names,
)
from torchprobe.analysis.given import checked_labels, checked_rows, row_names
from torchprobe.analysis.positions import FeatureDim, LayerEncoder, Position, at_layer
from torchprobe.analysis.reading import Source, portable
from torchprobe.analysis.vectors import Around, evaluating, part_of
from torchprobe.common import storage
from torchprobe.common.deprecation import RenamedAttribute, renamed_fields
from torchprobe.common.facts import require_same
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import CountCallback
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.labeled import check_groups

_BLOCK = 1 << 22  # numbers at a time


@renamed_fields(made="provenance")
@dataclass(repr=False)
class Embeddings:
    """The representations of images by an encoder: one row each, before normalization.

    Args:
        h: the representations, (n, d), kept in float32. They may contain nan and inf.
        y: the labels, rows of the head, (n,), kept in int64. −1 if unknown.
        ids: the names of the images.
        skipped: images that could not be read, each with the reason.
        classes: the rows of the head to choose from; None: all.
        groups: label → rows that stand for the same class; see :func:`torchprobe.datasets.imagenet_set`.
        provenance: the encoder, data and batch size from which they were computed, as far as known.
        partial: whether the run was stopped before the end.

    Raises:
        ValueError: shapes or types that do not match.

    >>> Embeddings(torch.randn(3, 8), torch.tensor([0, 1, -1]), ["a", "b", "c"])
    Embeddings(3 × 8, 2 with a label)
    """

    h: Tensor
    y: Tensor
    ids: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    classes: tuple[int, ...] | None = None
    groups: dict[int, tuple[int, ...]] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    partial: bool = False

    made = RenamedAttribute("provenance")
    labelled = RenamedAttribute("labeled")

    def __post_init__(self) -> None:
        if self.h.dim() != 2 or not self.h.is_floating_point():
            raise ValueError(f"representations must be floating point (n, d), got {self.h.dtype} {tuple(self.h.shape)}")
        if self.y.shape != (len(self.h),) or self.y.is_floating_point() or self.y.is_complex():
            raise ValueError(f"expected {len(self.h)} whole numbers as labels, got {self.y.dtype} {tuple(self.y.shape)}")
        if len(self.ids) != len(self.h):
            raise ValueError(f"expected {len(self.h)} ids, got {len(self.ids)}")
        if len(self.y) and int(self.y.min()) < -1:
            raise ValueError(f"a label is a row of the head, or -1 if unknown, got {int(self.y.min())}")
        check_groups(self.groups)
        self.h, self.y = self.h.float(), self.y.long()
        self.classes = None if self.classes is None else tuple(self.classes)

    @classmethod
    def from_arrays(
        cls, h: Tensor | NDArray[Any], y: Tensor | NDArray[Any] | None = None, ids: Iterable[str] | NDArray[Any] | None = None
    ) -> Embeddings:
        """Representations that you have already. Float32 arrays, also memory-mapped ones, are not copied.

        Args:
            h: floating point (n, d).
            y: whole numbers (n,), rows of the head, or −1 if unknown; None: all unknown.
            ids: names of the images; None: "row 0 of n" and so on.

        Raises:
            TypeError, ValueError: another type, shape or number of rows; a name twice.

        >>> Embeddings.from_arrays(torch.ones(3, 8).numpy())
        Embeddings(3 × 8, 0 with a label)
        """
        rows = checked_rows(h)
        return cls(rows, checked_labels(y, rows), row_names(len(rows), ids))

    def __len__(self) -> int:
        return len(self.h)

    def __repr__(self) -> str:
        parts = [f"{len(self)} × {self.features}", f"{int((self.y >= 0).sum())} with a label"]
        if self.classes is not None:
            parts.append(f"{len(self.classes)} classes")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped")
        return f"Embeddings({', '.join(parts)}{', partial' if self.partial else ''})"

    @property
    def features(self) -> int:
        """The width d of the representations."""
        return self.h.shape[1]

    @property
    def nonfinite(self) -> int:
        """The number of rows with nan or inf."""
        rows = max(1, _BLOCK // max(1, self.features))
        return sum(int((~block.isfinite().all(-1)).sum()) for block in self.h.split(rows)) if len(self) else 0

    def select(self, index: Tensor | Sequence[int] | Sequence[bool] | slice) -> Embeddings:
        """Some of the rows: by index, in that order, or by a bool for each row.

        A slice keeps memory-mapped representations mapped; other indices copy. The list of skipped images stays the same.

        Raises:
            ValueError: not a bool for each row, or an index outside the rows.

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

    def labeled(self) -> Embeddings:
        """The rows with a label."""
        known = self.y >= 0
        return self if known.all() else self.select(known)

    def merge(self, other: Embeddings) -> Embeddings:
        """Adds the rows of other images by the same encoder, in place, and returns self.

        Raises:
            ValueError: another width, another encoder, other classes or groups, or common images.
        """
        if other.features != self.features:
            raise ValueError(f"cannot merge embeddings of {self.features} and {other.features} features")
        for key in ("encoder", "weights", "modules", "preprocessing"):
            if key in self.provenance and key in other.provenance and self.provenance[key] != other.provenance[key]:
                raise ValueError(f"cannot merge embeddings with different {key}: {self.provenance[key]!r} and {other.provenance[key]!r}")
        if self.classes != other.classes or self.groups != other.groups:
            raise ValueError("cannot merge embeddings with different classes to choose from: set both to the same")
        if common := set(self.ids) & set(other.ids):
            raise ValueError(f"cannot merge embeddings with {len(common)} common images, such as {min(common)!r}")
        self.h, self.y = torch.cat([self.h, other.h.to(self.h.device)]), torch.cat([self.y, other.y.to(self.y.device)])
        self.ids = [*self.ids, *other.ids]
        self.skipped = list(dict.fromkeys([*self.skipped, *other.skipped]))
        self.partial |= other.partial
        self.provenance = {key: value for key, value in self.provenance.items() if other.provenance.get(key) == value}
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file. It replaces an older file only when everything is on the disk.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: a label above 2³¹ − 1.
        """
        tensors = {"h": self.h, "y": labels_int32(self.y), "names": names_tensor(self.ids, self.skipped)}
        storage.write(path, KIND, tensors, metadata(self.provenance, self.classes, self.groups, self.partial))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Embeddings:
        """Reads a file of :meth:`save` or :func:`embed`. The representations stay on the disk and are read when they are used.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: another kind of file, or a damaged one; the message names the file and the part.
        """
        file = storage.File(path, KIND)
        h = file.tensor("h", torch.float32, (None, None))
        y = file.tensor("y", torch.int32, (len(h),)).clone()
        names, facts = read_names(file, len(h))
        try:
            groups = None if facts.groups is None else {int(label): tuple(rows) for label, rows in facts.groups.items()}
            classes = None if facts.classes is None else tuple(facts.classes)
            return cls(h, y, names.ids, names.skipped, classes, groups, facts.made, facts.partial)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error

    def _with(self, h: Tensor, y: Tensor, ids: list[str]) -> Embeddings:
        return Embeddings(h, y, ids, list(self.skipped), self.classes, self.groups, dict(self.provenance), self.partial)


def embed(
    encoder: nn.Module,
    dataset: Any,
    *,
    layer: str | None = None,
    position: Position | None = None,
    feature_dim: FeatureDim = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 2,
    path: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: CountCallback | None = None,
    stop: Callable[[], bool] | None = None,
    around: Around | None = None,
) -> Embeddings:
    """Runs images through an encoder and keeps its representations, float32, with their labels.

    With ``path`` they are written to a safetensors file batch by batch, so memory use stays small. A run that was interrupted, even killed,
    resumes after its last complete batch. If ``torch.distributed`` is initialized, the ranks share the batches: rank r takes each batch i
    with i mod ranks = r. Every rank returns all embeddings. The batches, and so the numbers, do not depend on the number of ranks. All
    ranks must see ``path``.

    Args:
        encoder: a :class:`torchprobe.Encoder`, or any module: images → (N, d). It runs in eval mode; its mode is restored afterwards.
        dataset: images of :mod:`torchprobe.datasets`, with or without labels, or a map-style PyTorch data set of (image, label) or of
            images. PIL images are preprocessed by ``encoder.preprocess``; tensors are used unchanged. A label is a row of the head. Items
            that cannot be read are skipped and counted. The name of an item of a PyTorch data set is its index.
        layer: the name of a layer whose activation is the representation, instead of the output of the encoder; see
            :class:`~torchprobe.analysis.positions.LayerEncoder`.
        position: which of the positions of that layer: "class", "patch", "mean", "last" or "all". "patch" and "all" give one row for each
            position; its id is that of the image, "@" and the position in the layer. None for a layer with one vector for each image.
        feature_dim: the dimension of the features of ``layer``, as for :func:`torchprobe.record`, if it is refused because it is unsure.
        batch_size: images in a batch. It is part of the definition: a network gives slightly different numbers in batches of another size.
        device: the encoder is moved there; None: it stays where it is.
        workers: threads that decode files.
        path: of the file.
        resume: a file of the same encoder, preprocessing, data and batch size is continued, or loaded if complete; skipped images stay
            skipped. False starts over and replaces the file at the end.
        progress: called with (images done, images in all) after every batch.
        stop: called before every batch. If it returns True, the run ends, and the result is marked as partial. KeyboardInterrupt does the
            same.
        around: called with each batch that this process runs, and with its inputs on the device. The encoder runs within the context that
            it returns, so hooks can be told what they see.

    Raises:
        DatasetError: the data set is empty, no image could be read, or it holds items that cannot be used.
        ValueError: ``path`` is a file of another encoder, preprocessing, data set or batch size, which the message names, or not a file
            of embeddings; the preprocessing is random; or the output of the encoder is not (N, d). Or the encoder has no such layer, or
            the layer no such position.

    >>> from torch.utils.data import TensorDataset
    >>> embed(nn.Flatten(), TensorDataset(torch.randn(5, 3, 2, 2), torch.arange(5)))
    Embeddings(5 × 12, 5 with a label)
    """
    source = Source(dataset, getattr(encoder, "preprocess", None), batch_size, workers)
    encoder = encoder if device is None else encoder.to(device)
    if layer is not None or position is not None:
        encoder = at_layer(encoder, layer, position, source.example(), feature_dim)
    elif feature_dim is not None:
        raise ValueError("feature_dim is of a layer, and the output of the encoder is (N, d): name a layer, or leave it out")
    provenance = source.facts(encoder, saved=path is not None) | (encoder.facts if isinstance(encoder, LayerEncoder) else {})
    several = isinstance(encoder, LayerEncoder) and encoder.several
    longest = len(source) << 20 if several else len(source)  # at most so many rows
    file = None if path is None else GrowingFile(Path(path), metadata(provenance, source.classes, source.groups), longest)
    with Ranks() as ranks, contextlib.ExitStack() as stack:
        if file is not None:
            stack.callback(file.close)
        done = ranks.on_first(lambda: 0 if file is None else _begin(file, resume))
        if done < 0:  # the file is complete
            assert path is not None
            return Embeddings.load(path)
        kept: list[Part] = []
        partial = _run(encoder, source, ranks, done, kept.append if file is None else file.append, progress, stop, around)
        whole = ranks.on_first(lambda: _finish(kept, file, partial))
        if file is not None and not partial:
            ranks.barrier()
            return Embeddings.load(file.path)
    h = whole.h if file is None else file.so_far(len(whole.ids), whole.h.shape[1])
    y = torch.tensor(whole.y, dtype=torch.int64)
    return Embeddings(h, y, whole.ids, whole.skipped, source.classes, source.groups, provenance, partial)


# -- the pass ------------------------------------------------------------------------------------------------------------


def _begin(file: GrowingFile, resume: bool) -> int:
    """The number of batches that are done; −1 if the file is complete."""
    file.lock()
    if file.path.exists():
        if not resume:
            storage.File(file.path, KIND)  # refuses to replace another kind of file
        else:
            finished = Embeddings.load(file.path)
            if finished.partial:
                raise ValueError(f"{file.path} holds only a part of the embeddings: {START_OVER}")
            require_same(file.path, finished.provenance, file.provenance, START_OVER)
            file.discard()
            file.close()
            return -1
    return file.open(resume)


def _run(
    encoder: nn.Module,
    source: Source,
    ranks: Ranks,
    done: int,
    keep: Callable[[Part], None],
    progress: CountCallback | None,
    stop: Callable[[], bool] | None,
    around: Around | None,
) -> bool:
    """Computes the batches from number ``done`` on. The first rank calls ``keep`` with them, in order. True if the run was stopped."""
    place = next((tensor.device for tensor in [*encoder.parameters(), *encoder.buffers()]), torch.device("cpu"))
    mine = [i for i in range(done, source.batches) if i % ranks.size == ranks.rank]
    files = min(done * source.size, len(source))

    def share(number: int) -> Part | Exception | str | None:
        try:
            if stop is not None and stop():
                return "stop"
            return None if number >= source.batches else part_of(encoder, place, next(batches), around)
        except KeyboardInterrupt:
            return "stop"
        except Exception as error:  # the other ranks have to know
            return error if ranks.size == 1 else portable(error, ranks.rank)

    with torch.inference_mode(), evaluating(encoder), warnings.catch_warnings(), contextlib.closing(source.read(mine)) as batches:
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about metadata of image files
        for first in range(done, source.batches, ranks.size):
            turn = [first + (rank - first) % ranks.size for rank in range(ranks.size)]
            own = share(turn[ranks.rank])
            shares = [own, *ranks.to_first(own)]
            end: Exception | str | None = None
            for _, part in sorted(zip(turn, shares, strict=False), key=lambda pair: pair[0]):
                if isinstance(part, (Exception, str)):
                    end = part
                if end is None and isinstance(part, Part) and ranks.first:
                    try:
                        keep(part)
                    except OSError as error:  # such as a full disk
                        end = error
                    files += part.files
            end, files = ranks.from_first((end, files))
            if isinstance(end, Exception):
                raise end
            if end is not None:
                return True
            if progress is not None:
                progress(files, len(source))
    return False


def _finish(kept: list[Part], file: GrowingFile | None, partial: bool) -> Part:
    """All batches as one. With a file, the representations stay on the disk and only their width is returned."""
    if file is None:
        rows = [part.h for part in kept if part.ids]
        whole = Part(skipped=[pair for part in kept for pair in part.skipped])
        whole.h = torch.cat(rows) if rows else whole.h
        whole.y, whole.ids = [label for part in kept for label in part.y], [name for part in kept for name in part.ids]
    else:
        whole = Part(torch.empty(0, file.features), file.y, file.ids, file.skipped)
    if not whole.ids and partial:
        raise KeyboardInterrupt
    if not whole.ids:
        if file is not None:
            file.discard()
        name, why = whole.skipped[0]
        raise DatasetError(f"none of the {len(whole.skipped)} images could be read; the first, {name}: {why}")
    if file is not None and not partial:
        file.finish()
        return Part()  # every rank loads the file
    return whole
