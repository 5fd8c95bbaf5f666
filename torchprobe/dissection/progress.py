"""How far a dissection is, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``stage``: "thresholds", "overlap", "labels" or "scores"; ``done`` of ``total`` images in this stage, on this rank, those done by an
    interrupted run included; ``elapsed`` seconds of this run; ``remaining`` seconds of the whole run, or None while nothing is known.
    """

    stage: str
    done: int
    total: int
    elapsed: float
    remaining: float | None


Told = Callable[[Progress], object]


class Clock:
    """Estimates the time left from the pace of the present stage; stages to come are taken to be as slow.

    Args:
        told: is called after every batch.
        stages: stages with a pass over all images that are still to come, the first included.
    """

    def __init__(self, told: Told | None, stages: int) -> None:
        self.told, self.stages = told, stages
        self._begin = time.monotonic()
        self.start("", 0, 0)

    def start(self, stage: str, done: int, total: int) -> None:
        """A stage begins with ``done`` images done already."""
        self.stage, self.total = stage, total
        self._before, self._start = done, time.monotonic()

    def tell(self, done: int) -> None:
        """``done`` of all images of the stage are done."""
        if self.told is None:
            return
        now = time.monotonic()
        fresh = done - self._before
        pace = (now - self._start) / fresh if fresh > 0 else None
        remaining = None if pace is None else pace * (self.total - done + self.total * (self.stages - 1))
        self.told(Progress(self.stage, done, self.total, now - self._begin, remaining))

    def finish(self) -> None:
        """The stage is over."""
        self.stages -= 1
