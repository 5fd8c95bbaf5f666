"""The recorder and the recording: numbers, windows, files, and joining."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning
from torchprobe.statistics.moments import FIELDS

stats = pytest.importorskip("scipy.stats")


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def batches(count: int, seed: int = 0, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, width, generator=generator) for _ in range(count)]


def record(model: nn.Module, data: list[Tensor], *args: Any, **kwargs: Any) -> torchprobe.Recorder:
    with torchprobe.record(model, *args, **kwargs) as rec:
        for x in data:
            model(x)
    return rec


def activations(model: Net, data: list[Tensor]) -> dict[str, np.ndarray]:
    """What every layer gave, (vectors, features) in float64, kept by hooks of our own."""
    kept: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: kept.setdefault(name, []).append(out.detach()))
        for name, module in model.named_modules()
        if name != "blocks"
    ]
    for x in data:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().flatten(0, -2).numpy() for name, parts in kept.items()}


def assert_equal(a: torchprobe.Recording, b: torchprobe.Recording, rtol: float = 0.0) -> None:
    assert a.layers == b.layers
    for layer in a:
        torch.testing.assert_close(a[layer].state, b[layer].state, rtol=rtol, atol=1e-12 if rtol else 0)


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
    assert list(row) == ["layer", "module", "features", "feature_dim", "positions", *FIELDS]
    assert (row["layer"], row["module"], row["features"], row["feature_dim"]) == ("blocks.0", "Linear", 6, -1)
    assert last["layer"] == ""
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


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would wait for a device: reads of single numbers, and copies to the host by way of `_to_copy`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        return [call for call in self.calls if "_local_scalar" in call or "nonzero" in call or "masked_select" in call]


def test_snapshot_reset_and_metrics_do_not_wait_and_do_not_grow_with_layers() -> None:
    launches = []
    for depth in (2, 12):
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)])
        with torchprobe.record(model, "*") as rec:
            model(batches(1)[0])
            rec.snapshot(0)
            model(batches(1)[0])
            with Copies() as seen:
                rec.snapshot(1)
            assert not seen.waits
            launches.append(len(seen.calls))
            with Copies() as seen:
                rec.metrics()
                rec.reset()
                with rec.paused():
                    pass
            assert not seen.waits
            launches.append(len(seen.calls))
            model(batches(1)[0])
    assert launches[:2] == launches[2:]


def test_windows_history_and_total() -> None:
    model, data = Net(), batches(6)
    windows = []
    with torchprobe.record(model) as rec:
        for step in (10, 20, 30):
            for x in data[step // 10 * 2 - 2 : step // 10 * 2]:
                model(x)
            windows.append(rec["blocks.1"])
            rec.snapshot(step)
        assert rec["blocks.1"].vectors == 0
        for x in batches(1, seed=9):
            model(x)
    assert rec.history.steps == [10, 20, 30]
    assert rec.history.layers == rec.layers
    assert len(rec.history) == 3
    column = rec.layers.index("blocks.1")
    for index, window in enumerate(windows):
        assert rec.history["vector_kurtosis"][index, column] == window.vector_kurtosis
        assert rec.history["std"][index, column] == pytest.approx(float(window.variance.mean().sqrt()), rel=1e-12)
    whole = record(model, data + batches(1, seed=9))
    assert rec.total.layers == whole.layers
    for layer in whole:
        torch.testing.assert_close(rec.total[layer].state, whole[layer].state, rtol=1e-9, atol=1e-9)
    assert rec["blocks.1"].vectors == 15
    assert {row["step"] for row in rec.history.rows()} == {10, 20, 30}
    assert len(rec.history.rows()) == 12
    with pytest.raises(KeyError, match="'kurtosis' is no field of the history; it has vectors"):
        rec.history["kurtosis"]


def test_history_is_nan_where_a_layer_did_not_fire_and_new_layers_join() -> None:
    class Branch(Net):
        which = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[self.which](x)

    model = Branch()
    with torchprobe.record(model, "blocks.*") as rec:
        for step in range(3):
            model.which = step
            model(batches(1)[0])
            rec.snapshot(step)
    vectors = rec.history["vectors"]
    assert np.array_equal(np.isnan(vectors), ~np.eye(3, dtype=bool))
    assert np.array_equal(np.diag(vectors), [15.0] * 3)
    assert [(row["step"], row["layer"]) for row in rec.history.rows()] == [(i, f"blocks.{i}") for i in range(3)]


def test_nan_shows_at_its_step_and_layer() -> None:
    model = Net()
    with torchprobe.record(model, "blocks.*") as rec:
        for step in range(3):
            if step == 1:
                with torch.no_grad():
                    model.blocks[1].weight[2, 0] = math.nan
            model(batches(1)[0])
            rec.snapshot(step)
    assert rec.history["nonfinite"].tolist() == [[0, 0, 0], [0, 15, 90], [0, 15, 90]]


def test_every_counts_on_through_windows() -> None:
    model, data = Net(), batches(7)
    with torchprobe.record(model, "head", every=3) as rec:
        for x in data[:4]:
            model(x)
        rec.snapshot(0)
        for x in data[4:]:
            model(x)
    assert rec.history["vectors"].tolist() == [[30.0]]  # calls 0 and 3
    assert rec["head"].vectors == 15  # call 6
    assert rec.total["head"].calls == rec["head"].calls == 7
    assert rec._entries()[0].closed.calls == 4
    np.testing.assert_allclose(rec.total["head"].mean, record(model, [data[0], data[3], data[6]], "head")["head"].mean)


def test_reset_forgets_everything() -> None:
    model, data = Net(), batches(3)
    with torchprobe.record(model, every=2) as rec:
        model(data[0])
        rec.snapshot(0)
        rec.reset()
        for x in data[1:]:
            model(x)
    assert len(rec.history) == 0
    assert rec.total[""].vectors == 15
    assert_equal(rec, record(model, data[1:], every=2))


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


@pytest.mark.parametrize("positions", ["class", "patch", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_and_masks_against_float64(positions: str, masked: bool) -> None:
    model, x = Net(), batches(1)[0]
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else torch.ones(5, 3, dtype=torch.bool)
    mask[4] = not masked  # an input without any token
    with torchprobe.record(model, "**", positions=positions) as rec:
        if masked:
            rec.mask(mask)
        model(x)
    for layer, flat in activations(model, [x]).items():
        h, m = torch.from_numpy(flat).reshape(5, 3, -1), mask
        if positions == "class":
            vectors = h[:, 0][m[:, 0]]
        elif positions == "patch":
            vectors = h[:, 1:][m[:, 1:]]
        else:
            vectors = torch.stack([h[i, m[i]].mean(0) for i in range(5) if m[i].any()])
        assert rec[layer].vectors == len(vectors)
        expected = stats.kurtosis(vectors.numpy(), axis=1, fisher=False).mean()
        assert rec[layer].vector_kurtosis == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(rec[layer].mean, vectors.mean(0), rtol=1e-5, atol=1e-6)


def test_mask_holds_until_changed_or_to_the_end_of_its_block() -> None:
    model, x = Net(), batches(1)[0]
    first, second = torch.zeros(5, 3, dtype=torch.bool), torch.zeros(5, 3, dtype=torch.bool)
    first[0], second[:2] = True, True
    seen = []
    with torchprobe.record(model, "head") as rec:

        def vectors() -> int:
            rec.reset()
            model(x)
            return rec["head"].vectors

        rec.mask(first)
        seen += [vectors(), vectors()]
        with rec.mask(second):
            seen.append(vectors())
        seen.append(vectors())
        rec.mask(None)
        seen.append(vectors())
    assert seen == [3, 3, 6, 3, 15]


def test_mask_passes_over_one_vector_per_input() -> None:
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x)[:, 0])

    model = Pooled()
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[:, 2] = False
    with torchprobe.record(model, ["blocks.0", "head"]) as rec, rec.mask(mask):
        model(batches(1)[0])
    assert (rec["blocks.0"].vectors, rec["head"].vectors) == (10, 5)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4, 3, dtype=torch.bool), ValueError, r"layer 'head': the mask has shape \(4, 3\).*activation has shape \(5, 3, 4\)"),
        (torch.ones(5, 3), TypeError, r"bool tensor .* got torch.float32; try mask.bool\(\)"),
        ([[True]], TypeError, "got list"),
        (torch.ones(5, dtype=torch.bool), ValueError, r"shape \(batch, tokens\), got \(5,\)"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, error: type[Exception], message: str) -> None:
    model = Net()

    def run() -> None:
        with torchprobe.record(model, "head") as rec:
            rec.mask(mask)
            model(batches(1)[0])

    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"of": "outputs"}, ValueError, "of must be one of 'output', 'input', 'gradient'; got 'outputs'"),
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


def test_positions_of_sequence_first_attention_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="its attention has batch_first=False"):
        torchprobe.record(layer, "", positions="class")
    torchprobe.record(layer, "", positions="all")


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
    """A statistic of another kind: smallest and largest value."""

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


def test_another_statistic() -> None:
    model, data = Net(), batches(2)
    rec = record(model, data, "head", statistic=Range)
    expected = torch.from_numpy(activations(model, data)["head"]).float()
    assert torch.equal(rec["head"].state[2], expected.amax(0).clamp(min=0))  # type: ignore[attr-defined]
    other = torchprobe.record(model, "head", statistic=Range)
    other.load_state_dict(rec.state_dict())
    assert torch.equal(other["head"].state, rec["head"].state)
    for refused in (rec.metrics, rec.rows, lambda: rec.snapshot(0), lambda: rec.save("nowhere")):
        with pytest.raises(TypeError, match="hold Moments, not Range"):
            refused()
    with pytest.raises(ValueError, match="Range.update takes no every"):
        torchprobe.record(model, statistic=Range, every=2)
    with pytest.raises(ValueError, match="Range.update takes no mask"):
        rec.mask(torch.ones(1, 1, dtype=torch.bool))


# -- joining and keeping -----------------------------------------------------------------------------------------------------


def test_merge_equals_one_recording_of_everything() -> None:
    model, data = Net(), batches(6)
    whole = record(model, data)
    first, second = record(model, data[:2]), record(model, data[2:])
    assert first.merge(second) is first
    assert_equal(first, whole, rtol=1e-9)
    again = second.total.merge(record(model, data[:2]))
    assert_equal(again, whole, rtol=1e-9)


def test_merge_brings_windows_and_histories_together() -> None:
    model, data = Net(), batches(3)
    recorders = []
    for step in (1, 2):
        with torchprobe.record(model) as rec:
            model(data[step])
            rec.snapshot(step)
            model(data[0])
        recorders.append(rec)
    first, second = recorders
    first.merge(second)
    assert first.history.steps == [1, 2]
    assert first["blocks.0"].vectors == 30
    assert first.total["blocks.0"].vectors == 60
    with pytest.raises(ValueError, match="both histories hold step 2, .*first.total.merge"):
        first.merge(second)
    assert first["blocks.0"].vectors == 30  # nothing was changed


def test_merge_into_a_recorder_that_never_ran_and_goes_on() -> None:
    model, data = Net(), batches(2)
    rec = torchprobe.record(model)
    rec.merge(record(model, data[:1]))
    with rec:
        model(data[1])
    assert_equal(rec, record(model, data), rtol=1e-9)


def test_merge_refuses_what_does_not_belong_together() -> None:
    model, data = Net(), batches(1)
    rec = record(model, data, "blocks.*")
    with pytest.raises(ValueError, match="other recording has layers that this one has not: 'head'"):
        rec.merge(record(model, data, "head"))
    with pytest.raises(ValueError, match="made differently"):
        rec.merge(record(model, data, "blocks.*", outlier_sigma=3.0))
    with pytest.raises(ValueError, match="layer 'blocks.0' is 6 features wide here and 8 there"):
        rec.merge(record(Net(8), batches(1, width=8), "blocks.*"))
    with pytest.raises(TypeError, match="cannot merge a recording with Moments"):
        rec.merge(rec["blocks.0"])  # type: ignore[arg-type]


def recorded_windows(model: nn.Module) -> torchprobe.Recorder:
    data = batches(4)
    with torchprobe.record(model, every=2) as rec:
        for step, x in enumerate(data):
            model(x)
            if step % 2:
                rec.snapshot(step)
        model(data[0])
        model(data[1])
        model(data[2])
    return rec


def test_resume_through_torch_save(tmp_path: Path) -> None:
    model, data = Net(), batches(4)
    uninterrupted = torchprobe.record(model, every=2)
    with uninterrupted:
        for step, x in enumerate(data):
            model(x)
            if step == 2:
                uninterrupted.snapshot(step)
    first = torchprobe.record(model, every=2)
    with first:
        for x in data[:3]:
            model(x)
        first.snapshot(2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = torchprobe.record(model, every=2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.layers == first.layers
    assert second.rows()[0]["feature_dim"] == -1
    with second:
        model(data[3])
    assert_equal(second, uninterrupted)
    assert_equal(second.total, uninterrupted.total)
    assert second.history.steps == [2]
    assert np.array_equal(second.history.values, uninterrupted.history.values, equal_nan=True)


def test_resume_refuses_another_recorder() -> None:
    model = Net()
    state = record(model, batches(1)).state_dict()
    with pytest.raises(ValueError, match="recorded with .*'outlier_sigma': 6.0"):
        torchprobe.record(model, outlier_sigma=3.0).load_state_dict(state)
    with pytest.raises(ValueError, match="layers that this recorder does not watch: 'blocks.0', 'blocks.1'"):
        torchprobe.record(model, "head").load_state_dict(state)
    with pytest.raises(ValueError, match="format 1; got format None"):
        torchprobe.record(model).load_state_dict({})


def test_save_and_load(tmp_path: Path) -> None:
    rec = recorded_windows(Net())
    path = tmp_path / "run.safetensors"
    rec.save(path)
    rec.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    loaded = torchprobe.load(path)
    assert type(loaded) is torchprobe.Recording
    assert_equal(loaded, rec)
    assert_equal(loaded.total, rec.total)
    assert repr(loaded.rows()) == repr(rec.rows())  # nan included
    assert loaded.settings == rec.settings
    assert loaded.history.steps == [1, 3]
    assert np.array_equal(loaded.history.values, rec.history.values, equal_nan=True)
    loaded.merge(torchprobe.load(path).total)
    assert loaded["blocks.0"].vectors == 30 + 60
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "1"
        assert torch.equal(file.get_tensor("blocks.1/mean"), rec["blocks.1"].mean)
        assert torch.equal(file.get_tensor("/max"), rec[""].max)


def test_aliases_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.add_module("again", model[0])
    rec = record(model, batches(1), "*")
    rec.save(tmp_path / "a.safetensors")
    loaded = torchprobe.load(tmp_path / "a.safetensors")
    assert loaded.layers == ["0", "1"]
    assert loaded["again"].vectors == rec["again"].vectors == 30


def tampered(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def edit(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        target: dict[str, Any] = metadata if key in metadata else tensors
        if value is None:
            del target[key]
        else:
            target[key] = value(target[key]) if callable(value) else value

    return change


def layers(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps([{**layer, **values} for layer in json.loads(text)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "2", "'format': expected '1', got '2'"),
        ("settings", None, "'settings': missing from the metadata"),
        ("settings", "{", "'settings': the metadata is not JSON"),
        ("settings", "[" * 100_000, "'settings': the metadata is not JSON"),
        ("settings", "{}", "'settings': expected of, positions"),
        ("layers", "{}", "'layers': expected a JSON list, got dict"),
        ("layers", '[{"name": 3}]', "'layers': each layer has name, module"),
        ("layers", layers(features=10**15), "'layers': layer .* cannot have 10{15} features"),
        ("layers", layers(features=7), "'blocks.0/closed/mean': missing, or not 7 features wide"),
        ("layers", layers(features="6"), "'layers': a value is of the wrong kind"),
        ("layers", layers(name="x"), "'x/closed/mean': missing"),
        ("layers", lambda text: json.dumps(json.loads(text)[1:]), "'blocks.0/.*': belongs to no layer"),
        ("layers", lambda text: json.dumps([json.loads(text)[0]] * 2), "'blocks.0/closed/mean': missing"),
        ("aliases", '{"a": 1}', "'aliases': an alias is no text"),
        ("history", '{"steps": 1}', "'history': expected the lists"),
        ("history", lambda text: text.replace("[1, 3]", "[1, 3, 5]"), "'history': expected F64 of shape \\(3, 4, 15\\)"),
        ("history", lambda text: text.replace("[1, 3]", '["x"]'), "'history': steps are numbers"),
        ("blocks.0/m2", None, "'blocks.0/m2': missing"),
        ("blocks.0/m2", torch.ones(5, dtype=torch.float64), r"'blocks.0/m2': expected F64 of shape \(6,\), got F64 of \(5,\)"),
        ("blocks.0/m2", torch.ones(6), "'blocks.0/m2': expected F64 of .*, got F32"),
        ("blocks.0/count", lambda t: -t, "'blocks.0/count': holds negative numbers or nan"),
        ("blocks.0/count", lambda t: t * math.nan, "'blocks.0/count': holds negative numbers or nan"),
        ("blocks.0/vector_kurtosis_histogram", lambda t: t + 1, "does not add up to the 30 vectors"),
        ("blocks.0/vector_kurtosis_histogram", lambda t: t[:10].clone(), r"expected F64 of shape \(1152,\)"),
        ("surprise", torch.ones(1), "'surprise': belongs to no layer"),
    ],
)
def test_loading_believes_nothing(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "run.safetensors"
    recorded_windows(Net()).save(path)
    with pytest.raises(ValueError, match=message) as caught:
        torchprobe.load(tampered(path, edit(key, value)))
    assert str(path) in str(caught.value)


def test_loading_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        torchprobe.load(tmp_path / "none")
    (tmp_path / "text").write_bytes(b"no recording at all")
    with pytest.raises(ValueError, match="is no safetensors file"):
        torchprobe.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="'format': expected '1', got None"):
        torchprobe.load(tmp_path / "weights")
