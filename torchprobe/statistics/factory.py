"""From what ``record(statistic=)`` is given to the statistics of the layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprobe.statistics.moments import Moments
from torchprobe.statistics.several import Several
from torchprobe.statistics.statistic import Statistic, Unstacked

Wanted = type[Statistic] | Callable[..., Statistic]
"""A class, or a function ``(features, device) -> Statistic``."""

_PROBE = 16  # the width of the statistic that is made to learn the fields
_VERBS = ("update", "merge", "reset", "state_dict", "load_state_dict")


class Factory:
    """Makes the statistic of one layer.

    Args:
        wanted: a class; a function ``(features, device) -> Statistic``; or several of them.
        outlier_sigma: for :class:`~torchprobe.Moments`, where that class itself is wanted.

    ``template`` is a statistic that it made, of a small width: it knows the fields.

    Raises:
        TypeError: it does not give a statistic.

    >>> Factory(Moments, 4.0)(8, torch.device("cpu")).outlier_sigma
    4.0
    """

    def __init__(self, wanted: Wanted | Sequence[Wanted], outlier_sigma: float = 6.0) -> None:
        self._several = isinstance(wanted, (list, tuple))
        kinds: Any = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        self._makers = [_maker(kind, outlier_sigma) for kind in kinds]
        self.template = self(_PROBE, torch.device("cpu"))
        self.name = "+".join(_names(self.template))

    def __call__(self, features: int, device: torch.device) -> Statistic:
        made = [make(features, device) for make in self._makers]
        return Several(made) if self._several else made[0]


def statistic_class(name: str) -> type[Statistic] | None:
    """The class of that name among those that are defined at present; None if there is not exactly one.

    >>> statistic_class("Moments").__name__, statistic_class("Nonsense")
    ('Moments', None)
    """
    found, waiting = list[type[Statistic]](), [Statistic]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting += subclasses
        found += [kind for kind in subclasses if kind.__name__ == name]
    return found[0] if len(found) == 1 else None


def _names(statistic: Statistic) -> list[str]:
    parts = list(statistic) if isinstance(statistic, Several) else [statistic]
    return [type(part).__name__ for part in parts]


def _maker(kind: Any, outlier_sigma: float) -> Callable[[int, torch.device], Statistic]:
    if not callable(kind):
        raise TypeError(f"statistic= takes a class, a function (features, device) -> Statistic, or a list of them; got {kind!r}")
    if isinstance(kind, type) and not issubclass(kind, Statistic):
        kind = _adopted(kind)
    arguments = {"outlier_sigma": outlier_sigma} if kind is Moments else {}
    name = getattr(kind, "__name__", repr(kind))
    try:
        by_keyword = "device" in inspect.signature(kind).parameters
    except (TypeError, ValueError):  # a callable without a signature
        by_keyword = False

    def make(features: int, device: torch.device) -> Statistic:
        made = kind(features, device=device, **arguments) if by_keyword else kind(features, device, **arguments)
        if not isinstance(made, Statistic):
            raise TypeError(f"statistic=: {name}(features, device) gave {type(made).__name__}, not a torchprobe.statistics.Statistic")
        return made

    return make


class _SixVerbs(Unstacked):
    """What a class with the six verbs of the earlier protocol lacks."""

    state: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"state": self.state}

    def setup(self) -> dict[str, Any]:
        return {"features": self.features}

    def anything(self) -> Tensor:
        return self.state.count_nonzero() > 0

    def summary(self) -> dict[str, float]:
        return {}


def _adopted(kind: type) -> type[Statistic]:
    """The class as a subclass of :class:`Statistic` without fields."""
    if missing := [verb for verb in _VERBS if not callable(getattr(kind, verb, None))]:
        raise TypeError(
            f"statistic=: {kind.__name__} is not a torchprobe.statistics.Statistic and has no {missing[0]}(): derive it from "
            f"Statistic, see docs/statistics.md"
        )
    warnings.warn(
        f"torchprobe: {kind.__name__} is not a subclass of torchprobe.statistics.Statistic. It is recorded, but has no fields to show. "
        f"Derive it from Statistic; docs/statistics.md has an example",
        DeprecationWarning,
        stacklevel=5,
    )
    return type(kind.__name__, (kind, _SixVerbs), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
