"""A head, whatever it came as: an ``nn.Linear``, or just its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprobe.encoders import Head

HeadLike = nn.Linear | Tensor
"""A linear layer (features → classes), or its weight (classes, features)."""


def weight_and_bias(head: HeadLike, features: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The weight (classes, features) and the bias (classes,) or None, detached, both float32, or float64 if the head is.

    Args:
        head: a linear layer or its weight.
        features: how wide the representations are that it is to be used on; not checked when None.

    Raises:
        TypeError: it is neither a linear layer nor a tensor.
        ValueError: not a matrix of real numbers, values that are not finite, or another width than ``features``.

    >>> weight, bias = weight_and_bias(nn.Linear(3, 2))
    >>> weight.shape, bias.shape
    (torch.Size([2, 3]), torch.Size([2]))
    >>> weight_and_bias(torch.eye(2, 3), features=4)
    Traceback (most recent call last):
    ValueError: the head takes 3 features (its weight is (2, 3)), but the representations have 4
    """
    if isinstance(head, nn.Linear):
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    elif isinstance(head, Tensor):
        weight, bias = head.detach(), None
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
    sound = weight.isfinite().all(-1) if bias is None else weight.isfinite().all(-1) & bias.isfinite()
    if not sound.all():
        rows = (~sound).nonzero().flatten().tolist()
        raise ValueError(f"the head has nan or inf in {len(rows)} of its {len(sound)} rows, the first is row {rows[0]}")
    return weight, bias


def normalizes(head: HeadLike) -> bool:
    """Whether the head brings representations to unit length first; see :class:`torchprobe.encoders.Head`."""
    return bool(getattr(head, "normalize", False))


def as_head(head: HeadLike) -> Head:
    """The same decisions as a :class:`torchprobe.encoders.Head`; a head that is one already is returned as it is.

    >>> as_head(torch.eye(2, 3))
    Head(in_features=3, out_features=2, bias=False)
    """
    if isinstance(head, Head):
        return head
    weight, bias = weight_and_bias(head)
    return Head(weight, bias, normalize=normalizes(head))
