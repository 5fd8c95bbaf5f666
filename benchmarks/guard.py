"""``python -m benchmarks.guard``: what a guard with a flight recorder, and a watch for jumps, add to a training step.

They run beside Moments of every block, in one process, with a step and a window in each round. Their time is taken inside, between two
clocks around everything that they do: in the forward, in the backward, and at the end of the step. So it is not the small difference of two
large numbers. It is the processor time of the thread, which other programs disturb least.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import thread_time
from typing import Any

import click
import torch

import torchprobe
from benchmarks.networks import TINY, VIT_B_32, Network, Training
from benchmarks.report import HELP, Report, Row, Section, Target, json_option
from benchmarks.timing import Timing, no_garbage_collection
from torchprobe.recording.guard_hooks import Batch, Watch
from torchprobe.recording.hook import Hook
from torchprobe.recording.watchers import Watchers

LIMIT = 0.5
"""Percent of a step for Moments, the guard and jumps together."""

PARTS: dict[str, list[tuple[Any, str]]] = {
    "Moments: hooks": [(Hook, "__call__")],
    "guard: forward": [(Watch, "__call__"), (Batch, "__call__")],
    "guard: backward": [(Watch, "arrived")],
    "guard and jumps: end of the step and of the window": [
        (Watchers, "end_step"),
        (Watchers, "end_window"),
        (Watchers, "window"),
        (Watchers, "window_closed"),
    ],
}
"""What is timed → the methods."""


class Clock:
    """The time inside some methods; that of a method within another one counts once."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.inside = False

    def around(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return method(*args, **kwargs)
            self.inside, began = True, thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] += thread_time() - began
                self.inside = False

        return timed

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        kept = [(owner, name, getattr(owner, name)) for methods in PARTS.values() for owner, name in methods]
        try:
            for part, methods in PARTS.items():
                for owner, name in methods:
                    setattr(owner, name, self.around(part, getattr(owner, name)))
            yield
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)


def run(network: Network, batch: int, rounds: int, layers: str | None = None) -> Section:
    """Steps with everything on. ``layers``: what the guard looks at; None: the recorded blocks."""
    training = Training(network, batch, torch.device("cpu"))
    model, clock = training.model, Clock()
    taken: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}
    recorder = torchprobe.record(model, list(training.blocks(model)))
    with tempfile.TemporaryDirectory() as folder, clock.placed(), no_garbage_collection(), recorder as rec:
        rec.guard(layers, dump=Path(folder))
        rec.watch_jumps()
        for index in range(rounds + 1):
            clock.seconds = dict.fromkeys(PARTS, 0.0)
            began = thread_time()
            training.step(model)
            rec.step()
            rec.snapshot(index)
            if index:  # the first one finds out where the features are
                taken["step"].append(thread_time() - began)
                for part, seconds in clock.seconds.items():
                    taken[part].append(seconds)
    timings = {part: Timing(tuple(seconds)) for part, seconds in taken.items()}
    step = timings.pop("step")
    together = Timing(tuple(map(sum, zip(*(timing.seconds for timing in timings.values()), strict=True))))
    share = 100 * together.median / step.median
    rows = [Row(f"{batch} images", part, timing, ratio=100 * timing.median / step.median) for part, timing in timings.items()]
    rows.append(Row(f"{batch} images", "together", together, ratio=share, target=Target("% of the step", share, LIMIT)))
    note = f"Processor time of one thread, medians of {rounds} steps of {step.median:.3f} s, with a window in every step."
    return Section(
        "guard",
        f"beside a training step of {network.title}, {'every block' if layers is None else layers} guarded",
        rows,
        note,
        ratio="% of the step",
    )


@click.command(context_settings=HELP)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Images in a step.")
@click.option("--rounds", type=click.IntRange(2), default=10, show_default=True)
@click.option("--all-modules", is_flag=True, help='The guard looks at every module, "**".')
@click.option("--quick", is_flag=True, help="A tiny network, which only shows that everything works.")
@json_option
def main(batch: int, rounds: int, all_modules: bool, quick: bool, path: Path | None) -> None:
    """The cost of a guard and of a watch for jumps beside Moments, in a training step on the CPU."""
    torch.set_num_threads(1)
    report = Report()
    report.add(run(TINY if quick else VIT_B_32, batch, rounds, "**" if all_modules else None))
    report.save(path)


if __name__ == "__main__":
    main()
