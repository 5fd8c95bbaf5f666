"""Intervals for shares of images, such as accuracies, and for the difference of two shares of the same images."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from torchprobe.analysis.resampling import FEWEST, LEVEL, check_level


@functools.lru_cache(maxsize=4096)
def share_interval(count: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval for a share of n independent images, with the correction near 0 and 1 (Brown, Cai and DasGupta, 2001).

    A bootstrap gives [1, 1] for 20 of 20. This interval never collapses. For counts of 1 to 3, Wilson's lower end is too high. It is
    replaced by the Poisson bound: the mean with which so many or more have probability 1 − level. The upper end for n minus such a count is
    its mirror image ("Interval Estimation for a Binomial Proportion", Statistical Science 16, section 4.1.1).

    Args:
        count: number of images with the property.
        n: number of images.
        level: of the interval.

    Returns:
        The two ends, within [0, 1]; (nan, nan) for n = 0.

    Raises:
        ValueError: ``count`` is not within [0, n], or ``level`` is outside (0, 1).

    >>> low, high = share_interval(20, 20)
    >>> round(low, 3), high
    (0.839, 1.0)
    """
    check_level(level)
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} images is not a share")
    return (_lower(count, n, level), 1 - _lower(n - count, n, level)) if n else (math.nan, math.nan)


def paired_difference(first: ArrayLike, second: ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """The difference of two shares of the same images, with Bonett and Price's interval (Br. J. Math. Stat. Psychol. 65, 2012).

    Δ̃ ± z √((p̃₁₂ + p̃₂₁ − Δ̃²) / (n + 2)), with p̃ = (count + 1)/(n + 2) of the images on which only one of the two is right, and
    Δ̃ = p̃₁₂ − p̃₂₁. It does not collapse if the two are right on the same images.

    Args:
        first, second: (n,), bool or 0 and 1, of the same images in the same order.
        level: of the interval.

    Returns:
        mean first − mean second, and the two ends of its interval; the ends are nan for fewer than 20 images, see
        :data:`torchprobe.analysis.resampling.FEWEST`.

    Raises:
        ValueError: the two are not (n,) of one length, or ``level`` is outside (0, 1).

    >>> paired_difference([True] * 30, [True] * 27 + [False] * 3)[0]
    0.1
    """
    check_level(level)
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two values for each image, got shapes {a.shape} and {b.shape}")
    n = len(a)
    if not n:
        return math.nan, math.nan, math.nan
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    difference = (only_first - only_second) / n
    if n < FEWEST:
        return difference, math.nan, math.nan
    p, q = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = normal_quantile(level) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return difference, max(-1.0, p - q - half), min(1.0, p - q + half)


def normal_quantile(level: float) -> float:
    """z such that a standard Gaussian variable lies within ±z with probability ``level``."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _lower(count: int, n: int, level: float) -> float:
    if not count:
        return 0.0
    if count <= (2 if n <= 50 else 3):
        return _poisson_mean(count, 1 - level) / n
    z, p = normal_quantile(level), count / n
    middle = p + z * z / (2 * n)
    return (middle - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


@functools.lru_cache
def _poisson_mean(count: int, probability: float) -> float:
    """The mean of a Poisson variable that is ``count`` or more with this probability, by bisection."""
    low, high = 0.0, float(count)
    for _ in range(60):
        mean = (low + high) / 2
        below = math.exp(-mean) * math.fsum(mean**k / math.factorial(k) for k in range(count))
        low, high = (mean, high) if 1 - below < probability else (low, mean)
    return low
