"""The definitions in extended precision against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from properties import definitions
from properties.activations import Activation, activations
from properties.tried import tried


def exact(column: list[float]) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    values = [Fraction(value) for value in column]
    mean = sum(values, Fraction(0)) / len(values)
    return mean, *(sum(((v - mean) ** k for v in values), Fraction(0)) / len(values) for k in (2, 3, 4))  # type: ignore[return-value]


@given(a=activations(layouts=("rows",), masks=("none",), nonfinite=("none",), most=150))
@tried
def test_moments_in_extended_precision_are_those_of_fractions(a: Activation) -> None:
    rows = a.rows()[:, :4]
    if not rows.isfinite().all():
        return
    got = definitions.moments(rows, 6.0)
    for feature, column in enumerate(rows.double().T.tolist()):
        mean, m2, m3, m4 = exact(column)
        assert abs(Fraction(*got["mean"][feature].as_integer_ratio()) - mean) <= Fraction(1, 10**15) * max(map(abs, map(Fraction, column)))
        assert abs(Fraction(*got["variance"][feature].as_integer_ratio()) - m2) <= m2 / 10**12
        if m2:
            assert float(got["kurtosis"][feature]) == pytest.approx(float(m4 / m2**2), rel=1e-12)
            assert float(got["skewness"][feature]) ** 2 == pytest.approx(float(m3**2 / m2**3), rel=1e-9, abs=1e-15)


def test_ranks() -> None:
    x = np.random.default_rng(0).permutation(999).astype(float)[:, None]
    for level in (Fraction(5, 999), Fraction(1, 10), Fraction(1, 3)):
        value = definitions.upper_quantiles(x, level)[0]
        assert (x > value).sum() <= level * 999 < (x >= value).sum()
        assert definitions.hazen(x, level)[0] == pytest.approx(np.quantile(x, 1 - float(level), method="hazen"), rel=1e-12)
    few = np.array([[1.0, np.nan, np.nan], [2.0, 5.0, np.nan], [3.0, np.nan, np.nan], [4.0, np.nan, np.nan]])
    np.testing.assert_array_equal(definitions.upper_quantiles(few, Fraction(1, 4)), [3, 5, np.nan])
    np.testing.assert_array_equal(definitions.hazen(few, Fraction(1, 4)), [3.5, 5, np.nan])


def test_average_precision() -> None:
    assert definitions.average_precision([3, 2, 1], [True, False, True], [True] * 3) == pytest.approx((1 + 2 / 3) / 2)
    assert definitions.average_precision([0, 0, 0], [True, False, True], [True] * 3) == pytest.approx(2 / 3)
    assert definitions.average_precision([3, 2, 1], [True, False, True], [True, False, True]) == 1
