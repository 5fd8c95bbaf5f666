"""``python -m benchmarks.training``: a training step with every block watched, compared with a plain step.

All contestants share one process and one set of weights. Each has its own modules over these weights, and they take turns. The time that
one adds is small compared with a step, so it is measured twice, as in :mod:`benchmarks.model`:

* from outside, as the median difference of whole steps within a round;
* on the CPU, from inside, between two clocks around the contestant's hook, summed over the blocks of a step.

Memory is the peak of a separate process for each contestant, minus the memory in use when everything has been imported.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import monitors
from benchmarks.networks import RESNET_50, VIT_B_32, HookClock, Network, Training, block_outputs
from benchmarks.report import HELP, Report, Row, Section, Target, json_option
from benchmarks.timing import TUNED_MALLOC, Timing, memory_in_use, peak_memory, race
from torchprobe.ops import new_state, observe_

LIMIT = 1.5
"""How much recording may add, relative to the sum of standalone ``observe_`` calls."""

MEMORY_STEPS = 4

NETWORKS = {"vit": VIT_B_32, "resnet": RESNET_50}
PLAIN, OURS = "plain", "torchprobe, every step"


def run(
    network: Network, batch: int, device: torch.device, seconds: float, only: Sequence[str] = ()
) -> tuple[list[Section], dict[str, str]]:
    """The tables of one network – whole steps, and on the CPU the time within the hooks –, and why a contestant was left out.

    ``only`` measures these contestants, the plain step and ours; default: all.
    """
    present, skipped = monitors.available(maps=network.feature_dim == 1)
    if only:
        present = {name: monitor for name, monitor in present.items() if name in (PLAIN, OURS, *only)}
    training = Training(network, batch, device)
    outputs = block_outputs(training.blocks(training.model).values(), partial(training.forward, training.model))
    alone = [partial(observe_, new_state(x.shape[network.feature_dim], device), x, network.feature_dim) for x in outputs]
    with contextlib.ExitStack() as stack:
        clocks = {}
        for name, monitor in present.items():
            model = training.twin()
            blocks = training.blocks(model)
            clock = clocks[name] = HookClock(blocks.values(), partial(training.step, model))
            clock.place_first()
            stack.enter_context(monitor.attach(model, blocks))
            clock.place_last()
        times = race({**clocks, "observe_": lambda: [call() for call in alone]}, seconds, device)
    case = f"{batch} images"
    sections = [_steps(network, case, times, present, skipped)]
    if device.type == "cpu":
        inside = {name: clock.timing(times[name]) for name, clock in clocks.items()}
        sections.append(_inside(network, case, times, inside, present))
    return sections, skipped


def _steps(
    network: Network, case: str, times: Mapping[str, Timing], present: Mapping[str, monitors.Monitor], skipped: Mapping[str, str]
) -> Section:
    rows = []
    for name, monitor in present.items():
        ratio = replace(times[name], seconds=tuple(a / b for a, b in zip(times[name].seconds, times[PLAIN].seconds, strict=True)))
        rows.append(Row(case, name, times[name], ratio=ratio.median, ratio_interval=ratio.interval, computes=monitor.computes))
    left_out = " ".join(f"Left out: {name}, {why}." for name, why in skipped.items())
    return Section(
        name="training steps",
        title=f"a training step of {network.title}, every block watched",
        rows=rows,
        ratio="× plain",
        note=f"{len(times['plain'].seconds)} rounds; ratios are medians over the rounds, with the 95 % interval. {left_out}",
    )


def _inside(
    network: Network, case: str, times: Mapping[str, Timing], inside: Mapping[str, Timing], present: Mapping[str, monitors.Monitor]
) -> Section:
    """The time that each adds, relative to the sum of standalone ``observe_`` calls."""
    alone = times["observe_"].median

    def row(name: str, timing: Timing, target: bool = False) -> Row:
        low, high = (bound / alone for bound in timing.interval)
        ratio = timing.median / alone
        aim = Target("× observe_", ratio, LIMIT, interval=(low, high)) if target else None
        return Row(case, name, timing, ratio=ratio, ratio_interval=(low, high), target=aim)

    rows = [row("observe_ of every block, between steps", times["observe_"])]
    rows += [row(f"{name}: inside", inside[name].minus(inside[PLAIN]), name == OURS) for name in present if name != PLAIN]
    rows.append(row(f"{OURS}: outside", times[OURS].minus(times[PLAIN]), True))
    share = 100 * rows[1].timing.median / times[PLAIN].median
    return Section(
        name="training hooks",
        title=f"the time that this adds to a step of {network.title}",
        rows=rows,
        ratio="× observe_",
        note=f"Inside: within the hooks; outside: step − plain step. every=10: of the nine steps in ten that only count. "
        f"torchprobe's hooks are {share:.2f} % of a plain step.",
    )


# -- memory ----------------------------------------------------------------------------------------------------------------


def peak(network: Network, name: str, batch: int, device: torch.device) -> int:
    """Bytes that this process needs at most for a few steps, beyond those that it uses now."""
    monitor = monitors.MONITORS[name]
    monitors.missing(monitor.module)  # imports it, so that imports are not counted
    monitors.missing(network.package)
    rehearsal = Training(replace(network, build=lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), size=4), 2, torch.device("cpu"))
    rehearsal.step(rehearsal.model)  # PyTorch imports more in the first step
    before = 0 if device.type == "cuda" else memory_in_use()
    training = Training(network, batch, device)
    with monitor.attach(training.model, training.blocks(training.model)):
        for _ in range(MEMORY_STEPS):
            training.step(training.model)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()) - before


def peaks(key: str, batch: int, device: torch.device, contestants: Sequence[str]) -> dict[str, int]:
    """The peak of every contestant, each in a separate process with the system's malloc."""
    environment = {name: value for name, value in os.environ.items() if name not in TUNED_MALLOC}
    found = {}
    for name in contestants:
        command = [sys.executable, "-m", "benchmarks.training", "--peak-of", name, "--network", key]
        command += ["--batch", str(batch), "--device", device.type]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found[name] = int(done.stdout.split()[-1])
    return found


