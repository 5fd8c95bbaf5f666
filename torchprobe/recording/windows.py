"""Many layers at once: every function makes the same few launches however many layers there are, and none synchronises."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchprobe.ops import layout
from torchprobe.ops.observe import merge_states
from torchprobe.recording.control import Slot
from torchprobe.statistics import Moments, Statistic
from torchprobe.statistics.moments import histogram, summarise

Function = TypeVar("Function", bound=Callable[..., Any])


def plainly(function: Function) -> Function:
    """Without autograd, and outside inference mode, whose tensors could not be changed later."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args)

    return cast(Function, call)


def by_shape(statistics: Sequence[Statistic]) -> list[list[int]]:
    """Indices of the statistics that can be stacked: one width, one device."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, statistic in enumerate(statistics):
        state = statistic.state
        groups.setdefault((statistic.features, state.device, state.dtype), []).append(index)
    return list(groups.values())


@plainly
def summaries(moments: Sequence[Moments], histograms: bool = False) -> list[tuple[list[int], Tensor]]:
    """For every group of one shape: which they are, and their numbers, (n, fields); nan for those that saw nothing.

    With ``histograms`` those of the vector kurtosis follow the fields: (n, fields + bins).
    """
    out = []
    for group in by_shape(moments):
        first = moments[group[0]]
        states = torch.stack([moments[index].state for index in group])
        seen = seen_anything(states)[:, None]
        numbers = summarise(states, first.features, first.outlier_sigma)
        numbers = torch.cat([numbers, histogram(states)], -1) if histograms else numbers
        out.append((group, numbers.where(seen, math.nan)))
    return out


def seen_anything(states: Tensor) -> Tensor:
    """Which of the states (n, slots) hold anything but a count of calls: bool (n,)."""
    rows = layout.rows(states)
    return (rows[..., layout.ROWS.index("count"), :] + rows[..., layout.ROWS.index("nonfinite"), :]).sum(-1) > 0


@plainly
def close(slots: Sequence[Slot]) -> None:
    """Adds the running windows to the closed ones and empties them; the counter of calls goes on."""
    windows = [slot.statistic for slot in slots]
    for group in by_shape(windows):
        states = torch.stack([windows[index].state for index in group])
        closed = [slots[index].closed for index in group]
        before = torch.stack([torch.zeros_like(s) if c is None else c.state for c, s in zip(closed, states, strict=True)])
        merged = merge_states(before, states)
        merged[:, layout.CALLS] = states[:, layout.CALLS]
        for index, state in zip(group, merged.unbind(0), strict=True):
            slots[index].closed = with_state(windows[index], state)
    _zero([slot.window for slot in slots])


@plainly
def erase(slots: Sequence[Slot]) -> None:
    """Forgets everything, the counter of calls too."""
    _zero([slot.state for slot in slots])
    for slot in slots:
        slot.closed = None


@plainly
def merged(parts: Iterable[Statistic | None]) -> Statistic | None:
    """All parts in one new statistic on the device of the first, or None when there is none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    total = duplicate(found[0])
    for part in found[1:]:
        total.merge(part)
    return total


@plainly
def duplicate(statistic: Statistic) -> Statistic:
    """An independent copy."""
    if isinstance(statistic, Moments):
        return statistic.clone()
    new = type(statistic)(statistic.features, statistic.state.device, getattr(statistic, "outlier_sigma", 6.0))
    new.load_state_dict(statistic.state_dict())
    return new


def with_state(moments: Statistic, state: Tensor) -> Statistic:
    """The same statistic over another state, which is not copied."""
    new = copy.copy(moments)
    new.state = state
    return new


def _zero(states: Sequence[Tensor]) -> None:
    for device in {state.device for state in states}:
        torch._foreach_zero_([state for state in states if state.device == device])
