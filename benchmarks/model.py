"""Every block of a vision transformer recorded, compared with its ``observe_`` calls on their own.

The added time is the small difference of two large ones, so it is measured twice:

* From outside: plain and recorded forward passes take turns. The median of their differences is the whole cost of recording, with the
  noise of whole forward passes.
* From inside: two hooks that read the clock surround the recorder's hook. The time between them, summed over the blocks, is the cost of
  the hooks. It has little noise, but misses the microsecond that any hook adds to a module.

The calls on their own take their turns in the same rounds, one after the other, so they find the caches as a forward pass leaves them. A
second figure gives their time from hot caches; in a model, other layers always run in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

import torchprobe
from benchmarks.networks import VIT_B_32, HookClock, Network, block_outputs, twin
from benchmarks.report import Row, Section, Target
from benchmarks.timing import Timing, race, total
from torchprobe.ops import new_state, observe_


def run(device: torch.device, seconds: float, network: Network = VIT_B_32, batch: int = 16) -> Section:
    torch.manual_seed(0)
    plain = network.build().eval().to(device)
    recorded = twin(plain)
    images = network.images(batch, device)
    outputs = block_outputs(network.blocks(plain).values(), partial(plain, images))
    alone = [partial(observe_, new_state(x.shape[network.feature_dim], device), x, network.feature_dim) for x in outputs]
    models = {"plain": plain, "recorded": recorded}
    clocks = {name: HookClock(network.blocks(model).values(), partial(model, images)) for name, model in models.items()}
    with torch.no_grad():
        for clock in clocks.values():
            clock.place_first()
        with torchprobe.record(recorded, network.pattern):
            for clock in clocks.values():
                clock.place_last()
            times = race({**clocks, "alone": lambda: [call() for call in alone]}, 0.95 * seconds, device)
        hot = race({str(i): call for i, call in enumerate(alone)}, 0.05 * seconds, device, hot=True)
    inside = clocks["recorded"].timing(times["recorded"]).minus(clocks["plain"].timing(times["plain"]))
    return _section(network, f"{type(plain).__name__}, {batch} images", times, inside, total(hot.values()))


def _section(network: Network, case: str, times: Mapping[str, Timing], inside: Timing, hot: Timing) -> Section:
    alone, outside = times["alone"], times["recorded"].minus(times["plain"])

    def row(contestant: str, timing: Timing, aim: float | None = None) -> Row:
        ratio = timing.median / alone.median
        low, high = (bound / alone.median for bound in timing.interval)
        return Row(case, contestant, timing, ratio=ratio, target=Target("× observe_", ratio, aim, interval=(low, high)) if aim else None)

    low, high = (f"{bound * 1e3:.2f}" for bound in outside.interval)
    return Section(
        name="model",
        title=f"recording every block of {network.title}",
        rows=[
            Row(case, "forward, plain", times["plain"]),
            Row(case, "forward, every block recorded", times["recorded"]),
            row("observe_ of every block, between forwards", alone),
            row("observe_ of every block, from hot caches", hot),
            row("added, from inside: the hooks", inside, 1.5),
            row("added, from outside: recorded − plain", outside, 1.5),
        ],
        ratio="× observe_",
        note=f"{len(outside.seconds)} pairs of forwards. From outside, the 95 % interval of the median is {low} … {high} ms. "
        f"The hooks are {100 * inside.median / times['plain'].median:.2f} % of a forward.",
    )
