"""What a run of :class:`~torchprobe.Moments` cannot leave in its state: such a state was damaged, and is not read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprobe.statistics.saved import count_problem

_COUNTS = ("calls", "vectors", "constant_vectors", "invalid_vectors", "vector_kurtosis_histogram", "count", "nonfinite", "outliers")
_SUMS = ("abs_sum", "m2", "m4")  # of numbers that are not negative
_TAME = 1e9  # fourth powers of larger values may leave the range of float32, and then a sum is inf or nan
_SLACK = 1e-4  # relative; tiles of float32 are rounded
_TOLD = 1e7  # times the rounding of the largest value: smaller deviations are not judged, since states merge by their means
_SMALLEST = 1e-60  # nor are ranges whose fourth powers may leave that of float64


def problem(parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first part that is wrong, and why; None if nothing is. Only values beyond 1e9 may have moments that are not finite.

    Args:
        parts: of one state, by name, as :meth:`Moments.parts` gives them.
    """
    for name in _COUNTS:
        if wrong := count_problem(name, parts[name]):
            return wrong
    vectors, count = parts["vectors"], parts["count"]
    if bool(parts["vector_kurtosis_histogram"].sum() != vectors):
        return "vector_kurtosis_histogram", f"does not add up to the {float(vectors):g} vectors counted"
    if wrong := count_problem("outliers", parts["outliers"], vectors):
        return wrong
    return _vector_problem(parts) or _feature_problem(parts, count > 0)


def _vector_problem(parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
    mean, features = parts["vector_kurtosis_mean"], parts["count"].numel()
    if not bool(parts["vectors"] > 0):
        low, high = 0.0, 0.0
    else:
        low, high = 1 - _SLACK, features * (1 + _SLACK)  # no kurtosis of d values is above d
    if not bool((mean >= low) & (mean <= high)):
        return "vector_kurtosis_mean", f"is {float(mean):g}, and no vectors of {features} features give that"
    m2 = parts["vector_kurtosis_m2"]
    if not bool((m2 >= 0) & m2.isfinite()):
        return "vector_kurtosis_m2", f"is {float(m2):g}, which is negative, nan or inf"
    return None


def _feature_problem(parts: Mapping[str, Tensor], seen: Tensor) -> tuple[str, str] | None:
    low, high, mean = parts["min"], parts["max"], parts["mean"]
    largest = torch.maximum(low.abs(), high.abs())
    tame = seen & (largest <= _TAME)
    slack = _SLACK * largest
    tests = [
        ("min", seen & ~low.isfinite(), "is not finite"),
        ("max", seen & ~high.isfinite(), "is not finite"),
        ("min", seen & (low > high), "is above the maximum"),
        ("mean", tame & ~((mean >= low - slack) & (mean <= high + slack)), "is not between the minimum and the maximum"),
        ("m3", tame & ~parts["m3"].isfinite(), "is not finite"),
    ]
    for name in _SUMS:
        part = parts[name]
        tests.append((name, ~(part >= 0) & (tame | ~seen), "is negative or nan"))
        tests.append((name, (tame & ~part.isfinite()) | (part < 0), "is negative or not finite"))
    limit = parts["count"] * largest * (1 + _SLACK)
    tests.append(("abs_sum", tame & (parts["abs_sum"] > limit), "is more than all values can add up to"))
    tests += _power_tests(parts, tame)
    for name, wrong, what in tests:
        if bool(wrong.any()):
            feature = int(wrong.nonzero()[0])
            return name, f"{what}: it is {float(parts[name][feature]):g} for feature {feature}"
    return None


def _power_tests(parts: Mapping[str, Tensor], tame: Tensor) -> list[tuple[str, Tensor, str]]:
    """What n values with the range r can have: a variance from r² / 2n to r² / 4, a kurtosis from 1 + skewness² to n. Popoviciu (1935),
    Sz.-Nagy (1918), Pearson (1916).

    A feature is left out if its offset is so large that a state cannot tell its powers, or if these leave the range of float64.
    """
    low, high, n = parts["min"], parts["max"], parts["count"].clamp(min=1)
    spread, largest = high - low, torch.maximum(low.abs(), high.abs())
    unit = spread.where(spread > 0, largest.where(largest > 0, 1))
    m2, m3, m4 = (_divided(parts[f"m{k}"], unit, k) / n for k in (2, 3, 4))
    told = _TOLD * torch.finfo(low.dtype).eps
    known = tame & (spread / (2 * n).sqrt() > told * largest) & (spread > _SMALLEST)
    least, varies, slack = 1 / (2 * n), known & (m2 > 0), 1 + _SLACK
    skew, kurtosis = m3 / m2 / m2.clamp(min=0).sqrt(), m4 / m2 / m2
    return [
        ("m2", tame & (spread == 0) & (m2 > told), "is not that of a constant feature"),
        ("m2", known & ((m2 > slack / 4) | (m2 * slack < least)), "is not that of values with this minimum and maximum"),
        ("m4", varies & (kurtosis > n * slack), "is a kurtosis above the number of values"),
        ("m4", varies & (kurtosis * slack < 1 + skew.square() / slack), "is a kurtosis below 1 + skewness²"),
    ]


def _divided(power: Tensor, unit: Tensor, times: int) -> Tensor:
    """A sum of powers in other units: step by step, since a power of the unit may leave the range of float64."""
    for _ in range(times):
        power = power / unit
    return power
