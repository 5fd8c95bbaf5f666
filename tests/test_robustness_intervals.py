"""The interval of effective robustness: how often it holds the truth, for standard models and for others, from 20 images on."""

import math

import numpy as np
import pytest

from torchprobe.analysis.baseline import FITS, Baseline, Fit
from torchprobe.analysis.robustness import robustness
from torchprobe.analysis.robustness_intervals import Measured, mean_robustness_interval, robustness_interval
from torchprobe.analysis.standard_models import standard_models


def accuracy(logit):
    return 100 / (1 + np.exp(-logit))


def refitted(true: Fit, rng: np.random.Generator) -> Fit:
    """The line through standard models drawn from a true line."""
    x = rng.normal(true.x_mean, math.sqrt(true.x_squares / true.n), true.n)
    y = true.slope * x + true.intercept + true.residual_std * rng.normal(size=true.n)
    return Baseline({"imagenet": accuracy(x), true.shift: accuracy(y)}).fit(true.shift)


def held(shift: str, images: int, imagenet_images: int, beyond: float, scatter: bool, draws: int = 1500) -> float:
    """How often the interval holds the true value: ``beyond`` the line in points, plus the scatter of a standard model."""
    true, rng, count = FITS[shift, "full"], np.random.default_rng(images), 0
    for _ in range(draws):
        x = rng.normal(true.x_mean, 0.3)
        line = true.slope * x + true.intercept
        y = accuracy(line + (true.residual_std * rng.normal() if scatter else 0.0))
        measured = 100 * rng.binomial(images, min(0.999, (y + beyond) / 100)) / images
        unshifted = 100 * rng.binomial(imagenet_images, accuracy(x) / 100) / imagenet_images
        ends = robustness_interval(refitted(true, rng), [Measured(measured, images)], Measured(unshifted, imagenet_images), scatter)
        count += ends[0] <= beyond <= ends[1]
    return count / draws


@pytest.mark.parametrize("images", [20, 100, 500, 2000, 10_000])
@pytest.mark.parametrize("shift", ["imagenet_v2", "objectnet", "imagenet_r"])
def test_a_standard_model_is_outside_in_one_of_twenty(shift, images):
    assert 0.93 <= held(shift, images, max(images, 500), 0.0, scatter=True) <= 0.975


@pytest.mark.parametrize("beyond", [0.0, 8.0])
@pytest.mark.parametrize("images", [20, 500, 10_000])
def test_the_distance_from_the_line_is_held(images, beyond):
    assert 0.93 <= held("imagenet_v2", images, 10_000, beyond, scatter=False) <= 0.975


def test_without_sampling_it_is_the_prediction_interval():
    fit = FITS["objectnet", "full"]
    low, high = fit.interval(70.0)
    assert robustness_interval(fit, [Measured(60.0)], Measured(70.0)) == pytest.approx((60 - high, 60 - low))
    narrow = robustness_interval(fit, [Measured(60.0, 10**12)], Measured(70.0, 10**12))
    assert narrow == pytest.approx((60 - high, 60 - low), abs=1e-3)
    line = fit.interval(70.0, scatter=False)
    assert low < line[0] < fit.predict(70.0) < line[1] < high


def test_what_the_rows_say():
    accuracies = {"imagenet": 70.0, "imagenet_v2": 60.0, "imagenet_r": 50.0, "imagenet_sketch": 40.0, "objectnet": 45.0, "imagenet_a": 20.0}
    plain = robustness(accuracies)
    known = robustness(accuracies, images=dict.fromkeys(accuracies, 500))
    for before, after in zip(plain.rows(), known.rows(), strict=True):
        assert after["low"] < before["low"] < before["high"] < after["high"]
        assert after["low"] < after["line_low"] < after["effective_robustness"] < after["line_high"] < after["high"]
        assert math.isnan(before["line_low"]) and "number is unknown" in before["note"] and "unknown" not in after["note"]
    assert (known["imagenet_v2"].images, known["mean"].images, known["mean"].imagenet_images) == (500, 2500, 500)
    mean = known.mean
    assert mean.shifts == tuple(row.shift for row in known.shifts) and mean.effective_robustness == known.mean_effective_robustness
    assert mean.interval[0] < mean.line_interval[0] < mean.effective_robustness < mean.line_interval[1] < mean.interval[1]
    assert math.isnan(plain.mean.line_interval[0]) and mean.interval[0] < plain.mean.interval[0] < plain.mean.interval[1] < mean.interval[1]
    fits, unshifted = [row.fit for row in known.shifts], [Measured(70.0, 500)] * 5
    together = standard_models().residual_correlation(mean.shifts)
    expected = mean_robustness_interval(fits, [Measured(row.accuracy, 500) for row in known.shifts], unshifted, together)
    assert mean.interval == pytest.approx(expected)
    few = robustness(accuracies, images={**dict.fromkeys(accuracies, 500), "objectnet": 7})["objectnet"]
    assert math.isnan(few.interval[0]) and "no interval: 7 images" in few.note
    certain = robustness({**accuracies, "imagenet": 100.0}, images=dict.fromkeys(accuracies, 500))
    assert math.isnan(certain["objectnet"].interval[0]) and certain.mean.shifts == ()
    every = robustness({**accuracies, "objectnet": 100.0}, images=dict.fromkeys(accuracies, 20))["objectnet"]
    assert every.interval[0] < every.effective_robustness < every.interval[1]
