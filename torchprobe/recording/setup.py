"""From the arguments of :class:`torchprobe.Recorder` to its hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torchprobe.common.numbers import positive, shown
from torchprobe.ops.memory import MOST_CALLS
from torchprobe.ops.positions import POSITIONS
from torchprobe.recording import masks
from torchprobe.recording.control import Control
from torchprobe.recording.gradients import GradientHook, WeightGradientHook, WeightHook, parameters_of
from torchprobe.recording.hook import Hook, InputHook
from torchprobe.recording.layers import Exclusion, Layer, Selection, select_layers
from torchprobe.recording.stream import PARAMETERS

HOOKS: dict[str, type[Hook]] = {kind.of: kind for kind in (Hook, InputHook, GradientHook, WeightHook, WeightGradientHook)}
_WHEN = ("always", "train", "eval")
_ON_ERROR = ("warn", "raise")


def check_arguments(of: str | Sequence[str], positions: str, every: int, when: str, on_error: str, outlier_sigma: float) -> tuple[str, ...]:
    """What is read of the layers: one kind or several.

    Raises:
        ValueError: an argument is out of range.
    """
    kinds = (of,) if isinstance(of, str) else tuple(of)
    choices = [("positions", positions, POSITIONS), ("when", when, _WHEN), ("on_error", on_error, _ON_ERROR)]
    for name, value, allowed in [("of", kind, tuple(HOOKS)) for kind in kinds] + choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"of= takes one or several different kinds, got {of!r}")
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= MOST_CALLS:
        raise ValueError(f"every must be a whole number of at least 1, got {shown(every)}")
    positive("outlier_sigma", outlier_sigma)
    return kinds


def select_kinds(
    model: nn.Module,
    kinds: Sequence[str],
    layers: Selection | None,
    feature_dim: int | Mapping[str, int] | None,
    exclude: Exclusion | None,
) -> dict[str, list[Layer]]:
    """The layers of every kind. By default a weight is read of every module that has one.

    Raises:
        ValueError: a layer that the model does not have, or only scripted ones.
    """
    selected: dict[str, list[Layer]] = {}
    for kind in kinds:
        if kind in PARAMETERS:
            with_weight = lambda name, module: bool(parameters_of(module))  # noqa: E731
            selected[kind] = select_layers(model, with_weight if layers is None else layers, None, exclude)
        else:
            selected[kind] = select_layers(model, layers, feature_dim, exclude)
        if all(isinstance(layer.module, torch.jit.ScriptModule) for layer in selected[kind]):
            raise ValueError(
                "every selected layer is a scripted module, which takes no hooks and runs its children without Python: "
                "record the model before torch.jit.script, or wrap it, nn.Sequential(scripted), and record the wrapper"
            )
    return selected


def make_hooks(model: nn.Module, selected: Mapping[str, Sequence[Layer]], control: Control) -> list[Hook]:
    """One hook for each layer and kind. Rows of the output, or else of the first kind, have the names of the layers."""
    for layers in selected.values():
        control.swapped.update(_tokens_first(model, layers))
    plain = "output" if "output" in selected else next(iter(selected))
    return [HOOKS[kind](layer, control, "" if kind == plain else f"@{kind}") for kind, layers in selected.items() for layer in layers]


def _tokens_first(model: nn.Module, layers: Sequence[Layer]) -> dict[int, bool | None]:
    """For every layer, by its ``id``: whether tokens come before the batch; False in a model without such layers."""
    if not masks.any_tokens_first(model):
        return {id(layer): False for layer in layers}
    return {id(layer): masks.tokens_first(layer.module, layer.around()) for layer in layers}