# -- the command -----------------------------------------------------------------------------------------------------------


@click.command(context_settings=HELP)
@click.option("--network", "keys", multiple=True, type=click.Choice(list(NETWORKS)), help="This one; may be repeated.")
@click.option("--contestant", "only", multiple=True, type=click.Choice(list(monitors.MONITORS)), help="This one; may be repeated.")
@click.option("--batch", type=click.IntRange(1), help="Images in a step.  [default: 16; 256 on a GPU]")
@click.option("--seconds", type=float, help="For the steps of a network.  [default: 180]")
@click.option("--quick", is_flag=True, help="Two images, five rounds.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Only this one.  [default: the CPU, and a GPU if there is one]")
@json_option
@click.option("--peak-of", hidden=True, type=click.Choice(list(monitors.MONITORS)))
def main(
    keys: tuple[str, ...],
    only: tuple[str, ...],
    batch: int | None,
    seconds: float | None,
    quick: bool,
    device: str | None,
    path: Path | None,
    peak_of: str | None,
) -> None:
    """The cost of watching every block in a training step: torchprobe, plain PyTorch, and the monitors of other packages."""
    if peak_of is not None:
        print(peak(NETWORKS[keys[0]], peak_of, batch or 2, torch.device(device or "cpu")))
        return
    report = Report()
    memory: list[dict[str, Any]] = []
    devices = [device] if device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for where in map(torch.device, devices):
        images = batch or (2 if quick else 256 if where.type == "cuda" else 16)
        for key in keys or NETWORKS:
            of_one, _ = run(NETWORKS[key], images, where, seconds if seconds is not None else 0 if quick else 180, only)
            bytes_of = peaks(key, images, where, [row.contestant for row in of_one[0].rows])
            of_one[0] = replace(of_one[0], rows=[replace(row, megabytes=bytes_of[row.contestant] / 1e6) for row in of_one[0].rows])
            memory += [{"network": key, "device": where.type, "contestant": name, "peak": value} for name, value in bytes_of.items()]
            for section in of_one:
                report.add(section)
    report.save(path, memory=memory)


if __name__ == "__main__":
    main()
