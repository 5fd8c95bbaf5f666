"""Explains why a layer was not read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import reason
from torchprobe.recording import compiled
from torchprobe.recording.compiled import OwnHook, at_trace_time, never_compile_alone
from torchprobe.recording.control import Skipped, Slot
from torchprobe.recording.hook import Hook, takes_hooks
from torchprobe.recording.layers import Layer, named_layers
from torchprobe.recording.stream import Stream
from torchprobe.recording.transfer import to_host

_SHOWN = 8  # layers that are named for one cause


class Witness:
    """Sees whether the model was called, and whether its calls ended."""

    def __init__(self) -> None:
        self.entered = 0
        self.left = 0
        self.traced = False
        self.over = False


class _Watch(OwnHook):
    """One of the two hooks of a :class:`Witness`."""

    def __init__(self, witness: Witness, counter: str) -> None:
        self.witness, self.counter = witness, counter
        self.key = compiled.register(self)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            _traced(self.key)
        elif self.witness.over:
            self.remove_from(module)  # it was moved there
        else:
            count(self.witness, self.counter)

    def complain(self, error: Exception) -> Exception | None:
        return error


never_compile_alone(_Watch.__call__)


def count(witness: Witness, counter: str) -> None:
    setattr(witness, counter, getattr(witness, counter) + 1)


@at_trace_time()
def _traced(watch: _Watch) -> None:
    watch.witness.traced = True


def watch(model: nn.Module, witness: Witness) -> list[Any]:
    """Places the hooks of the witness; returns their handles."""
    return [
        model.register_forward_pre_hook(_Watch(witness, "entered")),
        model.register_forward_hook(_Watch(witness, "left")),
    ]


def report(model: nn.Module, hooks: Sequence[Hook], witness: Witness) -> str:
    """Tells, in one text, every layer that saw nothing, or of which calls were left out, with the cause; empty if there is none.

    Layers with the same cause are told together. It never raises: a recording ends well, whatever became of the model meanwhile.
    """
    try:
        return _report(hooks, named_layers(model), witness)
    except Exception as error:
        return f"torchprobe: which layers were not read, and why, could not be found out ({reason(error)}). What was read is complete"


def _report(hooks: Sequence[Hook], named: dict[str, Layer], witness: Witness) -> str:
    streams = [stream for hook in hooks for stream in hook.streams.values()]
    numbers = dict(zip(map(id, streams), _calls(streams), strict=True))
    silent = [stream for stream in streams if not numbers[id(stream)][1] and not stream.left_out]
    unread = [stream for stream in streams if not numbers[id(stream)][1] and stream.left_out]
    partly = [stream for stream in streams if numbers[id(stream)][1] and stream.left_out]
    paragraphs = []
    if silent:
        explain = _Explanation(hooks, named, witness, anything=len(silent) < len(streams))
        if not explain.anything and not explain.called and all(not stream.skipped and not stream.slots for stream in streams):
            paragraphs.append(f"none of the {len(streams)} layers fired: {_NOT_CALLED}")
        else:
            by_stream = {id(stream): hook for hook in hooks for stream in hook.streams.values()}
            causes = [(stream, explain(by_stream[id(stream)], stream, numbers[id(stream)][0])) for stream in silent]
            paragraphs.append("\n".join([f"{len(silent)} of {len(streams)} layers never fired:", *_grouped(causes)]))
    for left, what in ((unread, "were not read"), (partly, "were not read in every call")):
        if left:
            causes = [(stream, _left_out(stream)) for stream in left]
            paragraphs.append("\n".join([f"{len(left)} of {len(streams)} layers {what}:", *_grouped(causes)]))
    return "torchprobe: " + "\n".join(paragraphs) if paragraphs else ""


def _left_out(stream: Stream) -> str:
    return f"{stream.left_out} {'call' if stream.left_out == 1 else 'calls'} left out: {stream.failure}"


def _grouped(causes: Sequence[tuple[Stream, str]]) -> list[str]:
    """One line for every cause, with the first layers that have it."""
    groups: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for stream, cause in causes:
        key = cause.replace(repr(stream.layer.name), "")
        groups.setdefault(key, []).append(repr(stream.name))
        texts.setdefault(key, cause)
    lines = []
    for key, names in groups.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"  {', '.join(names[:_SHOWN])}{more}: {texts[key]}")
    return lines


def _calls(streams: Sequence[Stream]) -> list[tuple[int, bool]]:
    """For every stream: how often it was called, and whether it saw anything. It makes one copy from each device."""
    slots = [(index, slot) for index, stream in enumerate(streams) for slot in stream.slots.values()]
    numbers = to_host([_seen(slot) for _, slot in slots]) if slots else []
    calls = [0] * len(streams)
    seen = [False] * len(streams)
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
_SKIPPED: dict[Skipped, Callable[[Stream], str]] = {
    Skipped.NO_TENSOR: lambda stream: "it holds no floating-point tensor with features; pick one with select=",
    Skipped.NO_PARAMETER: lambda stream: "it has no weight of its own; record the layers inside",
    Skipped.NO_POSITIONS: lambda stream: f'it has one vector per input, but positions="{stream.positions}" needs tokens',
    Skipped.NOT_REAL: lambda stream: "it was only exported or traced, without real numbers to read",
    Skipped.PAUSED: lambda stream: "it was only called while the recorder was paused",
    Skipped.OTHER_MODE: lambda stream: (
        'when="train", but it was only called in eval mode; call model.train(), or record with when="always"'
        if stream.control.training
        else 'when="eval", but it was only called in train mode; call model.eval(), or record with when="always"'
    ),
    Skipped.WAITING: lambda stream: (
        "no gradient reached it: backward was not called, or did not pass through it (an operation in place may have replaced it)"
    ),
    Skipped.NO_GRADIENT: lambda stream: "it was called without gradients (under no_grad, or because nothing before it requires gradients)",
    Skipped.RECOMPUTED: lambda stream: "it was only called during backward, which counts as the recomputation of an activation checkpoint",
}


class _Explanation:
    """Finds the cause from the notes of the hooks and from the place of the layer in the model."""

    def __init__(self, hooks: Sequence[Hook], named: dict[str, Layer], witness: Witness, anything: bool) -> None:
        self.hooks = hooks
        self.named = named
        self.witness = witness
        self.anything = anything
        self.called = bool(witness.entered or witness.traced)
        self.traced = any(Skipped.TRACED in stream.skipped for hook in hooks for stream in hook.streams.values())

    def __call__(self, hook: Hook, stream: Stream, calls: int) -> str:
        skipped = stream.skipped | hook.main.skipped
        module = hook.layer.alive
        if not calls and (module is None or (not stream.slots and self._replaced(hook.layer.name, module))):
            return "its module was replaced or deleted while the model was recorded; record again"
        if calls:
            return self._read_nothing(stream, calls)
        if stream.slots and not skipped:
            return "nothing was recorded after its state was loaded or reset"
        for flag, text in _SKIPPED.items():
            if flag in skipped:
                return text(stream)
        if Skipped.TRACED in skipped:
            return "it is part of a compiled graph that was created, but did not run to its end"
        return self._never_called(hook)

    @staticmethod
    def _read_nothing(stream: Stream, calls: int) -> str:
        empty = "had empty batches, or batches that the mask leaves out"
        every = stream.control.every
        if every == 1:
            return f"its {calls} calls {empty}"
        return f"every={every} read {math.ceil(calls / every)} of its {calls} calls, which {empty}"

    def _replaced(self, name: str, module: nn.Module) -> bool:
        now = self.named.get(name)
        return now is None or now.alive is not module

    def _never_called(self, hook: Hook) -> str:
        name, module = hook.layer.name, hook.layer.alive
        assert module is not None
        above = [around for parent in _ancestors(name) if parent in self.named and (around := self.named[parent].alive) is not None]
        if not takes_hooks(module):
            return "it is scripted, and runs without Python; record the model before torch.jit.script, or a module around it"
        if above and isinstance(above[0], nn.MultiheadAttention):
            return f"nn.MultiheadAttention uses its parameters without calling it; record the attention itself, {name.rpartition('.')[0]!r}"
        if not self.traced and compiled.has_graphs([type(module)]):
            return "it runs inside a compiled graph that was created before the hooks; call torch.compiler.reset() before recording"
        if not name and self.anything:
            return "the model was entered through another method than forward; its layers are recorded nevertheless"
        if any(Skipped.TRACED not in other.main.skipped and other.main.slots for other in self.hooks if _inside(other.layer.name, name)):
            return "its forward was called directly; only model(x) runs hooks, and model.forward(x) does not"
        if self.witness.entered > self.witness.left:
            return "the forward raised an error before it was reached"
        if not self.called and not self.anything:
            return _NOT_CALLED
        return "the forward does not call it (its parameters may be used without it)"


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _ancestors(name: str) -> list[str]:
    """Names of the modules around it, the nearest first."""
    if not name:
        return []
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]
