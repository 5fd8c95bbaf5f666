"""Hooks that read gradients: of the output of a module, and of its parameters; and one that reads the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.recording import traced
from torchprobe.recording.compiled import at_trace_time, in_region, never_compile_alone
from torchprobe.recording.control import Skipped
from torchprobe.recording.hook import Found, Hook, note, traced_open
from torchprobe.recording.stream import Stream
from torchprobe.recording.structure import holds, replaced

_observe_gradient = torch.ops.torchprobe.observe_gradient.default


class GradientHook(Hook):
    """Reads the gradient with respect to the output of one module, as ``register_full_backward_hook`` sees it.

    Activation checkpoints need no special case here. Of the two outputs, one is never differentiated: the first one in a reentrant
    checkpoint, the recomputed one in any other.
    """

    of = "gradient"

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:  # type: ignore[override]
        if torch.compiler.is_dynamo_compiling():
            return self.trace(module, output)
        control = self.control
        if not control.open or (control.training is not None and control.training != module.training):
            self.skip(module)
            return None
        changed = output
        control.trail.seen.given = args
        for stream, x in self.streams_in(output):
            if not x.requires_grad:
                stream.skipped |= Skipped.NO_GRADIENT
                continue
            try:
                if not x.is_nested:
                    stream.axis(x)
                watched = x
                if x.is_leaf or holds((args, kwargs), x) or (x is not output and holds(output, x)):
                    watched = x.view_as(x)  # other users of the same tensor must not count, nor later calls that give the same parameter
                    changed = replaced(changed, x, watched)
                _watch(stream, watched)
            except Exception as error:
                stream.failed(error, x)
        control.trail.seen.given = None
        return None if changed is output else changed

    def skip(self, module: nn.Module) -> None:
        if self.control.live and self.control.paused:
            self.main.skipped |= Skipped.PAUSED
        else:
            super().skip(module)

    def place(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_hook(self, with_kwargs=True)]

    def trace(self, module: nn.Module, value: Any) -> Any:
        if not traced_open(self.key, self.control.open, module.training):
            return None
        found = self.find(value)
        if len(found) > 1 or len(self.places) > 0:
            found = self.traced_places(found, isinstance(value, (tuple, list)))
        changed, any_changed = value, False
        for place, x in found:
            stream = self.places[place] if len(self.places) > 0 else self.main
            if not x.requires_grad:
                note(self.key, int(Skipped.NO_GRADIENT))
            elif not holds(value, x):
                not_in_output(self.key)
            else:
                dim = traced.axis(stream, x)
                if dim >= 0 and traced.allocated(stream.key, len(range(x.shape[dim])), x.device, x.dim()):
                    pattern = traced.pattern_of(stream.key)
                    mask = None if pattern is None else self.control.masks[pattern]
                    changed = replaced(changed, x, _observe_gradient(x, traced.observer_number(stream.key), mask))
                    any_changed = True
        return changed if any_changed else None


def _watch(stream: Stream, x: Tensor) -> None:
    stream.skipped |= Skipped.WAITING
    stream.take_place()  # in the order of the forward; gradients arrive in reverse order
    mask = stream.mask()

    def arrived(grad: Tensor) -> None:
        stream.gradient(grad, mask)

    x.register_hook(arrived)


class WeightHook(Hook):
    """Reads the parameters of one module, in every forward: its ``weight``, and every other parameter of two or more dimensions."""

    of = "weight"

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return super().__call__(module, None, module)
        if traced_open(self.key, self.control.open, module.training):
            for place, x in self.find(module):
                if traced_parameter(self.key, place):
                    traced.read(self.places[place], x)
        return None

    def place(self, module: nn.Module) -> list[Any]:
        self.settle_parameters(module)
        return [module.register_forward_pre_hook(self)]

    def settle_parameters(self, module: nn.Module) -> None:
        """Makes the streams. Without a ``weight`` there is none that has the name of the layer."""
        names = [name for name, _ in self.find(module)]
        for name in names:
            self.stream_of(name)
        if names and "weight" not in names and not self.main.slots:
            self.streams.pop("", None)

    def find(self, value: Any) -> Found:
        return parameters_of(value)

    def streams_in(self, value: Any) -> list[tuple[Stream, Tensor]]:
        found = self.find(value)
        if not found:
            self.nothing(value)
        return [(self.stream_of(name), x) for name, x in found]

    def stream_of(self, name: str) -> Stream:
        """The stream of a parameter; ``weight`` has the name of the layer."""
        if name not in self.places:
            self.places[name] = self.main if name == "weight" else self.stream(name)
        return self.places[name]

    def nothing(self, value: Any) -> None:
        if self.layer.explicit or self.control.strict:
            self.main.failed(TypeError(f"{self.layer.kind} has no weight of its own; record the layers inside"))
        else:
            self.main.skipped |= Skipped.NO_PARAMETER


class WeightGradientHook(WeightHook):
    """Reads the gradient of the parameters of one module, once in every backward, also if the module ran several times."""

    of = "weight_gradient"

    def place(self, module: nn.Module) -> list[Any]:
        self.settle_parameters(module)
        found = self.find(module)
        if not found:
            self.nothing(module)
        handles = []
        for name, parameter in found:
            stream = self.stream_of(name)
            if parameter.requires_grad:
                stream.skipped |= Skipped.WAITING
                handles.append(parameter.register_hook(self._reader(module, stream)))
            else:
                stream.skipped |= Skipped.NO_GRADIENT
        return handles

    def _reader(self, module: nn.Module, stream: Stream) -> Any:
        control = self.control

        def arrived(grad: Tensor) -> None:
            if control.open and (control.training is None or control.training == module.training):
                stream.gradient(grad, None)

        return arrived


def parameters_of(module: nn.Module) -> Found:
    """The parameters that a module holds itself: ``weight``, and the others of two or more dimensions."""
    return [
        (name, parameter)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.is_floating_point() and (parameter.dim() > 1 or (name == "weight" and parameter.dim() == 1))
    ]


for _kind in (GradientHook, WeightHook):
    never_compile_alone(_kind.__call__)


@at_trace_time()
def not_in_output(hook: Hook) -> None:
    raise ValueError(
        "under torch.compile only the gradient of a tensor that is part of the output can be read; let select= return one, "
        "or run this model without torch.compile"
    )


@at_trace_time(fallback=False)
def traced_parameter(hook: WeightHook, name: str) -> bool:
    hook.stream_of(name)
    if in_region():
        raise ValueError("a weight cannot be read inside of a nested compiled region; run this model without torch.compile")
    return True
