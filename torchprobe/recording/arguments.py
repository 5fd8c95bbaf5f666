"""Checks of what :func:`torchprobe.record` is given."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn

from torchprobe.recording.layers import Layer
from torchprobe.statistics import Statistic


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def needs_argument(statistic: type[Statistic], name: str) -> None:
    if name not in inspect.signature(statistic.update).parameters:
        raise ValueError(f"{statistic.__name__}.update takes no {name}, so it cannot be recorded with one")


def check_batch_first(selected: list[Layer], positions: str) -> None:
    """Tokens are looked for in the second dimension; attention that keeps them in the first is caught here."""
    for layer in selected:
        for family in (layer.module, layer.parent):
            for module in () if family is None else (family, *family.children()):
                if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                    raise ValueError(
                        f'positions="{positions}" looks for (batch, tokens, features), but layer {layer.name!r} works on '
                        f'(tokens, batch, features): its attention has batch_first=False. Use positions="all" for it'
                    )
