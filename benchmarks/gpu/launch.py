"""One call on one vector, where nothing but the overhead is left: for the host, and for the device.

On the host, a few calls are made in a row, so few that the queue of the device never fills. What a call takes until it returns is the
host's part; until the device, too, has done them all, is what a loop of such calls costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import nn

import torchprobe
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, time
from benchmarks.gpu.timing import WARM_UP, race, rotating, synchronize
from benchmarks.report import Target
from benchmarks.timing import Timing
from torchprobe.ops import new_state, observe_

LIMIT = 12.0  # µs


@dataclass(frozen=True)
class Plan:
    features: int = 768
    calls: int = 100
    rounds: int = 200
    seconds: float = 2  # for the device's part


QUICK = Plan(calls=10, rounds=5, seconds=0)


def run(device: Device, plan: Plan) -> Iterator[Figure]:
    where = device.torch_device
    x = torch.randn(1, plan.features, device=where)
    state = new_state(plan.features, where)
    plain, recorded = nn.Identity(), nn.Identity()
    case: dict[str, str | int] = {"shape": f"1 × {plan.features}"}
    with torchprobe.record(recorded, ""):
        host = hosts(
            {
                "x.add_(0)": partial(x.add_, 0),
                "observe_": partial(observe_, state, x),
                "no hook": partial(plain, x),
                "torchprobe.record": partial(recorded, x),
            },
            plan,
            where,
        )
    for name in ("x.add_(0)", "observe_"):
        returned, done = host[name]
        yield time(f"{name}, until it returns", returned, **case)
        target = Target("µs", done.median * 1e6, LIMIT) if name == "observe_" else None
        yield time(f"{name}, until the device has done it", done, target, note="calls in a row", **case)
    hook = host["torchprobe.record"][1].minus(host["no hook"][1])
    yield time("torchprobe.record, what it adds to nn.Identity", hook, note="until the device has done it", **case)
    contestants = {
        "x.add_(0)": rotating(lambda x: x.add_(0), [x], where),
        "observe_": rotating(partial(observe_, state), [x], where),
    }
    for name, timing in race(contestants, plan.seconds, where).items():
        yield time(f"{name}, on the device", timing, note=f"{contestants[name].calls} calls in one graph", **case)


def hosts(contestants: dict[str, Callable[[], object]], plan: Plan, device: torch.device) -> dict[str, tuple[Timing, Timing]]:
    """Of one call of each contestant: the time until it returns, and until the device has done it."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for call in contestants.values():
        for _ in range(WARM_UP):
            call()
    for _ in range(plan.rounds):
        for name, call in contestants.items():
            synchronize(device)
            start = perf_counter()
            for _ in range(plan.calls):
                call()
            returned = perf_counter()
            synchronize(device)
            times[name].append(((returned - start) / plan.calls, (perf_counter() - start) / plan.calls))
    return {name: (Timing(tuple(a for a, _ in pairs)), Timing(tuple(b for _, b in pairs))) for name, pairs in times.items()}
