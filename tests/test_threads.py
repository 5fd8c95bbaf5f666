"""Threads that share a state: updates, reads, windows, merges, copies and files. Nothing is lost, nothing is torn, nobody waits forever.

Python changes threads seldom within a few lines, and one processor seldom within a kernel. So threads here stop between lines of the
library (``torn``), and kernels get wide states. Without locks, the tests fail.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import X, mlp
from torch import Tensor, nn

import torchprobe
from torchprobe.ops import layout, new_state, states
from torchprobe.recording import windows
from torchprobe.statistics import FEATURES, Moments, Norms, Quantile, Saturation, Several, Sparsity, State, Statistic, TopInputs

KINDS: dict[str, Callable[[], Statistic]] = {
    "Moments": lambda: Moments(6),
    "Quantile": lambda: Quantile(6, quantile=0.4),
    "TopInputs": lambda: TopInputs(6, k=3),
    "Norms": lambda: Norms(6),
    "Sparsity": lambda: Sparsity(6),
    "Saturation": lambda: Saturation(6),
    "Several": lambda: Several([Moments(6), Norms(6)]),
}


@pytest.fixture(autouse=True)
def _quick_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _stops(frame: FrameType, event: str, _: object) -> Any:
    if "torchprobe" not in frame.f_globals.get("__name__", ""):
        return None
    if event == "line" and random.random() < 0.2:
        time.sleep(1e-5)
    return _stops


def together(*tasks: Callable[[], object], torn: bool = False) -> None:
    """Runs each task in a thread of its own. All must end, without an error.

    Args:
        tasks: the functions.
        torn: at many lines of the library, let another thread come in.
    """
    errors = list[BaseException]()

    def work(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(task,), daemon=True) for task in tasks]
    threading.settrace(_stops if torn else None)  # type: ignore[arg-type]
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.settrace(None)  # type: ignore[arg-type]
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    if errors:
        raise errors[0]


def assert_equal(one: Statistic, other: Statistic) -> None:
    """Two statistics have the same fields, up to rounding."""
    torch.testing.assert_close(one.summary(), other.summary(), rtol=1e-6, atol=1e-9, equal_nan=True)


def seen(statistic: Any) -> int:
    """How many vectors a statistic has seen."""
    if isinstance(statistic, Several):
        return seen(statistic["Moments"])
    return int(next(getattr(statistic, name) for name in ("positions", "inputs", "vectors") if hasattr(statistic, name)))


# -- recorders -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", [Moments, Norms, [Moments, Norms]])
def test_snapshots_beside_three_threads_lose_no_vector(statistic: Any) -> None:
    model, fed = nn.Sequential(nn.ReLU()), [0, 0, 0]
    over, width, windows = threading.Event(), *((16384, 150) if statistic is Moments else (16, 80))

    def infer(index: int) -> None:
        x = torch.randn(7, width)
        with torch.no_grad():
            while not over.is_set():
                model(x)
                fed[index] += 7

    def close() -> None:
        try:
            for step in range(windows):
                rec.snapshot(step)
        finally:
            over.set()

    with torchprobe.record(model, "*", statistic=statistic) as rec:
        model(torch.randn(7, width))
        together(close, *(lambda i=i: infer(i) for i in range(3)), torn=statistic is not Moments)  # type: ignore[misc]
        rec.snapshot(windows)
    expected = sum(fed) + 7
    assert sum(fed) > 0
    assert seen(rec.total["0"]) == expected
    if statistic is Moments:
        assert (torch.from_numpy(rec.history["vectors"]).nan_to_num(0).sum(0) == expected).all()


def test_what_is_read_beside_threads_is_whole(tmp_path: Path) -> None:
    model, over = mlp(1, width=16), threading.Event()

    def infer() -> None:
        x = torch.randn(5, 16)
        with torch.no_grad():
            while not over.is_set():
                model(x)

    def read() -> None:
        try:
            for step in range(25):
                for found in (rec["0"], pickle.loads(pickle.dumps(rec["0"])), Moments.from_state(rec["0"].state_dict())):
                    assert found.problem() is None
                    assert (found.count + found.nonfinite == found.vectors + found.constant_vectors + found.invalid_vectors).all()
                    assert found.vectors % 5 == 0
                rec.save(tmp_path / "run.safetensors")
                loaded = torchprobe.load(tmp_path / "run.safetensors")
                assert len(loaded.history) == step
                assert loaded.total["0"].vectors >= loaded["0"].vectors
                rec.rows(), rec.metrics(), repr(rec)
                rec.snapshot(step)
        finally:
            over.set()

    with torchprobe.record(model, "*") as rec:
        model(torch.randn(5, 16))
        together(read, infer, infer)


def test_an_interrupted_snapshot_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = mlp(1)
    with torchprobe.record(model, "*", statistic=[Moments, Norms]) as rec:
        model(X)
        rec.snapshot(0)
        model(X)
        before = {layer: rec[layer].state_dict() for layer in rec.layers}
        for name in ("join", "summaries"):
            with monkeypatch.context() as patch:
                patch.setattr(windows, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    rec.snapshot(1)
            after = {layer: rec[layer].state_dict() for layer in rec.layers}
            torch.testing.assert_close(after, before, rtol=1e-12, atol=0)
        rec.snapshot(1)
    assert seen(rec.total["0"]) == 2 * len(X) and rec.history.steps == [0, 1]


def test_a_pause_that_is_interrupted_while_it_begins_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = mlp(1)
    with torchprobe.record(model, "*") as rec:
        with monkeypatch.context() as patch:
            patch.setattr("torchprobe.recording.control.keep_contents", interrupted)
            with pytest.raises(KeyboardInterrupt), rec.paused():
                pass
        model(X)
    assert rec["0"].vectors == len(X)


@pytest.mark.parametrize("how", [lambda m: setattr(m, "1", nn.Identity()), lambda m: delattr(m, "1"), lambda m: m._modules.clear()])
@pytest.mark.parametrize("of", ["output", "gradient", "weight"])
def test_stop_never_raises_when_layers_are_gone(how: Callable[[nn.Sequential], object], of: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rec = torchprobe.record(model, ["0", "1"], of=of).start()
    how(model)
    gc.collect()
    with pytest.warns(torchprobe.RecordingWarning):
        rec.stop()
    rec.stop(), rec.snapshot(1), rec.metrics(), rec.state_dict(), rec.reset()


def test_stop_never_raises_when_the_report_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise ReferenceError("the module of layer '1' no longer exists")

    model = mlp(1)
    monkeypatch.setattr("torchprobe.recording.diagnosis._report", broken)
    rec = torchprobe.record(model, "*").start()
    model(X)
    with pytest.warns(torchprobe.RecordingWarning, match="could not be found out .*no longer exists"):
        rec.stop()
    assert rec["0"].vectors == len(X)


@pytest.mark.parametrize("absurd", [10**400, math.nan, -1, 0, "six", None, torch.zeros(2)])
def test_absurd_numbers_are_refused_by_name(absurd: Any) -> None:
    for make in (lambda: Moments(4, outlier_sigma=absurd), lambda: TopInputs(4, k=absurd), lambda: Quantile(4, quantile=absurd)):
        with pytest.raises(ValueError, match="outlier_sigma|k must|quantile must"):
            make()
    for kind in (Moments, Norms, Quantile, TopInputs, Sparsity, Saturation):
        with pytest.raises(ValueError, match="features must be"):
            kind(absurd)


# -- statistics ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merges_of_many_threads_lose_nothing(kind: str) -> None:
    make = (lambda: Moments(16384)) if kind == "Moments" else KINDS[kind]
    total, serial, parts = make(), make(), [make() for _ in range(60)]
    for part in parts:
        part.update(torch.randn(10, part.features).clamp(-1))
        serial.merge(part)
    together(*(lambda i=i: [total.merge(part.clone()) for part in parts[i::4]] for i in range(4)), torn=True)  # type: ignore[misc]
    assert seen(total) == 60 * 10
    assert_equal(total, serial)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_in_both_directions_end(kind: str) -> None:
    a, b = KINDS[kind](), KINDS[kind]()
    a.update(torch.randn(3, 6)), b.update(torch.randn(4, 6))
    together(
        lambda: [a.merge(b) for _ in range(12)],
        lambda: [b.merge(a) for _ in range(12)],
        lambda: [a.merge(a) for _ in range(5)],
        lambda: [(a.state_dict(), b.summary(), a.clone()) for _ in range(8)],
        lambda: [b.update(torch.randn(2, 6)) for _ in range(8)],
        torn=True,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_copies_beside_updates_are_whole(kind: str) -> None:
    """Every update changes everything, so a copy with half of one is equal to none."""
    statistic, serial, x, over = KINDS[kind](), KINDS[kind](), torch.randn(8, 6).relu(), threading.Event()
    twins, updates = list[Statistic](), 0

    def grown(number: int) -> Tensor:
        return x.roll(number, 1) * (1 + number / 8)

    def update() -> None:
        nonlocal updates
        while not over.is_set():
            statistic.update(grown(updates))
            updates += 1

    def read() -> None:
        try:
            while updates < 3:
                time.sleep(1e-3)
            for _ in range(12):
                for twin in (statistic.clone(), copy.deepcopy(statistic), pickle.loads(pickle.dumps(statistic))):
                    twin.load_state_dict(twin.state_dict())  # which checks it
                    twins.append(twin)
        finally:
            over.set()

    together(update, read, torn=True)
    for twin in sorted(twins, key=seen):
        assert seen(twin) % 8 == 0
        while seen(serial) < seen(twin):
            serial.update(grown(seen(serial) // 8))
        assert_equal(twin, serial)


def test_the_verbs_of_an_own_statistic_are_ordered() -> None:
    class Slow(Statistic):
        states = {"number": State((FEATURES,))}
        fields = {"largest": "largest number"}

        def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
            self._add(len(x))

        def merge(self, other: Slow) -> Slow:
            self._add(float(other.number[0]))
            return self

        def _add(self, more: float) -> None:
            before = float(self.number[0])
            time.sleep(1e-4)  # another thread may come in here
            self.number.fill_(before + more)

        def summarize(self, states: Any) -> dict[str, Tensor]:
            return {"largest": states["number"].amax(-1)}

    total, one = Slow(2), Slow(2)
    one.update(torch.zeros(1, 2))
    together(*(lambda: [(total.merge(one), total.update(torch.zeros(2, 2))) for _ in range(20)] for _ in range(4)))
    assert total.largest == 4 * 20 * 3


# -- operators -------------------------------------------------------------------------------------------------------------------


def test_what_is_taken_beside_threads_adds_up() -> None:
    width = 16384
    state, x, calls = new_state(width), torch.randn(3, width), 300
    taken, over = new_state(width), threading.Event()

    def observe() -> None:
        for _ in range(calls):
            torch.ops.torchprobe.observe_(state, x)

    def take() -> None:
        while not over.is_set():
            out = torch.zeros(1, state.numel(), dtype=torch.float64)
            states.take([state], out)
            out[:, layout.CALLS] = 0
            states.merge(taken, out[0])

    taker = threading.Thread(target=take)
    taker.start()
    together(observe, observe, observe)
    over.set()
    taker.join()
    states.merge(taken, states.read([state])[0])
    assert int(taken[layout.VECTORS]) == 3 * 3 * calls and int(taken[layout.CALLS]) == 3 * calls
    once = new_state(width)
    torch.ops.torchprobe.observe_(once, x)
    torch.testing.assert_close(layout.rows(taken)[6], layout.rows(once)[6], rtol=1e-9, atol=1e-12)


def test_whole_states_are_what_they_say() -> None:
    a, b = new_state(4), new_state(4)
    torch.ops.torchprobe.observe_(a, torch.randn(6, 4)), torch.ops.torchprobe.observe_(b, torch.randn(9, 4) + 3)
    before = a.clone()
    assert torch.equal(states.read([a, b]), torch.stack([a, b]))
    states.merge(a, b)
    from torchprobe.ops.observe import merge_states

    torch.testing.assert_close(a, merge_states(before, b), rtol=1e-12, atol=1e-12)
    states.write(a, before)
    assert torch.equal(a, before)
    out = torch.zeros(2, a.numel(), dtype=torch.float64)
    states.take([a, b], out)
    assert torch.equal(out[0], before) and a[layout.CALLS] == 1 and not a[1:].any()
    states.take([a, b], out, calls=True)
    assert not a.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: states.read([]), "states is empty"),
        (lambda a: states.read([a, new_state(3)]), "different sizes"),
        (lambda a: states.read([a[:-1]]), "states: .* is not a state"),
        (lambda a: states.take([a], torch.zeros(2, 3)), "out must have a row"),
        (lambda a: states.merge(a, a), "shares memory with other"),
        (lambda a: states.merge(a, new_state(3)), "both must be of one size"),
        (lambda a: states.write(a, torch.zeros(3)), "new: .* is not a state"),
        (lambda a: states.write(a.float(), a), "one size, type"),
    ],
)
def test_states_that_do_not_fit_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    state = new_state(4)
    with pytest.raises(ValueError, match=message):
        call(state)
    assert not state.any() and not math.isnan(float(state[0]))


def test_a_process_that_forks_beside_threads_can_go_on() -> None:
    """Otherwise a lock that another thread holds would stay closed in the child."""
    import os

    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    statistic, over = Several([Moments(64), Norms(64)]), threading.Event()

    def update() -> None:
        while not over.is_set():
            statistic.update(torch.ones(50, 64))

    thread = threading.Thread(target=update)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                statistic.state_dict(), statistic.update(torch.ones(1, 64))
                os._exit(0)
            deadline = time.monotonic() + 20
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            if ended[0] == 0:
                os.kill(child, 9)
                os.waitpid(child, 0)
            assert ended == (child, 0)
    finally:
        over.set()
        thread.join()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, y + 1


@pytest.mark.parametrize("number", range(3))
def test_layers_of_a_model_that_is_used_by_threads_from_the_first_call(number: int) -> None:
    """The first call decides what is read, and which dimension holds the features."""
    model, pair = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.ReLU())]), Pair()
    whole = nn.ModuleDict({"chain": model, "pair": pair})
    with torchprobe.record(whole, "*.**") as rec:
        together(
            *(lambda: [(model(torch.randn(2, 4)), pair(torch.randn(2, 4))) for _ in range(5)] for _ in range(3)),
            lambda: [(rec.rows(), rec.layers, len(rec), rec.snapshot(step)) for step in range(5)],
            torn=True,
        )
    assert len(rec.layers) == 1 + 24 + 3 and {"pair:0", "pair:1", "pair.linear"} < {*rec.layers}
    vectors = {name: total.vectors + total.constant_vectors for name, total in rec.total.items()}
    assert {*vectors.values()} == {3 * 5 * 2}, vectors


class Cautious(Norms):
    """A statistic of a user whose constructor calls a verb, which waits for other threads."""

    def __init__(self, features: int, device: Any = None) -> None:
        super().__init__(features, device)
        time.sleep(0.02)
        self.reset()


def test_a_first_call_beside_a_merge_ends() -> None:
    model, other = mlp(4), mlp(4)
    with torchprobe.record(other, "*", statistic=Cautious) as seen_before:
        other(X)
    with torchprobe.record(model, "*", statistic=Cautious) as rec:
        together(lambda: model(X), lambda: rec.merge(seen_before))
    assert all(seen(rec[layer]) == 2 * len(X) for layer in rec.layers)
