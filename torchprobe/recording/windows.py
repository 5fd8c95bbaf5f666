"""The layers of a recording with their windows, and operations on many of them at once.

Each operation makes the same few launches for any number of layers, and does not wait for the device. This holds for statistics with states
of a fixed shape; a :class:`~torchprobe.statistics.DynamicStatistic` is handled layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchprobe.statistics import Statistic

Function = TypeVar("Function", bound=Callable[..., Any])


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
    feature_dim_by: str = ""  # by what that dimension is known
    of: str = ""  # what was read of the layer; "": what the settings say

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text and tensors, for ``torch.save``."""
        return {
            "feature_dim": self.feature_dim,
            "feature_dim_by": self.feature_dim_by,
            "features": self.statistic.features,
            "window": self.statistic.state_dict(),
            "closed": None if self.closed is None else self.closed.state_dict(),
            "calls": self.calls,
        }


@dataclass(frozen=True)
class Unread:
    """A layer that was called, but where nothing decides which dimension of its activations holds the features."""

    name: str
    module: str  # the class of the module


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


# -- many layers at once -----------------------------------------------------------------------------------------------------


def without_grad(function: Function) -> Function:
    """Runs the function without autograd, and outside inference mode, whose tensors could not be changed later."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args)

    return cast(Function, call)


def groups(statistics: Sequence[Statistic]) -> list[list[int]]:
    """The indices of the statistics, in groups that can be handled together."""
    by_key: dict[tuple[Any, ...], list[int]] = {}
    for index, statistic in enumerate(statistics):
        by_key.setdefault(statistic.group_key(), []).append(index)
    return list(by_key.values())


@without_grad
def summaries(statistics: Sequence[Statistic], histograms: bool = False) -> list[tuple[list[int], Tensor]]:
    """For each group: the indices of its statistics, and their fields, (n, fields); nan if nothing was seen.

    With ``histograms`` these follow the fields: (n, fields + bins).
    """
    return [
        (group, type(statistics[group[0]]).summaries([statistics[index] for index in group], histograms)) for group in groups(statistics)
    ]


@without_grad
def take(windows: Sequence[Statistic], taken: dict[int, Statistic]) -> None:
    """Moves what windows hold into new statistics, ``taken``, by their indices, and empties them. A counter of calls continues.

    If it is interrupted, :func:`put_back` undoes it.
    """
    for group in groups(windows):
        found = list[Statistic]()
        try:
            type(windows[group[0]]).take_windows([windows[index] for index in group], found)
        finally:
            taken.update(zip(group, found, strict=False))


@without_grad
def put_back(windows: Sequence[Statistic], taken: Mapping[int, Statistic]) -> None:
    """Undoes :func:`take`."""
    for index, statistic in taken.items():
        windows[index].restore_window(statistic)


@without_grad
def join(taken: Sequence[Statistic], closed: Sequence[Statistic | None]) -> list[Statistic]:
    """Windows that were taken, together with what was closed before them."""
    result: dict[int, Statistic] = {}
    for group in groups(taken):
        chosen = [taken[index] for index in group]
        result.update(zip(group, type(chosen[0]).join_windows(chosen, [closed[index] for index in group]), strict=True))
    return [result[index] for index in range(len(taken))]


@without_grad
def erase(statistics: Sequence[Statistic]) -> None:
    """Forgets everything, including a counter of calls."""
    for group in groups(statistics):
        type(statistics[group[0]]).reset_all([statistics[index] for index in group])


@without_grad
def merged(parts: Iterable[Statistic | None]) -> Statistic | None:
    """A new statistic of all parts, on the device of the first one; None if all parts are None."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    result = present[0].clone()
    for part in present[1:]:
        result.merge(part)
    return result


@without_grad
def total(closed: Statistic | None, window: Statistic) -> Statistic:
    """A new statistic of all windows."""
    return window.clone() if closed is None else closed.clone().add_window(window)


@without_grad
def duplicate(statistic: Statistic) -> Statistic:
    """An independent copy."""
    return statistic.clone()
