"""Jumps: quiet while a run is healthy, at the stated rate, and soon when something changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guard_models import Net, batch
from models import COMPILER_WARNINGS
from numpy.typing import NDArray

import torchprobe
from torchprobe.recording import JumpWarning, find_jumps
from torchprobe.recording.jumps import Jump
from torchprobe.statistics.changes import MEMORY, SCALES, WARM_UP, Changes, find

pytestmark = COMPILER_WARNINGS

Array = NDArray[np.float64]


# -- synthetic series --------------------------------------------------------------------------------------------------------


def healthy(kind: str, windows: int, series: int, seed: int) -> Array:
    """The logarithm of a field in runs in which nothing happens: noise around a slow course."""
    draw = np.random.default_rng(seed)
    noise = draw.standard_normal((windows, series))
    time = np.arange(windows)[:, None]
    if kind == "Gaussian":
        return 0.02 * noise
    if kind == "Laplace":
        return 0.02 * draw.laplace(size=(windows, series))
    if kind == "Student's t, 3 degrees of freedom":
        return 0.02 * draw.standard_t(3, (windows, series))
    if kind == "extremes":  # as the largest activation of a window
        return 0.05 * draw.gumbel(size=(windows, series))
    if kind == "correlated":  # from window to window, by 0.95
        x = np.zeros((windows, series))
        for index in range(1, windows):
            x[index] = 0.95 * x[index - 1] + 0.02 * noise[index]
        return x
    if kind == "random walk":
        return 0.02 * draw.standard_normal((windows, series)) + np.cumsum(0.005 * noise, 0)
    if kind == "falls fast, then slowly":
        return 2 * np.exp(-time / 300) + 0.02 * noise
    if kind == "power of the time":
        return -0.5 * np.log1p(time) + 0.02 * noise
    rate = np.where(time < windows / 20, 20 * time / windows, (1 + np.cos(np.pi * time / windows)) / 2)
    return 3 * np.cumsum(rate, 0) / windows + 0.02 * (0.3 + rate) * noise  # learning rate with a warm-up and a cosine


KINDS = (
    "Gaussian",
    "Laplace",
    "Student's t, 3 degrees of freedom",
    "extremes",
    "correlated",
    "random walk",
    "falls fast, then slowly",
    "power of the time",
    "warm-up and cosine",
)


@pytest.mark.parametrize("kind", KINDS)
def test_quiet_on_healthy_series(kind: str) -> None:
    """Also without a smallest change, so that the threshold alone keeps it quiet."""
    assert not find(np.exp(healthy(kind, 2000, 24, seed=1)), least=1e-9)


@pytest.mark.slow("simulates 27 runs of 10,000 windows")
@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_rate_of_false_alarms(kind: str) -> None:
    """At false_alarms=0.1, of 3 runs of each kind with 40 series; of all 27, 2.7 could have one. At most 1 of each kind does."""
    alarmed = [bool(find(np.exp(healthy(kind, 10_000, 40, seed)), false_alarms=0.1, least=1e-9)) for seed in range(3)]
    assert sum(alarmed) <= 1


def test_the_share_beyond_the_usual_score() -> None:
    """What the threshold assumes: 1 in 1000 scores exceeds 5, and e times fewer for each further 1. Laplace noise stays below."""
    scores = []
    x = healthy("Laplace", 20_000, 40, seed=2)
    blocks = np.median(x.reshape(-1, SCALES[0], 40), 1)
    steps = np.diff(blocks, axis=0)
    for index in range(MEMORY, len(steps)):
        past = steps[index - MEMORY : index]
        middle = np.median(past, 0)
        scores.append(abs(steps[index] - middle) / (1.4826 * np.median(abs(past - middle), 0)))
    found = np.stack(scores)
    for excess in range(4):
        assert (found > 5 + excess).mean() <= 1e-3 * math.exp(-excess)


def test_scores_against_their_definition() -> None:
    """In float64, with numpy's medians."""
    x = np.exp(healthy("Gaussian", 400, 3, seed=3))
    x[200:, 1] *= 1.6
    ((index, change),) = find(x, least=0.01)
    assert (change.series, change.windows, index) == (1, 5, 204)
    blocks = np.log(np.median(x[:205, 1].reshape(-1, 5), 1))
    steps = np.diff(blocks)
    past = steps[:-1][-MEMORY:]
    spread = 1.4826 * np.median(abs(past - np.median(past)))
    assert change.score == pytest.approx(abs(steps[-1] - np.median(past)) / spread, rel=1e-12)
    assert change.before == np.median(x[195:200, 1]) and change.after == np.median(x[200:205, 1])
    tests = 3 * 10_000 * (1 / 5 + 1 / 20 + 1 / 80)
    assert change.threshold == pytest.approx(5 + math.log(1e-3 * tests / 0.01), rel=1e-12)


