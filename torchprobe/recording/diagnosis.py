"""Explains why a layer never fired."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchprobe.recording import compiled
from torchprobe.recording.compiled import Inert, at_trace_time, never_compile_alone
from torchprobe.recording.control import Skipped, Slot
from torchprobe.recording.hook import Hook, takes_hooks
from torchprobe.recording.transfer import to_host

if TYPE_CHECKING:
    from torchprobe.recording.layers import Layer


class RecordingWarning(UserWarning):
    """Something about a recording is unexpected. The numbers that were recorded are correct."""


class Witness:
    """Sees whether the model was called, and whether its calls ended."""

    def __init__(self) -> None:
        self.entered = 0
        self.left = 0
        self.traced = False


class _Watch:
    """One of the two hooks of a :class:`Witness`. A copy does nothing."""

    def __init__(self, witness: Witness, counter: str) -> None:
        self.witness, self.counter = witness, counter
        self.key = compiled.register(self)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            _traced(self.key)
        else:
            count(self.witness, self.counter)

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


never_compile_alone(_Watch.__call__)


def count(witness: Witness, counter: str) -> None:
    setattr(witness, counter, getattr(witness, counter) + 1)


@at_trace_time
def _traced(watch: _Watch) -> None:
    watch.witness.traced = True


def watch(model: nn.Module, witness: Witness) -> list[Any]:
    """Places the hooks of the witness; returns their handles."""
    return [
        model.register_forward_pre_hook(_Watch(witness, "entered")),
        model.register_forward_hook(_Watch(witness, "left")),
    ]


def report(hooks: Sequence[Hook], named: dict[str, Layer], witness: Witness, stacklevel: int) -> None:
    """Warns once, with one line for every layer that saw nothing."""
    calls = _calls(hooks)
    silent = [hook for hook, (_, seen) in zip(hooks, calls, strict=True) if not seen]
    if not silent:
        return
    explain = _Explanation(hooks, named, witness, anything=len(silent) < len(hooks))
    if not explain.anything and not explain.called and all(not hook.skipped and not hook.slots for hook in hooks):
        lines = [f"none of the {len(hooks)} layers fired: {_NOT_CALLED}"]
    else:
        lines = [f"{len(silent)} of {len(hooks)} layers never fired:"]
        by_hook = dict(zip(map(id, hooks), calls, strict=True))
        lines += [f"  {hook.layer.name!r}: {explain(hook, by_hook[id(hook)][0])}" for hook in silent]
    warnings.warn("torchprobe: " + "\n".join(lines), RecordingWarning, stacklevel=stacklevel + 1)


def _calls(hooks: Sequence[Hook]) -> list[tuple[int, bool]]:
    """For every hook: how often it was called, and whether it saw anything. It makes one copy from each device."""
    slots = [(index, slot) for index, hook in enumerate(hooks) for slot in hook.slots.values()]
    numbers = to_host([_seen(slot) for _, slot in slots]) if slots else []
    calls = [0] * len(hooks)
    seen = [False] * len(hooks)
    for (index, _), (n, anything) in zip(slots, numbers, strict=True):
        calls[index] += int(n)
        seen[index] |= bool(anything)
    return list(zip(calls, seen, strict=True))


def _seen(slot: Slot) -> Tensor:
    anything = slot.statistic.saw_anything()
    if slot.closed is not None:
        anything = anything | slot.closed.saw_anything().to(anything.device)
    calls = slot.call_count().to(anything.device)
    return torch.stack([calls, anything.to(calls.dtype)])


_NOT_CALLED = "the model was not called while it was recorded"
_SKIPPED: dict[Skipped, Callable[[Hook], str]] = {
    Skipped.NO_TENSOR: lambda hook: "it holds no floating-point tensor with features; pick one with select=",
    Skipped.NO_POSITIONS: lambda hook: f'it has one vector per input, but positions="{hook.control.positions}" needs tokens',
    Skipped.NOT_REAL: lambda hook: "it was only exported or traced, without real numbers to read",
    Skipped.PAUSED: lambda hook: "it was only called while the recorder was paused",
    Skipped.OTHER_MODE: lambda hook: (
        'when="train", but it was only called in eval mode; call model.train(), or record with when="always"'
        if hook.control.training
        else 'when="eval", but it was only called in train mode; call model.eval(), or record with when="always"'
    ),
    Skipped.WAITING: lambda hook: "no gradient reached it: backward was not called, or did not pass through it",
    Skipped.NO_GRADIENT: lambda hook: "it was called without gradients (under no_grad, or because nothing before it requires gradients)",
    Skipped.RECOMPUTED: lambda hook: "it was only called during backward, which counts as the recomputation of an activation checkpoint",
}


class _Explanation:
    """Finds the cause from the notes of the hooks and from the place of the layer in the model."""

    def __init__(self, hooks: Sequence[Hook], named: dict[str, Layer], witness: Witness, anything: bool) -> None:
        self.named = named
        self.witness = witness
        self.anything = anything
        self.called = bool(witness.entered or witness.traced)
        self.traced = any(Skipped.TRACED in hook.skipped for hook in hooks)

    def __call__(self, hook: Hook, calls: int) -> str:
        if hook.failure:
            return f"it could not be read: {hook.failure}"
        if calls:
            return self._read_nothing(hook, calls)
        for flag, text in _SKIPPED.items():
            if flag in hook.skipped:
                return text(hook)
        if Skipped.TRACED in hook.skipped:
            return "it is part of a compiled graph that was created, but did not run to its end"
        return self._never_called(hook)

    @staticmethod
    def _read_nothing(hook: Hook, calls: int) -> str:
        empty = "had empty batches, or batches that the mask leaves out"
        if hook.every == 1:
            return f"its {calls} calls {empty}"
        return f"every={hook.every} read {math.ceil(calls / hook.every)} of its {calls} calls, which {empty}"

    def _never_called(self, hook: Hook) -> str:
        name, module = hook.layer.name, hook.layer.module
        above = [self.named[parent].module for parent in _ancestors(name) if parent in self.named]
        if not takes_hooks(module):
            return "it is scripted, and runs without Python; record the model before torch.jit.script, or a module around it"
        if above and isinstance(above[0], nn.MultiheadAttention):
            return f"nn.MultiheadAttention uses its parameters without calling it; record the attention itself, {name.rpartition('.')[0]!r}"
        if not self.traced and compiled.has_graphs([type(module)]):
            return "it runs inside a compiled graph that was created before the hooks; call torch.compiler.reset() before recording"
        if not name and self.anything:
            return "the model was entered through another method than forward; its layers are recorded nevertheless"
        if self.witness.entered > self.witness.left:
            return "the forward raised an error before it was reached"
        if not self.called and not self.anything:
            return _NOT_CALLED
        return "the forward does not call it (its parameters may be used without it)"


def _ancestors(name: str) -> list[str]:
    """Names of the modules around it, the nearest first."""
    if not name:
        return []
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]
