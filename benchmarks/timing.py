"""Contestants timed in turn, within one process."""

from __future__ import annotations

import gc
import math
import random
import resource
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 20_000


@dataclass(frozen=True)
class Timing:
    """The times of one contestant, in the order of the rounds."""

    seconds: tuple[float, ...]
    page_faults: float = 0.0  # per call
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
        return Timing(tuple(a - b for a, b in zip(self.seconds, other.seconds, strict=True)), difference=True)

    def per(self, n: int) -> Timing:
        """Of one of n equal parts."""
        return Timing(tuple(s / n for s in self.seconds), self.page_faults / n, self.difference)


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
    faults = dict.fromkeys(contestants, 0)
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
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = perf_counter()
                contestant()
                synchronize()
                times[name].append(perf_counter() - start)
                faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            rounds += 1
    finally:
        gc.enable()
    return {name: Timing(tuple(times[name]), faults[name] / rounds) for name in contestants}


def _synchronize(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
