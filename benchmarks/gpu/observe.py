"""The operator ``observe_`` on a GPU: its share of the copy bandwidth, compared with the same formulas elsewhere, and one call alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks import formulas
from benchmarks.gpu.device import Device, clock_under
from benchmarks.gpu.results import Figure, Labels, time
from benchmarks.gpu.timing import L2_MULTIPLE, REPLAY_BYTES, WARM_UP, Contestant, capture, race, rotating, rotation
from benchmarks.report import Target
from benchmarks.timing import DTYPES as COMPARED
from benchmarks.timing import Timing, synchronize
from torchprobe.ops import new_state, observe_

MB = 1 << 20
DTYPES = {**COMPARED, "float16": torch.float16}
LAYOUTS = ("row-major", "channel-major")
TYPICAL = 768  # the width of a ViT-B
POSITIONS = 784  # of a channel-major map, 28 × 28, where so many vectors fit
AIMS = {"float32": (0.92, 0.80), "bfloat16": (0.85, 0.70), "float16": (0.85, 0.70)}  # aim, limit
LANES = 128  # lanes of instructions that a multiprocessor can issue in a cycle: four schedulers, a warp of 32 each
INSTRUCTIONS = {"float32": 26, "bfloat16": 24, "float16": 24}  # per element, about: see docs/performance.md
LAUNCH_LIMIT = 12.0  # µs

# -- bandwidth -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One tensor: ``size`` is the planned number of bytes, ``nbytes`` that of the whole vectors which fit."""

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
        """``count`` adjacent tensors in ``pool``."""
        return list(pool[: count * math.prod(self.shape)].view(count, *self.shape).unbind(0))

    def labels(self) -> Labels:
        return {**vars(self), "shape": " × ".join(map(str, self.shape)), "nbytes": self.nbytes}


class Found:
    """What the figures at the end are computed from."""

    def __init__(self) -> None:
        self.shares: dict[Case, float] = {}
        self.copies: list[float] = []  # seconds
        self.clock: float | None = None
        self.asked_for_clock = False


