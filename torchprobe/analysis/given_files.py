"""Representations in files of arrays → embeddings in a file of this library. Neither is held in memory as a whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.embeddings_file import KIND, START_OVER, GrowingFile, Part, metadata
from torchprobe.analysis.given import checked_labels, checked_rows, row_names
from torchprobe.analysis.inputs import weight_and_bias
from torchprobe.common import limits
from torchprobe.common.arrays import SUFFIXES, Array, choose, located, open_arrays
from torchprobe.common.facts import digest_of, require_same
from torchprobe.common.storage import digest
from torchprobe.common.version import VERSION
from torchprobe.encoders import Head, load_head

LABELS = ("y", "labels", "label")
"""The names of an array with the labels, in a file that also holds the representations."""

NAMES = ("ids", "names")
"""The names of an array of text with the names of the rows."""

BIASES = ("bias", "intercept", "intercept_")
"""The names of the bias of a head, beside its weight; sklearn calls it intercept_."""

_BLOCK = 1 << 22  # numbers at a time
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Given:
    """Representations that were computed elsewhere.

    Attributes:
        h: (n, d), of any floating type, mapped to its file where possible.
        y: int64 (n,).
        ids: the names of the rows.
        provenance: what is known of their origin.
        classes, groups: as of :class:`torchprobe.analysis.Embeddings`.
    """

    h: Tensor
    y: Tensor
    ids: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    classes: tuple[int, ...] | None = None
    groups: dict[int, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, embeddings: Embeddings) -> Given:
        """Embeddings in memory, or of a file of this library."""
        return cls(embeddings.h, embeddings.y, embeddings.ids, embeddings.provenance, embeddings.classes, embeddings.groups)

    def sample(self, count: int, seed: int) -> Given:
        """Some of the rows, chosen at random, in their order; all if there are not more."""
        if count >= len(self.ids):
            return self
        at = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        ids = [self.ids[i] for i in at.tolist()]
        return Given(self.h[at], self.y[at], ids, self.provenance, self.classes, self.groups)


def open_given(file: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None, prefix: str = "") -> Given:
    """Representations from a file of arrays, or from a file that :func:`torchprobe.analysis.embed` wrote.

    Args:
        file: ``.npy``, ``.npz``, ``.safetensors`` or ``.parquet``; FILE:NAME if it holds several matrices. If it also holds whole numbers
            called y, labels or label, they are the labels, and text called ids or names is the names of the rows.
        labels: another file, or FILE:NAME, with the labels.
        prefix: before the numbers of rows without a name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or its arrays do not fit each other; the message names the file and the array.
    """
    path, name = located(file)
    if name is None and _is_embeddings(path):
        saved = Given.of(Embeddings.load(path))
        y = saved.y if labels is None else _labels(labels, saved.h)
        return Given(saved.h, y, saved.ids, saved.provenance, saved.classes, saved.groups)
    arrays = open_arrays(path)
    chosen = choose(arrays, path, name, "representations", lambda one: one.kind == "float" and len(one.shape) == 2)
    h = checked_rows(chosen.tensor(), chosen.where)
    others = {key: one for key, one in arrays.items() if one is not chosen}
    beside, names = _named(others, LABELS), _named(others, NAMES)
    if labels is not None:
        y = _labels(labels, h)
    else:
        y = checked_labels(None, h) if beside is None else checked_labels(beside.tensor(), h, beside.where)
    ids = row_names(len(h), prefix=prefix) if names is None else row_names(len(h), names.texts(), names.where)
    return Given(h, y, ids, {"data": {"name": f"{path.name}{':' if name else ''}{name or ''}", "images": len(h)}})


def open_head(file: str | os.PathLike[str], features: int) -> Head:
    """A head from a file of arrays, or one that :func:`torchprobe.encoders.load_head` reads.

    Args:
        file: a weight (classes, features) as ``.npy``, ``.npz`` or ``.parquet``, or as FILE:NAME. The bias beside it is taken too: bias,
            intercept or intercept_, such as fc.bias with fc.weight, or b with w. Other files are checkpoints.
        features: the width of the representations.

    Raises:
        FileNotFoundError, ValueError, EncoderError: there is no such file, or it holds no such head.
    """
    path, name = located(file)
    if name is None and path.suffix.lower() not in (set(SUFFIXES) - {".safetensors"}):
        return load_head(path, features)
    arrays = open_arrays(path)
    name = "weight" if name is None and "weight" in arrays else name
    chosen = choose(arrays, path, name, "a head", lambda one: one.kind == "float" and len(one.shape) == 2 and one.shape[1] == features)
    if len(chosen.shape) != 2:
        raise ValueError(f"{chosen.where} cannot be a head: that is a weight (classes, features), got {tuple(chosen.shape)}")
    weight, bias = checked_rows(chosen.tensor(), chosen.where), _bias(arrays, chosen)
    if weight.shape[1] != features:
        transposed = ". Is it transposed? A head is (classes, features)" if weight.shape[0] == features else ""
        raise ValueError(f"{chosen.where} takes {weight.shape[1]} features, but the representations have {features}{transposed}")
    limits.check("head_numbers", weight.numel(), chosen.where)
    try:
        head = Head(weight.float(), None if bias is None else bias.tensor().float())
        weight_and_bias(head)
    except ValueError as error:
        raise ValueError(f"{chosen.where}: {error}") from error
    return head


def keep(given: Given, path: Path, name: str, resume: bool = False) -> Embeddings:
    """Writes representations to a file of embeddings, block by block, and returns them mapped to it.

    Args:
        given: the representations.
        path: of the file, in an existing folder.
        name: of the encoder.
        resume: a file of the same representations, labels and names is not written again.

    Raises:
        ValueError: no row is finite, a number or all of a row do not fit float32, or the file to resume holds something else.
    """
    content, finite = hashlib.sha256(repr(tuple(given.h.shape)).encode()), 0
    for block in _float32(given.h, name):
        finite += int(block.isfinite().all(1).sum())
        content.update(block.numpy().tobytes())
    if not finite:
        raise ValueError(f"{name}: every one of the {len(given.h):,} representations has nan or inf")
    made = {
        **given.provenance,
        "encoder": name,
        "representations": content.hexdigest(),
        "labels": digest([given.y]),
        "ids": digest_of(given.ids),
        "classes": digest_of([given.classes, sorted((given.groups or {}).items())]),
        "torchprobe": VERSION,
    }
    file = GrowingFile(path, metadata(made, given.classes, given.groups), len(given.h))
    file.lock()
    try:
        if resume and path.exists():
            before = Embeddings.load(path)
            require_same(path, before.provenance, made, START_OVER)
            file.close()
            return before
        file.open(resume=False)
        start = 0
        for block in _float32(given.h, name):
            end = start + len(block)
            file.append(Part(block, given.y[start:end].tolist(), given.ids[start:end]))
            start = end
        file.finish()
    except BaseException:
        file.discard()
        file.close()
        raise
    return Embeddings.load(path)


def _float32(h: Tensor, name: str) -> Iterator[Tensor]:
    """Blocks of rows in float32 on the CPU."""
    start = 0
    for rows in h.split(max(1, _BLOCK // h.shape[1])):
        block = rows.detach().float().cpu().contiguous()
        if rows.dtype == torch.float64 and bool((over := block.isinf() & rows.isfinite().cpu()).any()):
            row = start + int(over.any(1).nonzero()[0])
            raise ValueError(f"{name}: row {row} has a number beyond ±3.4e38, which float32 does not have; scale the representations")
        if rows.dtype == torch.float64 and bool((under := (block.abs().amax(1) < _SMALLEST) & rows.ne(0).any(1).cpu()).any()):
            row = start + int(under.nonzero()[0])
            raise ValueError(f"{name}: row {row} has no number above 1.2e-38, where float32 loses digits; scale the representations")
        start += len(rows)
        yield block


def _is_embeddings(path: Path) -> bool:
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        opened: Any = safe_open(os.fspath(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return (opened.metadata() or {}).get("kind") == KIND


def _labels(file: str | os.PathLike[str], h: Tensor) -> Tensor:
    path, name = located(file)
    chosen = choose(open_arrays(path), path, name, "labels", lambda one: one.kind == "whole" and len(one.shape) == 1)
    return checked_labels(chosen.tensor(), h, chosen.where)


def _bias(arrays: dict[str, Array], weight: Array) -> Array | None:
    """The bias that belongs to a weight, by the name of the weight. Without it, every decision would be that of another head."""
    name = next(key for key, one in arrays.items() if one is weight)
    path, dot, last = name.rpartition(".")
    names = [last.replace("weight", "bias")] if "weight" in last else []
    names += [f"{last}_bias", *BIASES, *(["b"] if last in ("w", "W") else [])]
    return next((arrays[path + dot + one] for one in names if path + dot + one in arrays), None)


def _named(arrays: dict[str, Array], names: tuple[str, ...]) -> Array | None:
    """The first array of these names with one element for each row. Whether it has the right type is checked when it is read."""
    return next((arrays[name] for name in names if name in arrays and len(arrays[name].shape) == 1), None)
