"""Tokens that are much longer than the others of their input: registers of vision transformers, sinks of language models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchprobe.analysis.outlier_rule import outside_bulk
from torchprobe.analysis.outliers import SIGMA

RATIO = 2.0
"""A long token is at least this many times as long as the median token of its input (we chose the number)."""


def long_tokens(tokens: Tensor, mask: Tensor | None = None, sigma: float = SIGMA, ratio: float = RATIO) -> tuple[Tensor, Tensor]:
    """Which tokens are long among the tokens of their input, and how long each is compared with their median.

    Darcet et al. ("Vision Transformers Need Registers", ICLR 2024) call a token of DINOv2's ViT-g an outlier if its Euclidean norm is above
    150, between the two peaks of the distribution (:func:`torchprobe.analysis.outliers.registers`). The number is that of one network: the
    code of Jiang et al. ("Vision Transformers Don't Need Trained Registers", NeurIPS 2025) takes 150 for DINOv2's ViT-L and 30 for OpenAI's
    ViT-B/16. So we compare the tokens of one input with each other: the norm lies more than ``sigma`` standard deviations of the bulk above
    its mean (:func:`torchprobe.analysis.outlier_rule.outside_bulk`), and is at least ``ratio`` times the median.

    Args:
        tokens: (n, positions, d), floating point.
        mask: bool (n, positions), True for tokens that count; None: all. Tokens with nan or inf do not count.
        sigma, ratio: the thresholds.

    Returns:
        bool (n, positions), False for tokens that do not count; and float64 (n, positions), nan for them. Of fewer than ten tokens none is
        long, because the bulk then has all of them.

    Raises:
        ValueError: other shapes.

    >>> tokens = torch.ones(1, 12, 4)
    >>> tokens[0, :, 0] += torch.arange(12) / 100
    >>> tokens[0, 3] *= 30
    >>> long_tokens(tokens)[0].nonzero().tolist()
    [[0, 3]]
    """
    if tokens.dim() != 3 or not tokens.shape[2] or (mask is not None and mask.shape != tokens.shape[:2]):
        got = tuple(tokens.shape) if mask is None else (tuple(tokens.shape), tuple(mask.shape))
        raise ValueError(f"expected tokens (n, positions, d) and a mask (n, positions), got {got}")
    values = tokens.detach().double()
    largest = values.abs().nan_to_num(0.0, 0.0, 0.0).amax() if values.numel() else values.new_ones(())
    norm = torch.linalg.vector_norm(values / (largest or 1.0), dim=-1)  # so that no square over- or underflows
    counted = norm.isfinite() if mask is None else norm.isfinite() & mask.to(norm.device)
    long, relative = torch.zeros_like(counted), torch.full_like(norm, math.nan)
    for row, at, found, share in zip(norm, counted, long, relative, strict=True):
        if len(lengths := row[at]):
            middle = lengths.quantile(0.5)
            found[at] = outside_bulk(lengths[None], sigma)[0] & (lengths >= ratio * middle) & (lengths > middle)
            share[at] = lengths / middle
    return long, relative
