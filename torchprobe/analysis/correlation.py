"""Do two numbers of several models rise together? Rank correlation, and how often chance gives as much."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERMUTATIONS = 9999


class RankCorrelation(NamedTuple):
    """Spearman's ``rho``; ``p_value``, two-sided, by permutation; ``n`` models with both numbers. Nan for fewer than three, or if all are
    equal."""

    rho: float
    p_value: float
    n: int


def rank_correlation(x: ArrayLike, y: ArrayLike, permutations: int = PERMUTATIONS, seed: int = 0) -> RankCorrelation:
    """Spearman's rank correlation: Pearson's, of the ranks, with the mean rank for equals (Spearman, 1904).

    The p-value is the share of random pairings whose |rho| is at least as large, the observed one counted in (Phipson and Smyth, 2010), so
    it is right for few models and for ties. It takes the models to be independent of each other, which variants of one model are not.

    Args:
        x, y: (n,), one number for each model; pairs with nan or inf are left out.
        permutations: random pairings.
        seed: of them.

    Raises:
        ValueError: x and y are not one-dimensional and equally long, or ``permutations`` below 1.

    >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]).rho
    0.8
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two numbers for each model, got shapes {a.shape} and {b.shape}")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    known = np.isfinite(a) & np.isfinite(b)
    n = int(known.sum())
    ranks = [_unit(_ranks(values[known])) for values in (a, b)]
    if n < 3 or not all(values.any() for values in ranks):
        return RankCorrelation(math.nan, math.nan, n)
    rho = float(ranks[0] @ ranks[1])
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.tile(ranks[1], (permutations, 1)), axis=1) @ ranks[0]
    beyond = int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())
    return RankCorrelation(round(rho, 12), (1 + beyond) / (1 + permutations), n)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 … n, the mean rank for equals."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    mean: NDArray[np.float64] = (last - (count - 1) / 2)[group]
    return mean


def _unit(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the mean, of length 1; zeros where all are equal."""
    centred: NDArray[np.float64] = ranks - ranks.mean() if ranks.size else ranks
    length = float(np.sqrt(centred @ centred))
    return centred / length if length > 0 else np.zeros_like(centred)
