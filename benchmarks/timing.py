"""Fair timing: contestants take turns within one process, with an allocator that does not charge them for page faults."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import random
import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 20_000

# By default glibc maps every large tensor anew and unmaps it when it is freed. Touching the new pages then costs several times the
# arithmetic. Users who care about speed tune this, or use an allocator that caches. ``observe_`` is compared with PyTorch in that state.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",  # no tensor gets its own mapping
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # nothing goes back to the system
    "MALLOC_TOP_PAD_": str(1 << 28),  # the heap grows in large steps
}


def malloc_is_tuned() -> bool:
    return all(os.environ.get(name) == value for name, value in TUNED_MALLOC.items())


def restart_with_tuned_malloc() -> None:
    """Restarts this process with a tuned malloc, which reads its settings only at the start. Does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc" and not malloc_is_tuned():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **TUNED_MALLOC})


def gaussian(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent Gaussian values, the same in every run."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


@dataclass(frozen=True)
class Timing:
    """The times of one contestant, in the order of the rounds."""

    seconds: tuple[float, ...]
    page_faults: float = 0.0  # per call
    disturbed: float = 0.0  # share of the calls in which a thread had to wait for a core
    difference: bool = False  # of two contestants; the minimum then means nothing

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the median, from binomial ranks. It assumes only that rounds are independent."""
        n = len(self.seconds)
        ordered, half = sorted(self.seconds), 0.98 * math.sqrt(n)
        return ordered[max(0, math.floor((n - 1) / 2 - half))], ordered[min(n - 1, math.ceil((n - 1) / 2 + half))]

    def minus(self, other: Timing) -> Timing:
        """Differences round by round, for a small difference of two large times that drift together."""
        seconds = tuple(a - b for a, b in zip(self.seconds, other.seconds, strict=True))
        return Timing(seconds, disturbed=max(self.disturbed, other.disturbed), difference=True)

    def per(self, n: float) -> Timing:
        """The time, and the page faults, of one of n equal parts."""
        return replace(self, seconds=tuple(s / n for s in self.seconds), page_faults=self.page_faults / n)


def total(timings: Iterable[Timing]) -> Timing:
    """The sum of several contestants, round by round."""
    timings = list(timings)
    seconds = tuple(map(sum, zip(*(timing.seconds for timing in timings), strict=True)))
    return Timing(seconds, disturbed=max(timing.disturbed for timing in timings))


def turns(contestants: Iterable[str], seconds: float, most: int) -> Iterator[str]:
    """Every name once a round, in an order that changes, for about ``seconds``; at least 5 rounds, at most ``most``.

    The garbage collector is off meanwhile.
    """
    order, shuffle = list(contestants), random.Random(0).shuffle
    with no_garbage_collection():
        rounds, end = 0, perf_counter() + seconds
        while rounds < MIN_ROUNDS or (rounds < most and perf_counter() < end):
            shuffle(order)
            yield from order
            rounds += 1


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def race(contestants: Mapping[str, Callable[[], object]], seconds: float, device: torch.device, *, hot: bool = False) -> dict[str, Timing]:
    """Times every contestant once a round, in an order that changes, for about ``seconds`` in all.

    ``hot`` calls each once more, unmeasured, right before its turn. Its input is then in the caches, as far as it fits.
    """
    for contestant in contestants.values():
        for _ in range(WARM_UP):
            contestant()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    faults, disturbed = dict.fromkeys(contestants, 0), dict.fromkeys(contestants, 0)
    gc.collect()
    with contextlib.closing(Waiting()) as waiting:
        for name in turns(contestants, seconds, MAX_ROUNDS):
            contestant = contestants[name]
            if hot:
                contestant()
                synchronize(device)
            faults_before, waited = _page_faults(), waiting.seconds()
            start = perf_counter()
            contestant()
            synchronize(device)
            taken = perf_counter() - start
            times[name].append(taken)
            disturbed[name] += waiting.seconds() - waited > 0.05 * taken
            faults[name] += _page_faults() - faults_before
    return {name: Timing(tuple(t), faults[name] / len(t), disturbed[name] / len(t)) for name, t in times.items()}


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has finished its work; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


class Waiting:
    """How long the threads of this process have waited for a core that another process was using; 0 on systems other than Linux."""

    def __init__(self) -> None:
        tasks = Path("/proc/self/task")
        self._files = [os.open(file, os.O_RDONLY) for file in tasks.glob("*/schedstat")]

    def seconds(self) -> float:
        return sum(int(os.pread(file, 64, 0).split()[1]) for file in self._files) / 1e9

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# -- memory ----------------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes that this process has used at most."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, what getrusage reports starts with the memory of the parent process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_in_use() -> int:
    """Bytes that this process uses now; the peak where only that is known."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory()
