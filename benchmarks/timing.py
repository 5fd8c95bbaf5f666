"""Contestants timed in turn, within one process."""

from __future__ import annotations

import gc
import math
import os
import random
import resource
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 20_000


@dataclass(frozen=True)
class Timing:
    """The times of one contestant, in the order of the rounds."""

    seconds: tuple[float, ...]
    page_faults: float = 0.0  # per call
    disturbed: float = 0.0  # share of the calls in which a thread had to wait for a core
    difference: bool = False  # of two contestants; the smallest one then means nothing

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
        """95 % interval of the median: binomial ranks, so it asks nothing of the distribution but independent rounds."""
        n = len(self.seconds)
        ordered, half = sorted(self.seconds), 0.98 * math.sqrt(n)
        return ordered[max(0, math.floor((n - 1) / 2 - half))], ordered[min(n - 1, math.ceil((n - 1) / 2 + half))]

    def minus(self, other: Timing) -> Timing:
        """Differences round by round, for a small difference of two large times that drift together."""
        seconds = tuple(a - b for a, b in zip(self.seconds, other.seconds, strict=True))
        return Timing(seconds, disturbed=max(self.disturbed, other.disturbed), difference=True)

    def per(self, n: int) -> Timing:
        """Of one of n equal parts."""
        return replace(self, seconds=tuple(s / n for s in self.seconds), page_faults=self.page_faults / n)


def race(contestants: Mapping[str, Callable[[], object]], seconds: float, device: torch.device, *, hot: bool = False) -> dict[str, Timing]:
    """Times every contestant once a round, in an order that changes, for about ``seconds`` in all.

    ``hot`` calls each once more, unmeasured, right before its turn: its input is then as near as the caches allow.
    """
    synchronize = _synchronize(device)
    for contestant in contestants.values():
        for _ in range(WARM_UP):
            contestant()
    synchronize()
    order, shuffle = list(contestants), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in contestants}
    faults, disturbed = dict.fromkeys(contestants, 0), dict.fromkeys(contestants, 0)
    waiting = Waiting()
    gc.collect()
    gc.disable()
    try:
        rounds, end = 0, perf_counter() + seconds
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and perf_counter() < end):
            shuffle(order)
            for name in order:
                contestant = contestants[name]
                if hot:
                    contestant()
                    synchronize()
                before, waited = _page_faults(), waiting.seconds()
                start = perf_counter()
                contestant()
                synchronize()
                taken = perf_counter() - start
                times[name].append(taken)
                disturbed[name] += waiting.seconds() - waited > 0.05 * taken
                faults[name] += _page_faults() - before
            rounds += 1
    finally:
        gc.enable()
        waiting.close()
    return {name: Timing(tuple(times[name]), faults[name] / rounds, disturbed[name] / rounds) for name in contestants}


class Waiting:
    """How long the threads of this process have waited for a core that something else was using; Linux tells, elsewhere it is 0."""

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


def _synchronize(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
