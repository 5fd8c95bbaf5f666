"""The layers of a recording, and how the recording was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchprobe.statistics import Statistic


@dataclass(frozen=True)
class Settings:
    """How a recording was made. Two recordings merge only if their settings are equal.

    ``statistic`` is the name of the class, or several names joined by "+". ``outlier_sigma`` is that of :class:`~torchprobe.Moments`.
    """

    of: str = "output"
    positions: str = "all"
    outlier_sigma: float = 6.0
    statistic: str = "Moments"


@dataclass
class Entry:
    """One layer of a recording."""

    name: str
    module: str  # the class of the module
    feature_dim: int | None  # the dimension that held the features
    statistic: Statistic  # the running window
    closed: Statistic | None = None  # all windows that a snapshot has closed
    calls: int = 0  # of the layer, if the statistic does not count them itself

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text and tensors, for ``torch.save``."""
        return {
            "feature_dim": self.feature_dim,
            "features": self.statistic.features,
            "window": self.statistic.state_dict(),
            "closed": None if self.closed is None else self.closed.state_dict(),
            "calls": self.calls,
        }


def check_mergeable(mine: Sequence[Entry], theirs: Sequence[Entry]) -> None:
    """Raises ValueError for a layer of both whose statistics cannot merge."""
    known = {entry.name: entry.statistic for entry in mine}
    for entry in theirs:
        statistic = known.get(entry.name)
        if statistic is None:
            continue
        if statistic.features != entry.statistic.features:
            raise ValueError(f"layer {entry.name!r} is {statistic.features} features wide here and {entry.statistic.features} there")
        try:
            statistic.check_mergeable(entry.statistic)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {entry.name!r}: {error}") from error
