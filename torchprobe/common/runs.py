"""How a long run is carried out: its options, how far it is, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


class RunWarning(UserWarning):
    """Something about how a run is carried out that its user should know, such as a stage that is computed again."""


@dataclass(frozen=True)
class Progress:
    """How far a run is on this rank.

    Attributes:
        stage: the present part of the run, such as "thresholds" or "overlap".
        done: items of this stage that are finished, including those that an interrupted run finished.
        total: items of this stage in all; 0 if unknown.
        elapsed: seconds since this run began.
        remaining: estimated seconds until the whole run ends; None if there is no estimate yet.
        unit: what the items are, in the plural.
    """

    stage: str
    done: int
    total: int
    elapsed: float
    remaining: float | None
    unit: str = "images"


ProgressCallback = Callable[[Progress], object]
"""Called with a :class:`Progress` at the start of a stage, and after every batch."""

CountCallback = Callable[[int, int], object]
"""Called with (items done, items in all) after every batch; 0 items in all if unknown."""


def counting(callback: CountCallback | None) -> ProgressCallback | None:
    """The :data:`ProgressCallback` that calls a :data:`CountCallback` once something is done; None for None.

    >>> counting(lambda done, total: print(done, "of", total))(Progress("scan", 3, 10, 0.5, None))
    3 of 10
    """
    return None if callback is None else lambda progress: callback(progress.done, progress.total) if progress.done else None


class Clock:
    """Estimates the remaining time from the speed of the present stage. Later stages are assumed to be as slow.

    Args:
        callback: called at the start of a stage and after every batch; None: no reports.
        stages: the number of stages that are not finished, each over all items; the first one included.

    >>> clock = Clock(lambda progress: print(progress.stage, progress.done, "of", progress.total), stages=1)
    >>> clock.start("scan", done=0, total=4)
    scan 0 of 4
    >>> clock.tell(2)
    scan 2 of 4
    """

    def __init__(self, callback: ProgressCallback | None, stages: int) -> None:
        self.callback, self.stages = callback, stages
        self._begin = self._start = time.monotonic()
        self.stage, self.total, self.unit, self._before = "", 0, "images", 0

    def start(self, stage: str, done: int, total: int, unit: str = "images") -> None:
        """Begins a stage of which ``done`` items are finished already, and reports it: the first batch may take long."""
        self.stage, self.total, self.unit = stage, total, unit
        self._before, self._start = done, time.monotonic()
        self.tell(done)

    def tell(self, done: int) -> None:
        """Reports that ``done`` items of the stage are finished."""
        if self.callback is None:
            return
        now = time.monotonic()
        fresh = done - self._before
        pace = (now - self._start) / fresh if fresh > 0 else None
        later = self.total * max(0, self.stages - 1)
        remaining = None if pace is None or not self.total else pace * (self.total - done + later)
        self.callback(Progress(self.stage, done, self.total, now - self._begin, remaining, self.unit))

    def count(self, done: int, total: int) -> None:
        """:meth:`tell`, as a :data:`CountCallback`, for a stage that learns its total on the way."""
        self.total = total
        self.tell(done)

    def finish(self) -> None:
        """Ends the stage."""
        self.stages -= 1


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Only ``seed`` changes what is measured.

    Args:
        batch_size: images in one forward pass.
        device: where the model runs; None: where its parameters are.
        workers: threads or processes that decode images.
        seed: of everything random.
        resume: continue an interrupted run instead of starting again.
        progress: called after every batch.
        stop: called between batches; if it returns True, the run ends early and keeps the results so far.
        overwrite: replace the results of an earlier run in the folder; see :func:`torchprobe.common.folders.output_folder`.

    >>> RunOptions(batch_size=64).workers
    2
    """

    batch_size: int = 32
    device: torch.device | str | None = None
    workers: int = 2
    seed: int = 0
    resume: bool = False
    progress: ProgressCallback | None = None
    stop: Callable[[], bool] | None = None
    overwrite: bool = False
