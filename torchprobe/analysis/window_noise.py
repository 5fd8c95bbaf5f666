"""Whether two sets of windows differ by more than windows differ among themselves: permutation tests of many numbers at once."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PERMUTATIONS = 9999
"""Random permutations, where there are more than that."""

FEWEST = 3
"""Windows of one recording below which their spread says nothing."""

DRIFT_LEVEL = 0.01
"""Level of the test of :func:`drifts`."""

_AT_ONCE = 4_000_000  # numbers of permuted statistics in memory
_ROUNDING = 1e-12  # differences below this share of the values are rounding


class Apart(NamedTuple):
    """How far two sets of windows lie apart in each number.

    Attributes:
        difference: mean of the second, minus mean of the first, (numbers,).
        noise: its standard error, √(s₁²/n₁ + s₂²/n₂), (numbers,).
        p: the p-value, adjusted for all numbers, (numbers,); nan where a number has too few windows.
    """

    difference: Array
    noise: Array
    p: Array


def attainable(first: int, second: int) -> float:
    """The smallest p-value that so many windows can give.

    >>> round(attainable(4, 4), 4), round(attainable(3, 3), 4)
    (0.0286, 0.1)
    """
    ways = math.comb(first + second, first)
    return max((2 if first == second else 1) / ways, 1 / (PERMUTATIONS + 1))


def apart(first: Array, second: Array, seed: int = 0) -> Apart:
    """Compares the means of many numbers over two sets of windows.

    The statistic of a number is Welch's t. Its distribution is that over all ways to divide the windows in two sets of these sizes, or over
    :data:`PERMUTATIONS` random ones. The p-values are adjusted by the step-down maximum of |t| over all numbers (Westfall and Young, 1993,
    algorithm 4.1): if the windows of both sets could be exchanged, the probability that any p is ≤ α is at most α, however the
    numbers depend on each other and however they are distributed.

    Args:
        first, second: (windows, numbers); nan where a number is missing.
        seed: of the random permutations.

    Raises:
        ValueError: the sets do not have the same numbers.

    >>> rng = np.random.default_rng(0)
    >>> found = apart(rng.normal(size=(8, 3)), rng.normal(size=(8, 3)) + [0, 9, 0])
    >>> (found.p < 0.05).tolist()
    [False, True, False]
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"expected two arrays (windows, numbers) of the same numbers, got {first.shape} and {second.shape}")
    values, cut = np.concatenate([first, second]), len(first)
    present = np.isfinite(values)
    enough = (present[:cut].sum(0) >= FEWEST) & (present[cut:].sum(0) >= FEWEST)
    difference, noise, p = (np.full(values.shape[1], math.nan) for _ in range(3))
    if not enough.any():
        return Apart(difference, noise, p)
    values, present = values[:, enough], present[:, enough]
    exponents = _exponents(values, present)
    values = _centered(np.ldexp(values, -exponents), present)
    chosen = np.zeros((1, len(values)))
    chosen[0, :cut] = 1
    gap, error = _gaps(values, present, chosen)
    difference[enough], noise[enough] = np.ldexp(gap[0], exponents), np.ldexp(error[0], exponents)
    t = _t(gap, error)[0]
    order = np.argsort(-t, kind="stable")
    hits, total = np.zeros(len(t)), 0
    step = max(1, _AT_ONCE // max(1, values.shape[1]))
    divisions, exact = _divisions(len(values), cut, seed)
    for start in range(0, len(divisions), step):
        found = _t(*_gaps(values, present, divisions[start : start + step]))[:, order]
        largest = np.maximum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
        hits += (largest >= t[order] * (1 - 1e-9)).sum(0)
        total += len(found)
    adjusted = np.maximum.accumulate(hits / total if exact else (hits + 1) / (total + 1))
    p_enough = np.empty(len(t))
    p_enough[order] = adjusted
    p[enough] = p_enough
    return Apart(difference, noise, p)


def drifts(values: Array, seed: int = 0) -> bool:
    """Whether windows depend on those before them, as while a model trains: then their spread does not measure noise.

    A permutation test of the sum of squared successive differences relative to that of the deviations (von Neumann, 1941), of its mean over
    all numbers and of its smallest value, together at :data:`DRIFT_LEVEL`. Fewer than 5 windows cannot show it.

    Args:
        values: (windows, numbers), in the order of time; numbers with nan are left out.
        seed: of the permutations.

    >>> drifts(np.arange(12.0)[:, None]), drifts(np.random.default_rng(0).normal(size=(12, 4)))
    (True, False)
    """
    values = values[:, np.isfinite(values).all(0)]
    values = np.ldexp(values, -_exponents(values, np.isfinite(values)))
    values = _centered(values, np.isfinite(values))
    squares = (values**2).sum(0)
    values, squares = values[:, squares > 0], squares[squares > 0]
    if len(values) < 5 or not values.shape[1]:
        return False
    rng = np.random.default_rng(seed)

    def ratios(order: NDArray[np.int64]) -> tuple[float, float]:
        found = (np.diff(values[order], axis=0) ** 2).sum(0) / squares
        return float(found.mean()), float(found.min())

    seen = ratios(np.arange(len(values)))
    others = np.array([ratios(rng.permutation(len(values))) for _ in range(999)])
    return bool((((others <= np.array(seen) * (1 + 1e-9)).sum(0) + 1) / 1000 <= DRIFT_LEVEL / 2).any())


def _exponents(values: Array, present: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Of the largest absolute value of each number. Numbers are brought to about 1, so that their squares neither overflow nor vanish."""
    largest: Array = np.abs(np.where(present, values, 0)).max(0, initial=0)
    return np.frexp(largest)[1]


def _centered(values: Array, present: NDArray[np.bool_]) -> Array:
    """Deviations from the mean over all windows, 0 for missing ones; rounding errors are 0, so that equal windows have no spread."""
    clean = np.where(present, values, 0)
    mean = clean.sum(0) / np.maximum(present.sum(0), 1)
    deviation = np.where(present, clean - mean, 0)
    deviation[np.abs(deviation) <= _ROUNDING * np.abs(clean).max(0, initial=0)] = 0
    return deviation


def _divisions(windows: int, first: int, seed: int) -> tuple[Array, bool]:
    """Rows of 0 and 1: which windows are in the first set. And whether these are all divisions."""
    ways = math.comb(windows, first)
    if ways <= PERMUTATIONS + 1:
        chosen = np.zeros((ways, windows))
        for row, indices in enumerate(itertools.combinations(range(windows), first)):
            chosen[row, list(indices)] = 1
        return chosen, True
    rng = np.random.default_rng(seed)
    chosen = np.zeros((PERMUTATIONS, windows))
    chosen[:, :first] = 1
    return rng.permuted(chosen, axis=1), False


def _gaps(values: Array, present: NDArray[np.bool_], chosen: Array) -> tuple[Array, Array]:
    """Difference of the means and its standard error, (divisions, numbers) each; nan if one set has fewer than two values."""
    means, errors = [], []
    for rows in (chosen, 1 - chosen):
        count = rows @ present
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = rows @ values / count
            variance = np.maximum(rows @ values**2 / count - mean**2, 0) * count / (count - 1)
            variance = np.where(variance <= _ROUNDING * (rows @ values**2 / count), 0, variance)
            errors.append(np.where(count >= 2, variance / count, math.nan))
        means.append(mean)
    return means[1] - means[0], np.sqrt(errors[0] + errors[1])


def _t(gap: Array, error: Array) -> Array:
    """|t|; 0 without a difference, inf for a difference without spread, and where a set has too few values."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.abs(gap) / error
    found = np.where(gap == 0, 0, found)
    return np.where(np.isnan(found), math.inf, found)
