"""A training step of a ViT-B/16 with and without recording every block; eager, and captured in a CUDA graph.

The added time is a small difference of two large ones, so it is measured twice. From outside, it is the median difference of steps that
take turns. From inside, it is the time between two events around the recorder's hook, summed over the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, Labels, time
from benchmarks.gpu.timing import WARM_UP, Contestant, Mark, capture, race
from benchmarks.networks import TINY, Network, Training, installed_vit_b_16
from benchmarks.report import Target
from benchmarks.timing import Timing, synchronize
from torchprobe.ops.observe import reference

LIMIT = 1.0  # percent of the step
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Step:
    """Time, memory and synchronization of an eager step."""

    network: Callable[[], Network] = installed_vit_b_16
    batch: int = 256
    seconds: float = 40
    watched: int = 20  # steps measured from inside

    @classmethod
    def quick(cls) -> Step:
        return cls(network=lambda: TINY, batch=2, seconds=0, watched=5)

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        training = Training(self.network(), self.batch, where, autocast=True)
        case: Labels = {"model": training.network.title, "batch": self.batch}
        plain, recorded = training.model, training.twin()
        peak_plain = peak_memory(lambda: training.step(plain), where)
        with torchprobe.record(recorded, training.network.pattern) as recorder:
            peak_recorded = peak_memory(lambda: training.step(recorded), where)
            contestants = {"plain": Contestant(lambda: training.step(plain)), "recorded": Contestant(lambda: training.step(recorded))}
            times = race(contestants, self.seconds, where, lead_in=False)
            yield time("step, plain", times["plain"], case)
            yield time("step, every block recorded", times["recorded"], case)
            yield share_of("added, from outside: recorded − plain", times["recorded"].minus(times["plain"]), times["plain"], case)
            with forbidden_to_synchronize(where):
                training.forward(recorded)
                recorder.snapshot(0)
            note = "snapshot included; the first would have been an error"
            yield Figure("synchronizations in a recorded forward pass", 0, "", case, note=note)
        yield share_of("added, from inside: the recorder's hooks", watch(training, self.watched), times["plain"], case)
        if peak_plain is not None and peak_recorded is not None:
            yield Figure("peak memory, plain", peak_plain, "B", case)
            yield Figure("peak memory, recorded", peak_recorded, "B", case)
            yield Figure("peak memory, added", peak_recorded - peak_plain, "B", case, note="includes the states")


@dataclass(frozen=True)
class Graph:
    """The whole step, recorder and optimizer included, captured in a CUDA graph and replayed.

    Whatever synchronizes cannot be captured, so a successful capture shows that nothing does. The weights change from replay to replay, and
    the activations with them. In the end the recorded statistics are compared with the float64 reference on the outputs that the graph
    leaves in its memory.
    """

    network: Callable[[], Network] = installed_vit_b_16
    batch: int = 256
    seconds: float = 20
    replays: int = 3  # whose statistics are checked

    @classmethod
    def quick(cls) -> Graph:
        return cls(network=lambda: TINY, batch=2, seconds=0)

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        training = Training(self.network(), self.batch, where, autocast=True, captured=True)
        case: Labels = {"model": training.network.title, "batch": self.batch}
        plain, recorded = training.model, training.twin()
        outputs = keep_outputs(training, recorded)
        shared: dict[str, Any] = {}
        if where.type == "cuda":  # the activations of two steps would not fit into memory together
            shared = {"stream": torch.cuda.Stream(where), "pool": torch.cuda.graph_pool_handle()}
        with torchprobe.record(recorded, training.network.pattern) as recorder:
            replay_recorded = capture(partial(training.step, recorded), where, **shared)
            recorder.reset()
            expected: dict[str, torchprobe.Moments] = {}
            for _ in range(self.replays):
                replay_recorded()
                for name, output in outputs.items():
                    if name not in expected:
                        expected[name] = torchprobe.Moments(output.shape[-1], where)
                    reference(expected[name].state, output)
            worst = max(disagreement(name, recorder[name], moments) for name, moments in expected.items())
            note = f"{self.replays} replays of {len(expected)} layers, counts equal; the largest of kurtosis, variance, vector kurtosis"
            yield Figure("relative error of the statistics", worst, "", case, target=Target("relative error", worst, TOLERANCE), note=note)
            # Warm-up steps would allocate a third copy of the activations, outside the shared pool.
            replay_plain = capture(partial(training.step, plain), where, warm_up=0, **shared)
            contestants = {"plain": Contestant(replay_plain), "recorded": Contestant(replay_recorded)}
            times = race(contestants, self.seconds, where, lead_in=False)
        yield time("captured step, plain", times["plain"], case)
        yield time("captured step, every block recorded", times["recorded"], case)
        yield share_of("added to the captured step", times["recorded"].minus(times["plain"]), times["plain"], case)


def share_of(name: str, added: Timing, whole: Timing, case: Labels) -> Figure:
    """``added`` as a share of the median of ``whole``, against the limit."""
    low, high = (100 * bound / whole.median for bound in added.interval)
    share = added.median / whole.median
    target = Target("% of the step", 100 * share, LIMIT, interval=(low, high))
    return Figure(name, share, "share", case, added, target, note=f"95 % interval {low:.2f} … {high:.2f} %")


def watch(training: Training, steps: int) -> Timing:
    """The time of the device between two hooks, one before and one after the recorder's, summed over the blocks of a step."""
    model, device = training.twin(), training.device
    blocks = training.blocks(model).values()
    before: list[Mark] = []
    after: list[Mark] = []
    for block in blocks:
        block.register_forward_hook(lambda *_: before.append(Mark(device)))
    seconds = []
    with torchprobe.record(model, training.network.pattern):
        for block in blocks:
            block.register_forward_hook(lambda *_: after.append(Mark(device)))
        for number in range(WARM_UP + steps):
            before.clear()
            after.clear()
            training.step(model)
            if number >= WARM_UP:
                seconds.append(sum(end.since(begin) for begin, end in zip(before, after, strict=True)))
    return Timing(tuple(seconds))


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


def keep_outputs(training: Training, model: nn.Module) -> dict[str, Tensor]:
    """Name → the last output of each block. A graph writes its results to the same memory again, so they are new after every replay."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        outputs[name] = output.detach()

    for name, block in training.blocks(model).items():
        block.register_forward_hook(partial(keep, name))
    return outputs


def disagreement(name: str, got: torchprobe.Moments, expected: torchprobe.Moments) -> float:
    """The largest relative error.

    Raises:
        RuntimeError: they have not seen the same number of values.
    """
    if got.vectors != expected.vectors or not torch.equal(got.count, expected.count):
        raise RuntimeError(f"{name}: the graph recorded {got.vectors} vectors, but its outputs have {expected.vectors}")
    pairs = [(got.kurtosis, expected.kurtosis), (got.variance, expected.variance)]
    pairs.append((torch.tensor(got.vector_kurtosis), torch.tensor(expected.vector_kurtosis)))
    return max(float(((a - b).abs() / b.abs()).max()) for a, b in pairs)
