"""Moments as a statistic: reads, merging, saving, display."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from oracle import assert_close, moments

from torchprobe import Moments
from torchprobe.ops import layout
from torchprobe.ops.observe import new_state
from torchprobe.statistics import Statistic
from torchprobe.statistics.moment_fields import sorted_median
from torchprobe.statistics.moments import FIELDS, summarize


def observed(x: torch.Tensor, **options) -> Moments:
    m = Moments(x.shape[-1], **options)
    m.update(x)
    return m


def test_reads_agree_with_scipy():
    x = torch.randn(400, 30, dtype=torch.float64).exp()
    m, a = observed(x), x.numpy()
    np.testing.assert_allclose(m.kurtosis, scipy.stats.kurtosis(a, fisher=False, bias=True), rtol=1e-10)
    np.testing.assert_allclose(m.skewness, scipy.stats.skew(a, bias=True), rtol=1e-10)
    np.testing.assert_allclose(m.std, a.std(0), rtol=1e-10)
    assert math.isclose(m.vector_kurtosis, scipy.stats.kurtosis(a, axis=1, fisher=False).mean(), rel_tol=1e-10)
    assert math.isclose(m.vector_kurtosis_std, scipy.stats.kurtosis(a, axis=1, fisher=False).std(), rel_tol=1e-9)


def test_types_and_shapes():
    m = observed(torch.randn(10, 7))
    for name in ("mean", "variance", "std", "skewness", "kurtosis", "min", "max", "mean_abs", "count", "nonfinite", "outlier_frequency"):
        value = getattr(m, name)
        assert value.dtype == torch.float64 and value.shape == (7,), name
        value.fill_(-1)  # a read is a copy: the state does not change
    assert isinstance(m.vector_kurtosis, float) and isinstance(m.vectors, int) and m.vectors == 10
    assert m.count.tolist() == [10.0] * 7


def test_empty_reads_are_nan():
    m = Moments(5)
    for name in ("mean", "variance", "std", "skewness", "kurtosis", "min", "max", "mean_abs", "outlier_frequency"):
        assert getattr(m, name).isnan().all(), name
    assert math.isnan(m.vector_kurtosis) and math.isnan(m.vector_kurtosis_std) and math.isnan(m.vector_kurtosis_quantile(0.5))
    assert (m.vectors, m.constant_vectors, m.invalid_vectors, m.calls) == (0, 0, 0, 0)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_from_the_histogram(q):
    x = torch.randn(4000, 200)
    x[:, 3] = torch.linspace(-60, 60, 4000)
    want = np.quantile(moments(x)["kurtosis_of_vectors"], q)
    assert abs(observed(x).vector_kurtosis_quantile(q) - want) <= 0.016 * want


def test_quantile_outside_the_unit_interval_is_refused():
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            Moments(3).vector_kurtosis_quantile(q)


def test_beyond_the_histogram_the_last_bin_is_open():
    x = torch.zeros(2, 400_000)
    x[:, 0] = 1  # kurtosis about 400,000, above 2**18
    m = observed(x)
    assert math.isclose(m.vector_kurtosis, 400_000, rel_tol=1e-4)
    assert layout.histogram(m.state)[-1] == 2


def test_outlier_frequency_is_nan_where_nothing_can_be_an_outlier():
    assert observed(torch.randn(9, 37)).outlier_frequency.isnan().all()  # 36/√37 = 5.92
    assert not observed(torch.randn(9, 39)).outlier_frequency.isnan().any()  # 38/√39 = 6.08
    assert not observed(torch.randn(9, 37), outlier_sigma=5.9).outlier_frequency.isnan().any()


def test_merge_is_the_union():
    x, y = torch.randn(300, 20), torch.randn(170, 20) * 3 + 7
    a, b = observed(x), observed(y)
    before = b.state.clone()
    assert a.merge(b) is a
    assert_close(a, torch.cat([x, y]))
    assert torch.equal(b.state, before)
    assert_close(Moments(20).merge(a), torch.cat([x, y]))
    assert_close(a.merge(Moments(20)), torch.cat([x, y]))


def test_merge_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="features 3 and 4"):
        Moments(3).merge(Moments(4))
    with pytest.raises(ValueError, match="outlier_sigma 6.0 and 5.0"):
        Moments(3).merge(Moments(3, outlier_sigma=5.0))
    with pytest.raises(TypeError, match="dict"):
        Moments(3).merge({})


def test_constructor_refuses_nonsense():
    with pytest.raises(ValueError, match="features must be at least 1"):
        Moments(0)
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="outlier_sigma must be positive"):
            Moments(3, outlier_sigma=sigma)


def test_reset():
    m = observed(torch.randn(9, 5))
    m.reset()
    assert not m.state.any()


def test_state_dict_round_trip():
    m = observed(torch.randn(50, 12))
    saved = m.state_dict()
    other = Moments(12)
    other.load_state_dict(saved)
    assert torch.equal(other.state, m.state)
    m.update(torch.randn(3, 12))
    assert int(saved["vectors"]) == 50  # a copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 13}, "features=13, this one has features=12"),
        ({"outlier_sigma": 5.0}, "outlier_sigma=5.0"),
        (
            {"mean": torch.zeros(11)},
            r"mean in the saved state of Moments is torch.float32 of shape \(11,\), expected torch.float64 of shape \(12,\)",
        ),
        ({"mean": "text"}, r"mean in the saved state of Moments is str, expected torch.float64 of shape \(12,\)"),
        ({"extra": torch.zeros(1)}, r"unknown \['extra'\]"),
        ({"m2": None}, r"lacks \['m2'\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, message):
    m = observed(torch.randn(50, 12))
    before, saved = m.state.clone(), m.state_dict()
    saved.update(change)
    if change.get("m2", 0) is None:
        del saved["m2"]
    with pytest.raises(ValueError, match=message):
        m.load_state_dict(saved)
    assert torch.equal(m.state, before)


def test_copies_are_independent():
    m = observed(torch.randn(50, 12))
    for other in (m.clone(), copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.state, m.state) and other.outlier_sigma == m.outlier_sigma
        other.update(torch.randn(1, 12))
        assert m.vectors == 50 and other.vectors == 51


def test_summary_of_several_layers_is_the_summary_of_each():
    x = torch.randn(3, 100, 50)
    x[1, :, 7] += 30
    x[2, 5, 5] = math.nan
    layers = [*(observed(part) for part in x), Moments(50)]
    together = summarize(torch.stack([m.state for m in layers]), 50)
    assert together.shape == (4, len(FIELDS))
    for row, m in zip(together, layers, strict=True):
        f = dict(zip(FIELDS, row.tolist(), strict=True))
        assert f["vectors"] == m.vectors and f["nonfinite"] == float(m.nonfinite.sum())
        np.testing.assert_equal(f["vector_kurtosis"], m.vector_kurtosis)
        np.testing.assert_equal(f["vector_kurtosis_median"], m.vector_kurtosis_quantile(0.5))
        np.testing.assert_equal(f["kurtosis_max"], float(m.kurtosis.max()))
        np.testing.assert_equal(f["kurtosis_median"], float(m.kurtosis.nanmedian()))
        np.testing.assert_equal(f["mean_abs_max"], float(m.mean_abs.max()))
        np.testing.assert_equal(f["min"], float(m.min.min()))
    assert together[1, FIELDS.index("outlier_features")] == 1


HARD = {
    "ordinary": torch.randn(300, 9),
    "far from zero": torch.randn(300, 9) * 0.1 + 1e4,
    "negative": -torch.rand(300, 9),
    "large": torch.randn(300, 9) * 1e30,
    "small": torch.randn(300, 9) * 1e-30,
    "denormal": torch.full((300, 9), 1e-44),
    "one value": torch.tensor([[-3.0] + 8 * [0.0]]),
    "scales that differ": torch.randn(300, 9) * torch.logspace(-30, 30, 9),
    "nan and inf": torch.randn(300, 9).masked_fill(torch.rand(300, 9) < 0.2, math.nan).masked_fill(torch.rand(300, 9) < 0.2, -math.inf),
    "half precision": (torch.randn(300, 9) * 1e4).half(),
    "dead features": torch.randn(300, 9).clamp(min=0) * torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, -0.0]),
    "all dead": torch.zeros(300, 9),
    "large float64": torch.randn(300, 9, dtype=torch.float64) * 1e70,
    "small float64": torch.randn(300, 9, dtype=torch.float64) * 1e-70,
}


@pytest.mark.parametrize("x", HARD.values(), ids=HARD.keys())
def test_fields_over_everything_against_all_values(x):
    parts = [observed(part) for part in x.split(70)]
    m = parts[0]
    for part in parts[1:]:
        m.merge(part)
    rows = x.double().numpy()
    finite = rows[np.isfinite(rows)]
    unit = abs(finite).max() or 1.0
    assert m.abs_max == abs(finite).max()
    assert m.rms == pytest.approx(unit * np.sqrt(((finite / unit) ** 2).mean()), rel=1e-6, abs=0)
    assert m.dead_features == np.mean([(column[np.isfinite(column)] == 0).all() for column in rows.T])


def test_fields_over_everything_are_nan_where_nothing_finite_was_seen():
    for m in (Moments(3), observed(torch.full((2, 3), math.nan))):
        assert all(math.isnan(m.summary()[name]) for name in ("abs_max", "rms", "dead_features"))
    one = observed(torch.tensor([[math.nan, 0.0, 0.0, 1.0], [math.inf, 0.0, 2.0, 1.0]]))
    assert (one.abs_max, one.rms, one.dead_features) == (2.0, math.sqrt(6 / 6), 0.25)


@pytest.mark.parametrize(
    ("low", "high", "mean", "m2", "rms"),
    [
        (1e300, 1e300, 1e300, 0.0, 1e300),  # the square does not fit
        (-1e-300, -1e-300, -1e-300, 0.0, 1e-300),
        (-1e150, 1e150, 0.0, 4e300, 1e150),
        (-1e-150, 1e-150, 0.0, 4e-300, 1e-150),
        (-1e-170, 1e-170, 0.0, 0.0, math.nan),  # the state itself has lost the squares: not 0
        (-1e170, 1e170, 0.0, math.inf, math.nan),
    ],
)
def test_rms_at_the_ends_of_float64(low, high, mean, m2, rms):
    state = new_state(2)
    rows = dict(zip(layout.ROWS, layout.rows(state), strict=True))
    for name, value in {"count": 4, "min": low, "max": high, "mean": mean, "m2": m2}.items():
        rows[name].fill_(value)
    assert summarize(state[None], 2)[0, FIELDS.index("rms")].item() == pytest.approx(rms, rel=1e-14, abs=0, nan_ok=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 7), (2, 8), (24, 768)])
def test_the_median_for_a_gpu_is_that_of_pytorch(shape):
    x = torch.randn(shape, dtype=torch.float64)
    x = x.masked_fill(torch.rand(shape) < 0.3, math.nan).masked_fill(torch.rand(shape) < 0.1, math.inf)
    x[0] = math.nan
    assert torch.equal(sorted_median(x).nan_to_num(7.0), x.nanmedian(-1).values.nan_to_num(7.0))


def test_repr_is_one_complete_line():
    x = torch.randn(100, 64)
    x[:, 3] += 50
    x[0, 0] = math.nan
    text = repr(observed(x))
    assert "\n" not in text
    for part in ("64 features", "99 vectors", "x∈[", "μ=", "σ=", "vector κ=", "1 outlier features", "1 invalid vectors", "1 nonfinite!"):
        assert part in text, text
    assert repr(Moments(4)) == "Moments(4 features, empty)"


def test_display_in_a_notebook():
    page = observed(torch.randn(100, 64))._repr_html_()
    assert page.startswith("<table>") and all(f"<th style='text-align:left'>{name}</th>" in page for name in FIELDS)


def test_is_a_statistic():
    assert isinstance(Moments(3), Statistic)


def test_the_variance_of_a_constant_feature_with_nan_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.full((60, 5), 31.0, dtype=torch.float16).masked_fill(torch.rand(60, 5, generator=generator) < 0.3, torch.nan)
    m = Moments(5)
    for part in x.split(7):
        m.update(part)
    assert m.variance.eq(0).all() and m.std.eq(0).all() and m.kurtosis.isnan().all()
    empty = Moments(2).variance
    assert empty.isnan().all()


@pytest.mark.parametrize("layout_", ["rows", "maps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_constant_feature_with_nan_has_no_deviations_in_its_state(dtype: torch.dtype, layout_: str) -> None:
    """n · (1 / n) is below 1 for 49, 98 and 103 values: with such a weight the mean of the first tile would not be the value."""
    torch.manual_seed(0)
    value = torch.randn(40, dtype=torch.float64).to(dtype)
    for n in (49, 98, 103, 1000, 5000):
        x = value.expand(n, 40).clone()
        x[torch.rand(n, 40) < 0.1] = torch.nan
        m = Moments(40)
        for part in x.tensor_split(3):
            m.update(*((part, -1) if layout_ == "rows" else (part.T.contiguous()[None], 1)))
        seen = m.count > 0
        assert torch.equal(m.mean[seen], value.double()[seen])
        assert not layout.rows(m.state)[[layout.ROWS.index(name) for name in ("m2", "m3", "m4")]].any()


def _two(values: list[float]) -> Moments:
    m = Moments(2)
    m.update(torch.tensor([values, values[::-1]]).T)
    return m


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("m2", lambda m2: m2 * 100, "not that of values with this minimum"),
        ("m2", lambda m2: m2 / 100, "not that of values with this minimum"),
        ("m4", lambda m4: m4 * 100, "above the number of values"),
        ("m4", lambda m4: m4 / 100, r"below 1 \+ skewness²"),
        ("m3", lambda m3: m3 + 10, r"below 1 \+ skewness²"),
    ],
)
def test_moments_that_no_values_have_are_refused(part, change, message):
    state = _two([0.0, 1.0, 2.0, 4.0]).state_dict()
    state[part][1] = change(state[part][1])
    with pytest.raises(ValueError, match=message):
        Moments.from_state(state)
    Moments.from_state(_two([0.0, 1.0, 2.0, 4.0]).state_dict())


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0] * 99 + [1.0], [-1.0] * 50 + [1.0] * 50, [3.0, 3.0, 3.0], [1e8, 1e8 + 8], [5.0]])
def test_values_at_the_limits_of_what_moments_can_be_are_read(values):
    m = _two(values)
    for _ in range(5):  # merging adds rounding
        m.merge(_two(values))
        assert m.problem() is None and Moments.from_state(m.state_dict()).vectors == m.vectors
    constant = _two([3.0, 3.0, 3.0])
    layout.rows(constant.state)[layout.ROWS.index("m2")] += 1
    assert constant.problem() == ("m2", "is not that of a constant feature: it is 1 for feature 0")
