"""Tensors that are not ordinary ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor, which can be read directly."""
    return type(x) is Tensor and not x.is_nested and x.layout is torch.strided


def is_ordinary(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_nested


def unreadable(x: Tensor) -> str | None:
    """Why the values of a tensor cannot be read; None if they can."""
    if torch._C._functorch.is_batchedtensor(x):
        return (
            "it is called inside torch.func.vmap, which hides the batched dimension, so the vectors would be mixed up: record outside "
            "vmap, or call the model on the batch directly"
        )
    if type(x).__name__ == "MaskedTensor":
        return "its output is a MaskedTensor; pick the values with select=lambda out: out.get_data(), and set rec.mask()"
    if x.is_nested:
        return None
    if x.layout is not torch.strided:
        layout = str(x.layout).removeprefix("torch.").replace("_mkldnn", "mkldnn")
        return (
            f"its output is a {layout} tensor, whose values are not stored one by one; record a layer with an ordinary output, or make "
            f"one with select=lambda out: out.to_dense()"
        )
    if x.is_quantized:
        return "its output is quantized; record a layer with a floating-point output, or pass select=lambda out: out.dequantize()"
    if x.is_floating_point() and x.element_size() == 1:
        kind = str(x.dtype).removeprefix("torch.")
        return f"its output is {kind}, which has too few bits to read; pass select=lambda out: out.float()"
    return None


def local(x: Any, feature_dim: int) -> Tensor:
    """The values on this rank of a distributed tensor; any other tensor is returned as it is.

    Raises:
        ValueError: they are not whole vectors.
    """
    if not hasattr(x, "placements"):
        tensor: Tensor = x
        return tensor
    for placement in x.placements:
        if placement.is_partial() or placement.is_shard(feature_dim % x.dim()):
            what = "one summand" if placement.is_partial() else "a slice of the features"
            raise ValueError(
                f"each rank holds {what} of this distributed tensor ({x.placements}), not whole vectors: record a layer "
                f"whose output is replicated, or split along another dimension"
            )
    return x.to_local()  # type: ignore[no-any-return]
