"""A training step with and without recording every block.

The added time is a small difference of two large ones, so it is taken twice: from outside, as the median difference of steps that take
turns; and from inside, between two events around the recorder's hook, summed over the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import torchprobe
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, time
from benchmarks.gpu.timing import WARM_UP, Contestant, Mark, race, synchronize
from benchmarks.gpu.vit import TINY, Tower, Training, installed_tower
from benchmarks.report import Target
from benchmarks.timing import Timing

LIMIT = 1.0  # per cent of the step


@dataclass(frozen=True)
class Plan:
    tower: Callable[[], Tower] = installed_tower
    batch: int = 256
    seconds: float = 40
    watched: int = 20  # steps seen from inside


QUICK = Plan(tower=lambda: TINY, batch=2, seconds=0, watched=5)


def run(device: Device, plan: Plan) -> Iterator[Figure]:
    where = device.torch_device
    training = Training(plan.tower(), plan.batch, where)
    case: dict[str, str | int] = {"model": training.tower.name, "batch": plan.batch}
    plain, recorded = training.model, training.twin()
    peak_plain = peak_memory(lambda: training.step(plain), where)
    with torchprobe.record(recorded, training.tower.layers) as recorder:
        peak_recorded = peak_memory(lambda: training.step(recorded), where)
        contestants = {"plain": Contestant(lambda: training.step(plain)), "recorded": Contestant(lambda: training.step(recorded))}
        times = race(contestants, plan.seconds, where, lead_in=False)
        yield time("step, plain", times["plain"], **case)
        yield time("step, every block recorded", times["recorded"], **case)
        yield share_of("added, from outside: recorded − plain", times["recorded"].minus(times["plain"]), times["plain"], case)
        with forbidden_to_synchronize(where):
            training.forward(recorded)
            recorder.snapshot(0)
        yield Figure(
            "synchronisations in a recorded forward pass", 0, "", case, note="snapshot included; the first would have been an error"
        )
    yield share_of("added, from inside: the recorder's hooks", watch(training, plan.watched), times["plain"], case)
    if peak_plain is not None and peak_recorded is not None:
        yield Figure("peak memory, plain", peak_plain, "B", case)
        yield Figure("peak memory, recorded", peak_recorded, "B", case)
        yield Figure("peak memory, added", peak_recorded - peak_plain, "B", case, note="the states are among it")


def share_of(name: str, added: Timing, whole: Timing, case: dict[str, str | int]) -> Figure:
    """``added`` as a share of the median of ``whole``, against the limit."""
    low, high = (100 * bound / whole.median for bound in added.interval)
    share = added.median / whole.median
    target = Target("% of the step", 100 * share, LIMIT, interval=(low, high))
    return Figure(name, share, "share", case, added, target, note=f"95 % interval {low:.2f} … {high:.2f} %")


def watch(training: Training, steps: int) -> Timing:
    """What the device does between two hooks, one before and one behind the recorder's, summed over the blocks of a step."""
    model, device = training.twin(), training.device
    before: list[Mark] = []
    behind: list[Mark] = []
    for block in training.blocks(model):
        block.register_forward_hook(lambda *_: before.append(Mark(device)))
    seconds = []
    with torchprobe.record(model, training.tower.layers):
        for block in training.blocks(model):
            block.register_forward_hook(lambda *_: behind.append(Mark(device)))
        for number in range(WARM_UP + steps):
            before.clear()
            behind.clear()
            training.step(model)
            if number >= WARM_UP:
                seconds.append(sum(end.since(begin) for begin, end in zip(before, behind, strict=True)))
    return Timing(tuple(seconds))


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at most during ``step``, once it has run a few times; None where that is not counted."""
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device)
    return peak


@contextlib.contextmanager
def forbidden_to_synchronize(device: torch.device) -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    if device.type != "cuda":
        yield
        return
    synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
