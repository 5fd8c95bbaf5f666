"""Windows, history and totals."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, assert_equal, batches, record
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import torchprobe
from torchprobe.recording import transfer
from torchprobe.recording.control import Slot


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that would wait for a device, and copies from a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.to_host: list[bool] = []  # for each copy whether the host waits for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        out = func(*args, **(kwargs or {}))
        devices = {value.device.type for value in args if isinstance(value, Tensor)}
        if isinstance(out, Tensor) and out.device.type == "cpu" and "cuda" in devices:
            self.to_host.append(not (kwargs or {}).get("non_blocking") and not any(value is True for value in args))
        return out

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
    with pytest.raises(KeyError, match="'kurtosis' is not a field of the history; it has vectors"):
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


def test_every_continues_through_windows() -> None:
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
    np.testing.assert_allclose(rec.total["head"].mean, record(model, [data[0], data[3], data[6]], "head")["head"].mean)
    rec.snapshot(1)
    assert rec._entries()[0].closed.calls == 7  # not 4 + 7: the counter of the window continues


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


# -- on a fake device: nothing can be read from its tensors, so anything that would wait for it is an error ------------------


class Event:
    """The event of a copy that takes as long as the test decides."""

    done = False

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return Event.done

    def synchronize(self) -> None:
        assert Event.done, "waits"


@pytest.fixture
def on_a_fake_device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[torchprobe.Recorder]:
    """A running recorder whose states are on ``cuda:0``."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(FakeTensor, "numpy", lambda self: np.zeros(self.shape))
    monkeypatch.setattr(Event, "done", False)
    monkeypatch.setattr(transfer, "BLOCK", 4)
    layers, keep = getattr(request, "param", (3, None))
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(layers)])
    with FakeTensorMode():
        recorder = torchprobe.record(model, "*", keep=keep)
        for stream in recorder._bank.streams():
            stream.slots[torch.device("cuda", 0)] = Slot(torchprobe.Moments(6, "cuda:0"))
            stream.take_place()
        yield recorder


@pytest.mark.parametrize("on_a_fake_device", [(2, None), (9, None)], indirect=True)
def test_one_copy_for_metrics_and_none_that_waits_for_windows(on_a_fake_device: torchprobe.Recorder) -> None:
    rec = on_a_fake_device
    with Copies() as seen:
        numbers = rec.metrics()
    assert len(numbers) == len(rec) * 5
    assert seen.to_host == [True]  # one, which waits
    with Copies() as seen:
        for step in range(transfer.BLOCK - 1):
            rec.snapshot(step)
        with rec.paused():
            pass
    assert not seen.to_host
    with Copies() as seen:
        for step in range(transfer.BLOCK - 1, 2 * transfer.BLOCK):
            rec.snapshot(step)
        rec.reset()
    assert not seen.waits
    assert seen.to_host == [False, False]  # one for each full block, and none waits


