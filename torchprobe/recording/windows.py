"""Many layers at once: every function makes the same few launches for any number of layers, and none waits for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchprobe.statistics import Statistic

Function = TypeVar("Function", bound=Callable[..., Any])


def plainly(function: Function) -> Function:
    """Without autograd, and outside inference mode, whose tensors could not be changed later."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args)

    return cast(Function, call)


def alike(statistics: Sequence[Statistic]) -> list[list[int]]:
    """Indices of the statistics that can be handled together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, statistic in enumerate(statistics):
        groups.setdefault(statistic.alike(), []).append(index)
    return list(groups.values())


@plainly
def summaries(statistics: Sequence[Statistic], histograms: bool = False) -> list[tuple[list[int], Tensor]]:
    """For every group that is alike: which they are, and their fields, (n, fields); nan for those that saw nothing.

    With ``histograms`` those follow the fields: (n, fields + bins).
    """
    return [
        (group, type(statistics[group[0]]).summaries([statistics[index] for index in group], histograms)) for group in alike(statistics)
    ]


@plainly
def close(windows: Sequence[Statistic], closed: Sequence[Statistic | None]) -> list[Statistic]:
    """Adds the windows to what is closed, and empties them. A counter of calls continues."""
    result: dict[int, Statistic] = {}
    for group in alike(windows):
        chosen = [windows[index] for index in group]
        result.update(zip(group, type(chosen[0]).close_windows(chosen, [closed[index] for index in group]), strict=True))
    return [result[index] for index in range(len(windows))]


@plainly
def erase(statistics: Sequence[Statistic]) -> None:
    """Forgets everything, a counter of calls too."""
    for group in alike(statistics):
        type(statistics[group[0]]).reset_all([statistics[index] for index in group])


@plainly
def merged(parts: Iterable[Statistic | None]) -> Statistic | None:
    """All parts in one new statistic on the device of the first, or None when there is none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    total = found[0].clone()
    for part in found[1:]:
        total.merge(part)
    return total


@plainly
def total(closed: Statistic | None, window: Statistic) -> Statistic:
    """A new statistic of all windows."""
    return window.clone() if closed is None else closed.clone().add_window(window)


@plainly
def duplicate(statistic: Statistic) -> Statistic:
    """An independent copy."""
    return statistic.clone()
