"""The contract of a statistic: what one writes, and everything that follows from it."""

from __future__ import annotations

import copy
import html
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchprobe.statistics.state import State

_updating = threading.Lock()  # threads may share a statistic

Self = TypeVar("Self", bound="Statistic")


class Statistic:
    """A streaming, mergeable statistic of one layer.

    A subclass names its states and its fields, and writes two methods. It then works everywhere :class:`~torchprobe.Moments` does: in
    recorders, windows, histories, tables, plots and files, with masks, in compiled models, on several devices and on many ranks.

    Class attributes:
        states: name → :class:`State`. Each is an attribute of every instance, a tensor.
        fields: name → one line of help, for the numbers that :meth:`summarize` gives. Plots show the first, unless ``headline`` names
            another.
        arguments: names of the constructor's further arguments. Each must be kept as an attribute of the same name. Statistics merge only
            if their arguments are equal.

    Methods to write:
        :meth:`accumulate` adds the vectors of one call to the states.
        :meth:`summarize` turns the states of many layers into fields.
        :meth:`merge_states`, only for states with ``reduce=None``.

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
    >>> one.merge(other).largest.tolist(), one.summary()
    ([3.0, 5.0], {'largest_max': 5.0})
    """

    states: ClassVar[Mapping[str, State]] = MappingProxyType({})
    fields: Mapping[str, str] = MappingProxyType({})
    arguments: ClassVar[tuple[str, ...]] = ()

    headline: str | None = None
    """The field that plots show; None: the first."""

    table_fields: Sequence[str] | None = None
    """The fields that a table shows; None: all."""

    fused: bool = False
    """Whether :meth:`update` is the operator ``torchprobe::observe_`` on ``self.state``. Hooks then call it without a detour."""

    bins: int = 0
    """Bins of the histogram that a history keeps of every window; 0: none. See :meth:`histogram`."""

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = int(features)
        place = torch.device(device) if device is not None else torch.get_default_device()
        for name, state in self.states.items():
            setattr(self, name, state.new(self.features, place))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "update" in cls.__dict__ and "fused" not in cls.__dict__:
            cls.fused = False

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        """Adds the vectors of one call to the states. It should not wait for the device.

        Args:
            x: (vectors, features), detached. float32, or float64 for a float64 activation. It may hold nan and inf, and no vector at all.
            kept: bool (vectors, 1). False for padding, which must not count.
        """
        raise NotImplementedError(f"{type(self).__name__} must define accumulate(x, kept)")

    def summarize(self, states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The fields of many layers at once, on their device. It should not wait for the device.

        Args:
            states: name → tensor (layers, *shape) of layers that are alike.

        Returns:
            One tensor (layers,) for every name in ``fields``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define summarize(states)")

    def merge_states(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states of everything that either saw; there may be a leading dimension of layers."""
        reduce: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
        missing = [name for name, state in self.states.items() if state.reduce is None]
        if missing:
            raise NotImplementedError(f"{type(self).__name__} must define merge_states(a, b): {missing[0]} has reduce=None")
        return {name: reduce[str(state.reduce)](a[name], b[name]) for name, state in self.states.items()}

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        """Adds every vector of ``x``.

        Args:
            x: floating point, any strides; ``features`` along ``feature_dim``. Every other dimension counts vectors.
            feature_dim: the dimension of the features.
            mask: bool, the shape of ``x`` without ``feature_dim``; where it is False, the vector is left out.

        Raises:
            ValueError: another width or type, or a mask of another shape.
        """
        x, mask = self.checked(x, feature_dim, mask)
        with torch.no_grad(), _updating:
            vectors = x.movedim(feature_dim, -1).reshape(-1, self.features)
            kept = torch.ones(len(vectors), dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1)
            if vectors.dtype not in (torch.float32, torch.float64):
                vectors = vectors.float()
            if len(vectors):
                self.accumulate(vectors, kept[:, None])

    def checked(self, x: Tensor, feature_dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x``, detached, and the mask, after a check of types and shapes."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__} reads floating-point tensors, got {found}")
        if not -x.dim() <= feature_dim < x.dim() or x.shape[feature_dim] != self.features:
            raise ValueError(f"expected {self.features} features along dimension {feature_dim}, got a tensor of shape {tuple(x.shape)}")
        if mask is not None:
            lead = list(x.shape)
            del lead[feature_dim]
            if mask.dtype != torch.bool or list(mask.shape) != lead:
                raise ValueError(f"mask must be bool of shape {tuple(lead)}, got {mask.dtype} of shape {tuple(mask.shape)}")
        return x.detach(), mask

    def merge(self: Self, other: Self) -> Self:
        """Adds, in place, everything ``other`` saw; returns itself. ``other`` may be on another device.

        Raises:
            TypeError: ``other`` is another statistic.
            ValueError: it has another width or other arguments.
        """
        self.check_mergeable(other)
        mine = self.tensors()
        theirs = {name: tensor.to(mine[name]) for name, tensor in other.tensors().items()}
        for name, tensor in self.merge_states(mine, theirs).items():
            mine[name].copy_(tensor)
        return self

    def check_mergeable(self, other: Statistic) -> None:
        """Raises what :meth:`merge` would raise, and changes nothing."""
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {name} with {type(other).__name__}")
        for key, mine in self.setup().items():
            if (theirs := other.setup().get(key)) != mine:
                raise ValueError(f"cannot merge {name} with {key} {mine} and {theirs}")

    def setup(self) -> dict[str, Any]:
        """``features`` and the further arguments: what two statistics must share to merge."""
        return {"features": self.features, **{name: getattr(self, name) for name in self.arguments}}

    def reset(self) -> None:
        """Forgets everything."""
        type(self).reset_all([self])

    def state_dict(self) -> dict[str, Any]:
        """:meth:`setup` and every part of the state under its name, cloned: plain numbers, text and tensors."""
        return {**self.setup(), **{name: part.clone() for name, part in self.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: another width or other arguments; a part missing, unknown or of the wrong shape. Nothing is changed then.
        """
        name, setup, parts = type(self).__name__, self.setup(), self.parts()
        for key, mine in setup.items():
            if state.get(key) != mine:
                raise ValueError(f"the saved state of {name} has {key}={state.get(key)}, this one has {key}={mine}")
        saved = {key: value for key, value in state.items() if key not in setup}
        if saved.keys() != parts.keys():
            lacks, unknown = sorted(parts.keys() - saved.keys()), sorted(saved.keys() - parts.keys())
            raise ValueError(f"the saved state of {name} lacks {lacks} and has unknown {unknown}")
        for key, part in parts.items():
            if not isinstance(saved[key], Tensor) or saved[key].shape != part.shape:
                shape = tuple(getattr(saved[key], "shape", ()))
                raise ValueError(f"{key} in the saved state of {name} has shape {shape}, expected {tuple(part.shape)}")
        for key, part in parts.items():
            part.copy_(saved[key])

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """A new statistic that holds what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is incomplete or damaged.
        """
        if missing := [key for key in ("features", *cls.arguments) if key not in state]:
            raise ValueError(f"the saved state of {cls.__name__} lacks {missing}")
        new = cls(state["features"], device=device, **{name: state[name] for name in cls.arguments})
        new.load_state_dict(state)
        return new

    def clone(self: Self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """The fields as plain numbers; nan when nothing was seen."""
        numbers = type(self).summaries([self])[0].tolist()
        return dict(zip(self.fields, numbers, strict=True))

    def histogram(self, states: Mapping[str, Tensor]) -> Tensor:
        """What a history keeps of every window besides the fields: states of many layers → (layers, bins)."""
        raise NotImplementedError(f"{type(self).__name__} has bins={self.bins} and must define histogram(states)")

    def bin_edges(self) -> Tensor:
        """The edges of :meth:`histogram`: float64 (bins + 1,)."""
        raise NotImplementedError(f"{type(self).__name__} has no histogram")

    def problem(self) -> tuple[str, str] | None:
        """What is wrong with the state, checked after it was read from a file: the part and the reason; None if nothing is."""
        return None

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:right'>{value:.6g}</td></tr>"
            for name, value in self.summary().items()
        )
        return f"<table><caption>{html.escape(type(self).__name__)} of {self.features} features</caption>{cells}</table>"

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value:.4g}" for name, value in self.summary().items())
        return f"{type(self).__name__}({self.features} features{', ' * bool(numbers)}{numbers})"

    # -- what recorders use; a statistic without fixed states has its own: see Unstacked -------------------------------

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

    def alike(self) -> tuple[Any, ...]:
        """Statistics with equal values can be handled together."""
        return (type(self), self.device, *self.setup().items())

    def seen(self, states: Mapping[str, Tensor]) -> Tensor:
        """Which of many layers saw anything: bool (layers,)."""
        changed = [(tensor != self.states[name].empty).reshape(len(tensor), -1).any(1) for name, tensor in states.items()]
        return torch.stack(changed).any(0)

    def anything(self) -> Tensor:
        """Whether it saw anything: bool (), without waiting for the device."""
        return self.seen({name: tensor[None] for name, tensor in self.tensors().items()})[0]

    @property
    def call_counter(self) -> Tensor | None:
        """The number of calls, where the statistic counts them itself on the device."""
        return None

    def window_tensors(self) -> dict[str, Tensor]:
        """What is emptied when a window is closed, by the name of its state."""
        return self.tensors()

    def merge_windows(self, closed: Mapping[str, Tensor], window: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`merge_states`, for a window that follows the closed ones."""
        return self.merge_states(closed, window)

    def add_window(self: Self, window: Self) -> Self:
        """Adds, in place, a window that follows those already seen; returns itself."""
        merged = self.merge_windows(self.tensors(), window.tensors())
        for name, tensor in self.tensors().items():
            tensor.copy_(merged[name])
        return self

    @classmethod
    def summaries(cls: type[Self], statistics: Sequence[Self], histograms: bool = False) -> Tensor:
        """The fields of statistics that are alike, in their order: float (layers, fields); nan where nothing was seen.

        With ``histograms`` those follow the fields: (layers, fields + bins). It does not wait for the device.
        """
        first = statistics[0]
        states = _stacked(statistics)
        found = first.summarize(states)
        if missing := [name for name in first.fields if name not in found]:
            raise ValueError(f"{cls.__name__}.summarize does not give {', '.join(missing)}, which its fields name")
        dtype = torch.float32 if first.device.type == "mps" else torch.float64
        numbers = torch.stack([found[name].to(dtype).expand(len(statistics)) for name in first.fields], -1)
        if histograms and first.bins:
            numbers = torch.cat([numbers, first.histogram(states).to(dtype)], -1)
        return numbers.where(first.seen(states)[:, None], math.nan)

    @classmethod
    def close_windows(cls: type[Self], windows: Sequence[Self], closed: Sequence[Self | None]) -> list[Self]:
        """Adds windows to what is closed, and empties them. All are alike; None: nothing is closed yet.

        It takes the same number of launches for any number of layers, and does not wait for the device.
        """
        first = windows[0]
        states = _stacked(windows)
        empty = {name: torch.full_like(tensor, first.states[name].empty) for name, tensor in first.tensors().items()}
        before = {
            name: torch.stack([empty[name] if one is None else one.tensors()[name] for one in closed]).to(states[name]) for name in states
        }
        merged = first.merge_windows(before, states)
        rows = {name: tensor.unbind(0) for name, tensor in merged.items()}
        result = []
        for index, window in enumerate(windows):
            new = copy.copy(window)
            for name, tensors in rows.items():
                setattr(new, name, tensors[index])
            result.append(new)
        first._empty({name: [window.window_tensors()[name] for window in windows] for name in states})
        return result

    @classmethod
    def reset_all(cls: type[Self], statistics: Sequence[Self]) -> None:
        """:meth:`reset` for statistics that are alike, in the same number of launches for any number of layers."""
        first = statistics[0]
        first._empty({name: [statistic.tensors()[name] for statistic in statistics] for name in first.states})

    def _empty(self, tensors: Mapping[str, list[Tensor]]) -> None:
        for name, state in self.states.items():
            torch._foreach_zero_(tensors[name])
            if state.empty:
                torch._foreach_add_(tensors[name], state.empty)


class Unstacked(Statistic):
    """A statistic whose state has no fixed shape: many layers are handled one after the other.

    A subclass defines ``update``, ``merge``, ``reset``, ``state_dict``, ``load_state_dict``, ``from_state``, :meth:`summary`, and
    :attr:`empty`.
    """

    @property
    def empty(self) -> bool:
        """Whether nothing was seen."""
        raise NotImplementedError

    def anything(self) -> Tensor:
        return torch.tensor(not self.empty)

    def add_window(self: Self, window: Self) -> Self:
        return self.merge(window)

    @classmethod
    def summaries(cls: type[Self], statistics: Sequence[Self], histograms: bool = False) -> Tensor:
        return torch.tensor([list(statistic.summary().values()) for statistic in statistics], dtype=torch.float64)

    @classmethod
    def close_windows(cls: type[Self], windows: Sequence[Self], closed: Sequence[Self | None]) -> list[Self]:
        result = [window.clone() if one is None else one.merge(window) for window, one in zip(windows, closed, strict=True)]
        cls.reset_all(windows)
        return result

    @classmethod
    def reset_all(cls: type[Self], statistics: Sequence[Self]) -> None:
        for statistic in statistics:
            statistic.reset()


def _stacked(statistics: Sequence[Statistic]) -> dict[str, Tensor]:
    tensors = [statistic.tensors() for statistic in statistics]
    return {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}
