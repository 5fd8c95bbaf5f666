"""GradScaler: its normal overflows are no alarm; what is not its doing is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from guard_models import Net, Told, batch, nan_in_row, poison_gradient
from models import COMPILER_WARNINGS
from torch import nn

import torchprobe
from torchprobe.recording import guard_hooks
from torchprobe.recording.guard_scaler import ScalerRule

pytestmark = COMPILER_WARNINGS
LAYERS = ["blocks.*", "head"]


def train(
    steps: int, at: Any = lambda model, step: None, early: bool = False, init_scale: float = 2.0**16, far: bool = False
) -> tuple[Told, Any, Any]:
    """Steps in float16 with a scaler, as the tutorial of PyTorch has them. ``early``: ``rec.step()`` comes before ``scaler.update()``."""
    model, told = Net(), Told()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.record(model, LAYERS) as rec:
        guard = rec.guard(on=told, scaler=scaler)
        for step in range(steps):
            at(model, step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = 30 * nn.functional.cross_entropy(model(batch(step)).flatten(0, 1), torch.arange(18) % 5)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            if early:
                rec.step()
            scaler.update()
            if not early:
                rec.step()
    return told, guard, scaler


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_overflows_of_the_scaler_are_no_alarm(early: bool, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps, and every time that the scale has grown too far."""
    monkeypatch.setattr(guard_hooks, "on_host", lambda x: not far)
    told, guard, scaler = train(25, early=early, init_scale=2.0**22)
    assert not told.reports and guard.overflows >= 4 and scaler.get_scale() > 1


@pytest.mark.parametrize("far", [False, True])
def test_nonfinite_activations_are_an_alarm_also_in_a_skipped_step(far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_hooks, "on_host", lambda x: not far)

    def at(model: Net, step: int) -> None:
        model.blocks[1].plant = nan_in_row(3) if step == 9 else None

    told, _, _ = train(12, at)
    (report,) = told.reports
    assert (report.first.layer, report.first.step, report.first.kind) == ("blocks.1", 9, "activation")


@pytest.mark.parametrize("early", [False, True])
def test_gradients_that_stay_nonfinite_are_an_alarm_at_a_scale_of_one(early: bool) -> None:
    """The scaler halves its scale in vain: 16 → 8 → 4 → 2 → 1, and then it is not the scaling."""

    def at(model: Net, step: int) -> None:
        model.blocks[2].plant = poison_gradient if step >= 3 else None

    told, guard, scaler = train(12, at, early, init_scale=16.0)
    (report,) = told.reports
    assert guard.overflows == 4 == report.overflows and report.first.kind != "activation"
    assert report.first.step == 7 + early and scaler.get_scale() < 1 and "4 steps overflowed under the GradScaler" in str(report)


def test_without_the_scaler_an_overflow_is_an_alarm_that_says_so() -> None:
    model, told = Net(), Told()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        with torch.autocast("cpu", torch.float16):
            loss = model(batch(0)).square().sum()
        (loss * 2.0**30).backward()
        rec.step()
    assert "pass guard(scaler=scaler)" in str(told.reports[0])


def test_a_scaler_that_is_off() -> None:
    model, told = Net(), Told()
    model.blocks[2].plant = poison_gradient
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told, scaler=torch.amp.GradScaler("cpu", enabled=False))
        model(batch(0)).sum().backward()
        rec.step()
    assert len(told.reports) == 1


class Scale:
    """A scaler with a given course."""

    def __init__(self, *scales: float) -> None:
        self.scales = list(scales)

    def get_scale(self) -> float:
        return self.scales.pop(0)

    def is_enabled(self) -> bool:
        return True


def test_the_rule() -> None:
    rule = ScalerRule(Scale(8.0, 4.0, 4.0, 8.0, 8.0, 8.0, 4.0, 4.0, 2.0, 1.0, 0.5, math.inf))
    told = [rule.judge(bad, True, None) for bad in (True, False, False, True, True, False, True, True, True, True)]
    # It fell; nothing; it grew; not yet fallen; still not; nothing; not yet; now; again; below 1.
    assert told == ["overflow", "alarm", "alarm", "wait", "alarm", "alarm", "wait", "overflow", "overflow", "alarm"]
    assert rule.judge(True, False, None) == "wait" and rule.judge(False, False, None) == "alarm"
