"""``python -m benchmarks.training``: a training step with every block watched, beside one with none.

One process, one set of weights: every contestant has modules of its own over them, and they take turns. What a contestant adds is small
beside a step, so it is taken twice, as in :mod:`benchmarks.model`: from outside, as the median of the differences of whole steps within
a round; and on the CPU from inside, between a hook that reads the clock before the contestant's and one behind it, summed over the
blocks of a step.

Memory is the high-water mark of a process of its own for each contestant, less what the process held once everything was imported.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import allocator, monitors, report
from benchmarks.inputs import gaussian
from benchmarks.report import Row, Section, Target
from benchmarks.timing import Timing, race
from torchprobe.ops import new_state, observe_

LIMIT = 1.5
"""What recording may add, in sums of standalone ``observe_`` calls."""

MEMORY_STEPS = 4

PLAIN, OURS = "plain", "torchprobe, every step"


@dataclass(frozen=True)
class Network:
    """A network and which of its modules are blocks; images are square, ``size`` wide."""

    title: str
    module: str  # what builds it
    build: Callable[[], nn.Module]
    is_block: Callable[[str], bool]
    size: int = 224
    maps: bool = False
    feature_dim: int = -1


def _vit() -> nn.Module:
    import open_clip

    logging.disable(logging.WARNING)  # it warns that there are no weights, as is meant
    try:
        visual: nn.Module = open_clip.create_model("ViT-B-32", pretrained=None).visual
    finally:
        logging.disable(logging.NOTSET)
    return visual


def _resnet() -> nn.Module:
    from torchvision.models import resnet50

    model: nn.Module = resnet50(weights=None)
    return model


NETWORKS = {
    "vit": Network("open_clip's ViT-B/32", "open_clip", _vit, lambda name: name.rpartition(".")[0] == "transformer.resblocks"),
    "resnet": Network(
        "torchvision's ResNet-50",
        "torchvision.models",
        _resnet,
        lambda name: name.count(".") == 1 and name.startswith("layer"),
        maps=True,
        feature_dim=1,
    ),
}


class Training:
    """One set of weights, one optimizer, and as many copies of the modules as are asked for."""

    def __init__(self, network: Network, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network = network
        self.model = network.build().train().to(device)
        self.images = gaussian(batch, 3, network.size, network.size, device=device)
        with torch.no_grad():
            self.labels = torch.arange(batch, device=device) % self.model(self.images).shape[1]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def twin(self) -> nn.Module:
        """Other modules over the same weights."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: module for name, module in model.named_modules() if self.network.is_block(name)}

    def step(self, model: nn.Module) -> None:
        loss = functional.cross_entropy(model(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def outputs(self) -> list[Tensor]:
        """What the blocks give."""
        model, outputs = self.twin(), []
        for block in self.blocks(model).values():
            block.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
        with torch.no_grad():
            model(self.images)
        return outputs


class Clock:
    """Steps of one model, and the time between two hooks on each block summed over a step."""

    def __init__(self, training: Training, model: nn.Module) -> None:
        self.training, self.model = training, model
        self.began = self.total = 0.0
        self.inside: list[float] = []

    def place(self, hook: Callable[..., None]) -> None:
        for block in self.training.blocks(self.model).values():
            block.register_forward_hook(hook)

    def begin(self, module: nn.Module, args: object, output: object) -> None:
        self.began = perf_counter()

    def end(self, module: nn.Module, args: object, output: object) -> None:
        self.total += perf_counter() - self.began

    def step(self) -> None:
        self.total = 0.0
        self.training.step(self.model)
        self.inside.append(self.total)

    def timing(self, steps: Timing) -> Timing:
        """Between the hooks, of the steps that were timed."""
        return replace(steps, seconds=tuple(self.inside[-len(steps.seconds) :]))


def run(
    network: Network, batch: int, device: torch.device, seconds: float, only: Sequence[str] = ()
) -> tuple[list[Section], dict[str, str]]:
    """The tables of one network: whole steps, and on the CPU what lies within the hooks; and who was left out, and why.

    ``only`` these contestants, the plain step and ours; default: all.
    """
    present, skipped = monitors.available(network.maps)
    if only:
        present = {name: monitor for name, monitor in present.items() if name in (PLAIN, OURS, *only)}
    training = Training(network, batch, device)
    outputs = training.outputs()
    alone = [partial(observe_, new_state(x.shape[network.feature_dim], device), x, network.feature_dim) for x in outputs]
    with contextlib.ExitStack() as stack:
        clocks = {}
        for name, monitor in present.items():
            clock = clocks[name] = Clock(training, training.twin())
            clock.place(clock.begin)
            stack.enter_context(monitor.attach(clock.model, training.blocks(clock.model)))
            clock.place(clock.end)
        turns: dict[str, Callable[[], object]] = {name: clock.step for name, clock in clocks.items()}
        times = race({**turns, "observe_": lambda: [call() for call in alone]}, seconds, device)
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
    """What each adds, in sums of standalone ``observe_`` calls."""
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
        title=f"what that adds to a step of {network.title}",
        rows=rows,
        ratio="× observe_",
        note=f"Inside: within the hooks; outside: step − plain step. With every=10, of the steps that only count, nine of ten. "
        f"torchprobe's hooks are {share:.2f} % of a plain step.",
    )


# -- memory ----------------------------------------------------------------------------------------------------------------


def peak(network: Network, name: str, batch: int, device: torch.device) -> int:
    """Bytes that a few steps need at most, in this process, beyond what it holds now."""
    monitor = monitors.MONITORS[name]
    monitors.missing(monitor.module)  # what is imported is not counted,
    monitors.missing(network.module)
    rehearsal = Training(replace(network, build=lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), size=4), 2, torch.device("cpu"))
    rehearsal.step(rehearsal.model)  # nor what PyTorch imports with the first step
    before = 0 if device.type == "cuda" else _resident()
    training = Training(network, batch, device)
    with monitor.attach(training.model, training.blocks(training.model)):
        for _ in range(MEMORY_STEPS):
            training.step(training.model)
    return _high_water(device) - before