@pytest.mark.parametrize("factor", [1.3, 3.0, 0.5])
def test_a_planted_step_is_found_within_ten_windows(factor: float) -> None:
    """A change of 30 % or more, with noise of 2 %, anywhere in a block."""
    for start in range(150, 160):
        x = np.exp(healthy("Gaussian", 200, 12, seed=start))
        x[start:, 7] *= factor
        found = find(x)
        assert [change.series for _, change in found] == [7] and start <= found[0][0] < start + 10


@pytest.mark.parametrize(("per_window", "windows", "after"), [(0.05, 200, 25), (0.01, 1500, 60), (0.003, 3000, 240)])
def test_a_planted_drift_is_found(per_window: float, windows: int, after: int) -> None:
    """With noise of 2 %: 5 % per window within 25 windows, 1 % within 60, 0.3 % within 240, once the larger blocks are known."""
    x = healthy("Gaussian", windows + after, 12, seed=4)
    x[windows:, 3] += per_window * np.arange(after)
    found = find(np.exp(x))
    assert found and {change.series for _, change in found} == {3} and windows <= found[0][0] < windows + after


def test_one_wild_window_is_no_change() -> None:
    x = np.exp(healthy("Gaussian", 600, 4, seed=5))
    x[300, 0], x[301, 0], x[400, 1], x[500, 2] = 1e6, 1e9, math.inf, 0.0
    assert not find(x)


def test_layers_that_come_later_and_windows_without_a_value() -> None:
    changes = Changes()
    x = np.exp(healthy("Gaussian", 700, 3, seed=6))
    x[400:, 2] *= 2
    x[::7, 0], x[100:250, 1] = math.nan, math.nan
    found = []
    for index, row in enumerate(x):
        found += [(index, change.series) for change in changes.add(row[:2] if index < 60 else row)]
    assert found == [(404, 2)] and changes.series == 3


def test_signed_and_constant_series() -> None:
    x = healthy("Gaussian", 300, 3, seed=7)  # around 0
    x[:, 1] = 0
    x[200:, 0] += 1
    x[250:, 1] = 0.5
    x[:, 2] = 4
    found = [(index, change.series, change.score) for index, change in find(x)]
    assert [(index, series) for index, series, _ in found] == [(204, 0), (254, 1)] and found[1][2] == math.inf


def test_a_series_that_changed_starts_anew() -> None:
    x = np.exp(healthy("Gaussian", 900, 1, seed=8))
    x[300:] *= 2
    x[600:] *= 2
    assert [index for index, _ in find(x)] == [304, 604]
    assert not find(x[: 5 * WARM_UP])


def test_arguments_of_the_detector() -> None:
    with pytest.raises(ValueError, match="false_alarms is the share of runs"):
        Changes(false_alarms=1)
    with pytest.raises(ValueError, match="windows must be at least 1"):
        Changes(windows=0)
    with pytest.raises(ValueError, match="least must be positive"):
        Changes(least=0)


# -- real training -----------------------------------------------------------------------------------------------------------


