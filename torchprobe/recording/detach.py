"""Removes every trace of this package from a model."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Protocol

from torch import nn

from torchprobe.recording.compiled import OwnHook, unguard_all


class Running(Protocol):
    """A recorder that may be running."""

    def watches(self, modules: set[int]) -> bool:
        """Whether it has a hook on one of these modules, given by their ids."""

    def leave(self) -> None:
        """Stops without a report."""


running: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The recorders that are running now, by their ``id``."""


def detach_all(model: nn.Module) -> int:
    """Stops every recorder that watches a part of ``model``, and removes all hooks of torchprobe from it, also those that came with a copy
    or a pickle.

    Hooks of others stay. The recorders keep what they have read.

    Returns:
        How many hooks were on the model.

    Raises:
        TypeError: ``model`` is not a module.

    >>> import torch, torchprobe
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> recorder = torchprobe.record(model, "1").start()
    >>> torchprobe.detach_all(model) > 0, torchprobe.detach_all(model)
    (True, 0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"detach_all takes a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    ids = {id(module) for module in modules}
    before = _count(modules)
    for recorder in list(running.values()):
        if recorder.watches(ids):
            recorder.leave()
    for module in modules:
        for hooks in _hooks(module):
            for key in [key for key, hook in hooks.items() if _is_own(hook)]:
                del hooks[key]
        unguard_all(module)
    return before


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (module._forward_hooks, module._forward_pre_hooks)


def _count(modules: list[nn.Module]) -> int:
    return sum(_is_own(hook) for module in modules for hooks in _hooks(module) for hook in hooks.values())


def _is_own(hook: object) -> bool:
    """A hook of ours, or what became of it in a pickle."""
    return isinstance(hook, OwnHook) or isinstance(getattr(hook, "__self__", None), contextlib.nullcontext)
