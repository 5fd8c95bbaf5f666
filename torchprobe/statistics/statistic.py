"""The contract of a statistic: what a subclass writes, and everything that follows from it."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchprobe.statistics.tensors import (
    State,
    arguments_of,
    check_input,
    clear,
    describe,
    field_of,
    hashable,
    html_table,
    no_autocast,
    number_dtype,
    reduced,
    stacked,
)

_updating = threading.RLock()  # threads may share a statistic, and a statistic may update another one

Self = TypeVar("Self", bound="Statistic")


class Statistic:
    """A streaming, mergeable statistic of one layer.

    A subclass names its states and its fields, and writes two methods. It then works everywhere :class:`~torchprobe.Moments` does: in
    recorders, windows, histories, tables, plots and files, with masks, in compiled models, on several devices and on many ranks.

    Class attributes:
        states: name → :class:`State`. Each is an attribute of every instance, a tensor. A shape that depends on an argument of the
            constructor is possible: set ``self.states`` before ``super().__init__(features, device)``.
        fields: name → one line of help, for the numbers that :meth:`summarize` returns. Plots show the first field, unless ``headline``
            names another one.
        arguments: names of the further arguments of the constructor; by default they follow from its signature. Each must be an attribute
            of the same name: a number, text, None, or a tuple of these. Statistics merge only if their arguments are equal.

    Methods to write:
        :meth:`accumulate` adds the vectors of one call to the states.
        :meth:`summarize` turns the states of many layers into fields.
        :meth:`merge_states`, only for states with ``reduce=None``.

    One more state comes for free: ``vectors``, float64 (), the number of vectors seen. A field can be read as an attribute, too.

    >>> from torchprobe.statistics import FEATURES, State
    >>> class Largest(Statistic):
    ...     states = {"largest": State((FEATURES,), "max")}
    ...     fields = {"largest_max": "largest value of any feature"}
    ...
    ...     def accumulate(self, x, kept):
    ...         torch.maximum(self.largest, x.where(kept, -torch.inf).amax(0), out=self.largest)
    ...
    ...     def summarize(self, states):
    ...         return {"largest_max": states["largest"].amax(-1)}
    >>> one, other = Largest(features=2), Largest(features=2)
    >>> one.update(torch.tensor([[1.0, 2.0], [0.0, 5.0]]))
    >>> other.update(torch.tensor([[9.0, 9.0], [3.0, 0.0]]), mask=torch.tensor([False, True]))
    >>> one.merge(other).largest.tolist(), one.summary(), int(one.vectors)
    ([3.0, 5.0], {'largest_max': 5.0}, 3)
    """

    states: Mapping[str, State] = MappingProxyType({})
    fields: Mapping[str, str] = MappingProxyType({})
    arguments: ClassVar[tuple[str, ...]] = ()

    headline: str | None = None
    """The field that plots show; None: the first."""

    table_fields: Sequence[str] | None = None
    """The fields that a table shows; None: all."""

    metric_fields: Sequence[str] | None = None
    """The fields that ``metrics`` returns by default, at most five; None: the first five."""

    fused: bool = False
    """Whether :meth:`update` is the operator ``torchprobe::observe_`` on ``self.state``. Hooks then call the operator directly."""

    capturable: bool = True
    """Whether :meth:`update` only launches kernels on fixed tensors, so that a CUDA graph can hold it."""

    histogram_bins: int = 0
    """Bins of the histogram that a history keeps of every window; 0: none. See :meth:`window_histogram`."""

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = int(features)
        self._counts_vectors = not hasattr(type(self), "vectors") and "vectors" not in (*self.states, *self.arguments)
        if self._counts_vectors:
            self.states = {**self.states, "vectors": State()}
        place = torch.device(device) if device is not None else torch.get_default_device()
        for name, state in self.states.items():
            if hasattr(Statistic, name) or name in ("features", *self.arguments):
                what = "an argument" if name in self.arguments else "an attribute of every Statistic"
                raise TypeError(f"{type(self).__name__}: the state {name!r} has the name of {what}; choose another name")
            setattr(self, name, state.new(self.features, place))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "update" in cls.__dict__ and "fused" not in cls.__dict__:
            cls.fused = False
        if "__init__" in cls.__dict__ and "arguments" not in cls.__dict__:
            cls.arguments = arguments_of(cls, cls.arguments)

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        """Adds the vectors of one call to the states, in place or by assignment. It should not wait for the device.

        Args:
            x: (vectors, features), at least one vector, detached. float32, or float64 for a float64 activation. It may hold nan and inf.
            kept: bool (vectors, 1). False for padding, which must not count.
        """
        raise NotImplementedError(f"{type(self).__name__} must define accumulate(x, kept)")

    def summarize(self, states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The fields of many layers at once, on their device. It should not wait for the device.

        Args:
            states: name → tensor (layers, *shape), of layers with the same width and arguments. A layer may have seen nothing.

        Returns:
            One tensor (layers,) for every name in ``fields``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define summarize(states)")

    def merge_states(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Merges the states with ``reduce=None``. The others need not be in the result.

        Args:
            a, b: all states of two statistics, name → tensor (*shape) or (layers, *shape): index the shape from its end.
        """
        return {}

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        """Adds every vector of ``x``.

        Args:
            x: floating point, any strides; ``features`` along ``feature_dim``. Every other dimension counts vectors.
            feature_dim: the dimension of the features.
            mask: bool, the shape of ``x`` without ``feature_dim``. Vectors where it is False are left out.

        Raises:
            ValueError: another width or type, or a mask that does not fit.
        """
        check_input(type(self).__name__, self.features, x, feature_dim, mask)
        with torch.no_grad(), _updating, no_autocast(x.device.type):
            vectors = x.detach().movedim(feature_dim, -1).reshape(-1, self.features)
            if not len(vectors):
                return
            if vectors.dtype not in (torch.float32, torch.float64):
                vectors = vectors.float()
            kept = torch.ones(len(vectors), dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1)
            before = self.tensors()
            self.accumulate(vectors, kept[:, None])
            self._keep_tensors(before)
            if self._counts_vectors:
                before["vectors"] += len(vectors) if mask is None else kept.sum()

    def _keep_tensors(self, before: Mapping[str, Tensor]) -> None:
        """Copies states that were assigned into their first tensors: those have the right dtype, and CUDA graphs write to them."""
        for name, tensor in before.items():
            new = getattr(self, name)
            if new is tensor:
                continue
            setattr(self, name, tensor)
            if not isinstance(new, Tensor) or new.shape != tensor.shape:
                raise ValueError(f"{type(self).__name__}.accumulate set {name} to {describe(new)}; its State is {describe(tensor)}")
            tensor.copy_(new)

    def merge(self: Self, other: Self) -> Self:
        """Adds, in place, everything ``other`` has seen, and returns itself. ``other`` may be on another device.

        Raises:
            TypeError: ``other`` is another statistic.
            ValueError: it has another width or other arguments.
        """
        self.check_mergeable(other)
        mine = self.tensors()
        with torch.no_grad():
            self._set(self.merged(mine, {name: tensor.to(mine[name]) for name, tensor in other.tensors().items()}))
        return self

    def check_mergeable(self, other: Statistic) -> None:
        """Raises what :meth:`merge` would raise, and changes nothing."""
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {name} with {type(other).__name__}")
        theirs = other.setup()
        for key, mine in self.setup().items():
            if theirs.get(key) != mine:
                raise ValueError(f"cannot merge {name} with {key} {mine} and {theirs.get(key)}")

    def setup(self) -> dict[str, Any]:
        """``features`` and the further arguments: two statistics merge only if these are equal."""
        return {"features": self.features, **{name: hashable(getattr(self, name)) for name in self.arguments}}

    def reset(self) -> None:
        """Forgets everything."""
        type(self).reset_all([self])

    def state_dict(self) -> dict[str, Any]:
        """:meth:`setup` and every part of the state under its name, cloned: plain numbers, text and tensors."""
        return {**self.setup(), **{name: part.clone() for name, part in self.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: another width or other arguments; a part is missing, unknown or of another shape or type. Nothing is changed then.
        """
        self._check_state(state)
        with torch.no_grad():
            for key, part in self.parts().items():
                part.copy_(state[key])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        name, setup, parts = type(self).__name__, self.setup(), self.parts()
        for key, mine in setup.items():
            if hashable(state.get(key)) != mine:
                raise ValueError(f"the saved state of {name} has {key}={state.get(key)}, this one has {key}={mine}")
        saved = {key: value for key, value in state.items() if key not in setup}
        if saved.keys() != parts.keys():
            lacks, unknown = sorted(parts.keys() - saved.keys()), sorted(saved.keys() - parts.keys())
            raise ValueError(f"the saved state of {name} lacks {lacks} and has unknown {unknown}")
        for key, part in parts.items():
            found = saved[key]
            if not isinstance(found, Tensor) or found.shape != part.shape or found.is_floating_point() != part.is_floating_point():
                raise ValueError(f"{key} in the saved state of {name} is {describe(found)}, expected {describe(part)}")

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """A new statistic that holds what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is incomplete or damaged.
        """
        if missing := [key for key in ("features", *cls.arguments) if key not in state]:
            raise ValueError(f"the saved state of {cls.__name__} lacks {missing}")
        arguments = {name: hashable(state[name]) for name in cls.arguments}
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a constructor may read tensors, which "meta" tensors do not allow
            cls(state["features"], device="meta", **arguments)._check_state(state)  # before any memory is allocated
        new = cls(state["features"], device=device, **arguments)
        new.load_state_dict(state)
        return new

    def clone(self: Self) -> Self:
        """An independent copy."""
        tensors = {id(tensor): tensor.clone() for tensor in self.tensors().values()}  # views of many layers; copy no more than ours
        return copy.deepcopy(self, dict[int, Any](tensors))

    # -- reads ---------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """The fields as plain numbers; nan if nothing was seen."""
        return dict(zip(self.fields, type(self).summaries([self])[0].tolist(), strict=True))

    def window_histogram(self, states: Mapping[str, Tensor]) -> Tensor:
        """What a history keeps of every window in addition to the fields: states of many layers → (layers, histogram_bins)."""
        raise NotImplementedError(f"{type(self).__name__} has histogram_bins and must define window_histogram(states)")

    def histogram_edges(self) -> Tensor:
        """The edges of :meth:`window_histogram`: float64 (histogram_bins + 1,)."""
        raise NotImplementedError(f"{type(self).__name__} has histogram_bins and must define histogram_edges()")

    def problem(self) -> tuple[str, str] | None:
        """What is wrong with a state that was read from a file: the name of the part, and the reason. None if nothing is."""
        return None

    def __getattr__(self, name: str) -> Any:
        """A field as a plain number, unless a state has its name."""
        return field_of(self, name)

    def _repr_html_(self) -> str:
        return html_table(self)

    def __repr__(self) -> str:
        numbers = [f"{name}={value:.4g}" for name, value in self.summary().items()]
        return f"{type(self).__name__}({', '.join([f'{self.features} features', *numbers])})"

    # -- what recorders use --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The states themselves, by name."""
        return {name: getattr(self, name) for name in self.states}

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
        return self.nonempty(stacked([self.tensors()]))[0]

    @property
    def call_counter(self) -> Tensor | None:
        """The number of calls, if the statistic counts them on the device."""
        return None

    def window_tensors(self) -> dict[str, Tensor]:
        """What is emptied when a window is closed, by the name of its state."""
        return self.tensors()

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
        self._set(self.merge_windows(self.tensors(), window.tensors()))
        return self

    def _set(self, contents: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(contents[name])

    @classmethod
    def summaries(cls: type[Self], statistics: Sequence[Self], histograms: bool = False) -> Tensor:
        """The fields of statistics with one :meth:`group_key`, in their order: float (layers, fields); nan if nothing was seen.

        With ``histograms`` these follow the fields: (layers, fields + histogram_bins). It does not wait for the device.
        """
        first = statistics[0]
        states = stacked([statistic.tensors() for statistic in statistics])
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
    def close_windows(cls: type[Self], windows: Sequence[Self], closed: Sequence[Self | None]) -> list[Self]:
        """Adds windows to what is closed, and empties them. All have one :meth:`group_key`; None: nothing is closed yet.

        It takes the same number of launches for any number of layers, and does not wait for the device.
        """
        first = windows[0]
        states = stacked([window.tensors() for window in windows])
        empty = {name: torch.full_like(tensor, first.states[name].empty) for name, tensor in first.tensors().items()}
        before = stacked([empty if one is None else one.tensors() for one in closed])
        rows = {name: tensor.unbind(0) for name, tensor in first.merge_windows(before, states).items()}
        result = []
        for index, window in enumerate(windows):
            new = copy.copy(window)
            for name, tensors in rows.items():
                setattr(new, name, tensors[index])
            result.append(new)
        clear(first.states, {name: [window.window_tensors()[name] for window in windows] for name in states})
        return result

    @classmethod
    def reset_all(cls: type[Self], statistics: Sequence[Self]) -> None:
        """:meth:`reset` for statistics with one :meth:`group_key`, in the same number of launches for any number of layers."""
        states = statistics[0].states
        clear(states, {name: [statistic.tensors()[name] for statistic in statistics] for name in states})
