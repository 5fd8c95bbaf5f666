"""Vector kurtosis and its controls against scipy, closed forms and float64; intervals and bands."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

from torchprobe.analysis import inputs as blocks_module
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.kurtosis import centered_kurtosis, peaks, rotation_control, summarize, vector_kurtosis
from torchprobe.analysis.resampling import band, bootstrap_interval


def scipys(h):
    return scipy.stats.kurtosis(np.asarray(h, dtype=np.float64), axis=-1, fisher=False, bias=True)


# -- vector kurtosis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_it_is_scipys_on_the_same_values(dtype):
    h = (10 * torch.randn(300, 131).exp()).to(dtype)
    got = vector_kurtosis(h)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, scipys(h.double()), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_neither_scale_nor_offset_matters(scale, offset):
    h = torch.randn(50, 200, dtype=torch.float64) ** 3 + offset
    np.testing.assert_allclose(vector_kurtosis(h * scale), scipys(h), rtol=1e-6)
    np.testing.assert_allclose(vector_kurtosis(-h * scale), scipys(h), rtol=1e-6)


@pytest.mark.parametrize("k", [6, 10, 20, 50])
def test_one_feature_at_k_sigma_follows_the_closed_form(k):
    d = 512
    h = torch.randn(4000, d, dtype=torch.float64)
    h[:, 100] = k
    expected = ((3 * (d - 1) + k**4) / d) / (((d - 1) + k**2) / d) ** 2
    assert vector_kurtosis(h).mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("d", [2, 5, 512])
def test_one_hot_reaches_the_ceiling(d):
    h = torch.nn.functional.one_hot(torch.arange(d), d)
    ceiling = (d * d - 3 * d + 3) / (d - 1)
    np.testing.assert_allclose(vector_kurtosis(h), ceiling, rtol=1e-9)
    assert summarize(h).ceiling == pytest.approx(ceiling)


def test_constant_and_nonfinite_vectors_have_none():
    h = torch.randn(6, 8)
    h[0], h[1], h[2] = 0.0, 0.1, 3e38
    h[3, 2], h[4, 5] = math.nan, -math.inf
    assert vector_kurtosis(h).isnan().tolist() == [True] * 5 + [False]
    assert vector_kurtosis(torch.randn(3, 1)).isnan().all()
    assert vector_kurtosis(torch.randn(0, 8)).shape == (0,)


def test_strides_and_blocks_make_no_difference(monkeypatch, tmp_path):
    h = torch.randn(101, 37)
    whole = vector_kurtosis(h)
    assert torch.equal(vector_kurtosis(h.T.contiguous().T), whole)
    assert torch.equal(vector_kurtosis(torch.randn(202, 74).copy_(h.repeat(2, 2))[::2, :37][:5]), vector_kurtosis(h[::2][:5]))
    save_file({"h": h}, tmp_path / "h.safetensors")
    monkeypatch.setattr(blocks_module.blocks, "__defaults__", (37 * 10,))
    mapped = load_file(tmp_path / "h.safetensors")["h"]
    assert torch.equal(vector_kurtosis(mapped), whole)
    assert torch.equal(vector_kurtosis(Embeddings(h, torch.zeros(101, dtype=torch.int64), ["x"] * 101)), whole)


@pytest.mark.parametrize("h", [torch.randn(8), torch.randn(2, 3, 4), torch.randn(3, 0), torch.randn(2, 3, dtype=torch.complex64)])
@pytest.mark.parametrize("measure", [vector_kurtosis, centered_kurtosis, peaks, rotation_control, summarize])
def test_other_shapes_are_refused(measure, h):
    with pytest.raises(ValueError, match=r"expected representations \(n, d\)"):
        measure(h)


# -- controls ------------------------------------------------------------------------------------------------------------


def with_outlier(n=400, d=512, size=30.0):
    h = torch.randn(n, d) + torch.randn(d)  # images share their mean
    h[:, 7] += size
    return h


@pytest.mark.parametrize("make", [with_outlier, lambda: torch.randn(400, 512), lambda: torch.randn(400, 512).relu()])
def test_rotations_lead_back_to_the_gaussian_value(make):
    d = 512
    control = rotation_control(make())
    assert control.mean == pytest.approx(3 * (d - 1) / (d + 1), abs=0.15)
    assert control.values.shape == (20,)
    assert control.mean == pytest.approx(float(control.values.mean()))
    assert control.std == pytest.approx(float(control.values.std(correction=0)))


def test_a_rotation_is_the_one_of_its_seed_and_keeps_what_has_no_direction_out():
    h = with_outlier(50, 64)
    spoiled = torch.cat([h, torch.full((1, 64), 2.0), torch.full((1, 64), math.nan)])
    control = rotation_control(spoiled, rotations=3, seed=5)
    assert torch.equal(control.values[1:], rotation_control(h, rotations=2, seed=6).values)
    from torchprobe.dissection import random_rotation

    turned = [scipys(h.double() @ random_rotation(64, seed).double()).mean() for seed in (5, 6, 7)]
    np.testing.assert_allclose(control.values, turned, rtol=1e-5)
    np.testing.assert_allclose(rotation_control(h * 1e30, 3, 5).values, turned, rtol=1e-5)
    with pytest.raises(ValueError, match="rotations must be at least 1, got 0"):
        rotation_control(h, rotations=0)


@pytest.mark.parametrize("d", [1, 2, 64, 700])
def test_vectors_are_turned_by_the_matrix_of_the_same_seed(d):
    from torchprobe.dissection import RandomRotation, random_rotation

    x = torch.randn(9, d)
    exact = x.double() @ random_rotation(d, 3).double()
    torch.testing.assert_close(RandomRotation(d, 3)(x).double(), exact, rtol=0, atol=1e-4)
    assert RandomRotation(d, 3)(x[:0]).shape == (0, d)
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        RandomRotation(0)


def test_centering_takes_out_what_is_always_large():
    h = with_outlier(size=50.0)
    wide = h.double().numpy()
    np.testing.assert_allclose(centered_kurtosis(h), scipys(wide - wide.mean(0)), rtol=1e-6)
    assert vector_kurtosis(h).mean() > 100
    assert centered_kurtosis(h).mean() < 3.2
    np.testing.assert_allclose(centered_kurtosis(h.double() + 1e7), centered_kurtosis(h), rtol=1e-5)
    spoiled = torch.cat([h, torch.full((1, 512), math.inf)])
    np.testing.assert_allclose(centered_kurtosis(spoiled)[:-1], centered_kurtosis(h))
    assert centered_kurtosis(spoiled)[-1].isnan()


def test_vectors_that_are_all_the_same_leave_nothing_when_centered():
    assert centered_kurtosis(torch.randn(1, 33).repeat(7, 1)).isnan().all()
    assert centered_kurtosis(torch.full((2, 4), math.nan)).isnan().all()
    assert centered_kurtosis(torch.randn(0, 4)).shape == (0,)


def test_peaks():
    h = torch.randn(40, 65)
    np.testing.assert_allclose(peaks(h), h.double().abs().amax(1) / h.double().abs().mean(1), rtol=1e-12)
    assert peaks(torch.full((1, 9), 1e308, dtype=torch.float64)).item() == pytest.approx(1)
    assert peaks(torch.tensor([[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0]])).isnan().all()


def test_the_summary_holds_everything():
    h = with_outlier(300, 128)
    h[0], h[1, 3] = 1.0, math.nan
    found = summarize(h, rotations=3, seed=4)
    kappa = scipys(h[2:])
    assert (found.features, found.vectors, found.constant_vectors, found.invalid_vectors) == (128, 298, 1, 1)
    assert (found.mean, found.median, found.std) == pytest.approx((kappa.mean(), np.median(kappa), kappa.std()), rel=1e-6)
    assert found.interval == bootstrap_interval(vector_kurtosis(h), 4)
    assert found.interval[0] < found.mean < found.interval[1]
    assert found.gaussian == 3 * 127 / 129
    assert found.gaussian_std == pytest.approx(math.sqrt(24 / 128), rel=0.1)
    assert found.rotation.values.tolist() == rotation_control(h, 3, 4).values.tolist()
    assert found.centered == pytest.approx(float(centered_kurtosis(h).nanmean()))
    assert found.peak == pytest.approx(float(peaks(h).nanmean()))
    assert not found.nonnegative
    assert summarize(h[2:].abs(), 1).nonnegative
    plain = found.as_dict()
    assert plain["rotation"]["values"] == found.rotation.values.tolist()
    assert plain["interval"] == list(found.interval)


def test_a_summary_of_nothing_is_nan():
    found = summarize(torch.randn(0, 16))
    assert math.isnan(found.mean) and math.isnan(found.rotation.mean) and math.isnan(found.peak)
    assert not found.nonnegative


# -- intervals -----------------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_its_formula():
    values = np.random.default_rng(0).exponential(size=300)
    drawn = np.random.default_rng(0).choice(values, (20_000, 300))
    ratios = (drawn.mean(1) - values.mean()) / (drawn.std(1, ddof=1))
    high, low = np.quantile(ratios, [0.025, 0.975])
    expected = [values.mean() - end * values.std(ddof=1) * (1 + (1.5 + 0.8 * scipy.stats.skew(values) ** 2) / 300) for end in (low, high)]
    assert bootstrap_interval(values, resamples=20_000) == pytest.approx(expected, rel=0.01)
    for scale in (1e-200, 1e200):
        assert bootstrap_interval(scale * values) == pytest.approx([scale * end for end in bootstrap_interval(values)])
    narrow = bootstrap_interval(values, level=0.5)
    wide = bootstrap_interval(values)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_seed_decides_and_what_is_not_finite_does_not():
    values = torch.randn(50)
    assert bootstrap_interval(values, 3) == bootstrap_interval(values.double().numpy(), 3)
    assert bootstrap_interval(values, 3) != bootstrap_interval(values, 4)
    assert bootstrap_interval([*values.tolist(), math.nan, math.inf], 3) == bootstrap_interval(values, 3)
    assert all(map(math.isnan, bootstrap_interval([1.0, math.nan])))


DISTRIBUTIONS = {
    "Gaussian": lambda rng, size: 10 + rng.normal(size=size),
    "exponential": lambda rng, size: rng.exponential(size=size),
    "log-normal, 0.5": lambda rng, size: rng.lognormal(0, 0.5, size),
    "log-normal, 1": lambda rng, size: rng.lognormal(0, 1, size),
    "Student, 3 degrees": lambda rng, size: rng.standard_t(3, size),
}
MEANS = {"Gaussian": 10, "exponential": 1, "log-normal, 0.5": math.exp(0.125), "log-normal, 1": math.exp(0.5), "Student, 3 degrees": 0}


@pytest.mark.parametrize("n", [20, 36, 100])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_bootstrap_holds_its_level(name, n):
    samples = DISTRIBUTIONS[name](np.random.default_rng(1), (1500, n))
    ends = [bootstrap_interval(sample, i, resamples=500) for i, sample in enumerate(samples)]
    assert 0.93 <= np.mean([low <= MEANS[name] <= high for low, high in ends]) <= 0.975


def test_an_interval_that_does_not_hold_its_level_is_withheld():
    for few in (np.arange(19.0), np.full(50, 3.0), np.arange(50.0) == 7):
        assert all(map(math.isnan, bootstrap_interval(few)))


def test_bands_are_ranges_between_draws():
    draws = np.random.default_rng(0).normal(size=(99, 3))
    found, ordered = band(draws), np.sort(draws, 0)
    np.testing.assert_array_equal([found.low, found.high], [ordered[1], ordered[-2]])
    assert found.level == 0.96  # 98 of 100 places would be more than needed, 96 are the fewest above 95
    few = band(draws[:5])
    np.testing.assert_array_equal([few.low, few.high], [draws[:5].min(0), draws[:5].max(0)])
    assert few.level == pytest.approx(2 / 3) and band(draws[:1]).level == 0
    assert np.isnan(band(np.empty((0, 3))).low).all() and math.isnan(band(np.empty((0, 3))).level)


@pytest.mark.parametrize("draws", [5, 20, 39, 100])
def test_a_band_holds_the_next_draw_as_often_as_it_says(draws):
    each = np.random.default_rng(0).lognormal(size=(draws + 1, 20_000))
    found = band(each[:-1])
    assert ((found.low <= each[-1]) & (each[-1] <= found.high)).mean() == pytest.approx(found.level, abs=0.012)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match="a level lies between 0 and 1"):
        bootstrap_interval([1.0, 2.0], level=level)
    with pytest.raises(ValueError, match="a level lies between 0 and 1"):
        band([1.0], level)


def test_what_an_interval_refuses():
    with pytest.raises(ValueError, match=r"values of shape \(n,\), got \(1, 2\)"):
        bootstrap_interval([[1.0, 2.0]])
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        bootstrap_interval([1.0, 2.0], resamples=0)
