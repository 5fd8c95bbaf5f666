"""The hooks of a guard: they look at what goes in and out of a module, and at gradients, and tell a :class:`Sink` what is nonfinite.

On the CPU a call costs one sum of the output, and the gradient another one. On an accelerator nothing is read on the host: see
:mod:`torchprobe.recording.guard_device`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchprobe.common.messages import reason
from torchprobe.ops.observers import register_observer
from torchprobe.recording.compiled import OwnHook, at_trace_time, in_region, never_compile_alone, register
from torchprobe.recording.control import Control
from torchprobe.recording.guard_writes import Entry, Written, may_write
from torchprobe.recording.layers import Layer
from torchprobe.recording.nonfinite import facts, hidden, on_host, readable, suspicious, tensors_in
from torchprobe.recording.structure import holds, replaced

_observe_call = torch.ops.torchprobe.observe_call_.default
_observe_gradient = torch.ops.torchprobe.observe_gradient.default
_current_backward = torch._C._current_graph_task_id

Named = Sequence[tuple[str, Tensor]]


class Sink(Protocol):
    """The guard behind some hooks."""

    control: Control

    def activation(self, watch: Watch, module: nn.Module | None, inputs: Named, outputs: Named, written: Written) -> None:
        """Outputs on the CPU are nonfinite."""

    def begin(self) -> None:
        """The model is called."""

    def finite(self, watch: Watch, outputs: Named) -> None:
        """A call gave finite outputs only."""

    def gradient(self, watch: Watch, call: int, grad: Tensor, name: str) -> None:
        """A gradient on the CPU is nonfinite; ``name`` is that of the parameter, or empty."""

    def finite_gradient(self, watch: Watch, name: str) -> None:
        """A gradient was finite."""

    def latch(self, watch: Watch, call: int, inputs: Named, outputs: Named, backward: bool, written: bool = False) -> None:
        """Looks at tensors on an accelerator, without waiting for it."""

    def token(self, device: torch.device) -> Tensor:
        """The number that keeps the calls of a compiled graph in order."""

    def uncovered(self, watch: Watch, why: str) -> None:
        """Something could not be looked at."""


class Watch(OwnHook):
    """Looks at the calls of one module.

    Args:
        layer: the module.
        sink: the guard.
        allowed: kinds of nonfinite values that are legitimate in its output.
        gradients: look at the gradient with respect to the output, too.
    """

    def __init__(self, layer: Layer, sink: Sink, allowed: frozenset[str] = frozenset(), gradients: bool = True) -> None:
        self.layer = layer
        self.sink = sink
        self.control = sink.control
        self.allowed = allowed
        self.gradients = gradients
        self.calls = 0
        self.seen = False  # an activation in this step; the first one counts
        self.seen_gradient = False
        self.leaves: Any = WeakTensorKeyDictionary()  # outputs that are leaves of autograd → the handle of their hook
        self.mark: Tensor | None = None  # of compiled graphs
        self.traced: list[TracedCall] = []  # operators know them by weak references
        self.entry = Entry() if may_write(layer.module) else None
        self.key = register(self)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.trace(module, args, kwargs, output)
        control = self.control
        if not control.live:
            self.remove_from(module)
            if self.entry is not None:
                self.entry.remove_from(module)
        elif not control.paused and (control.training is None or control.training == module.training):
            try:
                if _current_backward() == -1:  # otherwise an activation checkpoint runs the forward again
                    call, self.calls = self.calls, self.calls + 1
                    if not self.seen:
                        outputs = [("", output)] if type(output) is Tensor else tensors_in(output)
                        given = functools.partial(named_inputs, module, args, kwargs)
                        self.look(module, call, given, outputs, functools.partial(self.written, kwargs))
                if self.gradients:
                    self.watch_gradients(output)
            except Exception as error:  # a monitor does not end a run
                self.sink.uncovered(self, reason(error))
        return None

    def place(self, module: nn.Module) -> list[Any]:
        """Registers the hook; returns handles with ``remove``."""
        before = [] if self.entry is None else [module.register_forward_pre_hook(self.entry, with_kwargs=True)]
        return [*before, module.register_forward_hook(self, with_kwargs=True)]

    def place_on_parameters(self, module: nn.Module) -> list[Any]:
        """Looks at the gradients of the parameters of one dimension, scales and biases; returns handles with ``remove``.

        They are few numbers, and a nonfinite gradient of the output of a linear layer is also in the gradient of its bias.
        """
        return [
            parameter.register_hook(functools.partial(self.arrived, -1, name))
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.dim() == 1 and parameter.is_floating_point()
        ]

    def complain(self, error: Exception) -> Exception | None:
        self.sink.uncovered(self, reason(error))
        return None

    # -- eager ---------------------------------------------------------------------------------------------------------

    def look(self, module: nn.Module | None, call: int, inputs: Any, outputs: Named, written: Any) -> None:
        """Looks at one call. ``inputs()`` finds what went in, with names, and ``written(inputs)`` those of them that it wrote to."""
        bad = False
        for _, x in outputs:
            found = readable(x)
            if found is None:
                if (why := hidden(x)) is not None:
                    self.sink.uncovered(self, why)
                continue
            if not on_host(found):
                given = inputs()
                self.sink.latch(self, call, given, outputs, False, bool(written(given)))
                return
            bad = bad or (suspicious(found) and facts("", found).bad(self.allowed))
        if bad:
            self.seen = True
            given = inputs()
            self.sink.activation(self, module, given, outputs, written(given))
        else:
            self.sink.finite(self, outputs)

    def written(self, kwargs: Any, inputs: list[tuple[str, Tensor]]) -> Written:
        """The inputs that the call that ends now has written to."""
        return {} if self.entry is None else self.entry.written(kwargs, inputs)

    def watch_gradients(self, output: Any) -> None:
        """Looks at the gradients of the output when they arrive."""
        for _, x in [("", output)] if type(output) is Tensor else tensors_in(output):
            if x.requires_grad:
                handle = x.register_hook(functools.partial(self.arrived, self.calls - 1, ""))
                if x.is_leaf:  # a parameter, or an input that is given on: it outlives the call, so it has one hook, for the last call
                    if (before := self.leaves.pop(x, None)) is not None:
                        before.remove()
                    self.leaves[x] = handle

    def release(self) -> None:
        """Takes the hooks off tensors that outlive a call."""
        while self.leaves:
            self.leaves.popitem()[1].remove()

    def arrived(self, call: int, name: str, grad: Tensor) -> None:
        """Called during backward with the gradient of the output, or of the parameter ``name``."""
        control = self.control
        if not control.live or control.paused or self.seen_gradient:
            return
        try:
            x = readable(grad)
            if x is None:
                return
            if not on_host(x):
                self.sink.latch(self, call, (), [(name, x)], True)
            elif suspicious(x) and facts("", x).bad():
                self.seen_gradient = True
                self.sink.gradient(self, call, x, name)
            else:
                self.sink.finite_gradient(self, name)
        except Exception as error:
            self.sink.uncovered(self, reason(error))

    # -- compiled ------------------------------------------------------------------------------------------------------

    def trace(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """As :meth:`__call__`, for the compiler to trace."""
        if not traced_open(self.key, self.control.live, self.control.paused, module.training):
            return None
        inputs = [(name, _local(x)) for name, x in tensors_in((args, kwargs)) if _is_shown(x)]
        outputs = [(name, _local(x)) for name, x in tensors_in(output) if _is_shown(x)]
        if len(outputs) == 0:
            return None
        back = [name for name, x in inputs for _, y in outputs if x is y]  # a graph does not count writes
        names = tuple([name for name, _ in inputs]), tuple([name for name, _ in outputs]), tuple(back)
        number = call_number(self.key, *names, outputs[0][1].device)
        if number < 0:
            return None
        _observe_call(self.mark, [x for _, x in inputs], [x for _, x in outputs], number)
        changed, any_changed = output, False
        if self.gradients:
            for _, x in outputs:
                if x.requires_grad and holds(output, x):
                    changed, any_changed = replaced(changed, x, _observe_gradient(x, gradient_number(self.key), None)), True
        return changed if any_changed else None


never_compile_alone(Watch.__call__)


class TracedCall:
    """What a compiled graph calls: one place in it, with the names of what it shows."""

    def __init__(self, watch: Watch, inputs: Sequence[str] = (), outputs: Sequence[str] = (), back: Sequence[str] = ()) -> None:
        self.watch, self.inputs, self.outputs = watch, inputs, outputs
        self.back = back if watch.entry is not None else ()  # inputs that it gives back, and may have written to

    def called(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        watch, control = self.watch, self.watch.control
        if not control.live or _current_backward() != -1:  # an activation checkpoint runs the graph again
            return
        try:
            call, watch.calls = watch.calls, watch.calls + 1
            if not watch.seen:
                module = watch.layer.alive
                named = list(zip(self.inputs, inputs, strict=True))
                watch.look(
                    module,
                    call,
                    lambda: [(_argument(module, name), x) for name, x in named],
                    list(zip(self.outputs, outputs, strict=True)),
                    lambda given: {_argument(module, name): None for name in self.back},
                )
        except Exception as error:
            watch.sink.uncovered(watch, reason(error))

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        self.watch.arrived(self.watch.calls - 1, "", grad)


class Batch(OwnHook):
    """Holds the inputs of the model while it runs, so that a bad batch can be named."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.of_thread = threading.local()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        if not self.sink.control.live:
            self.remove_from(module)
        elif output or _current_backward() != -1:
            self.of_thread.given = None
        else:
            self.of_thread.given = module, args, kwargs
            self.sink.begin()

    def tensors(self) -> Named:
        """What the model was given, while it runs; nothing if that is not known, as in a compiled graph."""
        given: tuple[nn.Module, Any, Any] | None = getattr(self.of_thread, "given", None)
        return [] if given is None else named_inputs(*given)

    def place(self, module: nn.Module) -> list[Any]:
        """Registers the hooks around the call; returns handles with ``remove``."""
        return [
            module.register_forward_pre_hook(self, with_kwargs=True),
            module.register_forward_hook(self, with_kwargs=True, always_call=True),
        ]


