"""The intervals of a mean effective robustness over several shifts, and of a paired difference: how often they hold the truth.

Images, lines and standard models are drawn anew in each simulation. The residuals of the lines go together as those of the published ones.
"""

import math

import numpy as np
import pytest

from torchprobe.analysis.baseline import FITS, SHIFTS, Baseline
from torchprobe.analysis.resampling import FEWEST
from torchprobe.analysis.robustness_intervals import Measured, mean_robustness_interval, paired_robustness, robustness_interval
from torchprobe.analysis.standard_models import standard_models

TRUE = [FITS[shift, "full"] for shift in SHIFTS]
TOGETHER = standard_models().residual_correlation(SHIFTS)
SCATTER = np.linalg.cholesky(TOGETHER) * np.array([fit.residual_std for fit in TRUE])[:, None]


def accuracy(logit):
    return 100 / (1 + np.exp(-logit))


def on_lines(x, scatter):
    """Accuracies under the five shifts of models with these logits on ImageNet, (shifts, models)."""
    return accuracy(np.array([fit.slope * x + fit.intercept for fit in TRUE]) + scatter)


def baseline(rng, models=85):
    """Standard models drawn about the true lines."""
    x = rng.normal(TRUE[0].x_mean, math.sqrt(TRUE[0].x_squares / TRUE[0].n), models)
    y = on_lines(x, SCATTER @ rng.normal(size=(len(TRUE), models)))
    return Baseline({"imagenet": accuracy(x), **dict(zip(SHIFTS, y, strict=True))})


def test_the_residuals_of_the_published_lines_go_together():
    table = standard_models()
    with np.errstate(divide="ignore"):
        logits = {name: np.log(values / (100 - values)) for name, values in table.accuracies.items()}
    for i, j in ((0, 3), (1, 2)):
        one, other = (logits[SHIFTS[k]] - TRUE[k].slope * logits["imagenet"] - TRUE[k].intercept for k in (i, j))
        known = np.isfinite(one) & np.isfinite(other)
        expected = one[known] @ other[known] / math.sqrt((one[known] ** 2).sum() * (other[known] ** 2).sum())
        assert TOGETHER[i, j] == TOGETHER[j, i] == pytest.approx(expected, rel=1e-6)
    assert TOGETHER[1, 2] > 0.85 and (TOGETHER.diagonal() == 1).all()
    few = Baseline({"imagenet": [60, 70, 80], "imagenet_r": [30, 45, 50], "objectnet": [40, 50, 62]})
    assert (few.residual_correlation(["imagenet_r", "objectnet"]) == 1).all()


def held(images, imagenet_images, scatter, shifts=range(5), draws=1000, models=85, correlated=True):
    """How often the interval holds the true mean, where it is not withheld."""
    rng, count, given = np.random.default_rng(images), 0, 0
    beyond = np.zeros(5) if scatter else np.array([0.0, 8.0, 4.0, -2.0, 6.0])
    chosen = [SHIFTS[k] for k in shifts]
    for _ in range(draws):
        own = baseline(rng, models)
        x = rng.normal(TRUE[0].x_mean, 0.3)
        y = on_lines(np.array([x]), SCATTER @ rng.normal(size=(5, 1)) if scatter else 0.0)[:, 0] + beyond
        shifted = [Measured(100 * rng.binomial(images, min(0.999, y[k] / 100)) / images, images) for k in shifts]
        unshifted = Measured(100 * rng.binomial(imagenet_images, accuracy(x) / 100) / imagenet_images, imagenet_images)
        together = own.residual_correlation(chosen) if correlated else np.eye(len(chosen))
        ends = mean_robustness_interval([own.fit(shift) for shift in chosen], shifted, [unshifted] * len(chosen), together, scatter)
        truth = beyond[list(shifts)].mean()
        count += ends[0] <= truth <= ends[1]
        given += not math.isnan(ends[0])
    assert given > 0.95 * draws
    return count / given


@pytest.mark.slow("draws thousands of baselines")
@pytest.mark.parametrize(("images", "imagenet_images"), [(20, 20), (20, 500), (100, 100), (500, 2000), (2000, 2000), (10_000, 50_000)])
@pytest.mark.parametrize("scatter", [True, False])
def test_the_mean_is_held(images, imagenet_images, scatter):
    """With the scatter 0 is held for standard models, without it the distance of any model from the lines."""
    assert 0.93 <= held(images, imagenet_images, scatter, draws=2000) <= 0.97
    assert 0.93 <= held(images, imagenet_images, scatter, shifts=(1, 2), draws=2000) <= 0.97  # whose residuals go together most


@pytest.mark.slow("draws thousands of baselines")
def test_a_baseline_of_ten_models_is_enough():
    assert 0.93 <= held(2000, 2000, True, models=10, draws=2000) <= 0.985


@pytest.mark.slow("draws thousands of baselines")
def test_taking_the_lines_as_independent_would_be_too_short():
    assert held(10_000, 50_000, True, correlated=False) < 0.9


