"""Weights that are elsewhere, or nowhere yet: a state is never on ``meta``, where numbers vanish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import told
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import FEATURES, Moments, Quantile, State, Statistic, TopInputs

SIZES = (5, 3, 4)
DATA = [torch.randn(size, 8, generator=torch.Generator().manual_seed(size)) for size in SIZES]


class TotalOffloaded(Statistic):
    states = {"total": State((FEATURES,))}
    fields = {"sum": "sum of all values"}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.total += x.sum(0)

    def summarize(self, states: Any) -> dict[str, Tensor]:
        return {"sum": states["total"].sum(-1)}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def offloaded() -> nn.Sequential:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


def materialized() -> nn.Sequential:
    model = on_meta()
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    return model


def partly_offloaded() -> nn.Sequential:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    accelerate.cpu_offload(model[0], execution_device="cpu")
    return model


def dispatched_to_disk(folder: Path) -> nn.Sequential:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    accelerate.disk_offload(model, str(folder), execution_device="cpu")
    return model


def saved(statistic: Any = Moments, data: list[Tensor] = DATA[:1], **options: Any) -> torchprobe.Recorder:
    model = net()
    with torchprobe.record(model, "**", statistic=statistic, **options) as rec:
        for x in data:
            model(x)
        rec.snapshot(0)
        for x in data:
            model(x)
    return rec


def want(layer: str, data: list[Tensor]) -> Tensor:
    model, outputs = net(), []
    for x in data:
        h = model[0](x)
        outputs.append({"0": h, "1": h.relu(), "2": model[2](h.relu()), "": model[2](h.relu())}[layer].detach())
    return torch.cat(outputs)


def devices(rec: torchprobe.Recorder) -> set[str]:
    return {tensor.device.type for slot in rec._bank.slots() for tensor in slot.statistic.tensors().values()}


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "plain": net,
    "offloaded": offloaded,
    "partly": partly_offloaded,
    "materialized": materialized,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


@every_model
def test_an_offloaded_model_is_recorded(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    with told() as texts, torchprobe.record(model, "**") as rec:
        for x in DATA:
            model(x)
    assert texts == []
    assert devices(rec) == {"cpu"}
    for layer in ("0", "1", "2", ""):
        oracle.assert_close(rec[layer], want(layer, DATA))


@every_model
def test_a_state_that_is_loaded_first_is_continued(make: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    torch.save(saved().state_dict(), tmp_path / "state.pt")
    model = make()
    rec = torchprobe.record(model, "**")
    rec.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert devices(rec) == {"cpu"}
    oracle.assert_close(rec["0"], want("0", DATA[:1]))  # before anything ran
    with rec:
        for x in DATA[1:]:
            model(x)
    for layer in ("0", "1", "2", ""):
        oracle.assert_close(rec[layer], want(layer, DATA))
        assert rec.total[layer].count.tolist() == [5 + sum(SIZES)] * rec[layer].features
    assert rec.history.steps == [0]
    rec.snapshot(1)
    column = rec.history.layers.index("2")
    assert rec.history["vectors"][:, column].tolist() == [5.0, 12.0]
    rec.save(tmp_path / "run.safetensors")
    assert torchprobe.load(tmp_path / "run.safetensors").total["2"].vectors == 17


@every_model
def test_another_recording_is_merged_first(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    rec = torchprobe.record(model, "**").merge(saved())
    with rec:
        for x in DATA[1:]:
            model(x)
    oracle.assert_close(rec["2"], want("2", DATA))
    assert devices(rec) == {"cpu"}


@pytest.mark.parametrize(
    "statistic",
    [TotalOffloaded, Quantile, TopInputs, [Moments, TotalOffloaded, Quantile]],
    ids=["own", "quantile", "top inputs", "several"],
)
def test_other_statistics(statistic: Any) -> None:
    model, first = on_meta(), saved(statistic)
    rec = torchprobe.record(model, "**", statistic=statistic)
    rec.load_state_dict(first.state_dict())
    assert devices(rec) <= {"cpu"}
    assert numbers(rec) == pytest.approx(numbers(first), nan_ok=True)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    with rec:
        for x in DATA[1:]:
            model(x)
    straight = net()
    with torchprobe.record(straight, "**", statistic=statistic) as expected:
        for x in DATA:
            straight(x)
    assert numbers(rec) == pytest.approx(numbers(expected), rel=1e-9, abs=1e-9, nan_ok=True)
    assert not all(value != value for value in numbers(rec).values())


def numbers(rec: torchprobe.Recording) -> dict[str, float]:
    return {f"{row['layer']}/{field}": row[field] for row in rec.rows() for field in rec.fields}


def test_a_state_that_is_loaded_before_the_weights_are_made() -> None:
    """``to_empty`` makes the weights of a model on ``meta``. What was loaded before it stays."""
    model = on_meta()
    rec = torchprobe.record(model, "**")
    rec.load_state_dict(saved().state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    with rec:
        for x in DATA[1:]:
            model(x)
    for layer in ("0", "1", "2", ""):
        oracle.assert_close(rec[layer], want(layer, DATA))


def test_a_model_that_leaves_meta_while_it_is_recorded() -> None:
    model = on_meta()
    with told() as texts, torchprobe.record(model, "**") as rec:
        model(DATA[0].to("meta"))
        assert rec.layers == []
        model.to_empty(device="cpu")
        model.load_state_dict(net().state_dict())
        for x in DATA:
            model(x)
    assert texts == []
    for layer in ("0", "1", "2", ""):
        oracle.assert_close(rec[layer], want(layer, DATA))


def test_a_model_that_goes_to_meta_keeps_what_was_read() -> None:
    model = net()
    with torchprobe.record(model, "**") as rec:
        model(DATA[0])
        model.to("meta")
        model(DATA[1].to("meta"))
    assert devices(rec) == {"cpu"}
    oracle.assert_close(rec["2"], want("2", DATA[:1]))


def test_a_meta_model_alone_is_told() -> None:
    model = on_meta()
    with told() as texts, torchprobe.record(model, "**") as rec:
        model(DATA[0].to("meta"))
    assert rec.layers == []
    assert "it was only exported or traced, without real numbers to read" in texts[-1]
    assert rec.rows() == []


@pytest.mark.parametrize("of", ["input", "gradient", "weight", "weight_gradient", ("output", "weight")])
def test_other_kinds(of: Any) -> None:
    """Weights are where they are used: on ``meta`` there is nothing to read, and it is said."""
    model = offloaded()
    with told() as texts, torchprobe.record(model, "[02]", of=of) as rec:
        for x in DATA:
            out = model(x.clone().requires_grad_())
            if "gradient" in of:
                out.sum().backward()
    assert devices(rec) <= {"cpu"}
    plain = net()
    with told(), torchprobe.record(plain, "[02]", of=of) as expected:
        for x in DATA:
            out = plain(x.clone().requires_grad_())
            if "gradient" in of:
                out.sum().backward()
    for layer in rec:
        assert rec[layer].vectors == expected[layer].vectors
        torch.testing.assert_close(rec[layer].max, expected[layer].max)
    missing = set(expected.layers) - set(rec.layers)
    assert all(f"'{layer}'" in texts[-1] for layer in missing)
    if of in ("input", "gradient"):
        assert not missing


def test_weights_on_disk(tmp_path: Path) -> None:
    model = dispatched_to_disk(tmp_path)
    rec = torchprobe.record(model, "**")
    rec.load_state_dict(saved().state_dict())
    with rec:
        for x in DATA[1:]:
            model(x)
    oracle.assert_close(rec["0"], want("0", DATA))


def test_metrics_and_windows_of_an_offloaded_model() -> None:
    model = offloaded()
    with torchprobe.record(model, "[02]") as rec:
        for step, x in enumerate(DATA):
            model(x)
            rec.snapshot(step)
            metrics = rec.metrics()
    assert rec.history["vectors"].tolist() == [[float(size)] * len(rec) for size in SIZES]
    assert metrics
    with torchprobe.record(model, "**") as again:
        model(DATA[0])
    oracle.assert_close(again["2"], want("2", DATA[:1]))
