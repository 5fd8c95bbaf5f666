"""Pairs, attention, routing and rounded layers with inputs that nobody expects: no crash, no false claim, everything as it was."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections import UserDict, defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchprobe
from torchprobe.analysis import compare_recordings
from torchprobe.analysis.quantization import FORMATS, clipping, forecast, forecasts, measure, smoothing_scales
from torchprobe.analysis.quantization.layers import layer_forecast, simulated
from torchprobe.analysis.window_noise import apart, drifts
from torchprobe.integrations.padding import Padding
from torchprobe.recording.structure import mapped
from torchprobe.recording.tensor_difference import difference
from torchprobe.statistics import Exponents, Moments, Routing
from torchprobe.statistics.changes import find

MODULES = [importlib.import_module(f"torchprobe.analysis.quantization.{name}") for name in ("features", "forecast")]


class Gives(nn.Module):
    """A linear layer, and what a function makes of its output, with a buffer."""

    def __init__(self, function: Callable[[Tensor], Any] = lambda x: x, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.linear, self.function, self.output = nn.Linear(4, 4), function, nn.Identity()
        self.register_buffer("kept", buffer)

    def forward(self, x: Tensor) -> Any:
        return self.output(self.function(self.linear(x)))


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


UNREAD: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "without numbers": lambda x: x.to("meta"),
    "mkldnn": lambda x: x.detach().to_mkldnn(),
    "masked": lambda x: torch.masked.masked_tensor(x.detach(), x.detach() > 0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("name", UNREAD)
def test_outputs_that_cannot_be_compared_are_named_and_differ_in_nothing(name: str, isolate: bool) -> None:
    model = Gives(UNREAD[name])
    found = torchprobe.record_pair(model, copy.deepcopy(model), torch.randn(3, 4), isolate=isolate)
    assert found.first is None and found.culprit is None
    assert "could not be compared" in found.answer() and any("could not be compared" in remark for remark in found.remarks)
    assert found.summary()["first"] is None and found.table().row_count == len(found.rows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


BUFFERS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "without numbers": lambda: torch.zeros(2, device="meta"),
    "nan, expanded": lambda: torch.tensor([math.nan]).expand(5),
    "nan, of inference mode": lambda: inference(torch.tensor([math.nan])),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "a conjugated view": lambda: torch.complex(torch.ones(2), torch.ones(2)).conj(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_of_any_kind_stay(name: str) -> None:
    model = Gives(buffer=BUFFERS[name]())
    kept, other = model.kept, Gives(buffer=BUFFERS[name]())
    other.linear = copy.deepcopy(model.linear)
    assert torchprobe.record_pair(model, other, torch.randn(3, 4)).first is None
    assert model.kept is kept


def test_differences_beyond_the_digits_of_float64() -> None:
    big = difference(torch.tensor([2**62]), torch.tensor([2**62 + 1]))
    assert big.max_abs == 1 and big.first == (0,)
    assert difference(torch.tensor([2**63 - 1]), torch.tensor([-(2**63)])).max_abs == 2.0**64
    assert difference(*torch.tensor([[1.7e308, 1e-300], [1.7e308, 2e-300]], dtype=torch.float64)).max_abs == 1e-300
    assert difference(torch._neg_view(torch.ones(2)), -torch.ones(2)).equal


class Attention(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given)


def test_attention_without_keys_ends_no_run() -> None:
    model = nn.Sequential(Attention(lambda x: x.softmax(-1)))
    with pytest.warns(torchprobe.recording.RecordingWarning, match="could not be read"), torchprobe.record_attention(model):
        model(torch.zeros(2, 3, 5, 0))


def test_attention_inside_vmap_is_not_mixed() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torchprobe.record_attention(model) as rec:
            torch.func.vmap(lambda x: model(x, x, x)[0], randomness="same")(torch.randn(3, 2, 5, 8))
    assert rec.layers == [] and "vmap" in str(told[0].message)
    with torchprobe.record_attention(model) as rec:
        model(*[torch.randn(2, 5, 8)] * 3)
    assert rec["entropy"].vectors == 10


@pytest.mark.parametrize("bad", [[0.0, 0.0, 0.0], [-1.0, 2.0, 0.0], [-1.0, 1.0, 0.0]])
def test_tokens_without_probabilities_are_left_out(bad: list[float]) -> None:
    good = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.875, 0.0]])
    mixed, clean = Routing(3, given="probabilities"), Routing(3, given="probabilities")
    mixed.update(torch.cat([torch.tensor([bad]), good]))
    clean.update(good)
    assert mixed.invalid_tokens == 1 and mixed.problem() is None
    assert all(getattr(mixed, name) == getattr(clean, name) for name in mixed.fields if name != "invalid_tokens")


def test_scores_whose_sum_is_beyond_their_type() -> None:
    routing = Routing(3, given="probabilities")
    routing.update(torch.full((1, 3), 1e308, dtype=torch.float64))
    assert routing.mass.tolist() == pytest.approx([1 / 3] * 3) and routing.router_entropy == pytest.approx(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def seen(*names: str) -> dict[str, Exponents]:
    found = {name: Exponents(8) for name in names}
    for exponents in found.values():
        exponents.update(torch.randn(50, 8))
    return found


def test_weights_that_layers_share_are_rounded_once_and_come_back() -> None:
    model = Tied()
    weight, data = model.a.weight, model.a.weight.detach().clone()
    with simulated(model, ["a", "b"], "int8_tensor", seen("a", "b")):
        rounded = model.a.weight.detach().clone()
    single = nn.Linear(8, 8)
    single.weight.data = data.clone()
    with simulated(nn.Sequential(single), ["0"], "int8_tensor", seen("0")):
        assert torch.equal(single.weight, rounded)
    assert model.a.weight is model.b.weight is weight and torch.equal(weight, data) and not torch.equal(rounded, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
def test_weights_that_are_computed_are_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="weight of '0' is computed"), simulated(model, ["0"], "int8_tensor", seen("0")):
        pass
    model(torch.randn(2, 8))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e160, 1e307])
def test_verdicts_do_not_depend_on_the_unit(scale: float) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + np.array([0, 3, 0])
    found, known = apart(one * scale, other * scale), apart(one, other)
    np.testing.assert_allclose(found.p, known.p)
    np.testing.assert_allclose(found.noise / scale, known.noise, rtol=1e-9)
    assert drifts(np.arange(12.0)[:, None] * scale) and not drifts(one * scale)


@pytest.mark.parametrize("scale", [1e-300, 1e307, 1.1e308])
def test_jumps_do_not_depend_on_the_unit(scale: float) -> None:
    noise = np.random.default_rng(0).normal(1, 0.01, 400)
    noise[300:] *= 1.5
    known = find(noise[:, None])
    found = find(noise[:, None] * scale)
    assert [(index, change.windows) for index, change in found] == [(index, change.windows) for index, change in known] != []


def test_functional_attention_still_reads() -> None:
    model = nn.Sequential(Attention(lambda x: F.scaled_dot_product_attention(x, x, x)))
    with torchprobe.record_attention(model) as rec:
        model(torch.randn(2, 3, 5, 8))
    assert rec["0.entropy"].vectors == 10


def test_an_empty_batch_says_nothing_about_two_models() -> None:
    models = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(ValueError, match="no output holds any value, so there is nothing to compare"):
        torchprobe.record_pair(*models, torch.zeros(0, 4))
    assert torchprobe.record_pair(*models, torch.zeros(1, 4)).first == ""


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-318])
def test_a_forecast_without_squares_says_so(scale: float) -> None:
    x = torch.randn(200, 40, dtype=torch.float64) * scale
    exponents = Exponents(40)
    exponents.update(x)
    found = forecast(exponents, "int8_token")
    assert math.isnan(found.sqnr_db) and found.unsure == "the squares of the values are beyond float64"
    known = measure(x / scale, "int8_token").sqnr_db
    assert abs(measure(x, "int8_token").sqnr_db - known) < (1e-6 if scale > 1e-300 else 1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        out: Tensor = self.linear(torch.ones(2, 3, 4))
        return out


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["nested", "sparse"])
def test_a_mask_that_cannot_be_read_ends_no_run_and_leaves_none_behind(kind: str) -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]])
    bad = {"nested": torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "sparse": mask.to_sparse()}
    model = Tokens()
    with torchprobe.record(model, "linear") as rec:
        padding = Padding(model, rec)
        padding.batch({"input_ids": ids, "attention_mask": mask})
        model(ids)
        assert rec["linear"].vectors == 3
        with pytest.warns(torchprobe.recording.RecordingWarning, match="padding counts"):
            padding.batch({"input_ids": ids, "attention_mask": bad[kind]})
        model(ids)
    assert rec["linear"].vectors == 3 + 6


class Counting(nn.Module):
    """What it gives depends on how often it ran, as with codebooks that follow the data, and caches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.runs