@dataclass(frozen=True)
class Bandwidth:
    """``observe_`` as a share of the bandwidth of a copy.

    The measure is a device-to-device copy of a large buffer, bytes read and written per second. It takes its turn in every round of every
    case, so a clock that drifts affects both. A share is ``x.nbytes / seconds`` of ``observe_`` divided by that.

    Every size is read from memory: the buffers that take turns are together several times the L2 cache. For a tensor that fits into half of
    that cache, the time with a single buffer is measured as well. In a model, the layer before has just written its activation, so the real
    time lies between the two.

    Shares of tensors of ``large`` bytes and more have aims and limits. All cases together take ``seconds`` at most, one case ``each``.
    """

    sizes: Sequence[int] = tuple(MB << k for k in range(0, 13, 2))  # 1 MB … 4 GB
    widths: Sequence[int] = (64, 256, TYPICAL, 1024, 4096, 16_384, 65_536)
    large: int = 64 * MB
    copy_bytes: int = 1 << 30
    replay_bytes: int = REPLAY_BYTES
    seconds: float = 150
    each: float = 0.15

    @classmethod
    def quick(cls) -> Bandwidth:
        return cls(sizes=(MB // 4, MB), widths=(64, TYPICAL), large=MB, copy_bytes=MB, replay_bytes=1, seconds=30, each=0)

    def run(self, device: Device) -> Iterator[Figure]:
        where, all_cases = device.torch_device, self.cases()
        sizes = [size for size in self.sizes if pool_bytes(size, device) + 2 * self.copy_bytes <= (device.memory or math.inf) / 2]
        source, destination = (torch.empty(self.copy_bytes, dtype=torch.uint8, device=where).random_() for _ in range(2))
        copy = Contestant(capture(partial(destination.copy_, source), where))
        found = Found()
        failures: list[str] = []
        pool: Tensor | None = None
        end, done = perf_counter() + self.seconds, 0
        for case in (case for case in all_cases if case.size in sizes):
            if perf_counter() > end or len(failures) > 2:
                break
            done += 1
            if pool is None or pool.dtype != DTYPES[case.dtype]:
                pool = None  # only one of them at a time
                pool = _gaussian(DTYPES[case.dtype], pool_bytes(max(sizes), device), where)
            try:
                yield from self.measure(case, pool, copy, device, found)
            except RuntimeError as error:
                failures.append(f"{case}: {error}")
        yield from self.summary(found, device)
        if done < len(all_cases):
            yield Figure("left out", len(all_cases) - done, "cases", note="not enough time or memory")
        if failures:
            raise RuntimeError(failures[0])

    def cases(self) -> list[Case]:
        """The most important cases first, in case time runs out."""
        cases = [Case(*labels) for labels in product(DTYPES, LAYOUTS, self.widths, self.sizes)]
        return sorted(cases, key=lambda case: case.width != TYPICAL and case.size < self.large)

    def measure(self, case: Case, pool: Tensor, copy: Contestant, device: Device, found: Found) -> Iterator[Figure]:
        where = device.torch_device
        count = rotation(case.nbytes, device.l2)
        call = partial(observe_, new_state(case.width, where), feature_dim=case.feature_dim)
        buffers = case.buffers(pool, count)
        contestants = {"copy": copy, "cold": rotating(call, buffers, where, self.replay_bytes)}
        if case.nbytes <= device.l2 / 2:
            contestants["hot"] = rotating(call, buffers[:1], where, self.replay_bytes)
        if where.type == "cuda" and case.size >= self.large and not found.asked_for_clock:
            found.asked_for_clock, found.clock = True, clock_under(contestants["cold"].run, where)
        times = race(contestants, self.each, where)
        bandwidth = 2 * self.copy_bytes / times["copy"].median
        found.copies.extend(times["copy"].seconds)
        for which, name, buffers_used in (("cold", "observe_", count), ("hot", "observe_, x in L2", 1)):
            if which in times:
                share = case.nbytes / times[which].median / bandwidth
                if which == "cold":
                    found.shares[case] = share
                yield Figure(name, share, "share", case.labels(), times[which], note=f"{buffers_used} buffers")

    def summary(self, found: Found, device: Device) -> Iterator[Figure]:
        """The results of all cases: the copy, the smallest shares of large tensors, and the arithmetic."""
        if not found.copies:
            return
        timing = Timing(tuple(found.copies))
        bandwidth = 2 * self.copy_bytes / timing.median
        yield Figure("copy", bandwidth, "B/s", {"size": self.copy_bytes}, timing, note="bytes read and written, over all cases")
        for dtype, layout in product(DTYPES, LAYOUTS):
            large = {c: share for c, share in found.shares.items() if (c.dtype, c.layout) == (dtype, layout) and c.size >= self.large}
            typical = {c: share for c, share in large.items() if c.width == TYPICAL}
            for name, shares in ((f"width {TYPICAL}", typical), ("every width", large)):
                if shares:
                    worst = min(shares, key=shares.__getitem__)
                    aim, limit = AIMS[dtype]
                    goal = Target("% of the copy", 100 * shares[worst], 100 * aim, 100 * limit, at_least=True)
                    labels: Labels = {"dtype": dtype, "layout": layout, "at": name}
                    note = f"at width {worst.width:,}, {worst.size // MB:,} MB"
                    yield Figure(f"smallest share from {self.large // MB} MB on", shares[worst], "share", labels, target=goal, note=note)
        yield from _issue_slots(found, device, bandwidth)


def _issue_slots(found: Found, device: Device, bandwidth: float) -> Iterator[Figure]:
    """How many instructions an element may take at the speed of the copy, and how many could have been issued at the speed measured."""
    clock = found.clock or device.clock
    if not clock:
        return
    yield Figure("clock", clock, "Hz", note="under load" if found.clock else "the highest: nvidia-smi reported none under load")
    slots = device.multiprocessors * LANES * clock
    how = f"{device.multiprocessors} multiprocessors × {LANES} lanes × {clock / 1e9:.3f} GHz"
    for name, dtype in DTYPES.items():
        at_copy = bandwidth / dtype.itemsize  # elements a second
        allowed, needed = slots / at_copy, INSTRUCTIONS[name]
        labels: Labels = {"dtype": name}
        yield Figure("issue slots an element, at the speed of the copy", allowed, "slots", labels, note=f"{how} / {at_copy:.3g} elements/s")
        note = f"{allowed:.1f} slots for about {needed} instructions an element"
        yield Figure("largest share the issue slots allow", min(1, allowed / needed), "share", labels, note=note)
        typical = [c for c in found.shares if (c.dtype, c.layout, c.width) == (name, "row-major", TYPICAL)]
        if typical:
            largest = max(typical, key=lambda c: c.nbytes)
            rate = at_copy * found.shares[largest]
            note = f"{how} / {rate:.3g} elements/s, at {largest.size // MB:,} MB"
            yield Figure("issue slots an element, as measured", slots / rate, "slots", labels, note=note)


def pool_bytes(size: int, device: Device) -> int:
    """For a rotation of tensors of up to ``size`` bytes."""
    return size + L2_MULTIPLE * device.l2


def _gaussian(dtype: torch.dtype, nbytes: int, device: torch.device) -> Tensor:
    """Independent Gaussian values, the same in every run, without a copy in float32."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device).normal_(generator=generator)


# -- rivals ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rivals:
    """``observe_`` compared with the same formulas in eager PyTorch and under inductor, at a few sizes.

    All of them are replayed from a graph. This favors the eager formulas, because their twenty launches then cost the host nothing.
    ``vectors`` of each input; ``seconds`` for each input of each type, without the compilation.
    """

    vectors: Sequence[int] = (1576, 12_608, 403_456)  # 8, 64 and 2048 images of 197 tokens: 5 MB, 39 MB and 1.2 GB in float32
    features: int = 768
    compiled: bool = True
    replay_bytes: int = REPLAY_BYTES
    seconds: float = 1.5

    @classmethod
    def quick(cls) -> Rivals:
        return cls(vectors=(256,), compiled=False, replay_bytes=1, seconds=0)

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        failure: Exception | None = None
        calls: dict[str, Callable[[Tensor], object]] = {
            "x.sum()": torch.sum,
            "observe_": partial(observe_, new_state(self.features, where)),
            "eager": formulas.eager,
        }
        for vectors, (name, dtype) in product(self.vectors, COMPARED.items()):
            labels: Labels = {"dtype": name, "shape": f"{vectors} × {self.features}"}
            count = rotation(vectors * self.features * dtype.itemsize, device.l2)
            buffers = list(torch.randn(count, vectors, self.features, dtype=dtype, device=where).unbind(0))
            contestants = {what: rotating(call, buffers, where, self.replay_bytes) for what, call in calls.items()}
            if self.compiled and failure is None:
                try:
                    compiled = torch.compile(formulas.eager, fullgraph=True, dynamic=False)
                    contestants["inductor"] = rotating(compiled, buffers, where, self.replay_bytes)
                except Exception as error:  # the compiler needs a C compiler and more, and raises its own errors
                    failure = error
            times = race(contestants, self.seconds, where)
            for what, timing in times.items():
                yield time(what, timing, labels, note=f"{timing.median / times['observe_'].median:.2f} × observe_")
        if failure is not None:
            raise RuntimeError(f"inductor: {type(failure).__name__}: {failure}") from failure


# -- launch ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One call on one vector, where only the overhead is left: for the host, and for the device.

    On the host a few calls are made in a row, so few that the queue of the device never fills. The time until a call returns is the host's
    part. The time until the device, too, has done them all is the cost in a loop of such calls.
    """

    features: int = 768
    calls: int = 100
    rounds: int = 200
    seconds: float = 2  # for the device's part

    @classmethod
    def quick(cls) -> Launch:
        return cls(calls=10, rounds=5, seconds=0)

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        x = torch.randn(1, self.features, device=where)
        state = new_state(self.features, where)
        plain, recorded = nn.Identity(), nn.Identity()
        case: Labels = {"shape": f"1 × {self.features}"}
        with torchprobe.record(recorded, ""):
            host = self.on_host(
                {
                    "x.add_(0)": partial(x.add_, 0),
                    "observe_": partial(observe_, state, x),
                    "no hook": partial(plain, x),
                    "torchprobe.record": partial(recorded, x),
                },
                where,
            )
        for name in ("x.add_(0)", "observe_"):
            returned, done = host[name]
            yield time(f"{name}, until it returns", returned, case)
            target = Target("µs", done.median * 1e6, LAUNCH_LIMIT) if name == "observe_" else None
            yield time(f"{name}, until the device has done it", done, case, target, note="calls in a row")
        hook = host["torchprobe.record"][1].minus(host["no hook"][1])
        yield time("torchprobe.record, what it adds to nn.Identity", hook, case, note="until the device has done it")
        contestants = {
            "x.add_(0)": rotating(lambda x: x.add_(0), [x], where),
            "observe_": rotating(partial(observe_, state), [x], where),
        }
        for name, timing in race(contestants, self.seconds, where).items():
            yield time(f"{name}, on the device", timing, case, note=f"{contestants[name].calls} calls in one graph")

    def on_host(self, contestants: dict[str, Callable[[], object]], device: torch.device) -> dict[str, tuple[Timing, Timing]]:
        """For one call of each contestant: the time until it returns, and until the device has done it."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for call in contestants.values():
            for _ in range(WARM_UP):
                call()
        for _ in range(self.rounds):
            for name, call in contestants.items():
                synchronize(device)
                start = perf_counter()
                for _ in range(self.calls):
                    call()
                returned = perf_counter()
                synchronize(device)
                times[name].append(((returned - start) / self.calls, (perf_counter() - start) / self.calls))
        return {name: (Timing(tuple(a for a, _ in pairs)), Timing(tuple(b for _, b in pairs))) for name, pairs in times.items()}
