"""The contract of a statistic: what a subclass writes, and everything that follows from it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchprobe.common.numbers import shown, whole
from torchprobe.common.threads import ordered
from torchprobe.ops.observe import MOST_FEATURES
from torchprobe.statistics.layers import Layers, order_verbs
from torchprobe.statistics.saved import DamagedState, check_keys, check_mapping, count_problem, fits, made, same
from torchprobe.statistics.tensors import (
    State,
    arguments_of,
    check_input,
    describe,
    field_of,
    hashable,
    html_table,
    no_autocast,
)

Self = TypeVar("Self", bound="Statistic")


class Statistic(Layers):
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

    Threads may share a statistic. All verbs, also those that a subclass defines, run one after the other, so that nothing is lost, and
    what :meth:`clone`, :meth:`state_dict`, :meth:`summary`, a pickle and a merge read is whole. The states themselves, as attributes, are
    what updates write to.

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
        self.features = whole("features", features, 1, MOST_FEATURES)
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
        order_verbs(cls)

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        """Adds the vectors of one call to the states, in place or by assignment. It should not wait for the device.

        ``self.vectors`` is the number of vectors of the calls before: it does not include this call. Those of this call that count are
        ``kept.sum()``.

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
        with torch.no_grad(), no_autocast(x.device.type):
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
        with torch.no_grad():
            self.add_states(other.contents())
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
        whole_state = self.with_states(self.contents())
        return {**self.setup(), **{name: part.clone() for name, part in whole_state.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: another width or other arguments; a part is missing, unknown, damaged, or of another shape or type. Nothing is
                changed then.
        """
        self._check_state(state)
        with torch.inference_mode(False), torch.no_grad():
            new = self.with_states({name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()})
            for key, part in new.parts().items():
                part.copy_(state[key])
            if problem := new.problem():
                raise DamagedState(type(self).__name__, *problem)
            self.replace_states(new.tensors())

    def _check_state(self, state: Mapping[str, Any]) -> None:
        name, setup, parts = type(self).__name__, self.setup(), self.parts()
        check_mapping(name, state)
        for key, mine in setup.items():
            if not same(hashable(state.get(key)), mine):
                raise ValueError(f"the saved state of {name} has {key}={shown(state.get(key))}, this one has {key}={mine}")
        saved = {key: value for key, value in state.items() if key not in setup}
        check_keys(name, saved, parts)
        for key, part in parts.items():
            if not fits(saved[key], part):
                raise ValueError(f"{key} in the saved state of {name} is {describe(saved[key])}, expected {describe(part)}")

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """A new statistic that holds what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is incomplete or damaged.
        """
        check_mapping(cls.__name__, state)
        if missing := [key for key in ("features", *cls.arguments) if key not in state]:
            raise ValueError(f"the saved state of {cls.__name__} lacks {missing}")
        features = whole(f"features in the saved state of {cls.__name__}", state["features"], 1, MOST_FEATURES)
        arguments = {name: hashable(state[name]) for name in cls.arguments}
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a constructor may read tensors, which "meta" tensors do not allow
            made(cls, features, "meta", arguments)._check_state(state)  # before any memory is allocated
        new = made(cls, features, device, arguments)
        new.load_state_dict(state)
        return new

    def clone(self: Self) -> Self:
        """An independent copy."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__getstate__())
        return new

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = self.clone()
        return new

    @ordered
    def __getstate__(self) -> dict[str, Any]:
        """Everything, copied while no other thread changes it: for copies and pickles."""
        memo = dict[int, Any]()
        contents = self.contents()
        for name, tensor in self.tensors().items():
            memo[id(tensor)] = contents[name]  # not views of many layers: copy no more than ours
        copied: dict[str, Any] = copy.deepcopy(self.__dict__, memo)
        return copied

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
        """What is wrong with a state that was saved: the name of the part, and the reason. None if nothing is.

        A subclass may know more than this: the number of vectors is a whole number.
        """
        return None if not self._counts_vectors else count_problem("vectors", self.tensors()["vectors"])

    def __getattr__(self, name: str) -> Any:
        """A field as a plain number, unless a state has its name."""
        return field_of(self, name)

    def _repr_html_(self) -> str:
        return html_table(self)

    def __repr__(self) -> str:
        numbers = [f"{name}={value:.4g}" for name, value in self.summary().items()]
        return f"{type(self).__name__}({', '.join([f'{self.features} features', *numbers])})"
