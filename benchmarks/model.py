"""Every block of a vision transformer recorded, against its ``observe_`` calls on their own.

The added time is the small difference of two large ones, so it is taken twice. From outside: plain and recorded forwards take turns, and
the median of their differences says what recording costs as a whole, with the noise of whole forwards. From inside: two hooks that read the
clock stand before and behind the recorder's hook, and what lies between them, summed over the blocks, is what the hooks took: with next to
no noise, and all but the microsecond that a module with hooks costs more than one without.

The calls on their own are made in the same turns, one after the other, so they find the caches as a forward leaves them. How fast they are
when nothing runs in between is told as well; in a model something always does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks.inputs import gaussian
from benchmarks.report import Row, Section, Target
from benchmarks.timing import Timing, race
from torchprobe.ops import new_state, observe_

BLOCKS = "transformer.resblocks.*"


def vit_b_32() -> nn.Module:
    """The image tower, at random initialisation."""
    import open_clip

    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # it warns that there are no weights, as is meant
    try:
        visual: nn.Module = open_clip.create_model("ViT-B-32", pretrained=None).visual
    finally:
        logging.disable(logging.NOTSET)
    return visual


def run(device: torch.device, seconds: float, build: Callable[[], nn.Module] = vit_b_32, batch: int = 16, size: int = 224) -> Section:
    plain = build().eval().to(device)
    recorded = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})  # other modules over the same weights
    images = gaussian(batch, 3, size, size, device=device)
    with torch.no_grad():
        outputs = block_outputs(plain, images)
        alone = [partial(observe_, new_state(x.shape[-1], device), x) for x in outputs]
        around = {"plain": Stopwatch(plain), "recorded": Stopwatch(recorded)}
        for watch in around.values():
            watch.place_first()
        with torchprobe.record(recorded, BLOCKS):
            for watch in around.values():
                watch.place_last()
            turns = {name: partial(watch.forward, images) for name, watch in around.items()}
            times = race({**turns, "alone": lambda: [call() for call in alone]}, 0.95 * seconds, device)
        hot = race({str(i): call for i, call in enumerate(alone)}, 0.05 * seconds, device, hot=True)
    inside = around["recorded"].timing(times["recorded"]).minus(around["plain"].timing(times["plain"]))
    return _section(f"{type(plain).__name__}, {batch} images", times, inside, total(list(hot.values())))


def _section(case: str, times: Mapping[str, Timing], inside: Timing, hot: Timing) -> Section:
    alone, outside = times["alone"], times["recorded"].minus(times["plain"])

    def row(contestant: str, timing: Timing, aim: float | None = None) -> Row:
        ratio = timing.median / alone.median
        low, high = (bound / alone.median for bound in timing.interval)
        return Row(case, contestant, timing, ratio=ratio, target=Target("× observe_", ratio, aim, interval=(low, high)) if aim else None)

    rows = [
        Row(case, "forward, plain", times["plain"]),
        Row(case, "forward, every block recorded", times["recorded"]),
        row("observe_ of every block, between forwards", alone),
        row("observe_ of every block, from hot caches", hot),
        row("added, from inside: the hooks", inside, 1.5),
        row("added, from outside: recorded − plain", outside, 1.5),
    ]
    low, high = (f"{bound * 1e3:.2f}" for bound in outside.interval)
    return Section(
        name="model",
        title="recording every block of an open_clip ViT-B/32",
        rows=rows,
        ratio="× observe_",
        note=f"{len(outside.seconds)} pairs of forwards; from outside, the 95 % interval of the median is {low} … {high} ms. "
        f"The hooks are {100 * inside.median / times['plain'].median:.2f} % of a forward.",
    )


class Stopwatch:
    """The time between two hooks, summed over the blocks of one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = list(model.get_submodule(BLOCKS.removesuffix(".*")).children())
        self.began = self.total = 0.0
        self.forwards: list[float] = []

    def place_first(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(self._begin)

    def place_last(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(self._end)

    def forward(self, images: Tensor) -> None:
        self.total = 0.0
        self.model(images)
        self.forwards.append(self.total)

    def timing(self, forwards: Timing) -> Timing:
        """Between the hooks, of the forwards that were timed."""
        return replace(forwards, seconds=tuple(self.forwards[-len(forwards.seconds) :]))

    def _begin(self, module: nn.Module, args: object, output: object) -> None:
        self.began = perf_counter()

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self.total += perf_counter() - self.began


def block_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the blocks give for these images."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output.clone())) for block in Stopwatch(model).blocks
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return outputs


def total(timings: Sequence[Timing]) -> Timing:
    """The sum of several contestants, round by round."""
    seconds = tuple(map(sum, zip(*(timing.seconds for timing in timings), strict=True)))
    return Timing(seconds, disturbed=max(timing.disturbed for timing in timings))
