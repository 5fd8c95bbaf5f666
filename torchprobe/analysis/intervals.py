"""How sure a number is: an interval from resampling, and the band that repeated draws fall into."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""Of every interval and band, unless another is asked for (a choice of ours)."""

RESAMPLES = 2000
"""Of a bootstrap, unless another number is asked for (a choice of ours)."""

_DRAWN_AT_ONCE = 2_000_000


def bootstrap_interval(values: ArrayLike, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap of the mean of independent values (Efron, 1979).

    What comes from one image is dependent: give one value per image.

    Args:
        values: (n,), array or tensor on the CPU; nan and inf are left out.
        seed: of the resampling.
        level: share of the resampled means between the two ends.
        resamples: how often.

    Returns:
        The two ends; (nan, nan) for fewer than two finite values.

    Raises:
        ValueError: ``values`` are not one-dimensional, ``level`` outside (0, 1), ``resamples`` below 1.

    >>> low, high = bootstrap_interval(np.arange(100.0))
    >>> low < 49.5 < high
    True
    """
    sample: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ValueError(f"an interval is of values of shape (n,), got {sample.shape}")
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
    """The middle ``level`` of repeated draws, between their quantiles (1 ± level) / 2; linear between neighbours.

    Args:
        draws: (repeats, …), the repetitions along the first dimension.
        level: share of the draws inside.

    Returns:
        Lower and upper end, float64, of the shape of one draw; nan without a draw.

    Raises:
        ValueError: ``level`` outside (0, 1).

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


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
