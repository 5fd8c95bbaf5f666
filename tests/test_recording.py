"""The recorder and the recording: numbers, selection of calls, and display."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, activations, assert_equal, batches, record
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning, bank, recorder
from torchprobe.statistics import Moments, Norms, Quantile, Saturation, Sparsity, TopInputs
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


@pytest.mark.parametrize("statistic", [Moments, [Moments, Sparsity], Quantile])
def test_reading_all_layers_takes_one_step_for_each(statistic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    entry = bank.entry_of
    for place in (bank, recorder):
        monkeypatch.setattr(place, "entry_of", lambda stream: made.append(stream.name) or entry(stream))
    for depth in (5, 40):
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)])
        model.add_module("again", model[0])
        rec = record(model, [torch.randn(4, 3)], "*", statistic=statistic)
        for read in (
            lambda rec: dict(rec.items()),
            lambda rec: dict(zip(rec, rec.values(), strict=True)),
            lambda rec: {layer: rec[layer] for layer in rec.layers},
        ):
            made.clear()
            found = read(rec)
            assert list(found) == rec.layers == [str(i) for i in range(depth)]
            assert len(made) <= 4 * depth  # the layers themselves are listed two or three times
            assert [one.state_dict().keys() for one in found.values()] == [rec[name].state_dict().keys() for name in found]
            found["0"].reset()  # it is a copy
            assert rec["0"].saw_anything()
            assert ("again" in rec, "none" in rec, 3 in rec) == (True, False, False)
    total = rec.total
    monkeypatch.setattr(total, "_entries", lambda: pytest.fail("a lookup lists all layers"))
    assert total["again"] is total["0"]
    assert "none" not in total


def test_the_text_of_a_recording_is_short_and_takes_one_copy() -> None:
    calls = []
    for depth in (21, 60):
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)])
        rec = record(model, [torch.randn(4, 3)], "*")
        with Counting() as counted:
            lines = repr(rec).splitlines()
        calls.append(counted.calls)
        assert lines[0] == f"Recorder({depth} layers, 0 windows closed)"
        numbers = rec.metrics(layers="0")
        shown = ", ".join(f"{name}={numbers[f'0/{name}']:.4g}" for name in MAIN)
        assert lines[1] == f"  '0': Moments(3 features, {shown})"
        assert len(lines) == 22
        assert lines[-1] == f"  … and {depth - 20} more"
    assert calls[0] == calls[1] > 0
    rec.snapshot(0)
    assert repr(rec).splitlines()[20] == "  '19': Moments(3 features, empty)"
    assert repr(rec.total).startswith("Recording(60 layers, 0 windows closed)\n  '0': Moments(3 features, vector_kurtosis=1.5")
    few = record(Net(), batches(1), "head", statistic=[Sparsity, Norms])
    assert repr(few).splitlines()[1].startswith("  'head': Sparsity+Norms(4 features, zero_share=0, dead_features=0, norm_mean=")
    assert len(repr(few).splitlines()) == 2
    assert repr(torchprobe.record(Net())) == "Recorder(0 layers, 0 windows closed)"


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_metrics_are_stable_floats_under_a_prefix() -> None:
    model = Net()
    with torchprobe.record(model) as rec:
        model(batches(1)[0])
        first = rec.metrics(prefix="act/")
        rec.snapshot(0)
        empty = rec.metrics(prefix="act/")
        model(batches(1)[0])
    assert list(first) == [f"act/{layer}/{field}" for layer in rec for field in MAIN]
    assert all(type(value) is float for value in first.values())
    assert first["act/blocks.1/vector_kurtosis"] == rec["blocks.1"].vector_kurtosis
    assert list(empty) == list(first)
    assert math.isnan(empty["act/blocks.1/std"])


MAIN = ("vector_kurtosis", "nonfinite", "abs_max", "std", "kurtosis_max")


def test_metrics_of_chosen_fields_and_layers() -> None:
    model = Net()
    rec = record(model, batches(1), "**")
    everything = rec.metrics(fields="all")
    assert list(everything) == [f"{layer}/{field}" for layer in rec for field in FIELDS]
    rows = {row["layer"]: row for row in rec.rows()}
    assert everything == pytest.approx({f"{layer}/{field}": rows[layer][field] for layer in rec for field in FIELDS}, nan_ok=True)
    for fields, names in (("rms", ["rms"]), (["min", "max", "min"], ["min", "max"]), ((), []), (iter(["std"]), ["std"])):
        assert list(rec.metrics("a/", fields=fields)) == [f"a/{layer}/{name}" for layer in rec for name in names]
    for layers, names in (
        ("head", ["head"]),
        ("", [""]),
        ("(output)", [""]),
        ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("**", ["blocks.0", "blocks.1", "blocks.2", "head", ""]),
        (["head", "blocks.[02]", "head"], ["blocks.0", "blocks.2", "head"]),
        ("module._orig_mod.head", ["head"]),
        ([], []),
    ):
        for recording in (rec, rec.total):
            assert list(recording.metrics(fields="std", layers=layers)) == [f"{name}/std" for name in names], layers
    assert rec.metrics(layers="head") == {key: everything[key] for key in everything if key in {f"head/{name}" for name in MAIN}}


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"fields": "vector_kurtosi"}, ValueError, "'vector_kurtosi' is not a field of this recording; did you mean vector_kurtosis"),
        ({"fields": ["std", "zzz"]}, ValueError, "'zzz' is not a field of this recording; it has vectors, constant_vectors, "),
        ({"fields": [3]}, ValueError, "3 is not a field"),
        ({"fields": 3}, ValueError, "3 is not a field"),
        ({"layers": "haed"}, ValueError, "layers=: 'haed' is not one of the recorded layers; did you mean head?"),
        ({"layers": ["head", "x.*"]}, ValueError, "'x.*' is not one of the recorded layers; the layers are '"),
        ({"layers": 0}, TypeError, "layers= takes a name or glob, or several of them; got 0"),
        ({"layers": [None]}, TypeError, "got None"),
    ],
)
def test_metrics_of_unknown_fields_and_layers_are_refused(choice: dict[str, Any], error: type[Exception], message: str) -> None:
    rec = record(Net(), batches(1), "**")
    for recording in (rec, rec.total):
        with pytest.raises(error, match=re.escape(message)):
            recording.metrics(**choice)


def test_metrics_of_layers_with_several_names_and_of_silent_ones() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model.add_module("again", model[0])
    rec = torchprobe.record(model, "*")
    before = rec.metrics(fields="std")
    assert list(before) == ["0/std", "1/std", "2/std"]  # nothing has run yet
    assert all(math.isnan(value) for value in before.values())
    assert list(rec.metrics(fields="std", layers=["2", "aga*"])) == ["0/std", "2/std"]
    with rec:
        model(batches(1)[0])
    assert list(rec.metrics(fields="std", layers=["2", "aga*"])) == ["0/std", "2/std"]
    assert not any(math.isnan(value) for value in rec.metrics().values())


def test_layers_that_cannot_be_read_are_known() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0).long()

    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), Counts())
    rec = torchprobe.record(model).start()
    for keys in ({"/std"}, set()):  # in the first step the recorder does not know yet that there is nothing to read
        assert rec.metrics(layers="0.0", fields="std").keys() == {"0.0/std"}
        assert rec.metrics(layers="", fields="std").keys() == keys  # no error, which would end the run
        model(batches(1)[0])
    with pytest.warns(RecordingWarning):
        rec.stop()
    assert rec.metrics(layers=["", "*.1"], fields="std").keys() == {"0.1/std"}


@pytest.mark.parametrize(
    ("statistics", "names"),
    [
        ([Moments], MAIN),
        ([Sparsity], ("zero_share", "dead_features")),
        ([Moments, Sparsity], (*MAIN[:3], "zero_share", "Sparsity.dead_features")),
        ([Sparsity, Moments], ("zero_share", "dead_features", *MAIN[:3])),
        ([Norms, Saturation], ("norm_mean", "norm_max", "rms_mean", "saturated", "saturated_low")),
        ([Moments, Norms, Sparsity], (*MAIN[:2], "norm_mean", "norm_max", "zero_share")),
        (
            [Moments, Norms, Sparsity, Saturation, Quantile, TopInputs],
            (MAIN[0], "norm_mean", "zero_share", "saturated", "quantile_max"),
        ),
    ],
)
def test_several_statistics_share_the_five_default_metrics(statistics: list[Any], names: tuple[str, ...]) -> None:
    for recording in (rec := record(Net(), batches(1), "head", statistic=statistics), rec.total):
        assert list(recording.metrics()) == [f"head/{name}" for name in names]
        assert list(recording.metrics(fields="all")) == [f"head/{name}" for name in recording.fields]


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
