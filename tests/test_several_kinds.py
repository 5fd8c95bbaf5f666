"""Outputs, inputs, gradients, weights and their gradients in one recorder."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import COMPILER_WARNINGS, Calls, Net, batches, hooks_on, together, told, witnessed
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import Moments, Quantile

KINDS = ("output", "input", "gradient", "weight", "weight_gradient")
LAYERS = ("blocks.0", "blocks.1", "blocks.2", "head")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def train(call: Callable[[Tensor], Tensor], data: list[Tensor], model: nn.Module, rate: float = 0.01) -> dict[str, list[Tensor]]:
    """Plain steps of SGD. Returns what an independent observer sees: every weight before its use, and every gradient of a weight."""
    seen: dict[str, list[Tensor]] = {}
    for x in data:
        for name, p in model.named_parameters():
            seen.setdefault(f"{name}@weight", []).append(p.detach().double().clone())
            p.grad = None
        call(x.clone().requires_grad_()).square().sum().backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                seen.setdefault(f"{name}@weight_gradient", []).append(p.grad.double().clone())
                p -= rate * p.grad
    return seen


def assert_numbers(rec: torchprobe.Recording, kinds: dict[str, dict[str, list[Any]]], suffix: Callable[[str], str]) -> None:
    for kind, seen in kinds.items():
        for layer in LAYERS:
            x = seen[layer] if kind == "output" else [value[0] for value in seen[layer]]
            oracle.assert_close(rec[layer + suffix(kind)], together(x))


def observe(model: nn.Module, data: list[Tensor]) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for kind in ("output", "input", "gradient"):
        with witnessed(model, kind) as found[kind]:
            train(model, data, model)
        model.load_state_dict(state)
    return found


# -- numbers and names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [KINDS, ("gradient", "output"), ["input", "weight"], ("weight_gradient", "weight"), ("output",)])
def test_every_kind_against_float64(of: Any) -> None:
    model, data = Net(), batches(3)
    seen = observe(model, data)
    rec = torchprobe.record(model, LAYERS, of=of)
    with rec:
        weights = train(model, data, model)
    plain = "output" if "output" in of else of[0]
    suffix = lambda kind: "" if kind == plain else f"@{kind}"  # noqa: E731
    assert set(rec.layers) == {layer + suffix(kind) for layer in LAYERS for kind in of}
    assert_numbers(rec, {kind: seen[kind] for kind in of if kind in seen}, suffix)
    for kind in ("weight", "weight_gradient"):
        if kind in of:
            for layer in LAYERS:
                # the features are those of the output: one for each row of a weight (out, in)
                oracle.assert_close(rec[layer + suffix(kind)], together(weights[f"{layer}.weight@{kind}"], 0))
                assert rec[layer + suffix(kind)].calls == 3
    assert {(row["layer"], row["of"]) for row in rec.rows()} == {(layer + suffix(kind), kind) for layer in LAYERS for kind in of}
    assert hooks_on(model) == 0
    assert not any(p._backward_hooks for p in model.parameters())


def test_several_kinds_are_what_several_recorders_read() -> None:
    model, data = Net(), batches(2)
    together_, alone = torchprobe.record(model, "**", of=KINDS[:3]), [torchprobe.record(model, "**", of=kind) for kind in KINDS[:3]]
    with together_, alone[0], alone[1], alone[2]:
        train(model, data, model, rate=0)
    for kind, rec in zip(KINDS[:3], alone, strict=True):
        for layer in rec:
            name = layer if kind == "output" else f"{layer}@{kind}"
            assert torch.equal(together_[name].state, rec[layer].state), name
    assert len(together_) == sum(len(rec) for rec in alone)


@pytest.mark.parametrize("of", [(), ("output", "output"), ("output", "outputs"), [3], "weights"])
def test_kinds_that_are_refused(of: Any) -> None:
    with pytest.raises(ValueError, match="of= takes one or several different kinds|of must be one of"):
        torchprobe.record(Net(), of=of)


def test_names_of_the_model_itself_and_of_an_unknown_kind() -> None:
    model, data = Net(), batches(1)
    with torchprobe.record(model, ["", "head"], of=("output", "gradient")) as rec:
        train(model, data, model)
    assert set(rec.layers) == {"", "@gradient", "head", "head@gradient"}
    assert rec["(output)"].vectors == rec[""].vectors == 15
    for wrong, hint in (("head@weight", "no layer 'head@weight' was recorded"), ("haed@gradient", "did you mean 'head@gradient'")):
        with pytest.raises(KeyError, match=hint):
            rec[wrong]


def test_the_default_layers_of_each_kind() -> None:
    """Activations of the blocks; weights of all layers that have one."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)))
    ids = torch.randint(0, 10, (3, 5))
    with told() as texts, torchprobe.record(model, of=("output", "weight")) as rec:
        model(ids)
    assert {name for name in rec.layers if "@" in name} == {"0@weight", "1.0@weight", "1.2@weight", "1.3@weight"}
    assert not any("weight" in text for text in texts)
    with told() as texts, torchprobe.record(model, of="weight") as rec:
        model(ids)
    assert set(rec.layers) == {"0", "1.0", "1.2", "1.3"}
    assert texts == []


