"""The recorder and the recording: numbers, selection of calls, and display."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, activations, assert_equal, batches, record
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning
from torchprobe.statistics.moments import FIELDS

stats = pytest.importorskip("scipy.stats")


def test_every_number_against_scipy_on_all_activations() -> None:
    model, data = Net(), batches(4)
    rec = record(model, data, "**", outlier_sigma=1.4)
    for layer, x in activations(model, data).items():
        m = rec[layer]
        close = {"rtol": 1e-6, "atol": 0}
        np.testing.assert_allclose(m.mean, x.mean(0), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(m.variance, x.var(0), **close)
        np.testing.assert_allclose(m.skewness, stats.skew(x), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(m.kurtosis, stats.kurtosis(x, fisher=False), **close)
        assert np.array_equal(m.min, x.min(0))
        assert np.array_equal(m.max, x.max(0))
        np.testing.assert_allclose(m.mean_abs, abs(x).mean(0), **close)
        across = stats.kurtosis(x, axis=1, fisher=False)
        assert m.vector_kurtosis == pytest.approx(across.mean(), rel=1e-6)
        assert m.vector_kurtosis_std == pytest.approx(across.std(), rel=1e-5)
        z = abs(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        np.testing.assert_allclose(m.outlier_frequency, (z > 1.4).mean(0), atol=1e-12)
        assert m.vectors == len(x) == 60


def test_inputs_and_gradients_against_autograd() -> None:
    model, data = Net(), batches(1)
    with torchprobe.record(model, "**", of="input") as inputs, torchprobe.record(model, "**", of="gradient") as gradients:
        x = data[0].clone().requires_grad_()
        (model(x) ** 3).sum().backward()
    assert torch.equal(inputs["blocks.0"].max, data[0].double().flatten(0, 1).amax(0))
    y = data[0]
    outputs = []
    for block in model.blocks:
        y = block(y)
        y.retain_grad()
        outputs.append(y)
        y = torch.tanh(y)
    out = model.head(y)
    out.retain_grad()
    (out**3).sum().backward()
    for layer, grad in {"": out.grad, **{f"blocks.{i}": o.grad for i, o in enumerate(outputs)}}.items():
        g = grad.double().flatten(0, 1)
        np.testing.assert_allclose(gradients[layer].kurtosis, stats.kurtosis(g, fisher=False), rtol=1e-5)
        np.testing.assert_allclose(gradients[layer].mean_abs, g.abs().mean(0), rtol=1e-5)
    assert gradients.layers == ["blocks.0", "blocks.1", "blocks.2", "head", ""]  # forward order


def test_firing_order_and_mapping() -> None:
    class Backwards(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.blocks[2](x)))

    model = Backwards()
    with pytest.warns(RecordingWarning, match="'blocks.1': the forward does not call it"):
        rec = record(model, batches(1), "**")
    assert rec.layers == list(rec) == ["blocks.2", "blocks.0", "head", ""]
    assert len(rec) == 4
    assert "head" in rec
    assert "blocks.1" not in rec
    with pytest.raises(KeyError, match="'blocks.1' is recorded, but has not fired"):
        rec["blocks.1"]
    with pytest.raises(KeyError, match="no layer 'heda' was recorded; did you mean 'head'"):
        rec["heda"]


def test_what_is_read_is_a_copy() -> None:
    model = Net()
    with torchprobe.record(model) as rec:
        model(batches(1)[0])
        before = rec["blocks.0"]
        rec.snapshot(0)
        model(batches(1)[0])
    assert before.vectors == 15
    before.reset()
    assert rec["blocks.0"].vectors == 15


def test_rows_table_and_plot() -> None:
    rec = record(Net(), batches(2))
    (row, *_, last) = rec.rows()
    assert list(row) == ["layer", "module", "of", "features", "feature_dim", "feature_dim_by", "positions", *FIELDS]
    assert (row["layer"], row["module"], row["features"], row["feature_dim"]) == ("blocks.0", "Linear", 6, -1)
    assert (row["of"], row["feature_dim_by"]) == ("output", "Linear")
    assert (last["layer"], last["feature_dim_by"]) == ("", "the output of 'head'")
    assert row["vector_kurtosis"] == rec["blocks.0"].vector_kurtosis
    assert row["kurtosis_max"] == float(rec["blocks.0"].kurtosis.max())
    assert rec.table().row_count == 4
    assert "blocks.0" in repr(rec)
    pytest.importorskip("matplotlib").use("Agg")
    assert rec.plot().axes


def test_metrics_are_stable_floats_under_a_prefix() -> None:
    model = Net()
    with torchprobe.record(model) as rec:
        model(batches(1)[0])
        first = rec.metrics(prefix="act/")
        rec.snapshot(0)
        empty = rec.metrics(prefix="act/")
        model(batches(1)[0])
    assert list(first) == [f"act/{layer}/{field}" for layer in rec for field in FIELDS]
    assert all(type(value) is float for value in first.values())
    assert first["act/blocks.1/vector_kurtosis"] == rec["blocks.1"].vector_kurtosis
    assert list(empty) == list(first)
    assert math.isnan(empty["act/blocks.1/std"])


def test_paused_and_modes() -> None:
    model, data = Net(), batches(4)
    with (
        torchprobe.record(model) as rec,
        torchprobe.record(model, when="train") as train,
        torchprobe.record(model, when="eval") as validation,
    ):
        model(data[0])
        with rec.paused(), rec.paused():
            model.eval()
            model(data[1])
        model.train()
        model(data[2])
    assert_equal(rec, record(model, [data[0], data[2]]))
    assert_equal(train, record(model, [data[0], data[2]]))
    assert_equal(validation, record(model, [data[1]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"of": "outputs"}, ValueError, "of must be one of 'output', 'input', 'gradient', 'weight', 'weight_gradient'; got 'outputs'"),
        ({"positions": "cls"}, ValueError, "positions must be one of 'all', 'class', 'patch', 'mean'"),
        ({"when": "test"}, ValueError, "when must be one of"),
        ({"every": 0}, ValueError, "every must be a whole number of at least 1"),
        ({"every": 2.0}, ValueError, "every must be a whole number"),
        ({"outlier_sigma": 0}, ValueError, "outlier_sigma must be positive"),
        ({"layers": "nope"}, ValueError, "no layer 'nope'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torchprobe.record(Net(), **arguments)
    with pytest.raises(TypeError, match="takes a torch.nn.Module, got function"):
        torchprobe.record(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [5, 3])  # as many as inputs, too
@pytest.mark.parametrize("positions", ["all", "class", "patch", "mean"])
def test_positions_of_sequence_first_attention(positions: str, tokens: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16).eval()
    x = torch.randn(tokens, 3, 8)
    with torchprobe.record(layer, ["", "linear1"], positions=positions) as rec:
        out = layer(x).detach().double()
    chosen = {"all": out, "class": out[:1], "patch": out[1:], "mean": out.mean(0)}[positions].flatten(0, -2)
    assert rec[""].vectors == rec["linear1"].vectors == len(chosen)
    np.testing.assert_allclose(rec[""].mean, chosen.mean(0), rtol=1e-5, atol=1e-6)


def test_start_and_stop_without_with() -> None:
    model, data = Net(), batches(3)
    rec = torchprobe.record(model)
    model(data[0])
    assert rec.start() is rec
    with pytest.raises(RuntimeError, match="running already"):
        rec.start()
    model(data[1])
    rec.stop()
    rec.stop()
    model(data[0])
    rec.start()
    model(data[2])
    rec.stop()
    assert_equal(rec, record(model, data[1:]))


def test_a_recorder_keeps_no_model_alive() -> None:
    import gc
    import weakref

    model = Net()
    rec = record(model, batches(1))
    gone = weakref.ref(model.head)
    del model
    gc.collect()
    assert rec["blocks.0"].vectors == 15
    assert gone() is None
    with pytest.raises(RuntimeError, match="the model of this recorder no longer exists"):
        rec.start()


class Range:
    """The smallest and largest value, in a class of the earlier protocol."""

    def __init__(self, features: int, device: Any = None, outlier_sigma: float = 6.0) -> None:
        self.features = features
        self.state = torch.zeros(3, features, device=device)

    def update(self, x: Tensor, feature_dim: int = -1) -> None:
        x = x.detach().movedim(feature_dim, -1).flatten(0, -2)
        self.state.copy_(torch.stack([self.state[0] + len(x), *torch.cat([self.state[1:], x]).aminmax(dim=0)]))

    def merge(self, other: Range) -> Range:
        self.state.copy_(
            torch.stack(
                [
                    self.state[0] + other.state[0],
                    torch.minimum(self.state[1], other.state[1]),
                    torch.maximum(self.state[2], other.state[2]),
                ]
            )
        )
        return self

    def reset(self) -> None:
        self.state.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state.clone()}

    def load_state_dict(self, state: Any) -> None:
        self.state.copy_(state["state"])


def test_a_class_of_the_earlier_protocol() -> None:
    model, data = Net(), batches(2)
    with pytest.warns(DeprecationWarning, match="Range is not a subclass of torchprobe.statistics.Statistic") as caught:
        rec = torchprobe.record(model, "head", statistic=Range)
    assert caught[0].filename == __file__
    with rec:
        for x in data:
            model(x)
    expected = torch.from_numpy(activations(model, data)["head"]).float()
    assert isinstance(rec["head"], Range)
    assert torch.equal(rec["head"].state[2], expected.amax(0).clamp(min=0))
    with pytest.warns(DeprecationWarning, match="Range"):
        other = torchprobe.record(model, "head", statistic=Range)
    other.load_state_dict(rec.state_dict())
    assert torch.equal(other["head"].state, rec["head"].state)
    assert rec.metrics() == {}
    (row,) = rec.rows()
    assert row == {
        "layer": "head",
        "module": "Linear",
        "of": "output",
        "features": 4,
        "feature_dim": -1,
        "feature_dim_by": "Linear",
        "positions": "all",
    }
    rec.snapshot(0)
    assert torch.equal(rec.total["head"].state, other["head"].state)
    with pytest.raises(ValueError, match="Range.update takes no mask"):
        rec.mask(torch.ones(1, 1, dtype=torch.bool))
