"""What the hooks of one recorder share, and the state of one layer."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag, auto

from torch import Tensor

from torchprobe.statistics import Moments, Statistic


class Skipped(IntFlag):
    """Why a call was not read; for the report at the end."""

    PAUSED = auto()
    OTHER_MODE = auto()
    RECOMPUTED = auto()
    NO_TENSOR = auto()
    NO_POSITIONS = auto()
    NOT_REAL = auto()
    NO_GRADIENT = auto()
    WAITING = auto()
    TRACED = auto()


NOTHING_TO_READ = Skipped.NO_TENSOR | Skipped.NO_POSITIONS
"""A layer that nobody asked for by name, and that turned out to hold nothing to read."""


class Control:
    """What all hooks of one recorder look at."""

    def __init__(
        self,
        statistic: type[Statistic] = Moments,
        positions: str = "all",
        every: int = 1,
        when: str = "always",
        select: Callable[..., Tensor] | None = None,
        outlier_sigma: float = 6.0,
        lenient: bool = False,
    ) -> None:
        self.statistic = statistic
        self.positions = positions
        self.every = every
        self.training = {"always": None, "train": True, "eval": False}[when]
        self.select = select
        self.outlier_sigma = outlier_sigma
        self.lenient = lenient  # layers that nobody asked for by name may turn out to hold nothing to read
        self.live = False
        self.paused = False
        self.mask: Tensor | None = None
        self.fired = 0  # layers that have a state, which gives them their order
        self.graphs: set[str] = set()  # compiled graphs in which a layer was first met


class Slot:
    """The state of one layer on one device: the running window, and all windows that are closed."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.state = statistic.state
        self.window = statistic.state[1:]  # all but the counter of `every`
        self.closed: Statistic | None = None
        self.captured = False  # whether a CUDA graph writes to it, too
