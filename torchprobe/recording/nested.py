"""The vectors of nested tensors: inputs of different lengths in one tensor, in every layout of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sizes(x: Any) -> tuple[int, ...]:
    """The shape of a nested tensor, with 0 where its parts may differ."""
    if x.layout == torch.jagged:
        ragged: int = x._ragged_idx
        return tuple(0 if dim == ragged else int(size) for dim, size in enumerate(x.shape))
    table: Tensor = x._nested_tensor_size()  # on the CPU: reading it waits for nothing
    if not len(table):
        dims: int = x.dim()
        return (0,) * dims
    same: list[bool] = (table == table[0]).all(0).tolist()
    rest = tuple(int(size) if alike else 0 for size, alike in zip(table[0].tolist(), same, strict=True))
    return (len(table), *rest)


def vectors(x: Any, feature_dim: int, positions: str) -> tuple[Tensor, Tensor | None]:
    """The vectors of a nested tensor.

    Args:
        x: (batch, …), of layout jagged or strided, also transposed, sliced, or with holes.
        feature_dim: the dimension of the features, ≥ 1; all parts are equally wide.
        positions: "all", "class" (the first token), "patch" (the others), or "mean" (one vector for each part; none for an empty part).

    Returns:
        vectors: (n, features).
        kept: bool (n,), which of them count; None for all.

    Raises:
        ValueError: "class" or "patch" for parts that are not (tokens, features).
    """
    if positions in ("class", "patch") and x.dim() != 3:
        raise ValueError(f'positions="{positions}" needs (batch, tokens, features); got a nested tensor of {x.dim()} dimensions')
    if x.layout == torch.jagged:
        return _jagged(x, feature_dim, positions)
    parts = [part.movedim(feature_dim - 1, -1).flatten(0, -2) for part in x.unbind()]  # (tokens, features)
    if positions == "class":
        parts = [part[:1] for part in parts]
    elif positions == "patch":
        parts = [part[1:] for part in parts]
    elif positions == "mean":
        parts = [part.mean(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) for part in parts if len(part)]
    if not parts:
        return x.new_zeros((0, max(sizes(x)[feature_dim], 1)), layout=torch.strided), None
    return torch.cat(parts), None


def _jagged(x: Any, feature_dim: int, positions: str) -> tuple[Tensor, Tensor | None]:
    """One buffer holds all parts; offsets say where each begins, and lengths how much of it counts."""
    ragged = x._ragged_idx
    buffer = x.values().movedim((ragged - 1, feature_dim - 1), (0, -1))  # (rows, …, features)
    lengths = x.lengths()
    if positions == "all" and lengths is None:
        return buffer.flatten(0, -2), None
    offsets = x.offsets()
    row = torch.arange(len(buffer), device=buffer.device)
    part = torch.searchsorted(offsets[1:-1].contiguous(), row, right=True) if len(offsets) > 2 else torch.zeros_like(row)
    inside = row - offsets[part]
    kept = (inside >= 0) & (inside < (offsets.diff() if lengths is None else lengths)[part])
    if positions == "mean":
        return _means(buffer, part, kept, len(offsets) - 1)
    if positions == "class":
        kept &= inside == 0
    elif positions == "patch":
        kept &= inside > 0
    rest = buffer[0].numel() // buffer.shape[-1] if len(buffer) else 1
    return buffer.flatten(0, -2), kept.repeat_interleave(rest) if rest > 1 else kept


def _means(buffer: Tensor, part: Tensor, kept: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The mean of every part. A nonfinite value makes the mean of its own part nonfinite, and no other."""
    dtype = torch.promote_types(buffer.dtype, torch.float32)
    rows = buffer.flatten(1, -2).to(dtype).mean(1) if buffer.dim() > 2 else buffer.to(dtype)
    index = part.where(kept, parts)  # rows that do not count go to one part more
    total = rows.new_zeros((parts + 1, rows.shape[-1])).index_add(0, index, rows)[:parts]
    count = torch.zeros(parts + 1, dtype=torch.int64, device=part.device).index_add(0, index, torch.ones_like(index))[:parts]
    return total / count.clamp(min=1)[:, None], count > 0
