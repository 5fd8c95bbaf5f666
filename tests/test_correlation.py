from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from torchprobe.analysis.resampling import rank_correlation


@pytest.mark.parametrize("n", [3, 4, 10, 57])
@pytest.mark.parametrize("ties", [False, True])
def test_is_spearmans(n: int, ties: bool) -> None:
    random = np.random.default_rng(n)
    x, y = random.normal(size=n), random.normal(size=n)
    y += x
    if ties:
        x, y = np.round(x), np.round(y)
        x[0], x[-1], y[0], y[-1] = -9, 9, -9, 9
    assert rank_correlation(x, y).rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_p_value_is_that_of_all_pairings() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    exact = stats.permutation_test((x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=np.inf)
    assert rank_correlation(x, y, permutations=50_000).p_value == pytest.approx(exact.pvalue, abs=0.006)


def test_p_values_are_uniform_under_chance() -> None:
    random = np.random.default_rng(0)
    values = [rank_correlation(random.normal(size=12), random.normal(size=12), permutations=199, seed=i).p_value for i in range(400)]
    assert stats.kstest(values, "uniform").pvalue > 0.001


def test_of_few_models_the_p_value_is_exact():
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p_value == 2 / 6  # this order and its reverse
    assert rank_correlation([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]).p_value == 1.0
    x, y = np.random.default_rng(1).normal(size=(2, 7))
    each = [abs(stats.spearmanr(x, order).statistic) for order in itertools.permutations(y)]
    assert rank_correlation(x, y).p_value == np.mean(np.array(each) >= abs(stats.spearmanr(x, y).statistic) - 1e-12)


def test_what_has_no_rank_is_left_out() -> None:
    found = rank_correlation([1.0, math.nan, 2.0, 3.0, math.inf], [3.0, 1.0, 2.0, 1.0, 0.0])
    assert found.rho == -1 and found.n == 3


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])])
def test_too_little_is_nan(x: list[float], y: list[float]) -> None:
    found = rank_correlation(x, y)
    assert math.isnan(found.rho) and math.isnan(found.p_value) and found.n == len(x)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        rank_correlation([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least 1"):
        rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], permutations=0)
