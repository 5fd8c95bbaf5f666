"""Is the machine quiet enough for timings? The load average, and how much a loop of fixed work varies."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from benchmarks.timing import Waiting, no_garbage_collection

LOAD, SPREAD, WAITED = 0.25, 0.1, 0.02
"""The most of a quiet machine (chosen): load average for each core, spread of the loop, share of the time in which it waited for a core."""

_WORK = 20_000  # additions in a repetition: about half a millisecond


@dataclass(frozen=True)
class Look:
    """What one look at the machine found.

    Attributes:
        load: the load average of the last minute for each core; None where it is not known. After a run it includes the run.
        spread: (ninth decile − minimum) ÷ minimum of the times of the loop.
        waited: the share of the time in which the loop waited for a core that another process had; 0 where it is not known.
        seconds: the fastest repetition.
    """

    load: float | None
    spread: float
    waited: float
    seconds: float

    def problems(self, after: bool = False) -> list[str]:
        """What is not quiet. ``after``: the load is that of the run itself."""
        found = []
        if self.load is not None and self.load > LOAD and not after:
            found.append(f"the load average is {self.load:.2f} for each core (quiet: at most {LOAD})")
        if self.spread > SPREAD:
            varies = f"by {self.spread:.0%}" if self.spread < 2 else f"by a factor of {1 + self.spread:.0f}"
            found.append(f"a loop of fixed work varies {varies} (quiet: at most {SPREAD:.0%})")
        if self.waited > WAITED:
            found.append(f"it waited for a core {self.waited:.0%} of the time (quiet: at most {WAITED:.0%})")
        return found


def look(seconds: float = 1.0) -> Look:
    """One look, which takes about so many seconds."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None
    times = []
    with no_garbage_collection(), contextlib.closing(Waiting()) as waiting:
        waited, begin = waiting.seconds(), perf_counter()
        while not times or perf_counter() - begin < seconds or len(times) < 10:
            start = perf_counter()
            _loop()
            times.append(perf_counter() - start)
        waited = (waiting.seconds() - waited) / (perf_counter() - begin)
    return Look(load, spread_of(times), waited, min(times))


def spread_of(times: list[float]) -> float:
    """(ninth decile − minimum) ÷ minimum.

    >>> spread_of([1.0] * 90 + [3.0] * 10), spread_of([1.0] * 80 + [3.0] * 20)
    (0.0, 2.0)
    """
    return (statistics.quantiles(times, n=10, method="inclusive")[8] - min(times)) / min(times)


def verdict(before: Look, after: Look) -> dict[str, Any]:
    """Both looks, and what was not quiet, for JSON."""
    problems = [f"before: {one}" for one in before.problems()] + [f"after: {one}" for one in after.problems(after=True)]
    drift = max(before.seconds, after.seconds) / min(before.seconds, after.seconds) - 1
    if drift > SPREAD:
        problems.append(f"the loop took {drift:.0%} more at one end of the run than at the other: the clock of the processor changed")
    return {"quiet": not problems, "problems": problems, "before": vars(before), "after": vars(after)}


def sentence(found: Mapping[str, Any]) -> str:
    """The verdict in words."""
    if found["quiet"]:
        return "The machine was quiet."
    return f"The machine was not quiet, so times mean little and ratios more: {'; '.join(found['problems'])}."


def _loop() -> int:
    total = 0
    for i in range(_WORK):
        total += i
    return total
