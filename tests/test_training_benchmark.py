"""The training benchmark runs, its contestants watch what they claim, and a contestant that cannot take part is named with the reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benchmarks are not part of the installed package

from benchmarks import formulas, monitors, report, training  # noqa: E402
from benchmarks.networks import block_outputs  # noqa: E402
from benchmarks.timing import MIN_ROUNDS  # noqa: E402

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two blocks that return maps (N, 6, H, W), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1))
        self.head = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer1(x).mean((-1, -2)))


TINY = training.Network("a tiny network", "torch", Net, re.compile(r"layer1\..*"), size=8, feature_dim=1)


@pytest.fixture
def few(monkeypatch):
    """Without the packages that are slow to import."""
    kept = ("plain", "torchprobe, every step", "torchprobe, every=10", "hooks in plain PyTorch")
    monkeypatch.setattr(monitors, "MONITORS", {name: monitors.MONITORS[name] for name in kept})


def outputs(run):
    """What the blocks return in a forward pass."""
    return block_outputs(run.blocks(run.model).values(), lambda: run.forward(run.model))


def test_every_contestant_has_a_row(few):
    (steps, hooks), skipped = training.run(TINY, 4, CPU, 0)
    assert [row.contestant for row in steps.rows] == list(monitors.MONITORS) and not skipped
    assert steps.rows[0].ratio == 1 and steps.rows[0].ratio_interval == (1, 1)
    assert [row.contestant for row in hooks.rows if row.target] == ["torchprobe, every step: inside", "torchprobe, every step: outside"]
    assert len(hooks.rows) == 1 + 3 + 1 and hooks.rows[0].ratio == 1
    for section in (steps, hooks):
        assert all(len(row.timing.seconds) >= MIN_ROUNDS for row in section.rows)
        for width in (80, 200):
            assert report.table(section, width).row_count == len(section.rows)
    json.dumps(report.as_json([steps, hooks]), allow_nan=False)


def test_only_some_contestants():
    (steps, hooks), _ = training.run(TINY, 4, CPU, 0, only=["torchprobe, every=10"])
    assert [row.contestant for row in steps.rows] == ["plain", "torchprobe, every step", "torchprobe, every=10"]
    assert len(hooks.rows) == 4


def test_twins_share_weights_but_not_modules(few):
    run = training.Training(TINY, 4, CPU)
    twin = run.twin()
    assert twin.head is not run.model.head and twin.head.weight is run.model.head.weight
    before = twin.head.weight.detach().clone()
    run.step(twin)
    assert not torch.equal(run.model.head.weight, before)
    assert [tuple(x.shape) for x in outputs(run)] == [(4, 6, 8, 8)] * 2


def test_the_hooks_in_plain_pytorch_see_what_torchprobe_sees(monkeypatch):
    seen = []
    monkeypatch.setattr(formulas, "eager", lambda x: seen.append(x) or {})
    run = training.Training(TINY, 4, CPU)
    with monitors.eager(run.model, run.blocks(run.model)):
        run.model(run.images)
    for x, output in zip(seen, outputs(run), strict=True):
        torch.testing.assert_close(x, output.movedim(1, -1).reshape(-1, 6))
    run.model(run.images)
    assert len(seen) == 2  # the hooks are gone


@pytest.mark.parametrize("name", monitors.MONITORS)
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_monitors_leave_the_output_as_it_is(name):
    monitor = monitors.MONITORS[name]
    if why := monitors.missing(monitor.module):
        pytest.skip(why)
    run = training.Training(TINY, 4, CPU)
    expected = run.model(run.images)
    with monitor.attach(run.model, run.blocks(run.model)):
        torch.testing.assert_close(run.model(run.images), expected, rtol=0, atol=0)
        run.step(run.model)


def test_a_contestant_that_cannot_take_part_is_named_with_the_reason(monkeypatch):
    absent = monitors.Monitor("", monitors.nothing, "no_such_package.at_all")
    monkeypatch.setattr(monitors, "MONITORS", {"absent": absent, "maps": replace(absent, module="", maps_only=True)})
    present, skipped = monitors.available(maps=False)
    assert not present and skipped["maps"] == "takes maps (N, C, H, W) only"
    assert skipped["absent"].startswith("no_such_package.at_all cannot be imported: ModuleNotFoundError")
    assert list(monitors.available(maps=True)[0]) == ["maps"]


class Hungry(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ballast = torch.ones(256 << 20, dtype=torch.uint8)
        return super().forward(x) + 0 * ballast[-1]


def test_peak_memory_sees_what_a_step_needs():
    """In a separate process, as in the benchmark: this process may already have used as much."""
    code = "import test_training_benchmark as t; print(t.training.peak(t.replace(t.TINY, build=t.Hungry), 'plain', 2, t.CPU))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 256 << 20 <= int(done.stdout.split()[-1]) < 512 << 20


@pytest.mark.slow("runs a benchmark with a ResNet of full size")
def test_command(tmp_path):
    pytest.importorskip("torchvision")
    command = [sys.executable, "-m", "benchmarks.training", "--quick", "--batch", "1", "--network", "resnet", "--device", "cpu"]
    command += ["--contestant", "timm ActivationStatsHook"]
    done = subprocess.run([*command, "--json", str(tmp_path / "a.json")], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "observe_ of every block" in done.stdout and "peak MB" in done.stdout
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [section["name"] for section in figures["sections"]] == ["training steps", "training hooks"]
    assert {row["contestant"] for row in figures["memory"]} >= {"plain", "torchprobe, every step"}
    assert all(row["peak"] > 50e6 for row in figures["memory"])
