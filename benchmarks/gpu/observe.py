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
from benchmarks.timing import DTYPES, Timing, synchronize
from torchprobe.ops import new_state, observe_

MB = 1 << 20
TYPICAL = 768  # the width of a ViT-B
LARGE = 256 * MB
LANES = 128  # lanes of instructions that a multiprocessor can issue in a cycle: four schedulers, a warp of 32 each
INSTRUCTIONS = {"float32": 17.5, "bfloat16": 16.8}  # per element: benchmarks.gpu.count
LAUNCH_LIMIT = 12.0  # µs

# -- bandwidth -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One tensor of about ``size`` bytes: whole vectors, or whole maps of ``positions``. ``strong`` features are 60 times the others."""

    dtype: str
    layout: str = "rows"
    width: int = TYPICAL
    size: int = LARGE
    strong: int = 0
    positions: int = 784

    @property
    def shape(self) -> tuple[int, ...]:
        vectors = max(1, self.size // (self.width * DTYPES[self.dtype].itemsize))
        if self.layout == "rows":
            return vectors, self.width
        positions = min(self.positions, vectors)
        return max(1, vectors // positions), self.width, positions

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def buffers(self, pool: Tensor, count: int) -> list[Tensor]:
        """``count`` adjacent tensors in ``pool``."""
        return list(pool[: count * math.prod(self.shape)].view(count, *self.shape).unbind(0))

    def labels(self) -> Labels:
        strong = {"strong": f"{self.strong} strong features"} if self.strong else {}
        return {
            "dtype": self.dtype,
            "layout": self.layout,
            "shape": " × ".join(map(str, self.shape)),
            "size": f"{self.size / MB:g} MB",
            **strong,
        }


def goals(shares: dict[Case, float]) -> Iterator[Figure]:
    """What is aimed at: rows, maps and small maps by their share; wide vectors and outliers by comparison with the ordinary case."""
    aims = {"float32": {LARGE: 0.92, 64 * MB: 0.75}, "bfloat16": {LARGE: 0.85, 64 * MB: 0.75}}
    for case, share in shares.items():
        ordinary = shares.get(Case(case.dtype, case.layout, TYPICAL, case.size, 0, Case.positions))
        if case.strong or case.width == 8192:
            if ordinary:
                yield _goal("compared with the ordinary case", share / ordinary, 0.95, 0.85, case)
        elif case.positions < Case.positions:
            yield _goal("share of small maps", share, 0.75, 0.5, case)
        elif case.width == TYPICAL and case.size in aims[case.dtype]:
            aim = aims[case.dtype][case.size]
            yield _goal("share of the copy", share, aim, aim - 0.15, case)


def _goal(name: str, value: float, aim: float, limit: float, case: Case) -> Figure:
    return Figure(name, 100 * value, "%", case.labels(), target=Target("%", 100 * value, 100 * aim, 100 * limit, at_least=True))


@dataclass(frozen=True)
class Bandwidth:
    """``observe_`` as a share of the bandwidth of a copy, bytes read and written per second.

    The copy takes its turn in every round of every case, so a clock that drifts affects both. Every tensor is read from memory: the buffers
    that take turns are together several times the L2 cache. All cases together take ``seconds`` at most, one case ``each``.
    """

    sizes: Sequence[int] = (1 * MB, 16 * MB, 64 * MB, LARGE, 1024 * MB)
    widths: Sequence[int] = (64, 256, 1024, 4096, 5120, 8192, 50_257)
    copy_bytes: int = 1 << 30
    replay_bytes: int = REPLAY_BYTES
    seconds: float = 150
    each: float = 0.3

    def cases(self) -> list[Case]:
        """The most important first, in case time runs out."""
        large = LARGE if LARGE in self.sizes else max(self.sizes)
        found: list[Case] = []
        for dtype, layout in product(DTYPES, ("rows", "channels")):
            found += [Case(dtype, layout, size=size) for size in self.sizes]
            found += [Case(dtype, layout, size=large, strong=strong) for strong in (1, 8)]
            found += [Case(dtype, layout, width, large) for width in self.widths if layout == "rows" or width <= 1024]
        found += [Case(dtype, "channels", size=large, positions=positions) for dtype in DTYPES for positions in (196, 49)]
        return sorted(found, key=lambda case: case.size != large)

    def run(self, device: Device) -> Iterator[Figure]:
        where, start = device.torch_device, perf_counter()
        source, destination = (torch.empty(self.copy_bytes, dtype=torch.uint8, device=where).random_() for _ in range(2))
        copy = Contestant(capture(partial(destination.copy_, source), where))
        room = (device.memory or math.inf) / 2 - 2 * self.copy_bytes
        cases = [case for case in self.cases() if case.size + L2_MULTIPLE * device.l2 <= room]
        shares: dict[Case, float] = {}
        copies: list[float] = []
        failures: list[str] = []
        clock = None
        for case in cases:
            if shares and perf_counter() - start > self.seconds:
                break
            try:
                count = rotation(case.nbytes, device.l2)
                buffers = case.buffers(_values(case, count, where), count)
                call = partial(observe_, new_state(case.width, where), feature_dim=1)
                cold = rotating(call, buffers, where, self.replay_bytes)
                if where.type == "cuda" and clock is None:
                    clock = clock_under(cold.run, where)
                times = race({"copy": copy, "observe_": cold}, self.each, where)
            except RuntimeError as error:
                failures.append(f"{case}: {error}")
                continue
            copies.extend(times["copy"].seconds)
            shares[case] = case.nbytes / times["observe_"].median / (2 * self.copy_bytes / times["copy"].median)
            yield Figure("observe_", 100 * shares[case], "% of the copy", case.labels(), times["observe_"], note=f"{count} buffers")
        if copies:
            timing = Timing(tuple(copies))
            bandwidth = 2 * self.copy_bytes / timing.median
            yield Figure(
                "copy", bandwidth / 1e12, "TB/s", {"size": f"{self.copy_bytes / MB:g} MB"}, timing, note="read and written, over all cases"
            )
            yield from goals(shares)
            if clock:
                yield from issue_slots(shares, device.multiprocessors, clock, bandwidth)
        if left := len(self.cases()) - len(shares) - len(failures):
            yield Figure("left out", left, "cases", note="not enough time or memory")
        if failures:
            raise RuntimeError(failures[0])


def issue_slots(shares: dict[Case, float], multiprocessors: int, clock: float, bandwidth: float) -> Iterator[Figure]:
    """How many instructions an element may take at the speed of the copy, and how many could have been issued at the speed measured."""
    slots = multiprocessors * LANES * clock
    for name, dtype in DTYPES.items():
        rate, labels = bandwidth / dtype.itemsize, {"dtype": name}
        note = f"{multiprocessors} multiprocessors × {LANES} lanes × {clock / 1e9:.3f} GHz; {INSTRUCTIONS[name]} instructions are counted"
        yield Figure("issue slots an element, at the speed of the copy", slots / rate, "", labels, note=note)
        if share := shares.get(Case(name)):
            yield Figure("issue slots an element, as measured", slots / (rate * share), "", labels, note=f"at {LARGE // MB} MB")


def _values(case: Case, count: int, device: torch.device) -> Tensor:
    """Independent Gaussian values, the same in every run, without a copy in float32."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.empty(count * math.prod(case.shape), dtype=DTYPES[case.dtype], device=device).normal_(generator=generator)
    if case.strong:
        values.view(count * case.shape[0], case.width, -1)[:, :: case.width // case.strong] *= 60
    return values


# -- rivals ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rivals:
    """``observe_`` compared with the same formulas in eager PyTorch and under inductor.

    All of them are replayed from a graph. This favors the eager formulas, because their twenty launches then cost the host nothing.
    ``vectors`` of each input; ``seconds`` for each input of each type, without the compilation.
    """

    vectors: Sequence[int] = (12_608, 403_456)  # 64 and 2048 images of 197 tokens: 39 MB and 1.2 GB in float32
    features: int = TYPICAL
    compiled: bool = True
    replay_bytes: int = REPLAY_BYTES
    seconds: float = 1.5

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        failure: Exception | None = None
        calls: dict[str, Callable[[Tensor], object]] = {
            "x.sum()": torch.sum,
            "observe_": partial(observe_, new_state(self.features, where)),
            "eager": formulas.eager,
        }
        for vectors, (name, dtype) in product(self.vectors, DTYPES.items()):
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
    """One call on one vector, where only the overhead is left.

    A few calls are made in a row, so few that the queue of the device never fills. The time until a call returns is the host's part. The
    time until the device, too, has done them all is the cost in a loop of such calls.
    """

    features: int = TYPICAL
    calls: int = 100
    rounds: int = 200

    def run(self, device: Device) -> Iterator[Figure]:
        where = device.torch_device
        x = torch.randn(1, self.features, device=where)
        plain, recorded = nn.Identity(), nn.Identity()
        case: Labels = {"shape": f"1 × {self.features}"}
        with torchprobe.record(recorded, ""):
            calls: dict[str, Callable[[], object]] = {
                "x.add_(0)": partial(x.add_, 0),
                "observe_": partial(observe_, new_state(self.features, where), x),
                "no hook": partial(plain, x),
                "torchprobe.record": partial(recorded, x),
            }
            times = {name: self.measure(call, where) for name, call in calls.items()}
        for name in ("x.add_(0)", "observe_"):
            returned, done = times[name]
            target = Target("µs", done.median * 1e6, LAUNCH_LIMIT) if name == "observe_" else None
            yield time(f"{name}, until it returns", returned, case)
            yield time(f"{name}, until the device has done it", done, case, target, note="calls in a row")
        hook = times["torchprobe.record"][1].minus(times["no hook"][1])
        yield time("torchprobe.record, what it adds to nn.Identity", hook, case, note="until the device has done it")

    def measure(self, call: Callable[[], object], device: torch.device) -> tuple[Timing, Timing]:
        """The time of one call until it returns, and until the device has done it."""
        for _ in range(WARM_UP):
            call()
        returned, done = [], []
        for _ in range(self.rounds):
            synchronize(device)
            start = perf_counter()
            for _ in range(self.calls):
                call()
            returned.append((perf_counter() - start) / self.calls)
            synchronize(device)
            done.append((perf_counter() - start) / self.calls)
        return Timing(tuple(returned)), Timing(tuple(done))
