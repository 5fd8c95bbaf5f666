"""Finds the one tensor that is read in the output of a module."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in tuples, lists, mappings and dataclasses, depth first; None without one.

    A single number does not count, such as a loss that comes before the logits.
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.dim() > 0 else None
    for item in _items(value):
        tensor = first_tensor(item)
        if tensor is not None:
            return tensor
    return None


def holds(value: Any, tensor: Tensor) -> bool:
    """Whether ``tensor`` itself is part of the structure."""
    return value is tensor or any(holds(item, tensor) for item in _items(value))


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """``value`` with ``new`` in place of ``old``. The containers around it are new ones of the same classes."""
    if value is old:
        return new
    if not _items(value):
        return value
    if isinstance(value, Mapping):
        items = {key: replaced(item, old, new) for key, item in value.items()}
        make: Any = type(value)
        return make(items) if make in (dict, OrderedDict) else make(**items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[replaced(item, old, new) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)([replaced(item, old, new) for item in value])
    names = [field.name for field in dataclasses.fields(value)]
    return type(value)(**{name: replaced(getattr(value, name), old, new) for name in names})


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if isinstance(value, Mapping):
        return tuple(value.values())
    if value is None or isinstance(value, (int, float, str)):
        return ()  # checked first, since the compiler cannot check whether None is a dataclass
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return ()


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor, which can be read directly."""
    return type(x) is Tensor and not x.is_nested


def plain(x: Tensor, feature_dim: int | None = None) -> Tensor:
    """The ordinary tensor inside another one: the values of a nested tensor, the local part of a distributed tensor.

    Raises:
        ValueError: the local part of a distributed tensor does not hold whole vectors.
    """
    if x.is_nested:
        values: Tensor = x.values()
        return values if values.dim() > 1 else values.view(-1, x.size(-1))
    if hasattr(x, "placements"):
        dim = x.dim() - 1 if feature_dim is None else feature_dim % x.dim()
        for placement in x.placements:
            if placement.is_partial() or placement.is_shard(dim):
                what = "one summand" if placement.is_partial() else "a slice of the features"
                raise ValueError(
                    f"each rank holds {what} of this distributed tensor ({x.placements}), not whole vectors: record a layer "
                    f"whose output is replicated, or split along another dimension"
                )
        return x.to_local()  # type: ignore[attr-defined, no-any-return]
    return x


def fit_mask(mask: Tensor, x: Tensor, feature_dim: int) -> Tensor | None:
    """The padding mask for ``x``: the mask itself, or None for an activation with one vector per input.

    Raises:
        ValueError: the mask belongs to another shape.
    """
    lead = list(x.shape)
    del lead[feature_dim]
    if lead == list(mask.shape):
        return mask
    if len(lead) == 1 and lead[0] == mask.shape[0]:
        return None
    raise ValueError(
        f"the mask has shape {tuple(mask.shape)} (batch, tokens), but the activation has shape {tuple(x.shape)} with "
        f"feature_dim={feature_dim}: set the mask of this batch, clear it with mask(None), or record this layer with "
        f"another recorder, without a mask"
    )


def cut(mask: Tensor | None, positions: str) -> Tensor | None:
    """The mask of the vectors that :func:`torchprobe.ops.positions.vectors_of` returns."""
    if mask is None or positions == "all":
        return mask
    if positions == "mean":
        return mask.any(1, keepdim=True)
    return mask[:, :1] if positions == "class" else mask[:, 1:]
