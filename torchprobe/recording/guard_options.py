"""The arguments of a guard, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
