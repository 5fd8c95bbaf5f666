"""The right numbers: two passes in extended precision, exact fractions, sorting. They share nothing with the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

Wide = np.longdouble
"""On x86-64 it has 64 bits of mantissa, and a range in which no fourth power of a float64 is lost; elsewhere it may be float64."""


def central(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean, variance and the third and fourth central moment along the last axis, of values in units of the largest deviation; the unit
    too. ``known`` says which values count; there is at least one in each row."""
    n = known.sum(-1)
    first = np.take_along_axis(values, known.argmax(-1)[..., None], -1)
    mean = first + (np.where(known, values - first, 0).sum(-1) / n)[..., None]
    d = np.where(known, values - mean, 0)
    unit = np.abs(d).max(-1, keepdims=True)
    d = d / np.where(unit > 0, unit, 1)
    d = np.where(known, d - (d.sum(-1) / n)[..., None], 0)
    square = d * d
    return mean[..., 0], square.sum(-1) / n, (square * d).sum(-1) / n, (square * square).sum(-1) / n, unit[..., 0]


def moments(rows: Tensor, outlier_sigma: float) -> dict[str, Any]:
    """Every field of Moments for (vectors, features). The exact comparisons of outliers carry their margin."""
    x = rows.double().numpy().astype(Wide)
    features = x.shape[1]
    finite = np.isfinite(x)
    names = ("mean", "variance", "skewness", "kurtosis", "min", "max", "mean_abs")
    out: dict[str, Any] = {name: np.full(features, np.nan, Wide) for name in names}
    seen = finite.any(0)
    if seen.any():
        columns, known = np.ascontiguousarray(x.T[seen]), np.ascontiguousarray(finite.T[seen])
        columns = np.where(known, columns, 0)
        mean, m2, m3, m4, unit = central(columns, known)
        low, high = np.where(known, columns, np.inf).min(1), np.where(known, columns, -np.inf).max(1)
        constant = low == high
        m2 = np.where(constant, 1, m2)
        out["mean"][seen], out["mean_abs"][seen] = mean, np.abs(columns).sum(1) / known.sum(1)
        out["min"][seen], out["max"][seen] = low, high
        out["variance"][seen] = np.where(constant, 0, m2 * unit * unit)
        out["skewness"][seen] = np.where(constant, np.nan, m3 / m2 / np.sqrt(m2))
        out["kurtosis"][seen] = np.where(constant, np.nan, m4 / m2 / m2)
    valid = finite.all(1)
    varies = valid & (x != x[:, :1]).any(1)
    kurtosis, unsure = np.empty(0, Wide), np.zeros(features, int)
    outliers = np.zeros(features, int)
    if varies.any():
        vectors = x[varies]
        mean, m2, _, m4, unit = central(vectors, np.ones(vectors.shape, bool))
        kurtosis = m4 / m2 / m2
        ratio = np.abs(vectors - mean[:, None]) / (unit * np.sqrt(m2))[:, None] / Wide(outlier_sigma)
        outliers, unsure = (ratio > 1).sum(0), (np.abs(ratio - 1) < 1e-5).sum(0)
    return {
        **out,
        "count": finite.sum(0),
        "nonfinite": (~finite).sum(0),
        "vectors": int(varies.sum()),
        "constant_vectors": int((valid & ~varies).sum()),
        "invalid_vectors": int((~valid).sum()),
        "kurtosis_of_vectors": kurtosis,
        "outliers": outliers,
        "outliers_unsure": unsure,
    }


def norms(rows: Tensor) -> tuple[np.ndarray, int]:
    """The L2 norm of each finite vector, and the number of the others."""
    x = rows.double().numpy().astype(Wide)
    finite = np.isfinite(x).all(1)
    x = x[finite]
    unit = np.abs(x).max(1, keepdims=True, initial=0)
    return unit[:, 0] * np.sqrt(((x / np.where(unit > 0, unit, 1)) ** 2).sum(1)), int((~finite).sum())


def upper_quantiles(x: np.ndarray, level: Fraction) -> np.ndarray:
    """Of each column the smallest value that at most ⌊level · n⌋ of its n values exceed; nan left out, and nan if there is nothing else."""
    return _ranked(x, lambda n: math.floor(level * n))


def hazen(x: np.ndarray, level: Fraction) -> np.ndarray:
    """Linear between values: number k of n descending ones, from 0, is at the level (k + ½) / n."""

    def rank(n: int) -> Fraction:
        return min(max(level * n - Fraction(1, 2), Fraction(0)), Fraction(max(n - 1, 0)))

    upper, lower = _ranked(x, lambda n: math.floor(rank(n))), _ranked(x, lambda n: math.ceil(rank(n)))
    share = _of_each(x, lambda n: float(rank(n) - math.floor(rank(n))))
    with np.errstate(invalid="ignore"):
        between = upper + share * (lower - upper)
    return np.where((upper == lower) | np.isinf(upper), upper, between)


def _of_each(x: np.ndarray, of: Callable[[int], float]) -> np.ndarray:
    """A function of the number of values of each column; nan left out. Most columns have as many, and fractions are slow."""
    counts, column = np.unique((~np.isnan(x)).sum(0), return_inverse=True)
    return np.array([of(int(n)) for n in counts])[column]


def _ranked(x: np.ndarray, rank: Callable[[int], int]) -> np.ndarray:
    """Value number ``rank(n)`` of the n values of each column, in descending order from 0."""
    if not len(x):
        return np.full(x.shape[1], np.nan)
    descending = -np.sort(-x.astype(float), 0)  # nan comes last
    return np.take_along_axis(descending, _of_each(x, rank)[None].clip(max=len(x) - 1), 0)[0]


def top(scores: np.ndarray, ids: Sequence[int], k: int) -> tuple[list[list[float]], list[list[int]]]:
    """The k best inputs of each feature, by score and then id; scores (inputs, features), nan: none. An id counts once, with its best."""
    values, names = [], []
    for column in scores.T.tolist():
        best: dict[int, float] = {}
        for score, name in zip(column, ids, strict=True):
            if not math.isnan(score):
                best[name] = max(score, best.get(name, -math.inf))
        order = sorted(best, key=lambda name: (-best[name], name))[:k]
        values.append([best[name] for name in order] + [-math.inf] * (k - len(order)))
        names.append(order + [-1] * (k - len(order)))
    return values, names


def average_precision(scores: Sequence[float], shows: Sequence[bool], counts: Sequence[bool]) -> float:
    """Of one unit and one concept, in exact fractions: the mean over positives of the precision among the images that score at least as
    high; only the images that count."""
    images = [i for i in range(len(scores)) if counts[i]]
    total, positives = Fraction(0), [i for i in images if shows[i]]
    for i in positives:
        above = [j for j in images if scores[j] >= scores[i]]
        total += Fraction(sum(shows[j] for j in above), len(above))
    return float(total / len(positives)) if positives else math.nan
