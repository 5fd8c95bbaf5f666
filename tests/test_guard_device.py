"""The guard on an accelerator, on the CPU: nothing is read on the host before it has arrived, and the answers are the same."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_models import Net, Told, batch, nan_in_row, poison_gradient, train
from models import COMPILER_WARNINGS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchprobe
from torchprobe.recording import guard_device, guard_hooks, read_flight, transfer
from torchprobe.recording.guard_device import Latches
from torchprobe.recording.guard_hooks import Watch

pytestmark = COMPILER_WARNINGS
LAYERS = ["blocks.*", "head"]


@pytest.fixture(autouse=True)
def _far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors count as those of an accelerator."""
    monkeypatch.setattr(guard_hooks, "on_host", lambda x: False)


class Late:
    """Copies that arrive when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = False
        monkeypatch.setattr(transfer.Copy, "arrived", lambda copy: self.here)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "item")):
            self.read.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_nan_made_in_a_block_is_told_a_step_later(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model, told, late = Net(), Told(), Late(monkeypatch)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model

    def at(step: int) -> None:
        model.blocks[2].plant = nan_in_row(4) if step == 3 else None
        late.here = step >= 5
        assert not told.reports or step > 5

    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        train(model, call, rec, 7, at)
    first = told.reports[0].first
    assert (first.layer, first.kind, first.verdict, first.step, first.after) == ("blocks.2", "activation", "made here", 3, "blocks.1")
    assert (first.call, first.rows, first.bad_rows) == (3, (4,), 1)
    assert [event.layer for event in told.reports[0].events] == ["blocks.2", "blocks.3", "head"]
    assert told.reports[0].events[1].verdict == "came in" and "1 row of it nonfinite: 4" in str(first)


def _plant(block: Any, planted: Any, step: int) -> None:
    block.plant = planted[step]


def test_the_same_answers_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """At random places: layer, call, step, rows and verdict."""
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        block, row, when = (int(torch.randint(n, (), generator=draw)) for n in (4, 6, 3))
        found = []
        for far in (True, False):
            monkeypatch.setattr(guard_hooks, "on_host", lambda x, far=far: not far)
            model, told = Net(), Told()

            bad = nan_in_row(row) if seed % 2 else poison_gradient
            planted = {step: bad if step == when else None for step in range(4)}
            with torchprobe.record(model, LAYERS) as rec:
                rec.guard(on=told)
                train(model, model, rec, 4, functools.partial(_plant, model.blocks[block], planted))
            first = told.reports[0].first
            found.append((first.layer, first.kind, first.name, first.call, first.step, first.rows, first.verdict))
        assert found[0] == found[1], seed


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Net()
    Late(monkeypatch)
    with torchprobe.record(model, LAYERS) as rec:
        guard = rec.guard("**", dump=tmp_path)
        model(batch(0)).sum().backward()  # a first call finds out where the features are
        with Count() as count:
            for step in range(3):
                model.blocks[1].plant = nan_in_row(1) if step == 1 else None
                model(batch(step)).sum().backward()
                rec.step()
                rec.snapshot(step)
        assert not count.read
        guard.on = lambda report: None


def test_the_first_of_several_steps_counts_and_a_later_trouble_is_told_again() -> None:
    model, told = Net(), Told()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        for step in range(9):
            model.blocks[step % 4].plant = nan_in_row(step % 3) if step in (1, 2, 6) else None
            model(batch(step))
            model.blocks[step % 4].plant = None
            rec.step()
    assert [(report.first.layer, report.first.step, report.first.rows) for report in told.reports] == [
        ("blocks.1", 1, (1,)),
        ("blocks.2", 6, (0,)),
    ]


def test_on_request() -> None:
    model, told = Net(), Told()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        model(batch(0))
        assert rec.guard_report() is None
        model.blocks[3].plant = nan_in_row(2)
        model(batch(0))
        report = rec.guard_report()
        assert report is not None and report.first.layer == "blocks.3" and not told.reports
        rec.step()
    assert told.reports == [report]


@pytest.mark.parametrize("allowed", ["", "-inf", "inf", "nan", "-inf inf", "nan inf"])
def test_rows_against_their_definition(allowed: str) -> None:
    kinds = frozenset(allowed.split())
    draw = torch.Generator().manual_seed(0)
    for shape in ((7, 3, 5), (9, 4), (6,), (1, 1), (0, 3), ()):
        x = torch.randn(shape, generator=draw)
        for value in (math.nan, math.inf, -math.inf):
            x = torch.where(torch.rand(shape, generator=draw) < 0.1, value, x)
        rows = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
        wrong = [
            any(
                (math.isnan(v) and "nan" not in kinds) or (v == math.inf and "inf" not in kinds) or (v == -math.inf and "-inf" not in kinds)
                for v in row
            )
            for row in rows.tolist()
        ]
        assert guard_device.bad_rows(x, kinds).tolist() == wrong


def test_inputs_with_minus_infinity_are_unsure() -> None:
    told = Told()
    model = nn.Sequential(nn.Identity(), nn.Softmax(-1))
    with torchprobe.record(model, ["1"], feature_dim=-1) as rec:
        rec.guard(["1"], on=told)
        x = torch.zeros(4, 3)
        x[2] = -math.inf
        model(x)
        rec.step()
    assert told.reports[0].first.verdict == "unsure" and told.reports[0].first.rows == (2,)


def test_the_flight_recorder_keeps_rows(tmp_path: Path) -> None:
    model, told = Net(), Told()

    def at(step: int) -> None:
        model.blocks[2].plant = nan_in_row(4) if step == 3 else None

    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told, dump=tmp_path)
        data = [batch(step) for step in range(6)]
        seen: list[torch.Tensor] = []
        model.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        train(model, model, rec, 6, at, data=lambda step: data[step])
    _, tensors = read_flight(told.reports[0].files[0])
    assert tensors["rows"].tolist() == [4]
    assert torch.equal(tensors["input/x"], seen[3][4:5]) and tensors["output/"].isnan().all()


def test_rows_of_another_shape_and_empty_batches() -> None:
    told = Told()
    model = Net()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        for rows in (6, 0, 3, 1):
            model(batch(0, rows=rows)).sum().backward()
            rec.step()
        model.blocks[0].plant = nan_in_row(1)
        model(batch(0, rows=2))
    assert told.reports[0].first.rows == (1,) and told.reports[0].first.call == 4


def test_latches_of_two_tensors() -> None:
    """Outputs in a tuple: the second one is the bad one."""
    model = nn.Linear(3, 3)
    layer = torchprobe.recording.select_layers(model)[0]
    rec = torchprobe.record(model)
    guard = rec.guard()
    watch, latches = Watch(layer, guard), Latches(sampled=False)
    good, bad = torch.zeros(2, 3), torch.full((2, 3), math.inf)
    latches.look(watch, [("x", good)], [("0", good), ("1", bad)], False)
    latches.send(0)
    ((found,),) = (arrived.found for arrived in latches.collect())
    assert (found.count, found.rows, found.input, found.call) == (0, (), False, 0)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_layer_that_writes_into_its_input_is_unsure(way: str) -> None:
    """What it was given is lost before the device looks at it."""

    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.div_(0)

    model, told = nn.Sequential(nn.Linear(4, 4), InPlace()), Told()
    with torchprobe.record(model, "**") as rec, torch.no_grad():
        rec.guard("**", on=told)
        call = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        call(torch.zeros(3, 4))
        rec.step()
    assert (told.reports[0].first.layer, told.reports[0].first.verdict) == ("1", "unsure")
