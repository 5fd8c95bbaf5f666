"""A training step of a ViT-B/16 with and without recording every block; eager, and captured in a CUDA graph.

What recording adds is the median difference of steps that take turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import torchprobe
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, Labels, time
from benchmarks.gpu.timing import WARM_UP, Contestant, capture, race
from benchmarks.networks import Network, Training, installed_vit_b_16
from benchmarks.report import Target
from benchmarks.timing import synchronize

LIMIT = 1.0  # percent of the step


@dataclass(frozen=True)
class Step:
    """Time, memory and synchronization of an eager step."""

    network: Callable[[], Network] = installed_vit_b_16
    batch: int = 256
    seconds: float = 40

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        training = Training(self.network(), self.batch, where, autocast=True)
        case: Labels = {"model": training.network.title, "batch": self.batch}
        plain, recorded = training.model, training.twin()
        peak_plain = peak_memory(lambda: training.step(plain), where)
        with torchprobe.record(recorded, training.network.pattern) as recorder:
            peak_recorded = peak_memory(lambda: training.step(recorded), where)
            yield from self.compare("step", partial(training.step, plain), partial(training.step, recorded), where, case)
            with forbidden_to_synchronize(where):
                training.forward(recorded)
                recorder.snapshot(0)
            note = "snapshot included; the first would have been an error"
            yield Figure("synchronizations in a recorded forward pass", 0, "", case, note=note)
        if peak_plain is not None and peak_recorded is not None:
            yield Figure("peak memory, plain", peak_plain / 1e6, "MB", case)
            yield Figure("peak memory, added", (peak_recorded - peak_plain) / 1e6, "MB", case, note="includes the states")

    def compare(
        self, name: str, plain: Callable[[], object], recorded: Callable[[], object], device: torch.device, case: Labels
    ) -> Iterator[Figure]:
        """The time of both, and what recording adds as a share of the plain step, against the limit."""
        times = race({"plain": Contestant(plain), "recorded": Contestant(recorded)}, self.seconds, device, lead_in=False)
        added, whole = times["recorded"].minus(times["plain"]), times["plain"].median
        low, high = (100 * bound / whole for bound in added.interval)
        share = 100 * added.median / whole
        target = Target("% of the step", share, LIMIT, interval=(low, high))
        yield time(f"{name}, plain", times["plain"], case)
        yield time(f"{name}, every block recorded", times["recorded"], case)
        yield Figure(f"added to the {name}", share, "% of the step", case, added, target, f"95 % interval {low:.2f} … {high:.2f} %")


@dataclass(frozen=True)
class Graph(Step):
    """The whole step, recorder and optimizer included, captured in a CUDA graph and replayed.

    Whatever synchronizes cannot be captured, so a successful capture shows that nothing does. ``tests/test_capture.py`` checks the
    statistics of a captured step.
    """

    seconds: float = 20

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        training = Training(self.network(), self.batch, where, autocast=True, captured=True)
        case: Labels = {"model": training.network.title, "batch": self.batch}
        plain, recorded = training.model, training.twin()
        shared: dict[str, Any] = {}
        if where.type == "cuda":  # the activations of two steps would not fit into memory together
            shared = {"stream": torch.cuda.Stream(where), "pool": torch.cuda.graph_pool_handle()}
        with torchprobe.record(recorded, training.network.pattern):
            replay_recorded = capture(partial(training.step, recorded), where, **shared)
            # Warm-up steps would allocate a third copy of the activations, outside the shared pool.
            replay_plain = capture(partial(training.step, plain), where, warm_up=0, **shared)
            yield from self.compare("captured step", replay_plain, replay_recorded, where, case)


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """The peak of allocated bytes during ``step``, after a few steps; None on a CPU."""
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
    """Anything that makes the host wait for the device raises an error."""
    if device.type != "cuda":
        yield
        return
    synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
