"""Reference quantizers against PyTorch's casts, and forecasts against what rounding really does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchprobe.analysis.quantization import FORMATS, clipping, forecast, forecasts, measure, quantize, smoothing_scales
from torchprobe.analysis.quantization.formats import ELEMENTS
from torchprobe.analysis.quantization.layers import (
    column_largest,
    column_squares,
    layer_forecast,
    rounded_weight,
    simulated,
    weight_matrix,
    weighted_layers,
)
from torchprobe.statistics import Exponents, Moments

GENERATOR = torch.Generator().manual_seed(0)
VECTORS, FEATURES = 1024, 256


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


# -- formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_that_of_pytorch(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = every[every.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, normal(20_000) * 100, normal(20_000) * 1e-4])
    x = x[x.abs() <= ELEMENTS[name].largest]
    assert torch.equal(ELEMENTS[name].round(x.double()).float(), x.to(dtype).float())
    assert float(numbers.max()) == ELEMENTS[name].largest
    assert ELEMENTS[name].round(torch.tensor([1e9, -1e9], dtype=torch.float64)).tolist() == [
        ELEMENTS[name].largest,
        -ELEMENTS[name].largest,
    ]


def test_e2m1_has_its_numbers() -> None:
    x = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert sorted(set(ELEMENTS["e2m1"].round(x).abs().tolist())) == numbers
    best = torch.tensor(numbers, dtype=torch.float64)
    nearest = (x.abs()[:, None] - best).abs().amin(1)
    assert torch.allclose((x - ELEMENTS["e2m1"].round(x)).abs(), nearest)


def test_scales_follow_the_definitions() -> None:
    x = normal(6, 40).double()
    assert torch.equal(
        quantize(x, "int8_token").div(x.abs().amax(1, keepdim=True) / 127).round(), (x / (x.abs().amax(1, keepdim=True) / 127)).round()
    )
    for start, stop in ((0, 32), (32, 40)):
        block = x[:, start:stop]
        scale = 2 ** (block.abs().amax(1, keepdim=True).log2().floor() - 8)
        assert torch.equal(quantize(x, "mxfp8")[:, start:stop], ELEMENTS["e4m3"].round(block / scale) * scale)
    whole = x.abs().max() / (6 * 448)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        block = x[:, start:stop]
        scale = ELEMENTS["e4m3"].round(block.abs().amax(1, keepdim=True) / 6 / whole) * whole
        torch.testing.assert_close(quantize(x, "nvfp4")[:, start:stop], ELEMENTS["e2m1"].round(block / scale) * scale, rtol=1e-12, atol=0)
    maps = normal(2, 40, 3, 3)
    torch.testing.assert_close(quantize(maps, "mxfp8", 1), quantize(maps.permute(0, 2, 3, 1), "mxfp8").permute(0, 3, 1, 2))


def test_nan_inf_and_zeros() -> None:
    x = torch.tensor([[0.0, math.nan, math.inf, -3.0], [0.0, 0.0, 0.0, 0.0]])
    for name in FORMATS:
        rounded = quantize(x, name)
        assert rounded[0].isnan().tolist() == [False, True, False, False] and rounded[0, 2] == math.inf and rounded[1].eq(0).all()
        assert math.isnan(measure(torch.zeros(3, 4), name).sqnr_db)


def test_tensors_without_values_are_rounded_to_themselves() -> None:
    for shape in ((3, 0), (0, 4), (2, 0, 5), (0,)):
        for name in FORMATS:
            assert quantize(torch.zeros(shape), name).shape == shape and quantize(torch.zeros(shape), name).dtype == torch.float64
            found = measure(torch.zeros(shape), name)
            assert math.isnan(found.sqnr_db) and found.underflow == found.overflow == 0
    with pytest.raises(KeyError, match="int8_token"):
        quantize(torch.zeros(3, 0), "int8_tokn")


def test_the_shares_of_gelu_and_of_saturated_values() -> None:
    x = FAMILIES["normal"]
    small, hard = nn.functional.gelu(x), (3 * x).clamp(-1, 1)
    assert forecast(exponents_of(small), "int8_channel").underflow == pytest.approx(measure(small, "int8_channel").underflow, abs=0.003)
    assert forecast(exponents_of(x), "nvfp4").overflow == pytest.approx(measure(x, "nvfp4").overflow, abs=0.01)
    for values in (hard, x * torch.logspace(-3, 3, VECTORS)[:, None]):
        assert math.isnan(forecast(exponents_of(values), "nvfp4").overflow)


def test_a_layer_that_shares_its_weight_is_rounded_alone() -> None:
    table, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = table.weight
    model, tokens = nn.Sequential(table, head), torch.arange(16)
    seen = exponents_of(table(tokens).detach())
    with torch.no_grad():
        plain, out = table(tokens), model(tokens)
        with simulated(model, ["1"], "int8_token", {"1": seen}):
            assert torch.equal(table(tokens), plain) and not torch.equal(model(tokens), out)
    assert head.weight is table.weight and torch.equal(model(tokens), out)


# -- forecasts -----------------------------------------------------------------------------------------------------------


def families() -> dict[str, Tensor]:
    x = normal(VECTORS, FEATURES)
    outlier, massive, tokens = x.clone(), x.clone(), x.clone()
    outlier[:, 7] *= 80
    massive[:, 7] -= 110
    tokens[::97, 9] = 800
    return {
        "normal": x,
        "after a ReLU": x.relu(),
        "after a GELU": nn.functional.gelu(2 * x),
        "an outlier feature": outlier,
        "a feature far from 0": massive,
        "massive tokens": tokens,
        "heavy tails": torch.distributions.StudentT(3.0).sample((VECTORS, FEATURES)),
        "very heavy tails": torch.distributions.StudentT(1.5).sample((VECTORS, FEATURES)),
        "skewed": (2 * x).exp(),
        "after a GELU, small": nn.functional.gelu(x),
        "after a SiLU": nn.functional.silu(2 * x),
        "after a hard tanh": (3 * x).clamp(-1, 1),
        "tiny": 1e-12 * x,
        "huge": 1e12 * x,
        "features of different scales": x * torch.logspace(-2, 2, FEATURES),
        "tokens of different scales": x * torch.logspace(-2, 2, VECTORS)[torch.randperm(VECTORS, generator=GENERATOR), None],
        "softmax": (3 * x).softmax(-1),
        "sigmoid": x.sigmoid(),
        "uniform": torch.rand(VECTORS, FEATURES, generator=GENERATOR),
        "binary": (x > 0).float(),
        "constant": torch.full((VECTORS, FEATURES), 0.7),
        "whole numbers": (3 * x).round(),
        "pixels": torch.randint(-127, 129, (VECTORS, FEATURES), generator=GENERATOR) / 128,
        "sparse": x * (torch.rand(VECTORS, FEATURES, generator=GENERATOR) < 0.02),
        "bfloat16": x.bfloat16(),
    }


torch.manual_seed(0)
FAMILIES = families()
PLAIN = ("normal", "after a ReLU", "tiny", "huge", "bfloat16", "heavy tails", "features of different scales")


def exponents_of(x: Tensor) -> Exponents:
    exponents = Exponents(x.shape[-1])
    for part in x.split(256):
        exponents.update(part)
    return exponents


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forecast_is_within_a_decibel_or_says_that_it_is_unsure(name: str) -> None:
    x = FAMILIES[name]
    for form, found in forecasts(exponents_of(x)).items():
        truth = measure(x, form)
        close = found.sqnr_db == truth.sqnr_db or abs(found.sqnr_db - truth.sqnr_db) < 1
        assert close or found.unsure, (form, found, truth)
        if name in PLAIN and form not in ("int8_channel", "mxfp8"):  # few values that saturate carry much of the error of MXFP8
            assert close and not found.unsure, (form, found, truth)
        for share, real in ((found.underflow, truth.underflow), (found.overflow, truth.overflow)):
            assert found.unsure or math.isnan(share) or abs(share - real) < 0.02, (form, found, truth)
    assert found.noise >= 0


def test_merged_halves_forecast_what_the_whole_does() -> None:
    x = FAMILIES["after a GELU"]
    one, other = exponents_of(x[:512]), exponents_of(x[512:])
    whole = exponents_of(x)
    one.merge(other)
    for form in FORMATS:
        assert forecast(one, form).sqnr_db == pytest.approx(forecast(whole, form).sqnr_db, rel=1e-9)


def test_nothing_and_zeros_have_no_number() -> None:
    empty, zeros = Exponents(4), Exponents(4)
    zeros.update(torch.zeros(10, 4))
    for form in FORMATS:
        assert math.isnan(forecast(empty, form).sqnr_db) and forecast(empty, form).unsure == "nothing was seen"
        assert math.isnan(forecast(zeros, form).sqnr_db) and forecast(zeros, form).unsure == "nothing but zeros was seen"


def test_outlier_features_are_named_and_what_they_cost() -> None:
    x = FAMILIES["an outlier feature"].clone()
    x[:, 11] *= 60
    found = forecast(exponents_of(x), "int8_tensor")
    assert found.outliers == (7, 11)
    others = [i for i in range(FEATURES) if i not in (7, 11)]
    rest, scale = x[:, others].double(), x.abs().max().double() / 127
    now = 10 * math.log10(float((rest**2).sum() / ((rest - (rest / scale).round() * scale) ** 2).sum()))
    assert found.others_db == pytest.approx(now, abs=1)
    assert found.without_db == pytest.approx(measure(rest, "int8_tensor").sqnr_db, abs=1)
    assert forecast(exponents_of(FAMILIES["normal"]), "int8_tensor").outliers == ()


# -- remedies ------------------------------------------------------------------------------------------------------------


def test_smoothing_changes_no_output_and_helps_outliers() -> None:
    x, w = FAMILIES["an outlier feature"].double(), normal(32, FEATURES).double()
    scales = smoothing_scales(exponents_of(x).largest, w.abs().amax(0))
    torch.testing.assert_close(scales, (x.abs().amax(0) / w.abs().amax(0)).sqrt())
    smooth, heavier = x / scales, w * scales
    torch.testing.assert_close(smooth @ heavier.T, x @ w.T)
    assert measure(smooth, "int8_tensor").sqnr_db > measure(x, "int8_tensor").sqnr_db + 3
    torch.testing.assert_close(smoothing_scales(x.abs().amax(0), w.abs().amax(0), 1.0), x.abs().amax(0))
    with pytest.raises(ValueError, match="alpha is from 0 to 1"):
        smoothing_scales(scales, scales, 2.0)


def test_clipping_finds_the_limit_that_measures_best() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((4096, 64)).double()
    found = clipping(exponents_of(x))

    def noise(limit: float) -> float:
        scale = limit / 127
        return float((((x / scale).round().clamp(-127, 127) * scale - x) ** 2).sum())

    limits = np.linspace(2, float(x.abs().max()), 200)
    best = min(limits, key=noise)
    assert noise(found.limit) < 1.1 * noise(best)
    assert found.gain_db == pytest.approx(10 * math.log10(noise(float(x.abs().max())) / noise(found.limit)), abs=0.5)
    assert found.share == pytest.approx(float((x.abs() > found.limit).double().mean()), rel=0.3)


# -- layers --------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=4)
        self.head = nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.depthwise(self.conv(x).relu()).relu()).mean((2, 3)))


def test_columns_of_convolutions_with_groups() -> None:
    module = Small().grouped
    weight = module.weight.detach().double()  # (24, 4, 1, 1): outputs 6g … 6g + 5 read inputs 4g … 4g + 3
    for j in range(16):
        group = j // 4
        column = weight[6 * group : 6 * group + 6, j % 4].flatten()
        assert float(column_squares(module)[j]) == pytest.approx(float((column**2).sum()))
        assert float(column_largest(module)[j]) == float(column.abs().max())
    conv = Small().conv
    matrix = rounded_weight(conv, "int8_tensor")
    for weights, rounded in zip(conv.weight.detach().double(), matrix, strict=True):
        scale = weights.abs().max() / 127
        torch.testing.assert_close(rounded, (weights / scale).round() * scale)


@pytest.mark.parametrize("form", ["int8_tensor", "int8_token", "e4m3", "e5m2", "mxfp8", "nvfp4"])
def test_the_output_of_a_layer_is_forecast(form: str) -> None:
    torch.manual_seed(0)
    model, x = Small().eval(), normal(16, 3, 24, 24)
    for name, dim in weighted_layers(model).items():
        module = model.get_submodule(name)
        caught: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(lambda _, i, o, caught=caught: caught.append((i[0], o)))
        with torch.no_grad():
            model(x)
        handle.remove()
        before, after = caught[0]
        exponents, moments = Exponents(before.shape[dim]), Moments(after.shape[dim])
        exponents.update(before, dim)
        moments.update(after, dim)
        found = layer_forecast(name, module, exponents, moments, form)
        caught.clear()
        with torch.no_grad(), simulated(model, [name], form, {name: exponents}):
            rounded = module(before).double()
        bias = module.bias.detach().double().view(-1, *[1] * (after.dim() - 2)) if after.dim() > 2 else module.bias.detach().double()
        truth = 10 * math.log10(float(((after.double() - bias) ** 2).sum() / ((after.double() - rounded) ** 2).sum()))
        # a small layer: errors of neighbors are not quite independent; and the head reads few values
        assert found.output_db == pytest.approx(truth, abs=1.5) or found.input.unsure, name


def test_a_simulation_leaves_the_model_as_it_was() -> None:
    model, x = Small().eval(), normal(2, 3, 8, 8)
    before, weights = model(x), [p.detach().clone() for p in model.parameters()]
    seen = {
        name: Exponents(model.get_submodule(name).weight.shape[1] * getattr(model.get_submodule(name), "groups", 1))
        for name in weighted_layers(model)
    }
    for exponents in seen.values():
        exponents.update(torch.ones(1, exponents.features))

    def broken() -> None:
        with simulated(model, list(seen), "int8_token", seen):
            assert not torch.equal(model(x), before)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(weights, (p.detach() for p in model.parameters())))


def test_the_linear_layer_of_gpt2_whose_weight_is_transposed() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear, other, x = nn.Linear(12, 20), Conv1D(20, 12), torch.randn(64, 12)
    other.weight.data, other.bias.data = linear.weight.data.T.contiguous(), linear.bias.data.clone()
    assert weighted_layers(nn.Sequential(other)) == {"0": -1}
    assert torch.equal(weight_matrix(linear), weight_matrix(other))
    assert torch.equal(column_squares(linear), column_squares(other)) and torch.equal(column_largest(linear), column_largest(other))
    seen, outputs = Exponents(12), Moments(20)
    seen.update(x)
    outputs.update(linear(x).detach())
    for form in FORMATS:
        assert layer_forecast("0", linear, seen, outputs, form) == layer_forecast("0", other, seen, outputs, form)
        found = []
        for model in (nn.Sequential(linear), nn.Sequential(other)):
            before = model[0].weight.clone()
            with torch.no_grad(), simulated(model, ["0"], form, {"0": seen}):
                found.append(model(x))
            assert torch.equal(model[0].weight, before)
        torch.testing.assert_close(*found)


def test_an_unknown_format_names_those_that_there_are() -> None:
    with pytest.raises(KeyError, match="'fp8_e4m3' is not one of the formats int8_tensor, .*; did you mean e4m3"):
        measure(torch.ones(1, 2), "fp8_e4m3")


def uneven(kind: str) -> Tensor:
    """Vectors whose features have very different sizes."""
    x = normal(4096, 256)
    if kind == "scales":
        return x * torch.logspace(-2, 2, 256)
    if kind == "dead":
        return x.relu() * (torch.arange(256) >= 128)
    x[:, 3] *= 100
    return x


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["scales", "dead", "outlier"])
def test_small_features_with_large_weights_have_the_error_that_they_have(kind: str, form: str) -> None:
    """One step for all features is not one error for all: a value below half a step loses itself, and a zero nothing."""
    torch.manual_seed(0)
    x, layer = uneven(kind), nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight.div_(x.square().mean(0).sqrt().clamp(min=1e-3))
        exponents, moments = Exponents(256), Moments(64)
        exponents.update(x)
        moments.update(layer(x))
        exact = nn.functional.linear(x.double(), layer.weight.double())
        rounded = nn.functional.linear(quantize(x, form, largest=exponents.largest), rounded_weight(layer, form))
    truth = 10 * math.log10(float((exact**2).sum() / ((exact - rounded) ** 2).sum()))
    assert layer_forecast("fc", layer, exponents, moments, form).output_db == pytest.approx(truth, abs=1)


def test_a_layer_that_is_called_by_keyword_is_rounded_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model, x, exponents = Named(), normal(16, 8), Exponents(8)
    exponents.update(x)
    with torch.no_grad(), simulated(model, ["fc"], "int8_token", {"fc": exponents}):
        found, same = model(x), model.fc(x)
    assert torch.equal(found, same) and not torch.equal(found, model(x).detach())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["two", "three", "four", "five", "ReLU6", "tanh", "softmax"])
def test_values_that_are_the_largest_of_their_token(kind: str, form: str) -> None:
    """They are a whole number of steps, so they have no error."""
    x = normal(4096, 64)
    narrow = {"two": 2, "three": 3, "four": 4, "five": 5, "softmax": 4}
    x = x[:, : narrow.get(kind, 64)]
    x = nn.functional.relu6(5 * x) if kind == "ReLU6" else nn.functional.hardtanh(2 * x) if kind == "tanh" else x
    x = (3 * x).softmax(-1) if kind == "softmax" else x
    exponents = Exponents(x.shape[1])
    for part in x.split(512):
        exponents.update(part)
    found = forecast(exponents, form)
    assert found.unsure or found.sqnr_db == pytest.approx(measure(x, form, largest=exponents.largest).sqnr_db, abs=1)
