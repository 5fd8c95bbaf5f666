"""The arguments of a guard, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

from torchprobe.common.messages import did_you_mean
from torchprobe.recording.layers import Exclusion, Layer, Selection, canonical, matches_glob
from torchprobe.recording.nonfinite import KINDS
from torchprobe.recording.verdicts import Report

On = Literal["raise", "warn"] | Callable[[Report], object]
Allow = str | Mapping[str, str]


class Scaler(Protocol):
    """A ``torch.amp.GradScaler``."""

    def get_scale(self) -> float:
        """The factor of the loss."""

    def is_enabled(self) -> bool:
        """Whether it scales at all."""


@dataclass(frozen=True)
class GuardOptions:
    """The arguments of :meth:`torchprobe.Recorder.guard`.

    Raises:
        ValueError: ``on`` is none of its values.
    """

    layers: Selection | None = None
    exclude: Exclusion | None = None
    gradients: bool = True
    on: On = "warn"
    allow: Allow = ""
    scaler: Scaler | None = None
    dump: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.on not in ("raise", "warn") and not callable(self.on):
            raise ValueError(f'on= is "raise", "warn" or a function of the report; got {self.on!r}')

    @classmethod
    def of_record(cls, guard: object) -> GuardOptions | None:
        """What ``record(…, guard=)`` was given; None without a guard.

        Raises:
            ValueError: it is none of its values, or a dict with an unknown option.

        >>> GuardOptions.of_record({"layer": "0"})
        Traceback (most recent call last):
        ValueError: guard= has no option 'layer'; did you mean layers? It takes layers, exclude, gradients, on, allow, scaler, dump
        """
        if guard is False:
            return None
        if guard is True or guard == "raise" or guard == "warn" or callable(guard):
            return cls() if guard is True else cls(on=guard)
        if not isinstance(guard, Mapping):
            near = did_you_mean(str(guard), ("raise", "warn"))
            raise ValueError(f'guard= is True, "raise", "warn", a function of the report or a dict of options; got {guard!r}{near}')
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in guard if name not in known]:
            near = did_you_mean(str(unknown[0]), known)
            raise ValueError(f"guard= has no option {unknown[0]!r}{near or '.'} It takes {', '.join(known)}")
        return cls(**guard)

    def allowed(self, layers: Sequence[Layer]) -> list[frozenset[str]]:
        """The kinds of nonfinite values that each layer may give.

        Raises:
            ValueError: an unknown kind, or a name that no layer has.
        """
        rules = {"**": self.allow} if isinstance(self.allow, str) else dict(self.allow)
        kinds = {pattern: frozenset(text.replace(",", " ").replace("−", "-").split()) for pattern, text in rules.items()}
        for pattern, given in kinds.items():
            if wrong := sorted(given - {*KINDS}):
                raise ValueError(f"allow= takes {', '.join(map(repr, KINDS))}; got {wrong[0]!r} for {pattern!r}")
            if pattern != "**" and not any(_fits(pattern, layer) for layer in layers):
                raise ValueError(f"allow: {pattern!r} is none of the guarded layers")
        return [frozenset[str]().union(*(given for pattern, given in kinds.items() if _fits(pattern, layer))) for layer in layers]


def _fits(pattern: str, layer: Layer) -> bool:
    return pattern == "**" or any(canonical(pattern) == name or matches_glob(pattern, name) for name in layer.names)
