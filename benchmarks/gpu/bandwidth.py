"""``observe_`` as a share of the bandwidth of a copy.

The measure is a device-to-device copy of a large buffer, bytes read and written per second; it takes its turn in every round of every
case, so a clock that drifts moves both. A share is ``x.nbytes / seconds`` of ``observe_`` over that.

Every size is read from memory: so many buffers take turns that together they are several times the L2 cache. For what fits into half of
that cache the time with a single buffer is told as well. In a model, where the layer before has just written its activation, the truth lies
between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, clock_under
from benchmarks.gpu.results import Figure
from benchmarks.gpu.timing import L2_MULTIPLE, REPLAY_BYTES, Contestant, capture, race, rotating, rotation
from benchmarks.report import Target
from benchmarks.timing import Timing
from torchprobe.ops import new_state, observe_

MB = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("row-major", "channel-major")
TYPICAL = 768  # the width of a ViT-B
POSITIONS = 784  # of a channel-major map, 28 × 28, where so many vectors fit
AIMS = {"float32": (0.92, 0.80), "bfloat16": (0.85, 0.70), "float16": (0.85, 0.70)}  # aim, limit
LANES = 128  # lanes of instructions that a multiprocessor can issue in a cycle: four schedulers, a warp of 32 each
INSTRUCTIONS = {"float32": 26, "bfloat16": 24, "float16": 24}  # an element, about: see docs/performance.md


@dataclass(frozen=True)
class Plan:
    """What is measured: from ``large`` bytes on shares have aims and limits; ``seconds`` at most for all cases, ``each`` for one."""

    sizes: Sequence[int] = tuple(MB << k for k in range(0, 13, 2))  # 1 MB … 4 GB
    widths: Sequence[int] = (64, 256, TYPICAL, 1024, 4096, 16_384, 65_536)
    large: int = 64 * MB
    copy_bytes: int = 1 << 30
    replay_bytes: int = REPLAY_BYTES
    seconds: float = 150
    each: float = 0.15


QUICK = Plan(sizes=(MB // 4, MB), widths=(64, TYPICAL), large=MB, copy_bytes=MB, replay_bytes=1, seconds=30, each=0)


@dataclass(frozen=True)
class Case:
    """One tensor: ``size`` is what was asked for, ``nbytes`` what whole vectors make of it."""

    dtype: str
    layout: str
    width: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        vectors = max(1, self.size // (self.width * DTYPES[self.dtype].itemsize))
        if self.layout == "row-major":
            return vectors, self.width
        positions = min(POSITIONS, vectors // 8 * 8 or vectors)  # channels stay aligned
        return vectors // positions, self.width, positions

    @property
    def feature_dim(self) -> int:
        return 1  # (vectors, features) as well as (images, features, positions)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def buffers(self, pool: Tensor, count: int) -> list[Tensor]:
        """``count`` tensors side by side in ``pool``."""
        return list(pool[: count * math.prod(self.shape)].view(count, *self.shape).unbind(0))

    def labels(self) -> dict[str, str | int]:
        return {**vars(self), "shape": " × ".join(map(str, self.shape)), "nbytes": self.nbytes}


class Seen:
    """What the figures at the end are made of."""

    def __init__(self) -> None:
        self.shares: dict[Case, float] = {}
        self.copies: list[float] = []  # seconds
        self.clock: float | None = None
        self.asked_for_clock = False


def run(device: Device, plan: Plan) -> Iterator[Figure]:
    where, all_cases = device.torch_device, list(_cases(plan))
    sizes = [size for size in plan.sizes if _pool_bytes(size, device) + 2 * plan.copy_bytes <= (device.memory or math.inf) / 2]
    cases = [case for case in all_cases if case.size in sizes]
    source, destination = (torch.empty(plan.copy_bytes, dtype=torch.uint8, device=where).random_() for _ in range(2))
    copy = Contestant(capture(partial(destination.copy_, source), where))
    seen, failures = Seen(), []
    pool: Tensor | None = None
    end, done = perf_counter() + plan.seconds, 0
    for case in cases:
        if perf_counter() > end or len(failures) > 2:
            break
        done += 1
        if pool is None or pool.dtype != DTYPES[case.dtype]:
            pool = None  # only one of them at a time
            pool = _gaussian(DTYPES[case.dtype], _pool_bytes(max(sizes), device), where)
        try:
            yield from _measure(case, pool, copy, device, plan, seen)
        except RuntimeError as error:
            failures.append(f"{case}: {error}")
    yield from summary(seen, device, plan)
    if done < len(all_cases):
        yield Figure("left out", len(all_cases) - done, "cases", note="time or memory did not suffice")
    if failures:
        raise RuntimeError(failures[0])


def _cases(plan: Plan) -> Iterator[Case]:
    """What matters most comes first, in case time runs out."""
    cases = [Case(*labels) for labels in product(DTYPES, LAYOUTS, plan.widths, plan.sizes)]
    yield from sorted(cases, key=lambda case: case.width != TYPICAL and case.size < plan.large)


def summary(seen: Seen, device: Device, plan: Plan) -> Iterator[Figure]:
    """What all cases together say: the copy, the smallest shares of large tensors, and the arithmetic."""
    if not seen.copies:
        return
    timing = Timing(tuple(seen.copies))
    bandwidth = 2 * plan.copy_bytes / timing.median
    yield Figure("copy", bandwidth, "B/s", {"size": plan.copy_bytes}, timing, note="bytes read and written, over all cases")
    for dtype, layout in product(DTYPES, LAYOUTS):
        large = {c: share for c, share in seen.shares.items() if (c.dtype, c.layout) == (dtype, layout) and c.size >= plan.large}
        typical = {c: share for c, share in large.items() if c.width == TYPICAL}
        for name, shares in ((f"width {TYPICAL}", typical), ("every width", large)):
            if shares:
                worst = min(shares, key=shares.__getitem__)
                aim, limit = AIMS[dtype]
                goal = Target("% of the copy", 100 * shares[worst], 100 * aim, 100 * limit, at_least=True)
                labels: dict[str, str | int] = {"dtype": dtype, "layout": layout, "at": name}
                note = f"at width {worst.width:,}, {worst.size // MB:,} MB"
                yield Figure(f"smallest share from {plan.large // MB} MB on", shares[worst], "share", labels, target=goal, note=note)
    yield from _issue_slots(seen, device, bandwidth)


def _issue_slots(seen: Seen, device: Device, bandwidth: float) -> Iterator[Figure]:
    """How many instructions an element may take at the speed of the copy, and how many could have been issued at the speed measured."""
    clock = seen.clock or device.clock
    if not clock:
        return
    yield Figure("clock", clock, "Hz", note="under load" if seen.clock else "the highest: nvidia-smi gave none under load")
    slots = device.multiprocessors * LANES * clock
    how = f"{device.multiprocessors} multiprocessors × {LANES} lanes × {clock / 1e9:.3f} GHz"
    for name, dtype in DTYPES.items():
        at_copy = bandwidth / dtype.itemsize  # elements a second
        allowed = slots / at_copy
        labels: dict[str, str | int] = {"dtype": name}
        yield Figure("issue slots an element, at the speed of the copy", allowed, "slots", labels, note=f"{how} / {at_copy:.3g} elements/s")
        needed = INSTRUCTIONS[name]
        note = f"{allowed:.1f} slots for about {needed} instructions an element"
        yield Figure("largest share the issue slots allow", min(1, allowed / needed), "share", labels, note=note)
        typical = [c for c in seen.shares if (c.dtype, c.layout, c.width) == (name, "row-major", TYPICAL)]
        if typical:
            largest = max(typical, key=lambda c: c.nbytes)
            rate = at_copy * seen.shares[largest]
            note = f"{how} / {rate:.3g} elements/s, at {largest.size // MB:,} MB"
            yield Figure("issue slots an element, as measured", slots / rate, "slots", labels, note=note)


def _measure(case: Case, pool: Tensor, copy: Contestant, device: Device, plan: Plan, seen: Seen) -> Iterator[Figure]:
    where = device.torch_device
    count = rotation(case.nbytes, device.l2)
    call = partial(observe_, new_state(case.width, where), feature_dim=case.feature_dim)
    buffers = case.buffers(pool, count)
    contestants = {"copy": copy, "cold": rotating(call, buffers, where, plan.replay_bytes)}
    if case.nbytes <= device.l2 / 2:
        contestants["hot"] = rotating(call, buffers[:1], where, plan.replay_bytes)
    if where.type == "cuda" and case.size >= plan.large and not seen.asked_for_clock:
        seen.asked_for_clock, seen.clock = True, clock_under(contestants["cold"].run, where)
    times = race(contestants, plan.each, where)
    bandwidth = 2 * plan.copy_bytes / times["copy"].median
    seen.copies.extend(times["copy"].seconds)
    for which, name in (("cold", "observe_"), ("hot", "observe_, x in L2")):
        if which in times:
            share = case.nbytes / times[which].median / bandwidth
            if which == "cold":
                seen.shares[case] = share
            yield Figure(name, share, "share", case.labels(), times[which], note=f"{count if which == 'cold' else 1} buffers")


def _pool_bytes(size: int, device: Device) -> int:
    """For a rotation of tensors of up to ``size`` bytes."""
    return size + L2_MULTIPLE * device.l2


def _gaussian(dtype: torch.dtype, nbytes: int, device: torch.device) -> Tensor:
    """Independent Gaussian values, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device).normal_(generator=generator)
