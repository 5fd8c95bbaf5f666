"""Small models, and helpers for the tests of the recorder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning

COMPILER_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf")


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def mlp(depth: int = 3, width: int = 6) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


class Calls(nn.Module):
    """A model that calls a function."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def report(recorder: torchprobe.Recorder, run: Callable[[], Any] = lambda: None) -> str:
    """The warning at the end of a recording."""
    with pytest.warns(RecordingWarning) as caught, recorder:
        run()
    (warning,) = [w for w in caught if issubclass(w.category, RecordingWarning)]
    assert warning.filename == __file__
    return str(warning.message)


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def batches(count: int, seed: int = 0, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, width, generator=generator) for _ in range(count)]


def record(model: nn.Module, data: list[Tensor], *args: Any, **kwargs: Any) -> torchprobe.Recorder:
    with torchprobe.record(model, *args, **kwargs) as rec:
        for x in data:
            model(x)
    return rec


def activations(model: Net, data: list[Tensor]) -> dict[str, np.ndarray]:
    """The output of every layer, (vectors, features) in float64, kept by separate hooks."""
    kept: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: kept.setdefault(name, []).append(out.detach()))
        for name, module in model.named_modules()
        if name != "blocks"
    ]
    for x in data:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().flatten(0, -2).numpy() for name, parts in kept.items()}


def assert_equal(a: torchprobe.Recording, b: torchprobe.Recording, rtol: float = 0.0) -> None:
    assert a.layers == b.layers
    for layer in a:
        torch.testing.assert_close(a[layer].state, b[layer].state, rtol=rtol, atol=1e-12 if rtol else 0)


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """The texts of the recorder's own warnings; other warnings are errors, as everywhere."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", RecordingWarning)
        try:
            yield texts
        finally:
            texts.extend(str(warning.message) for warning in caught)


@contextlib.contextmanager
def witnessed(model: nn.Module, of: str = "output") -> Iterator[dict[str, list[Any]]]:
    """What plain hooks see in every call: the output of every module, its positional inputs, or the gradients of its outputs."""
    seen: dict[str, list[Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(name, []).append(args if of == "input" else output)

        return hook

    place = "register_full_backward_hook" if of == "gradient" else "register_forward_hook"
    handles = [getattr(module, place)(keep(name)) for name, module in model.named_modules()]
    yield seen
    for handle in handles:
        handle.remove()


def together(tensors: list[Tensor], feature_dim: int = -1) -> Tensor:
    """All vectors of some activations, (vectors, features)."""
    return torch.cat([x.detach().double().movedim(feature_dim, -1).flatten(0, -2) for x in tensors])
