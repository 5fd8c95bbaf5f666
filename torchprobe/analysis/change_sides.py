"""One side of a comparison: a recording, or the recordings of several ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from torchprobe.analysis.window_noise import Array
from torchprobe.recording import Recording


class Side:
    """Several recordings of one model as one: their totals are merged, and their windows stand one after the other.

    Args:
        recordings: one recording, or several, such as one for each rank: each has windows of its own.

    Attributes:
        total: everything that was recorded.
        ends: the number of windows up to the end of each recording.

    Raises:
        ValueError: there is none, or they have other settings or layers that cannot be merged.
    """

    def __init__(self, recordings: Recording | Sequence[Recording]) -> None:
        self._parts = [recordings] if isinstance(recordings, Recording) else list(recordings)
        if not self._parts:
            raise ValueError("there is no recording to compare")
        longest = max(self._parts, key=lambda part: len(part.layers))
        self.total = longest.total
        for part in self._parts:
            if part is not longest:
                self.total.merge(part.total)
        self.settings = self.total.settings
        self.layers = longest.layers
        self.fields = longest.history.fields
        self.ends = list(accumulate(len(part.history) for part in self._parts))

    @property
    def windows(self) -> int:
        """How many windows were closed."""
        return self.ends[-1]

    def column(self, field: str, layer: str) -> Array:
        """One number of one layer in all windows, (windows,); nan where the layer did not fire."""
        parts = []
        for part in self._parts:
            history = part.history
            known = layer in history.layers
            parts.append(history[field][:, history.layers.index(layer)] if known else np.full(len(history), math.nan))
        return np.concatenate(parts)

    def typical(self, field: str) -> float:
        """The median of a number over all windows and layers."""
        values = np.concatenate([part.history[field].ravel() for part in self._parts])
        present = values[np.isfinite(values)]
        return float(np.median(present)) if present.size else math.nan

    def apart(self, values: Array) -> list[Array]:
        """An array (windows, …) cut into those of each recording."""
        return np.split(values, self.ends[:-1])
