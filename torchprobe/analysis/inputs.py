"""The arguments that most measures share, in the forms in which they may be given: representations, and a head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchprobe.common.arrays import to_tensor
from torchprobe.encoders import Head

if TYPE_CHECKING:
    from torchprobe.analysis.embeddings import Embeddings

HeadLike: TypeAlias = "nn.Linear | Tensor | NDArray[Any]"
"""A linear layer (features → classes), or its weight (classes, features), also as a NumPy array."""

Vectors: TypeAlias = "Tensor | NDArray[Any] | Embeddings"
"""Vectors (n, d), one in each row: a tensor, a NumPy array, or embeddings."""

_ELEMENTS = 1 << 20  # of one block; 8 MB in float64


def representations(h: Vectors) -> Tensor:
    """The vectors (n, d), from a tensor, a NumPy array or embeddings. An array shares its memory with the result where possible.

    Raises:
        ValueError: they are not (n, d) with d ≥ 1, or not real numbers.
    """
    rows = h if isinstance(h, Tensor) else to_tensor(h, "h") if isinstance(h, np.ndarray) else h.h
    if rows.dim() != 2 or not rows.shape[1] or rows.is_complex():
        raise ValueError(f"expected representations (n, d), one vector per row; got {rows.dtype} of shape {tuple(rows.shape)}")
    return rows.detach()


def blocks(h: Tensor, elements: int = _ELEMENTS) -> Iterator[Tensor]:
    """Consecutive rows of h (n, d) in float64, about ``elements`` numbers at a time, so that a memory-mapped ``h`` is never copied whole.

    There is at least one block, which may be empty.

    >>> [len(rows) for rows in blocks(torch.zeros(5, 3), elements=6)]
    [2, 2, 1]
    """
    for rows in h.split(max(1, elements // h.shape[1])):
        yield rows.double().contiguous()


def weight_and_bias(head: HeadLike, features: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The weight (classes, features) and the bias (classes,) or None. Both are detached and float32, or float64 if the head is.

    Args:
        head: a linear layer or its weight.
        features: the width of the representations that the head will be applied to; None: not checked.

    Raises:
        TypeError: ``head`` is neither a linear layer nor a tensor nor a NumPy array.
        ValueError: it is not a matrix of real numbers, has nan or inf, or has another width than ``features``.

    >>> weight, bias = weight_and_bias(nn.Linear(3, 2))
    >>> weight.shape, bias.shape
    (torch.Size([2, 3]), torch.Size([2]))
    >>> weight_and_bias(torch.eye(2, 3), features=4)
    Traceback (most recent call last):
    ValueError: the head takes 3 features (its weight is (2, 3)), but the representations have 4
    """
    if isinstance(head, nn.Linear):
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    elif isinstance(head, (Tensor, np.ndarray)):
        weight, bias = (to_tensor(head, "the head") if isinstance(head, np.ndarray) else head).detach(), None
    else:
        raise TypeError(f"a head is an nn.Linear or its weight (classes, features), got {type(head).__name__}")
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(f"the weight of a head is floating point (classes, features), got {weight.dtype} {tuple(weight.shape)}")
    if features is not None and weight.shape[1] != features:
        raise ValueError(
            f"the head takes {weight.shape[1]} features (its weight is {tuple(weight.shape)}), but the representations have {features}"
        )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    finite = weight.isfinite().all(-1) if bias is None else weight.isfinite().all(-1) & bias.isfinite()
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"the head has nan or inf in {len(rows)} of its {len(finite)} rows, the first is row {rows[0]}")
    return weight, bias


def normalizes(head: HeadLike) -> bool:
    """Whether the head scales representations to length 1 first; see :class:`torchprobe.encoders.Head`."""
    return bool(getattr(head, "normalize", False))


def as_head(head: HeadLike) -> Head:
    """A :class:`torchprobe.encoders.Head` with the same decisions. A ``Head`` is returned unchanged.

    >>> as_head(torch.eye(2, 3))
    Head(in_features=3, out_features=2, bias=False)
    """
    if isinstance(head, Head):
        return head
    weight, bias = weight_and_bias(head)
    return Head(weight, bias, normalize=normalizes(head))
