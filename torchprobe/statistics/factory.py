"""The statistics of the layers, made from the argument ``statistic`` of :func:`torchprobe.record`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch

from torchprobe.statistics.dynamic import DynamicStatistic, EarlierProtocol, adopted
from torchprobe.statistics.several import Several
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import is_plain

StatisticLike = type[Statistic] | Callable[..., Statistic]
"""A class, or a function ``(features, device) -> Statistic``."""

OUTLIER_SIGMA = 6.0
"""The default of ``outlier_sigma``."""

_TEMPLATE_FEATURES = 16
_ROW = ("layer", "module", "features", "feature_dim", "positions", "step")  # what rows hold in addition to the fields


class Factory:
    """Makes the statistic of one layer: ``factory(features, device)``.

    Args:
        statistic: a class whose constructor takes (features, device); a function ``(features, device) -> Statistic``; or a list of these.
        outlier_sigma: passed to every class whose constructor takes it.

    The constructor makes one statistic, ``template``, for a layer of 16 features on the CPU. The template has the fields. It is also
    tried out, so that mistakes are found before a model runs.

    Raises:
        TypeError: it does not make statistics, or a statistic breaks the contract; the message says how.
        ValueError: the list is empty, or nothing takes ``outlier_sigma``.

    >>> from torchprobe.statistics import Moments
    >>> Factory(Moments, 4.0)(8, torch.device("cpu")).outlier_sigma
    4.0
    """

    def __init__(self, statistic: StatisticLike | Sequence[StatisticLike], outlier_sigma: float = OUTLIER_SIGMA) -> None:
        self._in_list = isinstance(statistic, (list, tuple))
        kinds: list[Any] = list(statistic) if isinstance(statistic, (list, tuple)) else [statistic]
        self._makers = list[_Maker]()
        for kind in kinds:  # not a comprehension: before Python 3.12 it is a frame, which `stacklevel` in `adopted` would count
            self._makers.append(_Maker(kind, outlier_sigma, self._in_list))
        self.template = self._new(_TEMPLATE_FEATURES, torch.device("cpu"))
        self.name = "+".join(type(part).__name__ for part in _parts(self.template))
        if outlier_sigma != OUTLIER_SIGMA and not any(maker.takes_sigma for maker in self._makers):
            raise ValueError(
                f"outlier_sigma={outlier_sigma} has no effect: {self.name} does not take it here. "
                f"Pass it where the statistic is made, as in functools.partial(Moments, outlier_sigma={outlier_sigma})"
            )
        for part in _parts(self.template):
            check_contract(part)

    def __call__(self, features: int, device: torch.device) -> Statistic:
        new = self._new(features, device)
        parts, expected = _parts(new), _parts(self.template)
        names = ", ".join(maker.name for maker in self._makers)
        if any(part is one for part, one in zip(parts, expected, strict=False)):
            raise TypeError(f"statistic=: {names} returned the same statistic twice; it must make a new one in every call")
        if list(map(type, parts)) != list(map(type, expected)) or new.fields.keys() != self.template.fields.keys():
            raise TypeError(f"statistic=: {names} must return the same kind of statistic for every layer, with the same fields")
        return new

    def _new(self, features: int, device: torch.device) -> Statistic:
        parts = [maker(features, device) for maker in self._makers]
        return Several(parts) if self._in_list else parts[0]


def _parts(statistic: Statistic) -> list[Statistic]:
    return list(statistic) if isinstance(statistic, Several) else [statistic]


class _Maker:
    """Makes one of the statistics of a layer."""

    def __init__(self, kind: Any, outlier_sigma: float, in_list: bool) -> None:
        if isinstance(kind, Statistic):
            name = type(kind).__name__
            ways = f"the class {name}, or functools.partial({name}, …) with its arguments"
            raise TypeError(f"statistic=: each layer needs a statistic of its own; pass {ways}, not {kind!r}")
        if not callable(kind):
            raise TypeError(f"statistic= takes a class, a function (features, device) -> Statistic, or a list of them; got {kind!r}")
        made = getattr(kind, "func", kind)
        self.name = getattr(made, "__name__", repr(kind))
        if isinstance(kind, type) and not issubclass(kind, Statistic):
            if in_list and callable(getattr(kind, "update", None)):
                raise TypeError(f"statistic=: {self.name} must be derived from torchprobe.statistics.Statistic to be in a list")
            kind = adopted(kind)
        self.kind = kind
        parameters: Mapping[str, inspect.Parameter] = {}
        with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
            parameters = inspect.signature(kind).parameters
        self.takes_sigma = isinstance(kind, type) and "outlier_sigma" in parameters
        self.arguments = {"outlier_sigma": outlier_sigma} if self.takes_sigma else {}
        open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        self.by_keyword = "device" in parameters or open_ended
        if isinstance(made, type):
            _check_arguments(self.name, kind, parameters, self.arguments)
        if parameters and not self.by_keyword and not self._takes_two(parameters.values()):
            raise TypeError(f"statistic=: {self.name} must take (features, device)")

    def _takes_two(self, parameters: Any) -> bool:
        """Whether a function can be called with two arguments. In a class, the second one has to be called ``device``."""
        if isinstance(getattr(self.kind, "func", self.kind), type):
            return False
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return len(positional) >= 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)

    def __call__(self, features: int, device: torch.device) -> Statistic:
        place = {"device": device} if self.by_keyword else {}
        new = self.kind(features, *([] if place else [device]), **place, **self.arguments)
        if not isinstance(new, Statistic):
            raise TypeError(
                f"statistic=: {self.name}(features, device) returned {type(new).__name__}, not a torchprobe.statistics.Statistic"
            )
        if not hasattr(new, "features"):
            raise TypeError(f"statistic=: {type(new).__name__}.__init__ must call super().__init__(features, device)")
        if new.features != features:
            raise ValueError(f"statistic=: {self.name}(features={features}, device) returned a statistic of {new.features} features")
        return new


def _check_arguments(name: str, kind: Any, parameters: Mapping[str, inspect.Parameter], known: Container[str]) -> None:
    """Raises TypeError if a class, or a ``functools.partial`` of one, does not say what all arguments but (features, device) are."""
    if positional := getattr(kind, "args", ()):
        names = [p for p in list(inspect.signature(kind.func).parameters)[1:] if p != "device"]
        named = ", ".join(f"{argument}={value!r}" for argument, value in zip(names, positional, strict=False))
        raise TypeError(
            f"statistic=: the first argument of {name} is the width of the layer, so functools.partial must name the arguments: "
            f"functools.partial({name}, {named})"
        )
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [argument for argument in needed[1:] if argument != "device" and argument not in known]:
        values = ", ".join(f"{argument}=…" for argument in missing)
        raise TypeError(f"statistic=: {name} needs {', '.join(missing)}: pass functools.partial({name}, {values})")


def classes_named(name: str) -> list[type[Statistic]]:
    """The statistics of that name that are defined at present. Of a class that was defined again, as in a notebook, the last one.

    >>> [kind.__name__ for kind in classes_named("Moments")], classes_named("Nonsense")
    (['Moments'], [])
    """
    found, bases = dict[tuple[str, str], type[Statistic]](), [Statistic]
    while bases:
        for kind in bases.pop().__subclasses__():
            bases.append(kind)
            if kind.__name__ == name and kind not in (DynamicStatistic, EarlierProtocol, Several):
                found[kind.__module__, kind.__qualname__] = kind
    return list(found.values())


def check_contract(statistic: Statistic) -> None:
    """Tries out an empty statistic.

    Raises:
        TypeError: it breaks the contract; the message says how.
    """
    name = type(statistic).__name__
    if isinstance(statistic, EarlierProtocol):
        return
    if taken := [field for field in statistic.fields if field in _ROW]:
        raise TypeError(f"statistic=: {name} has a field {taken[0]!r}, which is a column of every table; choose another name")
    shown = [
        field for field in (statistic.headline, *(statistic.table_fields or ()), *(statistic.metric_fields or ())) if field is not None
    ]
    if unknown := [field for field in shown if field not in statistic.fields]:
        raise TypeError(f"statistic=: {name} shows {unknown[0]!r}, which is not among its fields: {', '.join(statistic.fields)}")
    if not isinstance(statistic, DynamicStatistic) and not statistic.tensors().keys() - {"vectors"}:
        raise TypeError(f"statistic=: {name} names no states")
    if missing := [argument for argument in statistic.arguments if not hasattr(statistic, argument)]:
        raise TypeError(f"statistic=: {name} takes {missing[0]!r} but does not keep it: set self.{missing[0]} in its constructor")
    for key, value in statistic.state_dict().items():
        if not is_plain(value):
            raise TypeError(
                f"statistic=: {key} of {name} is {type(value).__name__}, but a state_dict holds tensors, numbers, text, None and tuples "
                f"of these. If {key} need not be kept, leave it out of {name}.arguments"
            )
    if statistic.fused:  # the state of the operator needs no trial
        return
    try:
        layers = [statistic.clone() for _ in range(3)]
        type(statistic).summaries(layers, histograms=True)
        type(statistic).close_windows(layers, [statistic.clone(), None, None])
        hash(statistic.group_key())
    except Exception as error:
        raise TypeError(f"statistic=: {name} was tried on three layers that saw nothing, and failed: {error}") from error
