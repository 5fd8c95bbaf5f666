"""Representations, labels and names that are given as arrays, checked and brought into the form of embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.common.arrays import to_tensor

MOST_FEATURES = 1 << 15
"""The largest width. Rotations and directions need matrices of this size squared."""


def checked_rows(h: Tensor | NDArray[Any], where: str = "h") -> Tensor:
    """Representations (n, d) of a floating type.

    Raises:
        TypeError: not an array.
        ValueError: another shape or type; more features than :data:`MOST_FEATURES`.
    """
    rows = _tensor(h, where)
    if rows.dim() != 2 or 0 in rows.shape:
        hint = "; a single vector is h[None]" if rows.dim() == 1 and len(rows) else ""
        raise ValueError(f"{where} must be representations (n, d), one vector in each row; got {tuple(rows.shape)}{hint}")
    if not rows.is_floating_point():
        raise ValueError(f"{where} must be floating point, got {rows.dtype}: convert it first, and undo a quantization")
    if rows.shape[1] > MOST_FEATURES:
        raise ValueError(f"{where} has {rows.shape[1]:,} features in each row, more than {MOST_FEATURES:,}: is it transposed?")
    return rows


def checked_labels(y: Tensor | NDArray[Any] | None, rows: Tensor, where: str = "y") -> Tensor:
    """Labels, int64 (n,), for representations (n, d); −1, unknown, without any.

    Raises:
        TypeError: not an array.
        ValueError: another shape or type, another number of labels, or one below −1.
    """
    n, d = rows.shape
    if y is None:
        return torch.full((n,), -1, dtype=torch.int64)
    labels = _tensor(y, where)
    if labels.dim() != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{where} must be whole numbers (n,), rows of the head; got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) != n:
        transposed = ". Are the representations transposed? Each row is one vector" if len(labels) == d else ""
        raise ValueError(f"{where} has {len(labels):,} labels for {n:,} representations{transposed}")
    if n and int(labels.min()) < -1:
        raise ValueError(f"{where} has the label {int(labels.min())}: a label is a row of the head, or -1 if unknown")
    return labels.cpu().long()


def row_names(n: int, ids: Iterable[str] | NDArray[Any] | None = None, where: str = "ids", prefix: str = "") -> list[str]:
    """The names of n rows. Without any, "row 3 of 500": sets of different sizes then have no name in common.

    Raises:
        ValueError: another number of names, or a name twice.

    >>> row_names(2), row_names(2, ["cat.png", "dog.png"])
    (['row 0 of 2', 'row 1 of 2'], ['cat.png', 'dog.png'])
    """
    if ids is None:
        return [f"{prefix}row {i} of {n}" for i in range(n)]
    if isinstance(ids, str):
        raise ValueError(f"{where} must be one name for each row, got one text")
    names = [str(name) for name in (ids.tolist() if isinstance(ids, np.ndarray) else ids)]
    if len(names) != n:
        raise ValueError(f"{where} has {len(names):,} names for {n:,} representations")
    if len(set(names)) < n:
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{where} has the name {twice!r} twice: a name stands for one image")
    return names


def _tensor(array: Any, where: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        return to_tensor(array, where)
    raise TypeError(f"{where} must be a NumPy array or a tensor, got {type(array).__name__}")