@pytest.mark.parametrize(("same", "isolate"), [(False, False), (False, True), (True, False)], ids=["a copy", "isolated", "itself"])
def test_every_pass_begins_with_the_same_buffers(same: bool, isolate: bool) -> None:
    """Both models run several times; a pass must not see what an earlier one has left."""
    model = nn.Sequential(Counting(), nn.Linear(4, 4), Counting(), parametrizations.spectral_norm(nn.Linear(4, 2), n_power_iterations=1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = model if same else copy.deepcopy(model)
    found = torchprobe.record_pair(model, other, torch.randn(3, 4), isolate=isolate, memory=1)
    assert found.first is None and found.culprit is None, found.answer()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        return UserDict(y=self.fc(x) * mask[:, None])


def test_a_batch_in_any_mapping() -> None:
    model, x, mask = Named(), torch.randn(3, 4), torch.tensor([1, 1, 0])
    other = copy.deepcopy(model)
    other.fc.weight.data.mul_(1.1)
    empty = defaultdict(list)
    empty.update(x=x, mask=mask)
    for batch in (UserDict(x=x, mask=mask), MappingProxyType({"x": x, "mask": mask}), empty):
        assert torchprobe.record_pair(model, other, batch, isolate=True).culprit == "fc"
    assert batch["other"] == [] and isinstance(mapped(empty, torch.clone, lambda other: other), defaultdict)


def test_a_batch_of_a_tokenizer() -> None:
    batch = pytest.importorskip("transformers").BatchEncoding({"x": torch.randn(3, 4), "mask": torch.ones(3, dtype=torch.long)})
    model = Named()
    assert torchprobe.record_pair(model, copy.deepcopy(model), batch).first is None
    again = mapped(batch, torch.clone, lambda other: other)
    assert type(again) is type(batch) and again["x"] is not batch["x"] and torch.equal(again["x"], batch["x"])


def test_the_default_device_and_dtype_do_not_matter() -> None:
    """As in a script that begins with torch.set_default_device("cuda"), for a model on the CPU."""
    torch.manual_seed(0)
    model, x = nn.Linear(32, 8), torch.randn(300, 32)
    other = copy.deepcopy(model)
    other.weight.data[3] *= 1.1
    seen, outputs = Exponents(32), Moments(8)
    seen.update(x)
    outputs.update(model(x).detach())
    recordings = []
    for one in (model, other):
        with torchprobe.record(one) as rec:
            for step, part in enumerate(x.split(50)):
                one(part)
                rec.snapshot(step)
        recordings.append(rec)

    def everything() -> str:
        smooth = smoothing_scales(seen.largest, model.weight.abs().amax(0)).tolist()
        layers = [layer_forecast("fc", model, seen, outputs, form) for form in FORMATS]
        pair = torchprobe.record_pair(model, other, x, isolate=True).summary()
        changes = compare_recordings(*recordings).summary()
        return repr((forecasts(seen), clipping(seen), smooth, layers, pair, changes))

    expected = everything()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    forget_tables()
    try:
        found = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        forget_tables()
    assert found == expected


def forget_tables() -> None:
    """What was computed once for all forecasts."""
    for module in MODULES:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


class Recurrent(nn.Module):
    """Gives a loss, a state in a tuple, and what depends on neither."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.state = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y, h = self.fc(x), self.state.weight * x.sum()
        return {"loss": y.mean() + h.sum(), "y": y, "cache": (h, [None, h + 1])}


@pytest.mark.parametrize("compiled", [False, True])
def test_tensors_inside_of_an_output_and_single_numbers_are_compared(compiled: bool) -> None:
    model, x = Recurrent(), torch.randn(3, 4)
    other = copy.deepcopy(model)
    assert torchprobe.record_pair(model, other, x, isolate=True).first is None
    other.state.weight.data[0, 0] += 1
    torch.compiler.reset()
    found = torchprobe.record_pair(model, torch.compile(other, backend="eager") if compiled else other, x, isolate=not compiled)
    places = {row.place: row.output.apart() for row in found.rows if row.layer == ""}
    assert places == {"y": False, "loss": True, "cache.0": True, "cache.1.1": True}
    assert found.first == "" and not found.answer().endswith("At the end: relative error 0.")
    assert compiled or {row.place for row in found.rows if row.adds()} == {"loss", "cache.0", "cache.1.1"}
