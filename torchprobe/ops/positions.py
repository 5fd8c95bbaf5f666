"""What one vector is: a selection of positions, as views wherever possible."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = ("all", "class", "patch", "mean")


def vectors_of(x: Tensor, positions: str, feature_dim: int, mask: Tensor | None = None) -> Tensor:
    """The tensor whose slices along ``feature_dim`` (the same number, counted as given) are the vectors to observe.

    Args:
        x: an activation, batch first. A 2-D one has one vector per input, so "class" and "mean" take it as it is.
        positions: "all": x itself. "class": the first token. "patch": every token but the first. "mean": one vector per input, the mean
            over its positions – the one choice that makes a new tensor, of the size of the pooled activation.
        feature_dim: for "class" and "patch" the last dimension of a (batch, tokens, features) tensor.
        mask: for "mean": bool, the shape of ``x`` without ``feature_dim``; False positions are left out of the mean, and an input without
            any position comes out as zeros (leave it out by its own mask).

    Raises:
        ValueError: "class" or "patch" of something that is not (batch, tokens, features).
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