def right_on(rng, p, q, images):
    """Whether two models are right on each image; they agree on more images than by chance."""
    both = min(p, q) - 0.25 * min(p, q) * (1 - max(p, q))
    kind = rng.choice(4, size=images, p=[both, p - both, q - both, 1 - p - q + both])
    return kind <= 1, (kind == 0) | (kind == 2)


def held_paired(images, imagenet_images, apart, shifts, draws, beyond=(6.0, -2.0)):
    """How often the paired interval holds the true difference of two models that are ``apart`` logits apart on ImageNet."""
    rng, count, given = np.random.default_rng(images), 0, 0
    chosen = [SHIFTS[k] for k in shifts]
    for _ in range(draws):
        own = baseline(rng)
        x = rng.normal(TRUE[0].x_mean, 0.2) + np.array([-apart / 2, apart / 2])
        y = np.clip(on_lines(x, 0.0) + np.array(beyond), 1, 99) / 100
        truth = np.diff(-(100 * y - on_lines(x, 0.0))[list(shifts)].mean(0))[0]
        pairs = [right_on(rng, *y[k], images) for k in shifts]
        unshifted = right_on(rng, *accuracy(x) / 100, imagenet_images)
        _, low, high = paired_robustness([own.fit(s) for s in chosen], pairs, unshifted, correlation=own.residual_correlation(chosen))
        count += low <= truth <= high
        given += not math.isnan(low)
    assert given > 0.95 * draws
    return count / given


@pytest.mark.slow("draws thousands of baselines")
@pytest.mark.parametrize(("images", "imagenet_images"), [(20, 20), (20, 500), (100, 100), (500, 2000), (2000, 2000), (10_000, 50_000)])
@pytest.mark.parametrize(("apart", "shifts"), [(0.0, (0,)), (0.8, (3,)), (0.0, (0, 1, 3)), (0.8, (0, 1, 2, 3, 4))])
def test_the_paired_difference_is_held(images, imagenet_images, apart, shifts):
    assert 0.93 <= held_paired(images, imagenet_images, apart, shifts, 1000) <= (0.975 if images > 20 else 0.99)


def test_one_shift_is_the_interval_of_that_shift():
    for shift, scatter in (("imagenet_v2", True), ("imagenet_a", False)):
        fit, shifted, unshifted = FITS[shift, "full"], Measured(40.0, 500), Measured(70.0, 900)
        expected = robustness_interval(fit, [shifted], unshifted, scatter)
        assert mean_robustness_interval([fit], [shifted], [unshifted], scatter=scatter) == pytest.approx(expected, rel=1e-12)


def test_the_mean_of_equal_shifts():
    fit, shifted, unshifted = FITS["objectnet", "full"], Measured(40.0), Measured(70.0)
    low, high = robustness_interval(fit, [shifted], unshifted)
    assert mean_robustness_interval([fit] * 4, [shifted] * 4, [unshifted] * 4) == pytest.approx((low, high))
    alone = mean_robustness_interval([fit] * 4, [shifted] * 4, [unshifted] * 4, np.eye(4))  # independent: half as long
    assert alone[1] - alone[0] == pytest.approx((high - low) / 2)
    exact = robustness_interval(fit, [shifted], unshifted, scatter=False)
    assert mean_robustness_interval([fit] * 2, [shifted] * 2, [unshifted] * 2, scatter=False) == pytest.approx(exact)


def test_what_has_no_interval():
    fit = FITS["objectnet", "full"]
    assert math.isnan(mean_robustness_interval([], [], [])[0])
    for shifted, unshifted in (
        (Measured(40.0, FEWEST - 1), Measured(70.0)),
        (Measured(40.0), Measured(100.0)),
        (Measured(40.0), Measured(0.0)),
    ):
        assert all(map(math.isnan, mean_robustness_interval([fit] * 2, [Measured(40.0), shifted], [Measured(70.0), unshifted])))
    tiny = mean_robustness_interval([fit], [Measured(40.0, 500)], [Measured(0.01, 500)])  # less than one of its images
    assert all(map(math.isfinite, tiny))


@pytest.mark.slow("draws thousands of baselines")
@pytest.mark.parametrize("images", [20, 500, 10_000])
def test_the_row_of_the_mean_accuracy_is_held(images):
    """The line through mean accuracies holds 0 for standard models."""
    rng, count = np.random.default_rng(images), 0
    for _ in range(2000):
        own = baseline(rng)
        x = rng.normal(TRUE[0].x_mean, 0.3)
        y = on_lines(np.array([x]), SCATTER @ rng.normal(size=(5, 1)))[:, 0]
        shifted = [Measured(100 * rng.binomial(images, p / 100) / images, images) for p in y]
        unshifted = Measured(100 * rng.binomial(2000, accuracy(x) / 100) / 2000, 2000)
        low, high = robustness_interval(own.fit("mean"), shifted, unshifted)
        count += low <= 0 <= high
    assert 0.93 <= count / 2000 <= 0.97
