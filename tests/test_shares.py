"""Intervals of shares and of their paired differences: known values, and how often they hold the truth."""

import math

import numpy as np
import pytest

from torchprobe.analysis.shares import normal_quantile, paired_difference, share_interval


def coverage(n: int, p: float) -> float:
    """Exactly: the probability of the counts whose interval holds p."""
    total = 0.0
    for k in range(n + 1):
        low, high = share_interval(k, n)
        if low <= p <= high:
            total += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p))
    return total


def test_known_intervals():
    assert share_interval(20, 20) == pytest.approx((0.83887, 1), abs=1e-5)  # z² / (n + z²) from 1
    assert share_interval(10, 20) == pytest.approx((0.29930, 0.70070), abs=1e-5)
    assert share_interval(1, 20)[0] == pytest.approx(-math.log(0.95) / 20)  # the Poisson bound, not Wilson's 0.0089
    assert math.isnan(share_interval(0, 0)[0])
    for k, n in ((0, 7), (3, 60), (13, 41), (999, 1000)):
        low, high = share_interval(k, n)
        assert (1 - high, 1 - low) == pytest.approx(share_interval(n - k, n), abs=1e-15)
        assert 0 <= low <= k / n <= high <= 1
    assert share_interval(10, 20, 0.5)[0] > share_interval(10, 20, 0.9)[0]
    with pytest.raises(ValueError, match="21 of 20 images is not a share"):
        share_interval(21, 20)
    with pytest.raises(ValueError, match="level"):
        share_interval(1, 20, 95)


def test_wilsons_formula_in_the_middle():
    z = 1.959963984540054
    assert normal_quantile(0.95) == pytest.approx(z, abs=1e-12)
    for k, n in ((9, 20), (300, 1000), (70, 99)):
        p = k / n
        for end, sign in zip(share_interval(k, n), (-1, 1), strict=True):
            expected = (p + z * z / 2 / n + sign * z * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2)) / (1 + z * z / n)
            assert end == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [20, 36, 100, 400])
def test_the_interval_holds_its_level(n):
    each = np.array([coverage(n, p) for p in np.linspace(0.005, 0.995, 199)])
    assert 0.948 <= each.mean() <= 0.96  # over all shares; counts are whole, so single shares are above or below
    assert each.min() > 0.915
    if n == 20:
        assert coverage(20, 0.97) > 0.95  # a bootstrap holds it in 50 %
    if n == 100:
        assert coverage(100, 0.99) > 0.95  # a bootstrap: 59 %


@pytest.mark.parametrize("n", [20, 50, 400])
@pytest.mark.parametrize(("p", "q", "both"), [(0.9, 0.8, 0.75), (0.6, 0.5, 0.3), (0.5, 0.5, 0.45), (0.97, 0.9, 0.88)])
def test_paired_differences_hold_their_level(n, p, q, both):
    rng = np.random.default_rng(0)
    kinds = rng.choice(4, size=(4000, n), p=[both, p - both, q - both, 1 - p - q + both])
    held = 0
    for row in kinds:
        _, low, high = paired_difference(row <= 1, (row == 0) | (row == 2))
        held += low <= p - q <= high
    assert held / 4000 >= 0.935
    if n * (p + q - 2 * both) >= 15:  # with fewer images on which only one is right, it is longer than needed
        assert held / 4000 <= 0.975


def test_a_paired_difference_does_not_collapse():
    difference, low, high = paired_difference([True] * 200, [True] * 200)
    assert difference == 0 and low < -0.005 and high == -low
    assert math.isnan(paired_difference([True] * 19, [False] * 19)[1])
    assert all(map(math.isnan, paired_difference([], [])))
    with pytest.raises(ValueError, match="two values for each image"):
        paired_difference([True], [True, False])
