"""One hook where nothing but its overhead is left: a model that does nothing, on one vector."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks.inputs import gaussian
from benchmarks.report import Row, Section, Target
from benchmarks.timing import Timing, race
from torchprobe.ops import new_state, observe_


def run(device: torch.device, seconds: float, layers: int = 12, features: int = 768) -> Section:
    """Each figure is of one layer of ``layers``; as many layers have as many states, which must all pass through the cache."""
    x = gaussian(1, features, device=device)
    states = [new_state(features, device) for _ in range(layers)]
    plain = nn.Sequential(*[nn.Identity() for _ in range(layers)])
    hooked, recorded = copy.deepcopy(plain), copy.deepcopy(plain)
    for module in hooked:
        module.register_forward_hook(_empty)

    with torchprobe.record(recorded, "*"):
        times = race(
            {
                "plain": partial(plain, x),
                "hooked": partial(hooked, x),
                "recorded": partial(recorded, x),
                "operator": partial(_observe_all, states, x),
            },
            seconds,
            device,
        )
    per = {name: timing.per(layers) for name, timing in times.items()}
    added = per["recorded"].minus(per["plain"])
    case = f"(1, {features}), of {layers} layers"
    rows = [
        _row(case, "nn.Identity, no hook", per["plain"]),
        _row(case, "+ an empty Python hook", per["hooked"].minus(per["plain"])),
        _row(case, "+ torchprobe.record", added, Target("µs", added.median * 1e6, 10)),
        _row(case, "observe_ on its own", per["operator"]),
    ]
    return Section(
        name="hook",
        title="the cost of one hook",
        rows=rows,
        note="+: what is added to the plain call; median of the differences round by round.",
        unit="µs",
        scale=1e6,
    )


def _row(case: str, contestant: str, timing: Timing, target: Target | None = None) -> Row:
    return Row(case, contestant, timing, target=target)


def _empty(module: nn.Module, args: object, output: object) -> None:
    return None


def _observe_all(states: list[Tensor], x: Tensor) -> None:
    for state in states:
        observe_(state, x)
