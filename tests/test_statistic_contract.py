"""One suite for every statistic, including the example of docs/statistics.md."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import COMPILER_WARNINGS, Net, activations, batches
from statistic_kinds import Kind, kinds
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning
from torchprobe.recording.control import Slot
from torchprobe.recording.hook import Hook
from torchprobe.statistics import FEATURES, Moments, Quantile, Several, State, Statistic, TopInputs

KINDS = kinds()
everyone = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def run(model: nn.Module, data: list[Tensor], kind: Kind, **options: Any) -> torchprobe.Recorder:
    with torchprobe.record(model, "**", statistic=kind.statistic, **options) as rec:
        for x in data:
            model(x)
    return rec


def assert_same(a: torchprobe.Recording, b: torchprobe.Recording, rtol: float = 1e-9, by: bool = True) -> None:
    """Fields and states are equal for any statistic, except counters of calls. ``by``: and what decided the dimension of the features."""
    assert a.layers == b.layers
    for mine, theirs in zip(a.rows(), b.rows(), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key == "feature_dim_by" and not by:
                continue
            close = (
                value == theirs[key] if isinstance(value, str) else pytest.approx(theirs[key], rel=rtol, abs=1e-12, nan_ok=True) == value
            )
            assert close, key
    for layer in a:
        one, other = a[layer].state_dict(), b[layer].state_dict()
        assert one.keys() == other.keys()
        for key in one:
            buffer = "/" in key or key.endswith("generator")  # of a Quantile: in any order
            if isinstance(one[key], Tensor) and not buffer and not key.endswith("calls"):
                torch.testing.assert_close(one[key], other[key], rtol=rtol, atol=1e-9, equal_nan=True)


def assert_numbers(rec: torchprobe.Recording, model: Net, data: list[Tensor], kind: Kind) -> None:
    """Every field is that of all activations in float64."""
    rows = {row["layer"]: row for row in rec.rows()}
    for layer, x in activations(model, data).items():
        for name, value in kind.oracle(x).items():
            assert rows[layer][name] == pytest.approx(value, rel=1e-5), (layer, name)


@everyone
def test_numbers(kind: Kind) -> None:
    model, data = Net(), batches(4)
    rec = run(model, data, kind)
    assert_numbers(rec, model, data, kind)
    assert rec.settings.statistic == kind.name
    for layer in rec:
        statistic = rec[layer]
        assert isinstance(statistic, Statistic)
        assert list(statistic.summary()) == list(rec.fields) == list(statistic.fields)
        assert type(statistic).__name__ in repr(statistic)
        assert "<table>" in statistic._repr_html_()
    assert repr(rec).startswith("Recorder(5 layers, 0 windows closed)")


@everyone
def test_windows_history_and_total(kind: Kind) -> None:
    model, data = Net(), batches(5)
    with torchprobe.record(model, "**", statistic=kind.statistic) as rec:
        for step, x in enumerate(data[:4]):
            model(x)
            if step % 2:
                rec.snapshot(step)
        model(data[4])
    assert_numbers(rec, model, data[4:], kind)
    assert_numbers(rec.total, model, data, kind)
    assert_same(rec.total, run(model, data, kind))
    assert rec.history.steps == [1, 3]
    assert rec.history.fields == tuple(rec.fields)
    for index, part in enumerate((data[:2], data[2:4])):
        window = run(model, part, kind).rows()
        for field in rec.fields:
            np.testing.assert_allclose(rec.history[field][index], [row[field] for row in window], rtol=1e-9, atol=1e-12)
    assert len(rec.history.rows()) == 2 * len(rec)
    with pytest.raises(KeyError, match="not a field"):
        rec.history["nonsense"]
    rec.reset()
    assert not rec.history.steps
    assert all(math.isnan(value) for value in rec.metrics(fields="all").values())


@everyone
def test_what_is_shown(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    model, data = Net(), batches(4)
    with torchprobe.record(model, "**", statistic=kind.statistic) as rec:
        for step in range(3):
            model(data[step])
            rec.snapshot(step)
        model(data[3])
    rows = rec.rows()
    assert [row["layer"] for row in rows] == rec.layers
    assert {"layer", "module", "of", "features", "feature_dim", "feature_dim_by", "positions", *rec.fields} == rows[0].keys()
    metrics = rec.metrics(prefix="act/", fields="all")
    few = rec.metrics(prefix="act/")
    assert few == pytest.approx({key: metrics[key] for key in few}, nan_ok=True)
    assert {key.rpartition("/")[0] for key in few} == {f"act/{layer}" for layer in rec}
    assert len(few) == len(rec) * min(5, len(rec.fields))
    monkeypatch.setenv("COLUMNS", "400")
    assert metrics == pytest.approx({f"act/{row['layer']}/{field}": row[field] for row in rows for field in rec.fields}, nan_ok=True)
    headings = [str(column.header) for column in rec.table().columns]
    assert {"layer", "d", *kind.headings} <= set(headings)
    for field in (None, list(rec.fields)[-1]):
        for figure in (rec.plot(field=field), rec.plot("history", field=field), rec.history.plot(field)):
            assert figure.axes
    if rec.history.statistic.histogram_bins:
        assert rec.history.histograms.shape == (3, 5, len(rec.history.bin_edges) - 1)
        assert rec.history.plot_layer("head").axes
    else:
        assert rec.history.histograms.shape == (3, 5, 0)
        with pytest.raises(ValueError, match="keeps no histogram"):
            rec.history.plot_layer("head")
    with pytest.raises(ValueError, match="'nonsense' is not a field of this recording"):
        rec.plot(field="nonsense")


@everyone
def test_files(kind: Kind, tmp_path: Path) -> None:
    model, data = Net(), batches(4)
    with torchprobe.record(model, "**", statistic=kind.statistic) as rec:
        for step, x in enumerate(data):
            model(x)
            if step < 3:
                rec.snapshot(step)
    rec.save(tmp_path / "run.safetensors")
    loaded = torchprobe.load(tmp_path / "run.safetensors")
    assert_same(loaded, rec, rtol=0)
    assert_same(loaded.total, rec.total, rtol=0)
    assert loaded.settings == rec.settings
    assert loaded.history.steps == rec.history.steps
    np.testing.assert_array_equal(loaded.history.values, rec.history.values)
    np.testing.assert_array_equal(loaded.history.histograms, rec.history.histograms)
    again = torchprobe.load(tmp_path / "run.safetensors", statistic=kind.classes)
    assert_same(again, rec, rtol=0)
    with pytest.raises(ValueError, match="recorded with"):
        torchprobe.load(tmp_path / "run.safetensors", statistic=[*kind.classes, Moments])
    loaded.merge(run(model, data, kind))
    assert_numbers(loaded, model, [*data, data[3]], kind)


@everyone
def test_resuming(kind: Kind, tmp_path: Path) -> None:
    model, data = Net(), batches(6)
    with torchprobe.record(model, "**", statistic=kind.statistic, every=2) as straight:
        for step, x in enumerate(data):
            model(x)
            if step == 1:
                straight.snapshot(step)
    with torchprobe.record(model, "**", statistic=kind.statistic, every=2) as first:
        for step, x in enumerate(data[:3]):
            model(x)
            if step == 1:
                first.snapshot(step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = torchprobe.record(model, "**", statistic=kind.statistic, every=2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with second:
        for x in data[3:]:
            model(x)
    assert_same(second, straight)
    assert_same(second.total, straight.total)
    assert second.history.steps == [1]
    np.testing.assert_array_equal(second.history.values, straight.history.values)


@everyone
def test_every_reads_every_nth_call(kind: Kind) -> None:
    model, data = Net(), batches(7)
    assert_numbers(run(model, data, kind, every=3), model, data[::3], kind)


@everyone
def test_merging(kind: Kind) -> None:
    model, data = Net(), batches(5)
    rec = run(model, data[:2], kind)
    assert rec.merge(run(model, data[2:], kind)) is rec
    assert_numbers(rec, model, data, kind)
    with pytest.raises(ValueError, match="made with different settings"):
        rec.merge(torchprobe.record(model, "**", statistic=KINDS["extremes" if kind.name != "Extremes" else "moments"].statistic))
    other = Net(width=8)
    with pytest.raises(ValueError, match="layer 'blocks.0' is 6 features wide here and 8 there"):
        rec.merge(run(other, batches(1, width=8), kind))
    assert_numbers(rec, model, data, kind)  # nothing was changed


@everyone
def test_masks(kind: Kind) -> None:
    model, data = Net(), batches(3)
    mask = torch.tensor([[True, True, False]] * 4 + [[False, False, False]])
    with torchprobe.record(model, "**", statistic=kind.statistic) as rec, rec.mask(mask):
        for x in data:
            model(x)
    rows = {row["layer"]: row for row in rec.rows()}
    for layer, x in activations(model, data).items():
        kept = x[mask.flatten().repeat(3).numpy()]
        for name, value in kind.oracle(kept).items():
            if name != "inputs":  # an input without a position is still an input
                assert rows[layer][name] == pytest.approx(value, rel=1e-5), (layer, name)


@everyone
@pytest.mark.parametrize("positions", ["class", "patch", "mean"])
def test_positions(kind: Kind, positions: str) -> None:
    model, data = Net(), batches(2)
    rec = run(model, data, kind, positions=positions)
    for layer, x in activations(model, data).items():
        tokens = torch.from_numpy(x).reshape(-1, 3, x.shape[-1])
        chosen = {"class": tokens[:, 0], "patch": tokens[:, 1:].flatten(0, 1), "mean": tokens.mean(1)}[positions]
        (row,) = [row for row in rec.rows() if row["layer"] == layer]
        for name, value in kind.oracle(chosen.numpy()).items():
            assert row[name] == pytest.approx(value, rel=1e-5), (layer, name)


@everyone
@pytest.mark.parametrize("of", ["input", "gradient"])
def test_inputs_and_gradients(kind: Kind, of: str) -> None:
    model, data = Net(), batches(2)
    read: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = args[0] if of == "input" else output[0]
            read.setdefault(name, []).append(value.detach().double().flatten(0, -2))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name != "blocks":
                place = module.register_forward_hook if of == "input" else module.register_full_backward_hook
                stack.callback(place(keep(name)).remove)
        with torchprobe.record(model, "**", statistic=kind.statistic, of=of) as rec:
            for x in data:
                (model(x.clone().requires_grad_()) ** 3).sum().backward()
    for row in rec.rows():
        for name, value in kind.oracle(torch.cat(read[row["layer"]]).numpy()).items():
            assert row[name] == pytest.approx(value, rel=1e-5), (row["layer"], name)


@everyone
def test_several_devices(kind: Kind) -> None:
    model, data = Net(), batches(4)
    rec = run(model, data[:2], kind)
    other = run(model, data[2:], kind)
    for stream in rec._bank.streams():  # as if two calls had been on another device
        stream.slots[torch.device("cuda", 0)] = Slot(other[stream.name], 2)
    assert_numbers(rec, model, data, kind)
    rec.snapshot(0)
    assert_numbers(rec.total, model, data, kind)


@everyone
@COMPILER_WARNINGS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow("compiles with inductor"))])
def test_compiled(kind: Kind, backend: str) -> None:
    torch.compiler.reset()
    model, data = Net(), batches(4)
    plain = [model(x).detach() for x in data]
    with torchprobe.record(model, "**", statistic=kind.statistic, every=2) as rec:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for step, x in enumerate(data):
            torch.testing.assert_close(compiled(x).detach(), plain[step], rtol=1e-5, atol=1e-6)
            if step == 1:
                rec.snapshot(step)
        with rec.paused():
            compiled(data[0])
    assert_numbers(rec, model, data[2:3], kind)
    assert_numbers(rec.total, model, data[0:3:2], kind)
    compiled(data[0])
    assert_numbers(rec.total, model, data[0:3:2], kind)


@everyone
@COMPILER_WARNINGS
def test_compiled_training_with_gradients_and_masks(kind: Kind) -> None:
    torch.compiler.reset()
    model, x = Net(), batches(1)[0].requires_grad_()
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[:, 2] = False
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        forward = torchprobe.record(model, "**", statistic=kind.statistic)
        backward = torchprobe.record(model, "**", statistic=kind.statistic, of="gradient")
        with forward, backward, forward.mask(mask):
            (call(x) ** 2).sum().backward()
        results.append((forward, backward, x.grad.clone()))
        x.grad = None
    for eager, compiled in zip(*(result[:2] for result in results), strict=True):
        assert_same(compiled, eager, rtol=1e-6, by=False)
    torch.testing.assert_close(results[0][2], results[1][2])


@everyone
def test_copies(kind: Kind) -> None:
    model, data = Net(), batches(2)
    statistic = run(model, data[:1], kind)["head"]
    before = statistic.summary()
    for other in (statistic.clone(), copy.deepcopy(statistic), pickle.loads(pickle.dumps(statistic))):
        assert other.summary() == pytest.approx(before, nan_ok=True)
        other.update(torch.randn(3, 4))
        assert statistic.summary() == pytest.approx(before, nan_ok=True)
    empty = statistic.clone()
    empty.reset()
    assert not empty.saw_anything()
    assert statistic.saw_anything()
    assert all(math.isnan(value) for value in empty.summary().values())
    assert empty.merge(statistic).summary() == pytest.approx(before, nan_ok=True)


@everyone
def test_a_layer_that_never_fired_is_reported(kind: Kind) -> None:
    model = Net()
    with pytest.warns(RecordingWarning, match="none of the 5 layers fired: the model was not called"):
        run(model, [], kind)
    with pytest.warns(RecordingWarning, match="its 1 calls had empty batches"):
        run(model, [torch.empty(0, 3, 6)], kind)


def test_one_hook_reads_for_all() -> None:
    model, data = Net(), batches(2)
    (zeros,) = KINDS["zeros of the docs"].classes
    rec = torchprobe.record(model, "head", statistic=[Moments, zeros, functools.partial(Quantile, quantile=0.1), Quantile])
    with rec:
        assert [type(hook) for hook in model.head._forward_hooks.values()].count(Hook) == 1
        for x in data:
            model(x)
        assert [type(hook) for hook in model.head._forward_hooks.values()] == [Hook]  # what finds the features is gone
    several = rec["head"]
    assert isinstance(several, Several)
    moments, first, second, third = several
    assert len(several) == 4
    assert several[0] is several[Moments] is several["Moments"] is moments
    assert several["Zeros"] is several[zeros] is first
    assert several["Quantile_2"] is third
    assert second.quantile != third.quantile
    assert {"vector_kurtosis", "zero_share", "quantile_max", "Quantile_2.quantile_max"} <= rec.fields.keys()
    with pytest.raises(KeyError, match="no statistic 'TopInputs' was recorded; there are Moments, Zeros, Quantile, Quantile_2"):
        several[TopInputs]
    alone = torchprobe.record(model, "head")
    with alone:
        for x in data:
            model(x)
    assert torch.equal(moments.state, alone["head"].state)


def test_a_factory_chooses_by_width() -> None:
    model, data = Net(), batches(2)
    rec = torchprobe.record(model, "**", statistic=lambda width, place: Moments(width, place, outlier_sigma=0.5 * width))
    with rec:
        for x in data:
            model(x)
    assert (rec["head"].outlier_sigma, rec["blocks.0"].outlier_sigma) == (2.0, 3.0)
    expected = Moments(6, outlier_sigma=3.0)
    for x in data:
        expected.update(model.blocks[0](x))
    torch.testing.assert_close(rec["blocks.0"].state, expected.state)
    assert rec.rows()[0]["vectors"] == 30


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (3, "takes a class, a function"),
        ([], "empty list"),
        (lambda features, device: None, "returned NoneType, not a torchprobe.statistics.Statistic"),
        (dict, "dict is not a torchprobe.statistics.Statistic and has no merge"),
    ],
)
def test_other_objects_than_statistics_are_refused(statistic: Any, message: str) -> None:
    model = Net()
    with pytest.raises((TypeError, ValueError), match=message):
        torchprobe.record(model, statistic=statistic)


class Half(Statistic):
    states = {"total": State((FEATURES,))}
    fields = {"total": "sum"}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        assert x.dtype == torch.float32
        self.total += x.where(kept, 0).sum(0, dtype=torch.float64)  # type: ignore[has-type]


def test_errors_of_an_incomplete_class() -> None:
    half = Half(2)
    half.update(torch.ones(3, 2, dtype=torch.bfloat16))
    assert half.total.tolist() == [3.0, 3.0]
    with pytest.raises(NotImplementedError, match="Half must define summarize"):
        half.summary()
    with pytest.raises(NotImplementedError, match="Statistic must define accumulate"):
        Statistic(2).update(torch.ones(1, 2))
    Half.summarize = lambda self, states: {}  # type: ignore[method-assign]
    try:
        with pytest.raises(ValueError, match=r"Half.summarize must return tensors of shape \(1,\) for 1 layers; 'total' is NoneType"):
            half.summary()
    finally:
        del Half.summarize
    with pytest.raises(ValueError, match="expected 2 features along dimension -1"):
        half.update(torch.ones(3, 3))
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        half.update(torch.ones(3, 2), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="features must be at least 1"):
        Half(0)


def test_a_file_whose_class_is_unknown(tmp_path: Path) -> None:
    class Passing(Half):
        def summarize(self, states: Any) -> Any:
            return {"total": states["total"].sum(-1)}

    model = Net()
    with torchprobe.record(model, "head", statistic=Passing) as rec:
        model(batches(1)[0])
    rec.save(tmp_path / "run.safetensors")
    Passing.__name__ = "Renamed"
    with pytest.raises(ValueError, match="recorded with Passing: import the module that defines it, or call load"):
        torchprobe.load(tmp_path / "run.safetensors")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
