"""Every block of a vision transformer recorded, against its ``observe_`` calls on their own.

The added time is the small difference of two large ones, so it is taken twice. From outside: plain and recorded forwards take turns, and
the median of their differences says what recording costs as a whole, with the noise of whole forwards. From inside: two hooks that read the
clock stand before and behind the recorder's hook, and what lies between them, summed over the blocks, is what the hooks took: with next
to no noise, and all but the microsecond that a module with hooks costs more than one without.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
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
        around = {"plain": Stopwatch(plain), "recorded": Stopwatch(recorded)}
        for watch in around.values():
            watch.place_first()
        with torchprobe.record(recorded, BLOCKS):
            for watch in around.values():
                watch.place_last()
            forwards = race({name: partial(watch.forward, images) for name, watch in around.items()}, 0.9 * seconds, device)
        states = [new_state(x.shape[-1], device) for x in outputs]
        calls = race({str(i): partial(observe_, states[i], x) for i, x in enumerate(outputs)}, 0.1 * seconds, device, hot=True)

    rounds = len(forwards["plain"].seconds)
    added = forwards["recorded"].minus(forwards["plain"])
    inside = around["recorded"].timing(rounds).minus(around["plain"].timing(rounds))
    alone = total(list(calls.values()))
    case = f"ViT-B/32, {batch} images" if build is vit_b_32 else f"{type(plain).__name__}, {batch} images"
    low, high = added.interval[0] / alone.median, added.interval[1] / alone.median
    rows = [
        Row(case, "forward, plain", forwards["plain"]),
        Row(case, "forward, every block recorded", forwards["recorded"]),
        Row(case, f"observe_ on its own, sum of {len(outputs)} blocks", alone, ratio=1.0),
        Row(
            case,
            "added, from inside (the hooks)",
            inside,
            ratio=inside.median / alone.median,
            target=Target("× observe_", inside.median / alone.median, 1.5),
        ),
        Row(
            case,
            "added, from outside (forwards, differences)",
            added,
            ratio=added.median / alone.median,
            target=Target("× observe_", added.median / alone.median, 1.5, interval=(low, high)),
        ),
    ]
    return Section(
        name="model",
        title="recording a model",
        rows=rows,
        ratio="× observe_",
        note=f"From outside the 95 % interval of the median is {low:.2f} … {high:.2f} × observe_, over {rounds} pairs of forwards; "
        f"recording adds {100 * inside.median / forwards['plain'].median:.2f} % to a forward, as seen from inside.",
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

    def timing(self, rounds: int) -> Timing:
        """Of the last ``rounds`` forwards."""
        return Timing(tuple(self.forwards[-rounds:]))

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
    return Timing(tuple(map(sum, zip(*(timing.seconds for timing in timings), strict=True))))
