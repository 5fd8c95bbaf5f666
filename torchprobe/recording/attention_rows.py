"""The largest logit and the entropy of rows of attention: from queries and keys, or from logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 1 << 24  # logits in memory at a time


def of_queries(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of softmax(scale · query · keyᵀ + mask), as :func:`torch.nn.functional.scaled_dot_product_attention` defines them.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, heads, keys, width), or with a number of heads that divides that of the queries (grouped queries).
        mask: bool (True: attend) or added to the logits; it broadcasts to (batch, heads, queries, keys).
        causal: query i attends to the keys 0 … i.
        scale: default 1/√width.
        rows: read so many queries, evenly spaced. Default: all.

    Returns:
        The largest logit and the entropy in nats of each row, (batch, rows, heads) each, float32 or that of float64 queries. Nan for rows
        that attend to nothing.

    >>> q, k = torch.eye(2)[None, None], torch.eye(2)[None, None]
    >>> largest, entropy = of_queries(q, k, causal=True, scale=1.0)
    >>> largest.flatten().tolist(), round(float(entropy[0, 0, 0]), 4), round(float(entropy[0, 1, 0]), 4)
    ([1.0, 1.0], 0.0, 0.5822)
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(dtype).transpose(-1, -2)[:, :, None]
    batch, heads, queries, _ = query.shape
    found = []
    for index in _pieces(queries, rows, batch * heads * key.shape[-2], query.device):
        part = query[:, :, index].to(dtype) * scale
        logits = (part.unflatten(1, (key.shape[1], -1)) @ keys).flatten(1, 2)
        if mask is not None:
            chosen = mask if mask.shape[-2] == 1 else mask[..., index, :]
            logits = logits.masked_fill(~chosen, -math.inf) if mask.dtype == torch.bool else logits + chosen.to(dtype)
        if causal:
            hidden = torch.arange(key.shape[-2], device=query.device) > index[:, None]
            logits = logits.masked_fill(hidden, -math.inf)
        found.append(_read(logits, torch.finfo(query.dtype).min))
    return _joined(found)


def of_logits(logits: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """The same from logits (batch, heads, queries, keys), masked already: with −inf, or with the smallest number of their dtype."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    batch, heads, queries, keys = logits.shape
    pieces = _pieces(queries, rows, batch * heads * keys, logits.device)
    return _joined([_read(logits[:, :, index].to(dtype), torch.finfo(logits.dtype).min) for index in pieces])


def _pieces(queries: int, rows: int | None, size: int, device: torch.device) -> Iterator[Tensor]:
    """The indices of the queries to read, in pieces whose logits fit into memory; ``size`` is that of one query."""
    if rows is None or rows >= queries:
        chosen = torch.arange(queries, device=device)
    else:
        chosen = torch.linspace(0, queries - 1, rows, device=device, dtype=torch.float64).round().long()
    yield from chosen.split(max(1, _AT_ONCE // max(1, size)))


def _read(logits: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """``least`` stands for −inf in a mask: a row whose largest logit is near it attends to nothing.

    Models in float16 often widen their logits before the softmax. Then the mask is the smallest number of float16, plus a logit.
    """
    largest = logits.amax(-1)
    half = torch.finfo(torch.float16).min
    seen = (largest > least / 4) & ((largest < half) | (largest > half * 63 / 64))
    shares = logits.softmax(-1)
    entropy = 0 - torch.xlogy(shares, shares).sum(-1)
    return largest.where(seen, math.nan), entropy.where(seen, math.nan)


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    largest, entropy = (torch.cat(parts, -1).transpose(1, 2) for parts in zip(*found, strict=True))
    return largest, entropy