never_compile_alone(Batch.__call__)


def named_inputs(module: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """The tensors that went into a call, by the names of the arguments."""
    return [(_argument(module, name), x) for name, x in tensors_in((args, kwargs))]


def _argument(module: nn.Module | None, path: str) -> str:
    """``"0.2.x"``, the third positional argument, as ``"mask.x"``."""
    kind, _, rest = path.partition(".")
    if kind == "1" or module is None:
        return rest or path
    index, _, inside = rest.partition(".")
    try:
        names = list(inspect.signature(module.forward).parameters.values())
        name = names[int(index)].name if names[int(index)].kind != inspect.Parameter.VAR_POSITIONAL else index
    except (ValueError, TypeError, IndexError):
        name = index
    return f"{name}.{inside}" if inside else name


def _is_shown(x: Tensor) -> bool:
    return x.is_floating_point() and not x.is_nested


def _local(x: Any) -> Tensor:
    tensor: Tensor = x.to_local() if hasattr(x, "placements") else x
    return tensor


# -- what runs while a graph is traced ---------------------------------------------------------------------------------------


@at_trace_time(fallback=False)
def traced_open(watch: Watch, live: bool, paused: bool, training: bool) -> bool:
    """Whether a call counts. The compiler guards on the arguments."""
    if torch.compiler.is_exporting():
        return False
    return live and not paused and watch.control.training in (None, training)


@at_trace_time(fallback=-1, fresh=True)
def call_number(watch: Watch, inputs: tuple[str, ...], outputs: tuple[str, ...], back: tuple[str, ...], device: torch.device) -> int:
    """A new number for every call; −1 if it cannot be looked at."""
    if in_region():
        watch.sink.uncovered(watch, "it is inside of a nested compiled region")
        return -1
    mark = watch.sink.token(device)
    if watch.mark is not None and watch.mark is not mark:
        watch.sink.uncovered(watch, f"it also runs on {device}, in a compiled graph")
        return -1
    watch.mark = mark
    watch.traced.append(TracedCall(watch, inputs, outputs, back))
    return register_observer(watch.traced[-1])


@at_trace_time(fallback=-1, fresh=True)
def gradient_number(watch: Watch) -> int:
    watch.traced.append(TracedCall(watch))
    return register_observer(watch.traced[-1])