# -- weights -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "inputs", "dims"),
    [
        (nn.Linear(8, 6), torch.randn(5, 8), {"weight": 0}),
        (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 8, 8), {"weight": 0}),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 8), {"weight": 0}),
        (nn.ConvTranspose2d(3, 6, 3), torch.randn(2, 3, 8, 8), {"weight": 1}),
        (nn.Embedding(10, 6), torch.randint(0, 10, (4, 5)), {"weight": 1}),
        (nn.LayerNorm(6), torch.randn(4, 6), {"weight": 0}),
        (nn.BatchNorm1d(6), torch.randn(4, 6), {"weight": 0}),
        (nn.Bilinear(4, 5, 6), (torch.randn(3, 4), torch.randn(3, 5)), {"weight": 0}),
        (nn.Linear(6, 6), torch.randn(5, 6), {"weight": 0}),
        (nn.Embedding(6, 6), torch.randint(0, 6, (4, 5)), {"weight": 1}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("kind", ["weight", "weight_gradient"])
def test_the_features_of_a_weight_are_those_of_the_output(kind: str, layer: nn.Module, inputs: Any, dims: dict[str, int]) -> None:
    model = Calls(lambda self, *x: self.layer(*x), layer=layer)
    model.zero_grad()
    with torchprobe.record(model, "layer", of=kind) as rec:
        model(*(inputs if isinstance(inputs, tuple) else (inputs,))).square().sum().backward()
    assert rec.layers == ["layer"]
    value = layer.weight if kind == "weight" else layer.weight.grad
    assert rec["layer"].features == 6
    oracle.assert_close(rec["layer"], value, dims["weight"])
    (row,) = rec.rows()
    assert row["feature_dim"] == (-1 if dims["weight"] == value.dim() - 1 else dims["weight"])


def test_other_parameters_of_a_layer() -> None:
    """Every parameter of two or more dimensions has a row; a bias has none."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    model = Calls(lambda self, x: self.attn(x, x, x)[0], attn=attention)
    with torchprobe.record(model, "attn", of=("weight", "weight_gradient")) as rec:
        model(torch.randn(3, 5, 6)).square().sum().backward()
    assert set(rec.layers) == {"attn:in_proj_weight", "attn:in_proj_weight@weight_gradient"}
    oracle.assert_close(rec["attn:in_proj_weight"], attention.in_proj_weight, 0)
    oracle.assert_close(rec["attn:in_proj_weight@weight_gradient"], attention.in_proj_weight.grad, 0)
    lstm = nn.LSTM(4, 6, batch_first=True)
    with torchprobe.record(lstm, "", of="weight_gradient") as rec:
        lstm(torch.randn(3, 5, 4))[0].sum().backward()
    assert set(rec.layers) == {":weight_ih_l0", ":weight_hh_l0"}
    oracle.assert_close(rec[":weight_ih_l0"], lstm.weight_ih_l0.grad, 0)


def test_layers_without_a_weight() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with told() as texts, torchprobe.record(model, "**", of="weight") as rec:
        model(torch.randn(3, 6))
    assert rec.layers == ["0"]
    assert "it has no weight of its own; record the layers inside" in texts[-1]
    for kind in ("weight", "weight_gradient"):
        why = "layer '1': ReLU has no weight of its own; record the layers inside"
        with told(), pytest.raises(TypeError, match=why), torchprobe.record(model, "1", of=kind):
            model(torch.randn(3, 6))
    assert hooks_on(model) == 0


def test_a_frozen_weight_has_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model[0].weight.requires_grad_(False)
    with told() as texts, torchprobe.record(model, "*", of=("weight", "weight_gradient")) as rec:
        model(torch.randn(3, 6)).sum().backward()
    assert set(rec.layers) == {"0", "1", "1@weight_gradient"}
    assert "'0@weight_gradient': " in texts[-1]
    assert "no gradient" in texts[-1] or "without gradients" in texts[-1]


def test_a_layer_that_runs_twice_has_one_gradient_and_two_readings() -> None:
    model = Calls(lambda self, x: self.layer(self.layer(x)), layer=nn.Linear(6, 6))
    with torchprobe.record(model, "layer", of=("output", "weight", "weight_gradient")) as rec:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(3, 6)).square().sum().backward()
    assert {name: rec[name].calls for name in rec} == {"layer": 4, "layer@weight": 4, "layer@weight_gradient": 2}
    oracle.assert_close(rec["layer@weight"], together([model.layer.weight] * 4, 0))


def test_a_weight_under_two_names() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    with told(), torchprobe.record(model, "*", of="weight_gradient") as rec:
        model(torch.randn(3, 6)).square().sum().backward()
    for layer in rec:
        oracle.assert_close(rec[layer], model[0].weight.grad, 0)
    assert set(rec.layers) == {"0", "1"}


def test_parametrized_weights() -> None:
    """The parametrized weight is no parameter; its parts are, in a module of their own."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    x = torch.randn(3, 6)
    expected = model(x)
    with told(), torchprobe.record(model, "**", of=("output", "weight", "weight_gradient")) as rec:
        out = model(x)
        out.sum().backward()
    assert torch.equal(out, expected)
    oracle.assert_close(rec["0"], out)


# -- calls that count ----------------------------------------------------------------------------------------------------------------


def test_every_pauses_and_modes() -> None:
    model, data = Net(), batches(6)
    rec = torchprobe.record(model, "head", of=KINDS, every=2)
    with rec:
        train(model, data, model)
        with rec.paused():
            train(model, data, model)
    assert {rec[name].calls for name in rec} == {6}
    assert [rec[name].vectors for name in ("head", "head@input", "head@gradient")] == [45] * 3
    assert rec["head@weight"].vectors == rec["head@weight_gradient"].vectors == 3 * 6
    with told() as texts, torchprobe.record(model, "head", of=KINDS, when="eval") as rec:
        train(model, data[:1], model)
        model.eval()
        train(model, data[:1], model)
    assert {rec[name].calls for name in rec} == {1}
    assert texts == []


def test_every_with_steps_of_an_optimizer() -> None:
    """With ``step``, a step is read whole: all its calls, and the gradients of them."""
    model, data = Net(), batches(12)
    with torchprobe.record(model, "head", of=("output", "gradient", "weight_gradient"), every=2) as rec:
        for index in range(4):
            for x in data[3 * index : 3 * index + 3]:
                train(model, [x], model)
            rec.step()
    calls = {name: rec[name].calls for name in rec}
    assert calls == {"head": 6, "head@gradient": 6, "head@weight_gradient": 6}


def test_windows_totals_and_metrics() -> None:
    model, data = Net(), batches(4)
    with torchprobe.record(model, "head", of=("output", "gradient", "weight"), outlier_sigma=1.4) as rec:
        for step, x in enumerate(data):
            train(model, [x], model)
            rec.snapshot(step)
        metrics = rec.metrics()
        train(model, data[:1], model)
    assert {name.rpartition("/")[0] for name in metrics} == {"head", "head@gradient", "head@weight"}
    assert all(math.isnan(value) for value in metrics.values())
    assert rec.history.layers == rec.layers
    assert rec.history["vectors"].tolist() == [[15.0 if "weight" not in name else 6.0 for name in rec.layers]] * 4
    assert rec.total["head@gradient"].vectors == 75
    assert rec.settings.of == "output+gradient+weight"


def test_metrics_have_the_same_keys_before_anything_fired() -> None:
    model = Net()
    rec = torchprobe.record(model, "head", of=("output", "gradient", "weight", "weight_gradient"))
    with rec:
        before = rec.metrics("x/")
        train(model, batches(1), model)
        after = rec.metrics("x/")
    assert before.keys() == after.keys()
    assert all(math.isnan(value) for value in before.values())
    assert not all(math.isnan(value) for value in after.values())


def test_masks_and_positions_apply_to_activations_only() -> None:
    model, data = Net(), batches(1)
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[:, 1] = True
    for positions, vectors in (("all", 5), ("patch", 5), ("mean", 5)):
        with torchprobe.record(model, "head", of=KINDS, positions=positions) as rec, rec.mask(mask):
            seen = train(model, data, model)
        assert [rec[name].vectors for name in ("head", "head@input", "head@gradient")] == [vectors] * 3
        oracle.assert_close(rec["head@weight"], seen["head.weight@weight"][0], 0)
        oracle.assert_close(rec["head@weight_gradient"], seen["head.weight@weight_gradient"][0], 0)


def test_feature_dim_applies_to_activations_only() -> None:
    model, data = Net(), batches(1)
    with torchprobe.record(model, "head", of=("output", "weight"), feature_dim=1) as rec:
        model(data[0])
    assert (rec["head"].features, rec["head@weight"].features) == (3, 4)


@pytest.mark.parametrize("statistic", [Moments, [Moments, Quantile], Quantile])
def test_other_statistics(statistic: Any) -> None:
    model, data = Net(), batches(2)
    with torchprobe.record(model, "head", of=KINDS, statistic=statistic) as rec:
        train(model, data, model)
    assert len(rec) == 5
    assert all(not math.isnan(row[next(iter(rec.fields))]) for row in rec.rows())


# -- files, resuming, merging ------------------------------------------------------------------------------------------------------------


def test_files_resuming_and_merging(tmp_path: Path) -> None:
    model, data = Net(), batches(5)
    make = lambda: torchprobe.record(model, "**", of=("output", "gradient", "weight_gradient"), every=2)  # noqa: E731
    with told(), make() as whole:
        for step, x in enumerate(data):
            train(model, [x], model, rate=0)
            if step == 2:
                whole.snapshot(step)
    with told(), make() as first:
        train(model, data[:3], model, rate=0)
        first.snapshot(2)
    first.save(tmp_path / "run.safetensors")
    loaded = torchprobe.load(tmp_path / "run.safetensors")
    assert loaded.settings == first.settings == whole.settings
    assert loaded.layers == first.layers
    assert [(row["layer"], row["of"], row["feature_dim_by"]) for row in loaded.rows()] == [
        (row["layer"], row["of"], row["feature_dim_by"]) for row in first.rows()
    ]
    for name in first:
        assert torch.equal(loaded.total[name].state, first.total[name].state)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with told(), second:
        train(model, data[3:], model, rate=0)
    assert set(second.layers) == set(whole.layers)
    for name in whole:
        torch.testing.assert_close(second.total[name].state, whole.total[name].state, rtol=1e-12, atol=1e-12)
    third = make()
    with told(), third:
        train(model, data[3:], model, rate=0)
    merged = loaded.merge(third)
    assert merged["head@gradient"].vectors == 15
    assert merged.total["head@weight_gradient"].vectors == 3 * 6
    with pytest.raises(ValueError, match="made with different settings"):
        merged.merge(torchprobe.record(model, "**", of=("output", "gradient")))
    saved = json.dumps([row["layer"] for row in merged.rows()])
    assert "head@gradient" in saved


def test_rows_of_what_never_fired_say_their_kind() -> None:
    model = Net()
    with told() as texts, torchprobe.record(model, "head", of=("output", "gradient", "weight_gradient")) as rec:
        model(batches(1)[0])
    assert rec.layers == ["head"]
    assert "2 of 3 layers never fired" in texts[-1]
    assert "'head@gradient', 'head@weight_gradient': no gradient reached it" in texts[-1]
    with pytest.raises(KeyError, match="'head@gradient' is recorded, but has not fired"):
        rec["head@gradient"]


# -- compiled ------------------------------------------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow("compiles with inductor"))])
@pytest.mark.parametrize("of", [KINDS, ("weight", "weight_gradient")])
def test_compiled(of: Any, backend: str) -> None:
    data = [x.double() for x in batches(2)]
    recordings = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        call = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        with told() as texts, torchprobe.record(model, LAYERS, of=of) as rec:
            train(call, data, model)
        assert texts == []
        recordings.append(rec)
    plain, seen = recordings
    assert set(plain.layers) == set(seen.layers)
    for name in plain:
        assert seen[name].calls == plain[name].calls == 2
        torch.testing.assert_close(seen[name].state, plain[name].state, rtol=1e-9, atol=1e-9)


@COMPILER_WARNINGS
def test_other_parameters_compiled() -> None:
    model = nn.Sequential(Calls(lambda self, x: self.gamma * x @ self.kernel, inner=nn.Identity()), nn.Linear(4, 6)).double()
    model[0].kernel, model[0].gamma = nn.Parameter(torch.randn(6, 4).double()), nn.Parameter(torch.randn(1, 6).double())
    x = torch.randn(5, 6).double()
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with told() as texts, torchprobe.record(model, "*", of=("weight", "weight_gradient")) as rec:
            call(x).square().sum().backward()
        assert texts == []
        assert set(rec.layers) == {f"{name}{kind}" for name in ("0:kernel", "0:gamma", "1") for kind in ("", "@weight_gradient")}
        oracle.assert_close(rec["1@weight_gradient"], model[1].weight.grad, 0)
        assert rec["0:kernel"].calls == rec["0:kernel@weight_gradient"].calls == 1
