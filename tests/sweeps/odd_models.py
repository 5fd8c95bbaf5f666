"""The odd modules as cases: what a recorder must let pass, and what it must not take for features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from . import odd_modules as odd
from .case import BATCH, Built, CannotBuild, Case, Inputs, installed, randint, randn

LENGTH = (7, 11, 16)


def _tokens(geometry: int) -> Callable[[int], Inputs]:
    return lambda batch: ((randn(batch, LENGTH[geometry], odd.WIDTH),), {})


def _labelled(geometry: int) -> Callable[[int], Inputs]:
    return lambda batch: ((randn(batch, LENGTH[geometry], odd.WIDTH), randint(0, 5, (batch,))), {})


def _ids(geometry: int) -> Callable[[int], Inputs]:
    return lambda batch: ((randint(0, 32, (batch, LENGTH[geometry])),), {})


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Callable[[int], Inputs]]]] = {
    "scalars": (odd.Scalars, _tokens),
    "two towers": (odd.TwoTowers, _tokens),
    "torchmetrics": (odd.WithMetric, _labelled),
    "sampler": (odd.Sampling, _ids),
    "bools and ints": (odd.BoolsAndInts, _tokens),
    "None": (odd.Nones, _tokens),
    "structures": (odd.Structures, _tokens),
    "generators": (odd.Generators, _tokens),
    "distributions": (odd.Distributions, _tokens),
    "many widths": (odd.Widths, _tokens),
    "reused": (odd.Reused, _tokens),
    "lstm": (lambda: odd.Recurrent(nn.LSTM), _tokens),
    "gru both ways": (lambda: odd.Recurrent(nn.GRU, bidirectional=True), _tokens),
    "packed": (odd.Packed, _tokens),
    "checkpoints": (odd.Checkpointed, _tokens),
    "functional": (odd.Functional, _tokens),
    "complex": (odd.Complex, _tokens),
    "parametrized": (odd.Parametrized, _tokens),
    "own attributes": (odd.OwnAttributes, _tokens),
}


FEATURELESS = {
    "scalars": ("", "head"),
    "two towers": ("", "similarity"),
    "sampler": ("sampler",),
    "bools and ints": ("masks", "largest"),
    "None": ("layers.1", "layers.3"),
    "generators": ("steps",),
    "many widths": ("act", "drop"),
}
"""Layers without features, as two batches of different sizes show."""


def cases() -> Iterator[Case]:
    for name in MODELS:
        yield Case("odd", name, lambda geometry, name=name: build(name, geometry))  # type: ignore[misc]


def build(name: str, geometry: int) -> Built:
    if name == "torchmetrics" and not installed("torchmetrics"):
        raise CannotBuild("torchmetrics is not installed")
    make, inputs = MODELS[name]
    return Built(make(), inputs(geometry), f"batch {BATCH[geometry]}", featureless=FEATURELESS.get(name, ()))
