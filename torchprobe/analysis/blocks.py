"""Representations (n, d) some rows at a time, so that what is memory-mapped is never copied whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torchprobe.analysis.embeddings import Embeddings

_ELEMENTS = 1 << 20  # in work at a time; 8 MB in float64


def representations(h: Tensor | Embeddings) -> Tensor:
    """The vectors (n, d) themselves, whichever way they came.

    Raises:
        ValueError: they are not (n, d) with d ≥ 1, or not real numbers.
    """
    rows = h if isinstance(h, Tensor) else h.h
    if rows.dim() != 2 or not rows.shape[1] or rows.is_complex():
        raise ValueError(f"expected representations (n, d), one vector a row; got {rows.dtype} of shape {tuple(rows.shape)}")
    return rows.detach()


def blocks(h: Tensor, elements: int = _ELEMENTS) -> Iterator[Tensor]:
    """Consecutive rows of h (n, d) in float64, about ``elements`` numbers at a time; at least one block, which may be empty.

    >>> import torch
    >>> [len(rows) for rows in blocks(torch.zeros(5, 3), elements=6)]
    [2, 2, 1]
    """
    for rows in h.split(max(1, elements // h.shape[1])):
        yield rows.double().contiguous()
