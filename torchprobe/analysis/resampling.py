"""How certain a number is, by resampling: bootstrap intervals, bands of repeated draws, and rank correlations with their p-value."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from einops import repeat
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""Level of every interval and band, unless another one is given (we chose it)."""

RESAMPLES = 2000
"""Resamples of a bootstrap, unless another number is given (we chose it)."""

PERMUTATIONS = 9999
"""Random pairings for the p-value of a rank correlation."""

_DRAWN_AT_ONCE = 2_000_000


def bootstrap_interval(values: ArrayLike, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap of the mean of independent values (Efron, 1979).

    Values from the same image are dependent, so give one value per image.

    Args:
        values: (n,), array or tensor on the CPU. Nan and inf are left out.
        seed: of the resampling.
        level: share of the resampled means between the two ends.
        resamples: number of resamples.

    Returns:
        The two ends; (nan, nan) for fewer than two finite values.

    Raises:
        ValueError: ``values`` are not one-dimensional, ``level`` is outside (0, 1), or ``resamples`` is below 1.

    >>> low, high = bootstrap_interval(np.arange(100.0))
    >>> low < 49.5 < high
    True
    """
    sample: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ValueError(f"an interval needs values of shape (n,), got {sample.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _check_level(level)
    sample = sample[np.isfinite(sample)]
    n = sample.size
    if n < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // n)
    means = [sample[generator.integers(n, size=(min(at_once, resamples - start), n))].mean(-1) for start in range(0, resamples, at_once)]
    low, high = band(np.concatenate(means), level)
    return float(low), float(high)


def band(draws: ArrayLike, level: float = LEVEL) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The middle ``level`` of repeated draws, between their quantiles (1 ± level) / 2, with linear interpolation.

    Args:
        draws: (draws, …), the draws along the first dimension.
        level: share of the draws inside the band.

    Returns:
        Lower and upper end, float64, of the shape of one draw; nan without a draw.

    Raises:
        ValueError: ``level`` is outside (0, 1).

    >>> band(np.arange(41.0))
    (array(1.), array(39.))
    """
    _check_level(level)
    array: NDArray[np.float64] = np.asarray(draws, dtype=np.float64)
    if not len(array):
        nothing = np.full(array.shape[1:], math.nan)
        return nothing, nothing.copy()
    low, high = np.quantile(array, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


class RankCorrelation(NamedTuple):
    """Do two numbers rise together over models?

    Attributes:
        rho: Spearman's rank correlation; nan for fewer than three models, or if all x or all y are equal.
        p_value: two-sided, by permutation; nan if ``rho`` is.
        n: number of models with both numbers.
    """

    rho: float
    p_value: float
    n: int


def rank_correlation(x: ArrayLike, y: ArrayLike, permutations: int = PERMUTATIONS, seed: int = 0) -> RankCorrelation:
    """Spearman's rank correlation: Pearson's correlation of the ranks. Equal values get their mean rank (Spearman, 1904).

    The p-value is the share of random pairings with an |rho| at least as large, including the observed pairing (Phipson and Smyth, 2010).
    It is therefore valid for few models and for ties. It assumes that the models are independent; variants of one model are not.

    Args:
        x, y: (n,), one number per model. Pairs with nan or inf are left out.
        permutations: number of random pairings.
        seed: of the random pairings.

    Raises:
        ValueError: x and y are not one-dimensional and of equal length, or ``permutations`` is below 1.

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
    ranks_a, ranks_b = (_standardized(_ranks(values[known])) for values in (a, b))
    if n < 3 or not ranks_a.any() or not ranks_b.any():
        return RankCorrelation(math.nan, math.nan, n)
    rho = float(ranks_a @ ranks_b)
    generator = np.random.default_rng(seed)
    pairings = generator.permuted(repeat(ranks_b, "models -> pairings models", pairings=permutations), axis=1)
    beyond = int((np.abs(pairings @ ranks_a) >= abs(rho) - 1e-12).sum())
    return RankCorrelation(round(rho, 12), (1 + beyond) / (1 + permutations), n)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1 to n. Equal values get their mean rank."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    mean: NDArray[np.float64] = (last - (count - 1) / 2)[group]
    return mean


def _standardized(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks minus their mean, scaled to length 1; zeros if all are equal."""
    centered: NDArray[np.float64] = ranks - ranks.mean() if ranks.size else ranks
    length = float(np.sqrt(centered @ centered))
    return centered / length if length > 0 else np.zeros_like(centered)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
