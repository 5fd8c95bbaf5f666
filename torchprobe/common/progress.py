"""How far a run is, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``stage``: what the run is doing, such as "thresholds" or "overlap". ``done`` of ``total`` images of this stage are finished on this
    rank; images that an interrupted run finished are included. ``elapsed``: seconds of this run. ``remaining``: estimated seconds until the
    whole run ends, or None if there is no estimate yet.
    """

    stage: str
    done: int
    total: int
    elapsed: float
    remaining: float | None


ProgressCallback = Callable[[Progress], object]
"""Called with a :class:`Progress` after every batch."""

CountCallback = Callable[[int, int], object]
"""Called with (items done, items in all) after every batch; 0 items in all means that the number is unknown."""


class Clock:
    """Estimates the remaining time from the pace of the present stage. Later stages are expected to be as slow.

    Args:
        callback: called after every batch.
        stages: stages still to come that pass over all images, the first included.
    """

    def __init__(self, callback: ProgressCallback | None, stages: int) -> None:
        self.callback, self.stages = callback, stages
        self._begin = time.monotonic()
        self.start("", 0, 0)

    def start(self, stage: str, done: int, total: int) -> None:
        """Begins a stage of which ``done`` images are finished already."""
        self.stage, self.total = stage, total
        self._before, self._start = done, time.monotonic()

    def tell(self, done: int) -> None:
        """Reports that ``done`` images of the stage are finished."""
        if self.callback is None:
            return
        now = time.monotonic()
        fresh = done - self._before
        pace = (now - self._start) / fresh if fresh > 0 else None
        remaining = None if pace is None else pace * (self.total - done + self.total * (self.stages - 1))
        self.callback(Progress(self.stage, done, self.total, now - self._begin, remaining))

    def finish(self) -> None:
        """Ends the stage."""
        self.stages -= 1
