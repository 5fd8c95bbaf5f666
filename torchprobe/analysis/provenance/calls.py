"""What the modules of a network read and return in one forward pass."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-11  # of the largest value; the passes are in float64


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: the first tensor that it reads, and the first that it returns (both copied).

    ``number`` counts the calls of the module in one forward pass, from 0: some blocks call one dropout twice.
    """

    name: str
    number: int
    module: nn.Module
    input: Tensor
    output: Tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 tensors are equal up to rounding."""
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().amax() <= _TOLERANCE * b.abs().amax()) if a.numel() else True


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in an output or in arguments: a tensor, or in a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    parts: Iterable[Any] = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def with_first_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same output or arguments, with ``change`` applied to the first tensor in a tensor, tuple, list or dict."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        key = next(key for key, part in value.items() if first_tensor(part) is not None)
        changed = copy.copy(value)
        changed[key] = with_first_tensor(value[key], change)  # type: ignore[index]
        return changed
    for i, part in enumerate(value):
        if first_tensor(part) is not None:
            parts = [*value[:i], with_first_tensor(part, change), *value[i + 1 :]]
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def watched(model: nn.Module, names: Iterable[str], inputs: Tensor) -> list[Call]:
    """Runs the model, and returns the calls of some of its modules, in the order in which they end."""
    calls: list[Call] = []
    read: dict[str, list[Tensor]] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found = first_tensor((args, kwargs))
            read.setdefault(name, []).append(torch.empty(0) if found is None else found.clone())  # it may be changed in place later

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = first_tensor(output)
            if found is not None:
                number = sum(call.name == name for call in calls)
                calls.append(Call(name, number, module, read[name].pop(), found.clone()))

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in dict.fromkeys(names):
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name)).remove)
        model(inputs)
    return calls


@contextlib.contextmanager
def inputs_changed(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While the block lasts, the first tensor that these modules read goes through a function."""

    def hook_of(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if first_tensor(args) is not None:
                return with_first_tensor(args, change), kwargs
            return args, with_first_tensor(kwargs, change)

        return hook

    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook_of(change), with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def outputs_changed(model: nn.Module, changes: Mapping[tuple[str, int], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """In one forward pass, the first tensor that these calls return, by name and number, goes through a function."""
    done: dict[str, int] = {}

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            number = done.get(name, 0)
            done[name] = number + 1
            change = changes.get((name, number))
            return output if change is None else with_first_tensor(output, change)

        return hook

    with contextlib.ExitStack() as stack:
        for name in {name for name, _ in changes}:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_of(name)).remove)
        yield
