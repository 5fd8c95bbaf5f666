"""The tensors that a statistic reads and keeps, and other parts of its contract."""

from __future__ import annotations

import contextlib
import html
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

FEATURES = -1
"""Stands for the width of the layer in the shape of a :class:`State`."""

Reduction = Literal["sum", "min", "max"]
_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


@dataclass(frozen=True)
class State:
    """One tensor that a statistic keeps.

    Args:
        shape: of the tensor. :data:`FEATURES` stands for the width of the layer.
        reduce: how two of them become one: "sum", "min" or "max". None: the statistic defines :meth:`Statistic.merge_states`.
        dtype: floating point or integer. Sums need float64, because float32 stops counting at 2²⁴. A device without float64 gets float32.

    Raises:
        TypeError, ValueError: an argument is none of these.

    >>> State((FEATURES,), "max").new(3, torch.device("cpu"))
    tensor([-inf, -inf, -inf], dtype=torch.float64)
    """

    shape: tuple[int, ...] = ()
    reduce: Reduction | None = "sum"
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or not all(isinstance(size, int) for size in self.shape):
            raise TypeError(f"the shape of a State is a tuple of whole numbers, such as (FEATURES,); got {self.shape!r}")
        if any(size < 0 and size != FEATURES for size in self.shape):
            raise ValueError(f"the sizes of a State are at least 0, or FEATURES; got {self.shape}")
        if self.reduce not in (None, *get_args(Reduction)):
            raise ValueError(f'the reduce of a State is "sum", "min", "max" or None; got {self.reduce!r}')
        if self.dtype.is_complex or self.dtype == torch.bool:
            raise ValueError(f"the dtype of a State is floating point or integer; got {self.dtype}")

    @property
    def empty(self) -> float:
        """The value of every element before anything was seen."""
        if self.reduce not in ("min", "max"):
            return 0
        if self.dtype.is_floating_point:
            return math.inf if self.reduce == "min" else -math.inf
        limits = torch.iinfo(self.dtype)
        return limits.max if self.reduce == "min" else limits.min

    def new(self, features: int, device: torch.device) -> Tensor:
        """An empty tensor for a layer of this width."""
        shape = [features if size == FEATURES else size for size in self.shape]
        dtype = number_dtype(device) if self.dtype == torch.float64 else self.dtype
        with torch.inference_mode(False):  # a tensor created in inference mode could not be updated outside it
            return torch.full(shape, self.empty, dtype=dtype, device=device)


def reduced(states: Mapping[str, State], a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums, minima and maxima of the states that have such a ``reduce``."""
    return {name: _REDUCE[state.reduce](a[name], b[name]) for name, state in states.items() if state.reduce is not None}


def stacked(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of many layers, (layers, *shape) for each name."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def clear(states: Mapping[str, State], tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Empties tensors of many layers in place, in the same number of launches for any number of layers."""
    for name, state in states.items():
        torch._foreach_zero_(list(tensors[name]))
        if state.empty:
            torch._foreach_add_(list(tensors[name]), state.empty)


_BLOCK = 255  # the most that a uint8 counts


def column_counts(hits: Tensor, kept: Tensor) -> Tensor:
    """How many of the kept rows are True in each column: bool (rows, columns) and (rows, 1) → int64 (columns,). It overwrites ``hits``.

    Blocks of rows are counted in uint8, which takes a tenth of the time of bool and int64.

    >>> column_counts(torch.tensor([[True, False], [True, True]]), torch.tensor([[True], [False]])).tolist()
    [1, 0]
    """
    ones = hits.view(torch.uint8)
    ones &= kept.view(torch.uint8)
    blocks = len(ones) // _BLOCK
    whole = ones[: blocks * _BLOCK].reshape(blocks, _BLOCK, ones.shape[1]).sum(1, dtype=torch.uint8)
    return whole.sum(0) + ones[blocks * _BLOCK :].sum(0)


def check_input(name: str, features: int, x: Tensor, feature_dim: int, mask: Tensor | None) -> None:
    """Raises ValueError unless the statistic ``name`` can read ``x`` with this mask: types, width, shapes, devices."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} reads floating-point tensors, got {describe(x)}")
    if not -x.dim() <= feature_dim < x.dim() or x.shape[feature_dim] != features:
        raise ValueError(f"expected {features} features along dimension {feature_dim}, got a tensor of shape {tuple(x.shape)}")
    if mask is not None:
        lead = list(x.shape)
        del lead[feature_dim]
        if mask.dtype != torch.bool or list(mask.shape) != lead or mask.device != x.device:
            found = f"{mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
            raise ValueError(f"mask must be bool of shape {tuple(lead)} on {x.device}, got {found}")


def arguments_of(kind: type, inherited: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of a constructor without width and device. Those of its base class are included if it takes ``**options``."""
    parameters = inspect.signature(kind).parameters.values()
    width = next((p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD), "features")
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    base = inherited if any(p.kind == p.VAR_KEYWORD for p in parameters) else ()
    return (*base, *(name for name in named if name not in ("device", width, *base)))


def number_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def field_of(statistic: Any, name: str) -> float:
    """A field of a statistic, for ``statistic.name``.

    Raises:
        AttributeError: it is not a field; of several statistics, the message says which one has it.
    """
    kind = type(statistic)
    if name.startswith("_") or name not in statistic.fields:
        owner = next((label for label in vars(statistic).get("labels", ()) if hasattr(type(statistic[label]), name)), None)
        hint = f"; use [{owner!r}].{name}" if owner else ""
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}{hint}")
    return float(statistic.summary()[name])


MOST_METRICS = 5
"""``metrics`` returns at most so many fields of a layer by default. We chose the value."""


def metric_names(statistic: Any) -> tuple[str, ...]:
    """The fields that ``metrics`` returns by default."""
    names = statistic.fields if statistic.metric_fields is None else statistic.metric_fields
    return tuple(names)[:MOST_METRICS]


def html_table(statistic: Any) -> str:
    """The fields of a statistic, for a notebook."""
    row = "<tr><th style='text-align:left'>{}</th><td style='text-align:right'>{:.6g}</td></tr>"
    cells = "".join(row.format(html.escape(name), value) for name, value in statistic.summary().items())
    return f"<table><caption>{html.escape(type(statistic).__name__)} of {statistic.features} features</caption>{cells}</table>"


def describe(value: Any) -> str:
    """The type and shape of a tensor, or the type of anything else, for messages."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def is_plain(value: Any) -> bool:
    """Whether files can hold the value in a ``state_dict``: tensors, numbers, text, None and tuples of these."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def hashable(value: Any) -> Any:
    """Lists as tuples, also inside lists: JSON turns tuples into lists."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """The block computes in the precision of its tensors; autocast would compute matrix products in half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield
