"""Changes of many series against their own past, with a stated rate of false alarms.

A window gives one value of each series. Windows are gathered in blocks of 5, 20 and 80; of each block the median counts. What is tested is
the difference d of two blocks in a row, against the d of the last 64 pairs of blocks of that size:

    score = abs(d − median) / (1.4826 · MAD)

So the past of a series says how much it usually changes in that time. A slow drift is in the median, and noise that is correlated from
window to window, or walks at random, is in the MAD. The median of a block makes single values harmless, however large they are. Series that
are positive throughout are compared by their logarithms.

The threshold follows from the number of tests n in a run, and the share α of the runs in which a false alarm may occur:

    threshold = 5 + ln(0.001 · n / α)

This assumes that 1 score in 1000 exceeds 5, and that the share falls beyond it as exp(−score): noise with exponential tails (Laplace) gives
less than that, Gaussian noise much less. ``tests/test_jumps.py`` simulates it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.common.numbers import positive, real, whole

SCALES = (5, 20, 80)
"""Windows in a block."""

MEMORY = 64
"""Differences that are remembered."""

WARM_UP = 24
"""Differences that must be known before the first test."""

_USUAL, _SHARE = 5.0, 1e-3  # see above
_TO_STD = 1.4826  # the standard deviation of a Gaussian in units of its MAD

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        series: its index.
        windows: of a block, in which it was seen: between 5 and 80.
        before, after: the medians of the last two blocks.
        score: of the difference; inf if the series never changed before.
        threshold: what the score exceeded.
    """

    series: int
    windows: int
    before: float
    after: float
    score: float
    threshold: float


class Changes:
    """Watches series, one value of each at a time.

    Args:
        false_alarms: the share α of runs in which a false alarm may occur, over all series.
        windows: the length of such a run.
        least: the smallest change that counts: 0.1 is 10 % of the level.

    Raises:
        ValueError: an argument is out of range.

    >>> changes = Changes()
    >>> noise = np.random.default_rng(0).normal(1, 0.01, 400)
    >>> noise[300:] *= 1.5
    >>> [(index, found.windows) for index, value in enumerate(noise) for found in changes.add([value])]
    [(304, 5)]
    """

    def __init__(self, false_alarms: float = 0.01, windows: int = 10_000, least: float = 0.1) -> None:
        if not 0 < real("false_alarms", false_alarms) < 1:
            raise ValueError(f"false_alarms is the share of runs with a false alarm, between 0 and 1; got {false_alarms}")
        self.false_alarms = float(false_alarms)
        self.windows = whole("windows", windows, 1)
        self.least = positive("least", least)
        self.seen = 0
        self._levels = [_Level(size) for size in SCALES]

    @property
    def series(self) -> int:
        """How many series there are so far."""
        return self._levels[0].series

    @property
    def threshold(self) -> float:
        """What a score must exceed."""
        tests = self.series * sum(self.windows / size for size in SCALES)
        return _USUAL + math.log(max(_SHARE * tests / self.false_alarms, 1.0))

    def add(self, values: ArrayLike) -> list[Change]:
        """Adds one window: a value of each series, nan where there is none. Later windows may have more series, at the end.

        Returns:
            the changes that this window completes, at most one of each series. A series that changed starts anew.
        """
        window = np.asarray(values, dtype=np.float64)
        self.seen += 1
        found: dict[int, Change] = {}
        for level in self._levels:
            for change in level.add(window, self.threshold, self.least):
                found.setdefault(change.series, change)
        for series in found:
            for level in self._levels:
                level.forget(series)
        return list(found.values())


class _Level:
    """Blocks of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.filled = 0
        self.block = np.empty((size, 0))
        self.medians = np.empty((0, 0))  # of the last blocks, the oldest first

    @property
    def series(self) -> int:
        return self.block.shape[1]

    def add(self, window: Array, threshold: float, least: float) -> list[Change]:
        if (more := len(window) - self.series) > 0:
            self.block = np.pad(self.block, ((0, 0), (0, more)), constant_values=math.nan)
            self.medians = np.pad(self.medians, ((0, 0), (0, more)), constant_values=math.nan)
        self.block[self.filled] = np.pad(window, (0, -more if more < 0 else 0), constant_values=math.nan)
        self.filled += 1
        if self.filled < self.size:
            return []
        self.filled = 0
        median = _median(self.block)
        median[2 * np.isfinite(self.block).sum(0) < self.size] = math.nan
        found = self._test(median, threshold, least) if len(self.medians) > WARM_UP else []
        self.medians = np.concatenate([self.medians[-MEMORY:], median[None]])
        return found

    def forget(self, series: int) -> None:
        self.medians[:, series] = math.nan
        self.block[: self.filled, series] = math.nan

    def _test(self, median: Array, threshold: float, least: float) -> list[Change]:
        past = self.medians
        with np.errstate(divide="ignore", invalid="ignore"):
            log = ~(past <= 0).any(0) & (median > 0)
            levels = np.where(log, np.log(past), past)
            change = np.where(log, np.log(median), median) - levels[-1]
            steps = np.diff(levels, axis=0)
            usual = _median(steps)
            spread = _TO_STD * _median(abs(steps - usual))
            surprise = abs(change - usual)
            score = np.where(surprise > 0, surprise / spread, 0.0)  # inf if it never changed before
            enough = np.where(log, math.log1p(least), least * abs(_median(past)))
            known = np.isfinite(steps).sum(0) >= WARM_UP
            hit = known & (score > threshold) & (surprise > enough)
        return [Change(int(i), self.size, float(past[-1, i]), float(median[i]), float(score[i]), threshold) for i in np.flatnonzero(hit)]


def _median(values: Array) -> Array:
    """Over the first dimension, without nan; nan where there is no value. Infinite values count as the largest."""
    known = (~np.isnan(values)).sum(0)
    ordered = np.sort(values, axis=0)  # nan come last
    columns = np.arange(values.shape[1])
    low, high = np.maximum(known - 1, 0) // 2, np.minimum(known // 2, len(values) - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        below, above = ordered[low, columns], ordered[high, columns]
        middle = np.where(below == above, below, below / 2 + above / 2)  # no sum beyond float64
    return np.where(known > 0, middle, math.nan)


def find(values: ArrayLike, **options: Any) -> list[tuple[int, Change]]:
    """The changes in whole series, (windows, series), each with the index of the window that completes it.

    Arguments as in :class:`Changes`.
    """
    changes = Changes(**options)
    return [(index, change) for index, row in enumerate(np.asarray(values, dtype=np.float64)) for change in changes.add(row)]
