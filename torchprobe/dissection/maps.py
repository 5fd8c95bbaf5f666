"""Activations as maps with positions: what overlap can be measured on."""

from __future__ import annotations

import math

from torch import Tensor


def as_maps(x: Tensor, grid: tuple[int, int] | None = None, feature_dim: int | None = None) -> Tensor:
    """An activation as (images, units, h, w), a view.

    Args:
        x: maps (images, units, h, w), or tokens (images, tokens, units).
        grid: h and w of the tokens that are patches, from the patch embedding; by default they are a square. Tokens before them – the class
            token, registers – are left out.
        feature_dim: where the units are; by default dimension 1 of maps, and the last of tokens.

    Raises:
        ValueError: a pooled vector, which has no positions, or tokens that do not fit the grid.

    >>> import torch
    >>> as_maps(torch.zeros(2, 1 + 49, 768)).shape
    torch.Size([2, 768, 7, 7])
    """
    if x.dim() == 4:
        return x.movedim(1 if feature_dim is None else feature_dim, 1)
    if x.dim() != 3:
        raise ValueError(
            f"an activation of shape {tuple(x.shape)} has no positions, so no overlap with label maps; score it by average precision "
            '(score="ap"), or choose a layer before the pooling'
        )
    tokens = x.movedim(-1 if feature_dim is None else feature_dim, 1)
    count = tokens.shape[2]
    h, w = grid if grid is not None else (math.isqrt(count), math.isqrt(count))
    if h * w > count or h * w == 0 or (grid is None and count - h * w > 1):
        expected = "a square and a class token" if grid is None else f"{h} × {w} patches"
        raise ValueError(f"{count} tokens are not {expected}: give the grid of the patches")
    maps: Tensor = tokens[:, :, count - h * w :].unflatten(2, (h, w))
    return maps