def _high_water(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage knows on Linux begins with the memory of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # type: ignore[index]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident() -> int:
    """Bytes in use now; where only the high-water mark is known, that."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else _high_water(torch.device("cpu"))


def peaks(key: str, batch: int, device: torch.device, contestants: Sequence[str]) -> dict[str, int]:
    """Of every contestant, each in a process of its own with malloc as the system has it."""
    environment = {name: value for name, value in os.environ.items() if name not in allocator.TUNED}
    found = {}
    for name in contestants:
        command = [sys.executable, "-m", "benchmarks.training", "--peak-of", name, "--network", key]
        command += ["--batch", str(batch), "--device", device.type]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found[name] = int(done.stdout.split()[-1])
    return found


# -- the command -----------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--network", "keys", multiple=True, type=click.Choice(list(NETWORKS)), help="This one; may be repeated.")
@click.option("--contestant", "only", multiple=True, type=click.Choice(list(monitors.MONITORS)), help="This one; may be repeated.")
@click.option("--batch", type=click.IntRange(1), help="Images in a step.  [default: 16; 256 on a GPU]")
@click.option("--seconds", type=float, help="For the steps of a network.  [default: 180]")
@click.option("--quick", is_flag=True, help="Two images, five rounds.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="This one only.  [default: the CPU, and a GPU if there is one]")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure to FILE, in seconds and bytes.")
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
    """What watching every block costs a training step: torchprobe, plain PyTorch, and the monitors of other packages."""
    if peak_of is not None:
        print(peak(NETWORKS[keys[0]], peak_of, batch or 2, torch.device(device or "cpu")))
        return
    allocator.restart_tuned()
    console = Console()
    if not console.is_terminal:
        console.width = 200
    sections: list[Section] = []
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
                console.print(report.table(section, console.width), "")
            sections += of_one
    if path is not None:
        path.write_text(json.dumps({**report.as_json(sections), "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
