"""What recorders do with the states of statistics of many layers: read them at once, close windows, and summarize."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchprobe.common.threads import is_ordered, ordered
from torchprobe.statistics.tensors import State, clear, describe, number_dtype, reduced, stacked

VERBS = (
    "update",
    "merge",
    "reset",
    "state_dict",
    "load_state_dict",
    "clone",
    "summary",
    "saw_anything",
    "add_states",
    "add_window",
    "replace_states",
    "restore_window",
    "read",
    "summaries",
    "take_windows",
    "join_windows",
    "close_windows",
    "reset_all",
)
"""What changes or reads the states. Threads may share a statistic: whatever class defines these, they run one after the other."""

Self = TypeVar("Self", bound="Layers")


def order_verbs(kind: type[Layers]) -> None:
    """Puts every verb of a class under the lock, wherever in its bases it comes from. A fused update is an operator, with its own lock."""
    for name in VERBS:
        verb = inspect.getattr_static(kind, name, None)
        function = verb.__func__ if isinstance(verb, classmethod) else verb
        if inspect.isfunction(function) and not is_ordered(function) and not (name == "update" and kind.fused):
            setattr(kind, name, classmethod(ordered(function)) if isinstance(verb, classmethod) else ordered(function))


class Layers:
    """The part of :class:`~torchprobe.statistics.Statistic` that handles many layers at once."""

    states: Mapping[str, State] = MappingProxyType({})
    fields: Mapping[str, str] = MappingProxyType({})
    fused: bool = False
    histogram_bins: int = 0

    # -- what a statistic defines --------------------------------------------------------------------------------------

    def setup(self) -> dict[str, Any]:
        raise NotImplementedError

    def summarize(self, states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def merge_states(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def window_histogram(self, states: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    # -- the states ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The states themselves, by name."""
        return {name: getattr(self, name) for name in self.states}

    def contents(self) -> dict[str, Tensor]:
        """A copy of the states, by name."""
        return {name: tensor[0] for name, tensor in type(self).read([self]).items()}

    def parts(self) -> dict[str, Tensor]:
        """The states, or views of parts of them, under the names that files keep."""
        return self.tensors()

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return next((tensor.device for tensor in self.tensors().values()), torch.device("cpu"))

    def group_key(self) -> tuple[Any, ...]:
        """Statistics with equal keys can be stacked."""
        return (type(self), self.device, *self.setup().items())

    def nonempty(self, states: Mapping[str, Tensor]) -> Tensor:
        """Which of many layers have seen anything: bool (layers,)."""
        changed = [(tensor != self.states[name].empty).reshape(len(tensor), -1).any(1) for name, tensor in states.items()]
        return torch.stack(changed).any(0)

    def saw_anything(self) -> Tensor:
        """Whether it has seen anything: bool (), without waiting for the device."""
        return self.nonempty(type(self).read([self]))[0]

    @property
    def call_counter(self) -> Tensor | None:
        """The number of calls, if the statistic counts them on the device."""
        return None

    def merged(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states of everything that either has seen; there may be a leading dimension of layers."""
        result = {**reduced(self.states, a, b), **self.merge_states(a, b)}
        for name in self.states:
            if name not in result:
                raise NotImplementedError(f"{type(self).__name__} must define merge_states(a, b) for {name}, which has reduce=None")
            if result[name].shape != a[name].shape:
                raise ValueError(f"{type(self).__name__}.merge_states made {name} {describe(result[name])} out of {describe(a[name])}")
        return result

    def merge_windows(self, closed: Mapping[str, Tensor], window: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`merged`, for a window that follows the closed ones."""
        return self.merged(closed, window)

    def add_window(self: Self, window: Self) -> Self:
        """Adds, in place, a window that follows those already seen; returns itself."""
        self.replace_states(self.merge_windows(self.tensors(), window.contents()))
        return self

    def add_states(self, contents: Mapping[str, Tensor]) -> None:
        """Merges the states of another statistic into these."""
        mine = self.tensors()
        self.replace_states(self.merged(mine, {name: contents[name].to(tensor) for name, tensor in mine.items()}))

    def replace_states(self, contents: Mapping[str, Tensor]) -> None:
        """Replaces the states."""
        for name, tensor in self.tensors().items():
            tensor.copy_(contents[name])

    @classmethod
    def read(cls: type[Self], statistics: Sequence[Self]) -> dict[str, Tensor]:
        """Copies of the states of statistics with one :meth:`group_key`: (layers, *shape) for each name."""
        return stacked([statistic.tensors() for statistic in statistics])

    @classmethod
    def summaries(cls: type[Self], statistics: Sequence[Self], histograms: bool = False) -> Tensor:
        """The fields of statistics with one :meth:`group_key`, in their order: float (layers, fields); nan if nothing was seen.

        With ``histograms`` these follow the fields: (layers, fields + histogram_bins). It does not wait for the device.
        """
        first = statistics[0]
        states = cls.read(statistics)
        found = first.summarize(states) if first.fields else {}
        dtype = number_dtype(first.device)
        columns = []
        for name in first.fields:
            if not isinstance(number := found.get(name), Tensor) or number.shape != (len(statistics),):
                what = f"shape {(len(statistics),)} for {len(statistics)} layers; {name!r} is {describe(number)}"
                raise ValueError(f"{cls.__name__}.summarize must return tensors of {what}")
            columns.append(number.to(dtype)[:, None])
        if histograms and first.histogram_bins:
            columns.append(first.window_histogram(states).to(dtype))
        numbers = torch.cat(columns, -1) if columns else torch.empty(len(statistics), 0, dtype=dtype, device=first.device)
        return numbers.where(first.nonempty(states)[:, None], math.nan)

    @classmethod
    def take_windows(cls: type[Self], windows: Sequence[Self], into: list[Self]) -> None:
        """Moves what windows hold into new statistics, which it appends to ``into``, and empties them. All have one :meth:`group_key`.

        It takes the same number of launches for any number of layers, and does not wait for the device. If it is interrupted,
        :meth:`restore_window` undoes it for those in ``into``.
        """
        into += [window.with_states(row) for window, row in zip(windows, _rows(cls.read(windows)), strict=True)]
        cls.reset_all(windows)

    def restore_window(self: Self, taken: Self) -> None:
        """Undoes :meth:`take_windows`."""
        self.replace_states(taken.tensors())

    @classmethod
    def join_windows(cls: type[Self], taken: Sequence[Self], closed: Sequence[Self | None]) -> list[Self]:
        """Windows that were taken, together with what was closed before them; None: nothing was. What is closed does not change.

        It takes the same number of launches for any number of layers, and does not wait for the device.
        """
        first = taken[0]
        states = stacked([window.tensors() for window in taken])
        empty = {name: torch.full_like(tensor, first.states[name].empty) for name, tensor in first.tensors().items()}
        before = stacked([empty if one is None else one.tensors() for one in closed])
        return [window.with_states(row) for window, row in zip(taken, _rows(first.merge_windows(before, states)), strict=True)]

    @classmethod
    def close_windows(cls: type[Self], windows: Sequence[Self], closed: Sequence[Self | None]) -> list[Self]:
        """Adds windows to what is closed, and empties them; see :meth:`take_windows` and :meth:`join_windows`."""
        taken = list[Self]()
        cls.take_windows(windows, taken)
        return cls.join_windows(taken, closed)

    def with_states(self: Self, tensors: Mapping[str, Tensor]) -> Self:
        """A statistic like this one with other states."""
        new = type(self).__new__(type(self))
        new.__dict__.update({**self.__dict__, **tensors})
        return new

    @classmethod
    def reset_all(cls: type[Self], statistics: Sequence[Self]) -> None:
        """:meth:`reset` for statistics with one :meth:`group_key`, in the same number of launches for any number of layers."""
        states = statistics[0].states
        clear(states, {name: [statistic.tensors()[name] for statistic in statistics] for name in states})


def _rows(states: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The states of many layers, layer by layer."""
    columns = {name: tensor.unbind(0) for name, tensor in states.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
