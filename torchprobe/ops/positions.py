"""The vectors of an activation: a selection of its positions, as a view if possible."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = ("all", "class", "patch", "mean")


def vectors_of(x: Tensor, positions: str, feature_dim: int, mask: Tensor | None = None) -> Tensor:
    """The tensor whose slices along ``feature_dim`` are the vectors to observe; ``feature_dim`` is the same dimension as in ``x``.

    Args:
        x: an activation, batch first. A 2-D activation has one vector per input, so "class" and "mean" return it unchanged.
        positions: "all": x itself. "class": the first token. "patch": all tokens except the first. "mean": one vector per input, the mean
            over its positions. Only "mean" makes a new tensor, of the size of the pooled activation.
        feature_dim: for "class" and "patch" the last dimension of a (batch, tokens, features) tensor.
        mask: for "mean": bool, the shape of ``x`` without ``feature_dim``. Positions where it is False are left out of the mean. An input
            without any position gives zeros, so the caller must leave it out.

    Raises:
        ValueError: "class" or "patch" for an activation that is not (batch, tokens, features).
    """
    if positions == "all":
        return x
    if x.dim() == 2 and positions != "patch":
        return x  # one vector per input already
    if positions == "mean":
        feature_dim %= x.dim()
        dims = [dim for dim in range(1, x.dim()) if dim != feature_dim]
        dtype = torch.promote_types(x.dtype, torch.float32)
        if mask is None:
            return x.mean(dims, keepdim=True, dtype=dtype)
        kept = mask.unsqueeze(feature_dim)
        return x.where(kept, 0).sum(dims, keepdim=True, dtype=dtype) / kept.sum(dims, keepdim=True).clamp(min=1)
    if x.dim() != 3 or feature_dim % x.dim() != 2:
        raise ValueError(
            f'positions="{positions}" needs (batch, tokens, features) with features last; got shape {tuple(x.shape)} with '
            f'feature_dim={feature_dim}: use positions="all" or "mean" for this layer'
        )
    return x[:, :1] if positions == "class" else x[:, 1:]