@pytest.fixture
def frozen() -> Iterator[None]:
    """The garbage collector no longer goes through what other tests have left, which takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors() -> int:
    """Bytes of all tensors that live and are not frozen. A fake tensor counts with the size it would have, unless that is unknown."""
    gc.collect()
    found = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    return sum(value.nbytes for value in found if all(type(size) is int for size in value.shape))


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("on_a_fake_device", [(3, 10)], indirect=True)
def test_a_device_holds_one_block_however_many_windows_close(on_a_fake_device: torchprobe.Recorder) -> None:
    rec = on_a_fake_device
    Event.done = True
    sizes = []
    for step in range(8 * transfer.BLOCK + 1):
        rec.snapshot(step)
        if step % transfer.BLOCK == 0:
            sizes.append(tensors())
    assert sizes[3:] == sizes[3:4] * 6  # once the limit is reached
    assert (len(rec.history), rec.history.dropped) == (10, 8 * transfer.BLOCK - 9)


# -- a limit -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "block"), [(1, 64), (3, 64), (3, 2), (7, 3), (100, 4)])
def test_the_newest_windows_are_kept(monkeypatch: pytest.MonkeyPatch, keep: int, block: int) -> None:
    monkeypatch.setattr(transfer, "BLOCK", block)
    model, data = Net(), batches(17)
    with torchprobe.record(model, keep=keep) as rec, torchprobe.record(model) as everything:
        for step, x in enumerate(data):
            model(x)
            rec.snapshot(step)
            everything.snapshot(step)
            if step % 5 == 3:  # reading must change nothing
                assert len(rec.history.values) == min(keep, step + 1)
    kept = min(keep, 17)
    assert rec.history.steps == list(range(17))[-kept:]
    assert rec.history.dropped == 17 - kept
    assert rec.history.layers == everything.history.layers
    assert np.array_equal(rec.history.values, everything.history.values[-kept:], equal_nan=True)
    assert np.array_equal(rec.history.histograms, everything.history.histograms[-kept:])
    assert_equal(rec.total, everything.total)
    assert ("older ones dropped" in repr(rec.history)) == (keep < 17)


@pytest.mark.usefixtures("frozen")
def test_memory_does_not_grow_with_steps() -> None:
    model, x = Net(), batches(1)[0]
    sizes = []
    with torchprobe.record(model, keep=20) as rec:
        for step in range(6 * transfer.BLOCK):
            model(x)
            rec.snapshot(step)
            if step % transfer.BLOCK == 0:
                arrays = sum(values.nbytes for _, values in rec.history._blocks)
                sizes.append((tensors(), arrays, len(rec.history._blocks), len(rec.history.steps)))
    assert sizes[2:] == sizes[2:3] * 4


def test_a_bounded_history_is_saved_and_resumed(tmp_path: Any) -> None:
    model, data = Net(), batches(9)

    def run(rec: torchprobe.Recorder, steps: range) -> torchprobe.Recorder:
        with rec:
            for step in steps:
                model(data[step])
                rec.snapshot(step)
        return rec

    whole = run(torchprobe.record(model, keep=4), range(9))
    first = run(torchprobe.record(model, keep=4), range(6))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = torchprobe.record(model, keep=4)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (second.history.steps, second.history.dropped) == ([2, 3, 4, 5], 2)
    run(second, range(6, 9))
    assert (second.history.steps, second.history.dropped) == (whole.history.steps, whole.history.dropped) == ([5, 6, 7, 8], 5)
    assert np.array_equal(second.history.values, whole.history.values, equal_nan=True)
    assert_equal(second.total, whole.total)
    smaller = torchprobe.record(model, keep=2)
    smaller.load_state_dict(first.state_dict())
    assert (smaller.history.steps, smaller.history.dropped) == ([4, 5], 4)
    whole.save(tmp_path / "run.safetensors")
    loaded = torchprobe.load(tmp_path / "run.safetensors")
    assert (loaded.history.steps, loaded.history.dropped) == ([5, 6, 7, 8], 5)
    second.reset()
    assert (second.history.keep, second.history.dropped, len(second.history)) == (4, 0, 0)


def test_steps_are_finite_numbers(tmp_path: Any) -> None:
    model = Net()
    with torchprobe.record(model, "head") as rec:
        steps = [np.int64(3), np.float32(4.5), 5, np.uint8(6), np.float16(7.5), np.array(8), np.array(9.5), torch.tensor(10)]
        steps += [torch.tensor(11.5, requires_grad=True), torch.tensor(12, dtype=torch.uint8), torch.tensor(13.5, dtype=torch.bfloat16)]
        steps += [Fraction(29, 2), 10**300]
        for step in steps:
            model(batches(1)[0])
            rec.snapshot(step)
        wrong = [
            True,
            "6",
            math.inf,
            None,
            np.bool_(True),
            1j,
            np.array([3]),
            torch.tensor([3]),
            torch.tensor(True),
            torch.tensor(math.nan),
        ]
        wrong += [10**400, -(10**309), 1.5e308, Decimal(3), torch.nn.Linear(1, 1), torch.tensor(1j), np.datetime64("2026")]
        for step in wrong:
            with pytest.raises(TypeError, match="a step is a finite number, got"):
                rec.snapshot(step)
        with pytest.raises(TypeError, match=r"got a tensor on meta, and reading it would wait: pass step.item\(\)"):
            rec.snapshot(torch.tensor(3, device="meta"))
    plain = [3, 4.5, 5, 6, 7.5, 8, 9.5, 10, 11.5, 12, 13.5, 14.5, 10**300]
    assert rec.history.steps == plain
    assert [type(step) for step in rec.history.steps] == [type(step) for step in plain]
    rec.save(tmp_path / "run.safetensors")
    assert torchprobe.load(tmp_path / "run.safetensors").history.steps == plain


@pytest.mark.parametrize("keep", [0, -1, 2.0, True, "all"])
def test_a_bound_out_of_range(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep must be a whole number of at least 1, or None for all windows"):
        torchprobe.record(Net(), keep=keep)


def test_windows_in_which_nothing_has_fired_yet() -> None:
    model, x = Net(), batches(1)[0]
    with torchprobe.record(model, "head") as rec:
        rec.snapshot(0)
        model(x)
        rec.snapshot(1)
        rec.snapshot(2)
    assert np.array_equal(rec.history["vectors"], [[math.nan], [15.0], [math.nan]], equal_nan=True)


def test_columns_in_the_order_of_firing_whatever_the_widths() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    with torchprobe.record(model, "*") as rec:
        model(batches(1)[0])
        rec.snapshot(0)
        expected = [rec.history["std"][0].tolist(), rec.history.copy()["std"][0].tolist()]
    assert rec.history.layers == rec.layers == ["0", "1", "2", "3"]
    whole = rec.total.rows()
    assert expected == [[row["std"] for row in whole]] * 2
    other = record(model, batches(2)[1:], "*")
    other.snapshot(1)
    rec.merge(other)
    assert rec.history["std"][1].tolist() == [row["std"] for row in other.total.rows()]
