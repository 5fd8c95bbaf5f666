"""Norms, Sparsity and Saturation against NumPy in float64, on what breaks such numbers. The contract suite covers the rest."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import Norms, Saturation, Sparsity, Statistic

WIDTH = 7
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=dtype)


def observed(statistic: Statistic, x: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """The fields of two merged halves, which must be those of the whole."""
    whole, half = statistic.clone(), statistic.clone()
    whole.update(x, mask=mask)
    middle = len(x) // 2
    statistic.update(x[:middle], mask=None if mask is None else mask[:middle])
    half.update(x[middle:], mask=None if mask is None else mask[middle:])
    statistic.merge(half)
    assert statistic.summary() == pytest.approx(whole.summary(), rel=1e-12, abs=0, nan_ok=True)
    return statistic.summary()


INPUTS = {
    "ordinary": normal(200, WIDTH),
    "large": normal(200, WIDTH) * 1e30,
    "largest of float32": torch.full((20, WIDTH), 3.4e38),
    "small": normal(200, WIDTH) * 1e-30,
    "denormal": torch.full((20, WIDTH), 1e-45),
    "scales that differ": normal(200, WIDTH) * torch.logspace(-30, 30, WIDTH),
    "scales that differ between vectors": normal(200, WIDTH) * torch.logspace(-30, 30, 200)[:, None],
    "zeros": torch.zeros(20, WIDTH),
    "negative zeros": -torch.zeros(20, WIDTH),
    "a zero vector among others": normal(200, WIDTH) * (torch.arange(200) % 2)[:, None],
    "after a ReLU": normal(200, WIDTH).clamp(min=0) * torch.tensor([1, 0, 1, 0, 1, -0.0, 1]),
    "bfloat16": normal(200, WIDTH).bfloat16(),
    "float16 near its end": (normal(200, WIDTH) * 1e4).half(),
    "float64, large": normal(200, WIDTH, dtype=torch.float64) * 1e300,
    "float64, small": normal(200, WIDTH, dtype=torch.float64) * 1e-300,
    "one vector": normal(1, WIDTH),
}
inputs = pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())


@inputs
def test_norms_at_every_scale(x: Tensor) -> None:
    rows = x.double().numpy()
    unit = abs(rows).max(1, keepdims=True)
    rms = unit[:, 0] * np.sqrt((np.divide(rows, unit, out=np.zeros_like(rows), where=unit > 0) ** 2).mean(1))
    expected = {"norm_mean": rms.mean() * WIDTH**0.5, "norm_max": rms.max() * WIDTH**0.5, "rms_mean": rms.mean(), "rms_max": rms.max()}
    assert observed(Norms(WIDTH), x) == pytest.approx({**expected, "invalid_vectors": 0}, rel=1e-6, abs=0)


def test_vectors_with_a_nonfinite_element_are_left_out_and_counted() -> None:
    x = normal(40, WIDTH)
    x[3, 2], x[5, 0], x[5, 1], x[39] = math.nan, math.inf, -math.inf, math.nan
    norms = np.delete(np.linalg.norm(x.double(), axis=1), [3, 5, 39])
    found = observed(Norms(WIDTH), x)
    assert found["invalid_vectors"] == 3
    assert (found["norm_mean"], found["norm_max"]) == pytest.approx((norms.mean(), norms.max()), rel=1e-6)
    none = observed(Norms(WIDTH), x[[3, 5]])
    assert none["invalid_vectors"] == 2
    assert all(math.isnan(value) for name, value in none.items() if name != "invalid_vectors")


def test_padding_counts_nowhere() -> None:
    x, mask = normal(40, WIDTH), torch.arange(40) % 3 > 0
    x[0], x[3] = math.nan, 0  # both are padding
    x[1], x[2, 0], x[4, 1] = -1.5, 0, 1.5
    dead = x.clone()
    dead[:, 3] = 0
    dead[~mask, 3] = 7
    kept = x[mask]
    for make in (Norms, Sparsity, Saturation):
        assert observed(make(WIDTH), x, mask) == pytest.approx(observed(make(WIDTH), kept), rel=1e-12, abs=0)
        alone = make(WIDTH)
        alone.update(x, mask=torch.zeros(40, dtype=torch.bool))
        assert all(math.isnan(value) for value in alone.summary().values())
        assert not alone.saw_anything()
    assert observed(Sparsity(WIDTH), dead, mask)["dead_features"] == 1 / WIDTH


@inputs
def test_zeros_are_exact(x: Tensor) -> None:
    rows = x.double().numpy()
    assert observed(Sparsity(WIDTH), x) == {"zero_share": (rows == 0).mean(), "dead_features": (rows == 0).all(0).mean()}


@pytest.mark.parametrize("vectors", [1, 254, 255, 256, 509, 510, 511, 1300])
def test_counts_of_many_vectors_are_exact(vectors: int) -> None:
    x = (normal(vectors, 3) > 0.3).float() * torch.tensor([1.0, 1.0, 0.0])
    mask = torch.arange(vectors) % 5 != 3
    for kept in (None, mask):
        sparsity, saturation = Sparsity(3), Saturation(3, low=0.0)
        for one in (sparsity, saturation):
            one.update(x, mask=kept)
            one.update(x.T, 0, mask=kept)
        zeros = (x if kept is None else x[kept]).double().eq(0).sum(0)
        assert sparsity.zeros.tolist() == saturation.below.tolist() == (2 * zeros).tolist()
        assert (saturation.above + saturation.below).tolist() == 3 * [float(sparsity.vectors)]


def test_a_feature_with_a_nan_or_the_smallest_number_is_not_dead() -> None:
    x = torch.zeros(10, 4)
    x[3, 0], x[4, 1], x[5, 2] = math.nan, 1e-45, -math.inf
    assert observed(Sparsity(4), x) == {"zero_share": 37 / 40, "dead_features": 0.25}


@inputs
def test_saturation_of_squashed_values(x: Tensor) -> None:
    squashed = {  # what a layer gives, and the range of its activation function
        "tanh": (torch.tanh(x), {}),
        "sigmoid": (torch.sigmoid(x), {"low": 0.0}),
        "hardtanh": (nn.functional.hardtanh(x), {"tolerance": 0.0}),
        "relu6": (nn.functional.relu6(3 * x), {"low": 0, "high": 6, "tolerance": 0.1}),
        "cut off at ends that are not exact": (x.float().clamp(-0.3, 0.9), {"low": -0.3, "high": 0.9, "tolerance": 0.0}),
    }
    for name, (y, options) in squashed.items():
        low, high, tolerance = (options.get(key, value) for key, value in (("low", -1.0), ("high", 1.0), ("tolerance", 0.01)))
        dtype = np.float64 if y.dtype == torch.float64 else np.float32
        margin = tolerance * (high - low)
        rows = y.double().numpy()
        at_low, at_high = rows <= float(dtype(low + margin)), rows >= float(dtype(high - margin))
        expected = {
            "saturated": (at_low | at_high).mean(),
            "saturated_low": at_low.mean(),
            "saturated_high": at_high.mean(),
            "saturated_features": ((at_low | at_high).mean(0) >= 0.95).mean(),
        }
        assert observed(Saturation(WIDTH, **options), y) == pytest.approx(expected, rel=1e-12), name
        if tolerance == 0:
            cut = (x.float() <= low) | (x.float() >= high)
            assert expected["saturated"] == cut.double().mean().item(), name


def test_what_lies_beyond_an_end_is_saturated_and_nan_is_not() -> None:
    x = torch.tensor([[math.inf, -math.inf, 1.5, -7.0, math.nan, 0.97, 0.981]])
    found = observed(Saturation(WIDTH), x.repeat(40, 1))
    assert (found["saturated_low"], found["saturated_high"], found["saturated"]) == pytest.approx((2 / 7, 3 / 7, 5 / 7))
    assert found["saturated_features"] == pytest.approx(5 / 7)
    for share, stuck in ((0.94, 0.0), (0.95, 1.0)):
        y = torch.zeros(100, 1)
        y[: round(100 * share)] = 1
        assert observed(Saturation(1), y)["saturated_features"] == stuck


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low < high; got 1.0 and 1.0"),
        ({"low": 0.0, "high": math.inf}, "must be finite, .* use Sparsity"),
        ({"low": math.nan}, "must be finite"),
        ({"tolerance": 0.5}, "below 0.5; got 0.5"),
        ({"tolerance": -0.1}, "at least 0"),
        ({"tolerance": math.nan}, "at least 0"),
    ],
)
def test_ranges_that_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Saturation(3, **options)
    with pytest.raises(ValueError, match="low"):
        Saturation(3).merge(Saturation(3, low=0.0))


def test_they_share_one_hook_and_a_file_with_moments(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh())
    with torch.no_grad():
        model[0].bias[2] = -1e6  # this unit never fires
    statistic: list[Any] = [torchprobe.Moments, Norms, Sparsity, functools.partial(Saturation, tolerance=0.02)]
    with torchprobe.record(model, ["1", "3"], statistic=statistic) as rec:
        for step in range(3):
            model(100 * normal(50, 4))
            rec.snapshot(step)
    rec.save(tmp_path / "run.safetensors")
    total = torchprobe.load(tmp_path / "run.safetensors").total["1"]
    assert total["Moments"].dead_features == total["Sparsity"].dead_features == 1 / 8
    assert total["Norms"].rms_max <= total["Moments"].abs_max
    assert rec.total["3"]["Saturation"].saturated > 0.5
    assert rec.history["Sparsity.dead_features"][:, 0].tolist() == [1 / 8] * 3
