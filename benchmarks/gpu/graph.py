"""A whole training step, recorder and optimiser included, captured in a CUDA graph and replayed.

Nothing that synchronises can be captured, so that it works at all shows that nothing does. The weights change from replay to replay, and
with them the activations; what the recorder has seen in the end is held against the reference in float64 on the outputs that the graph
leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, time
from benchmarks.gpu.step import share_of
from benchmarks.gpu.timing import Contestant, capture, race
from benchmarks.gpu.vit import TINY, Tower, Training, installed_tower
from benchmarks.report import Target
from torchprobe.ops.observe import reference

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Plan:
    tower: Callable[[], Tower] = installed_tower
    batch: int = 256
    seconds: float = 20
    replays: int = 3  # whose statistics are checked


QUICK = Plan(tower=lambda: TINY, batch=2, seconds=0)


def run(device: Device, plan: Plan) -> Iterator[Figure]:
    where = device.torch_device
    training = Training(plan.tower(), plan.batch, where, captured=True)
    case: dict[str, str | int] = {"model": training.tower.name, "batch": plan.batch}
    plain, recorded = training.model, training.twin()
    outputs = keep_outputs(training, recorded)
    shared: dict[str, Any] = {}
    if where.type == "cuda":  # the activations of two steps would not fit beside each other
        shared = {"stream": torch.cuda.Stream(where), "pool": torch.cuda.graph_pool_handle()}
    with torchprobe.record(recorded, training.tower.layers) as recorder:
        replay_recorded = capture(partial(training.step, recorded), where, **shared)
        recorder.reset()
        wanted: dict[str, torchprobe.Moments] = {}
        for _ in range(plan.replays):
            replay_recorded()
            for name, output in outputs.items():
                if name not in wanted:
                    wanted[name] = torchprobe.Moments(output.shape[-1], where)
                reference(wanted[name].state, output)
        worst = max(disagreement(name, recorder[name], moments) for name, moments in wanted.items())
        note = f"{plan.replays} replays of {len(wanted)} layers, counts equal; the largest of kurtosis, variance, vector kurtosis"
        yield Figure("relative error of the statistics", worst, "", case, target=Target("relative error", worst, TOLERANCE), note=note)
        replay_plain = capture(partial(training.step, plain), where, warm_up=0, **shared)  # outside the pool there would be a third copy
        contestants = {"plain": Contestant(replay_plain), "recorded": Contestant(replay_recorded)}
        times = race(contestants, plan.seconds, where, lead_in=False)
    yield time("captured step, plain", times["plain"], **case)
    yield time("captured step, every block recorded", times["recorded"], **case)
    yield share_of("added to the captured step", times["recorded"].minus(times["plain"]), times["plain"], case)


def keep_outputs(training: Training, model: nn.Module) -> dict[str, Tensor]:
    """Name → the last output of each block. A graph leaves its results where they were at capture, so they are new after every replay."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        outputs[name] = output.detach()

    for name, module in model.get_submodule(training.tower.blocks).named_children():
        module.register_forward_hook(partial(keep, f"{training.tower.blocks}.{name}"))
    return outputs


def disagreement(name: str, got: torchprobe.Moments, want: torchprobe.Moments) -> float:
    """The largest relative error.

    Raises:
        RuntimeError: they have not seen the same number of values.
    """
    if got.vectors != want.vectors or not torch.equal(got.count, want.count):
        raise RuntimeError(f"{name}: the graph recorded {got.vectors} vectors, the outputs it left behind have {want.vectors}")
    pairs = [(got.kurtosis, want.kurtosis), (got.variance, want.variance)]
    pairs.append((torch.tensor(got.vector_kurtosis), torch.tensor(want.vector_kurtosis)))
    return max(float(((a - b).abs() / b.abs()).max()) for a, b in pairs)