def run(steps: int, way: str, at: Any = lambda model, step: None, **options: Any) -> tuple[list[Jump], torchprobe.Recorder]:
    """Trains a small network on fresh data; a window for each step."""
    torch.manual_seed(0)
    model = Net(depth=2)
    teacher = Net(depth=1).requires_grad_(False)
    call = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    told: list[Jump] = []
    with torchprobe.record(model, ["blocks.*", "head"], keep=100) as rec:
        jumps = rec.watch_jumps(**{"on": told.append, **options})
        for step in range(steps):
            at(model, step)
            x = batch(step, rows=64)
            optimizer.zero_grad()
            (call(x) - teacher(x)).square().mean().backward()
            optimizer.step()
            rec.snapshot(step)
    assert told == jumps.found
    return told, rec


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_healthy_run_is_quiet_and_a_planted_step_is_found(way: str) -> None:
    torch.compiler.reset()

    def at(model: Net, step: int) -> None:
        if step == 290:
            with torch.no_grad():
                model.blocks[1].down.weight.mul_(30)

    told, rec = run(300, way, at)
    assert told and all(jump.layer in ("blocks.1", "head") and 290 <= jump.step < 300 for jump in told)
    first = next(jump for jump in told if jump.layer == "blocks.1" and jump.field == "std")
    assert first.since == 290 and first.after > 2 * first.before and first.score > first.threshold
    assert f"std of 'blocks.1' went from {first.before:.4g}"[:30] in str(first)
    assert find_jumps(rec.history) == []  # it kept 100 windows, which are too few


@pytest.mark.slow("10,000 steps")
def test_quiet_on_a_healthy_run_of_ten_thousand_steps() -> None:
    told, _ = run(10_000, "eager")
    assert not told


def test_a_weight_that_grows_is_found() -> None:
    """A planted drift: from step 300 on a weight grows by 10 % in every step."""

    def at(model: Net, step: int) -> None:
        if step >= 300:
            with torch.no_grad():
                model.blocks[0].down.weight.mul_(1.1)

    told, _ = run(340, "eager", at)
    assert told and told[0].step < 340 and all(jump.step >= 300 for jump in told)


def test_a_warning_a_file_and_the_history(tmp_path: Path) -> None:
    def at(model: Net, step: int) -> None:
        if step == 150:
            with torch.no_grad():
                model.head.weight.mul_(100)

    with pytest.warns(JumpWarning, match="std of 'head' went from .* Written: .*jump-154.safetensors") as caught:
        _watched(at, tmp_path / "jumps")
    assert caught[0].filename == __file__
    loaded = torchprobe.load(tmp_path / "jumps" / "jump-154.safetensors")
    assert loaded.history.steps[-1] == 154
    (jump,) = find_jumps(loaded.history, fields="std", layers="head")
    assert (jump.step, jump.since) == (154, 150) and jump.to_dict()["layer"] == "head"


def _watched(at: Any, folder: Path) -> None:
    model = Net(depth=1)
    with torchprobe.record(model, ["blocks.*", "head"]) as rec:
        rec.watch_jumps(["std", "abs_max"], ["head"], save=folder)
        for step in range(160):
            at(model, step)
            model(batch(step, rows=64))
            rec.snapshot(step)


def test_arguments() -> None:
    model = Net()
    rec = torchprobe.record(model)
    with pytest.raises(KeyError, match="'norm' is not a field of Moments; it has vectors"):
        rec.watch_jumps("norm")
    with pytest.raises(ValueError, match='on= is "warn" or a function'):
        rec.watch_jumps(on="stop")  # type: ignore[arg-type]
    assert "nonfinite" not in rec.watch_jumps().fields
    with pytest.raises(TypeError, match="find_jumps takes the history"):
        find_jumps([])  # type: ignore[arg-type]


def test_nothing_is_read_on_the_host_until_a_window_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that has not arrived is looked at later."""
    from torchprobe.recording import transfer

    arrived = [False]
    monkeypatch.setattr(transfer.Copy, "arrived", lambda self: arrived[0])
    monkeypatch.setattr(transfer.Copy, "numbers", _Forbidden(transfer.Copy.numbers, arrived))
    model = Net()
    with torchprobe.record(model, ["head"]) as rec:
        jumps = rec.watch_jumps()
        for step in range(12):
            model(batch(step))
            rec.snapshot(step)
        assert not jumps.collect() and jumps.threshold == 5.0  # no series is known yet
        arrived[0] = True
        model(batch(0))
        rec.snapshot(12)
        assert jumps.threshold > 5


class _Forbidden:
    def __init__(self, function: Any, allowed: list[bool]) -> None:
        self.function, self.allowed = function, allowed

    def __get__(self, copy: Any, owner: Any) -> Any:
        assert self.allowed[0], "it waited for a copy"
        return self.function.__get__(copy, owner)
