"""The hooks: what stands between a module and the operator.

A hook lives in two worlds. In eager mode it is called at every forward, and its cost is Python. In a compiled graph it
is traced once, and only the operator remains: the traced half changes nothing and asks nothing of the host, and whatever
must happen while tracing sits in functions marked ``at_trace_time``.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchprobe.ops.observe import check
from torchprobe.ops.observers import register_observer
from torchprobe.ops.positions import vectors_of
from torchprobe.recording.compiled import Inert, allow_graphs, at_trace_time, is_tracing, make_static, never_compile_alone, register
from torchprobe.recording.control import Control, Skipped, Slot, capturing, hold
from torchprobe.recording.layers import Layer, default_feature_dim
from torchprobe.recording.tensors import cut, first_tensor, fit_mask, holds, is_plain, plain, replaced

_observe = torch.ops.torchprobe.observe_.default
_observe_activation = torch.ops.torchprobe.observe_activation_.default
_observe_gradient = torch.ops.torchprobe.observe_gradient.default
_current_backward = torch._C._current_graph_task_id
_allocating = threading.Lock()


class Hook:
    """Reads the output of one module. A copy or a pickle of a hook does nothing."""

    def __init__(self, layer: Layer, control: Control) -> None:
        self.layer = layer
        self.control = control
        self.slots: dict[torch.device, Slot] = {}
        self.dims: dict[int, int] = {}  # dimensions of an activation → the one of its features
        self.loaded_dim: int | None = None  # what a loaded state says of the features
        self.order = -1
        self.skipped = Skipped(0)
        self.key = register(self)
        self.every = control.every
        self.fused = control.factory.template.fused
        self.direct = self.fused and control.positions == "all"  # nothing but the operator is needed then

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.trace(module, output)
        if _current_backward() != -1:  # an activation checkpoint runs the forward again, inside backward
            self.skipped |= Skipped.RECOMPUTED
        elif self.open(module):
            self.read(output)
        return None

    def place(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self)

    def take_place(self) -> None:
        """Gives the layer its place in the order of firing, once."""
        if self.order < 0:
            self.order = self.control.fired
            self.control.fired += 1

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()

    # -- eager ---------------------------------------------------------------------------------------------------------

    def open(self, module: nn.Module) -> bool:
        """Whether calls count at present."""
        control = self.control
        if control.paused:
            self.skipped |= Skipped.PAUSED
            return False
        if control.training is not None and control.training != module.training:
            self.skipped |= Skipped.OTHER_MODE
            return False
        return True

    def read(self, value: Any) -> None:
        """Reads the tensor in what the module gave."""
        x: Tensor | None = None
        try:
            x = value if type(value) is Tensor and self.control.select is None else self.find(value)
            if x is not None:
                self.observe(x, self.control.mask)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self.explained(error, x) from error

    def observe(self, x: Tensor, mask: Tensor | None) -> None:
        """Reads one tensor: the shortest way when nothing special is asked for."""
        slot, dim = self.slots.get(x.device), self.dims.get(x.dim())
        if capturing(x):
            hold(slot, self.every)
        if self.direct and slot is not None and dim is not None and mask is None and is_plain(x):
            _observe(slot.state, x, dim, slot.sigma, self.every)
        else:
            self._observe_any(x, mask)

    def activation(self, x: Tensor, mask: Tensor | None) -> None:
        """Called by a compiled graph, for a statistic without an operator of its own."""
        if self.control.live:
            try:
                self.observe(x, mask)
            except (RuntimeError, TypeError, ValueError) as error:
                raise self.explained(error, x) from error

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        raise NotImplementedError("an output or an input has no gradient here")  # see GradientHook

    def _observe_any(self, x: Tensor, mask: Tensor | None) -> None:
        if x.is_meta or type(x).__name__ == "FakeTensor":
            self.skipped |= Skipped.NOT_REAL
            return
        if not x.is_floating_point() and self.control.select is None:
            nothing_found(self.key, False)
            return
        if torch._C._functorch.is_batchedtensor(x):
            raise ValueError(
                "it is called inside torch.func.vmap, which hides the batched dimension, so the vectors would be mixed up: "
                "record outside vmap, or call the model on the batch directly"
            )
        if not is_plain(x):
            mask = None if x.is_nested else mask  # a nested tensor holds no padding
            x = plain(x, self.layer.feature_dim)
        if not readable(self.key, x.dim()):
            return
        dim = axis(self.key, x.dim())
        allocate(self.key, x.shape[dim], x.device)
        slot = self.slots[x.device]
        if not slot.fused:  # the operator counts calls itself
            slot.calls += 1
            if (slot.calls - 1) % self.every:
                return
        positions = self.control.positions
        if mask is not None:
            mask = fit_mask(mask, x, dim)
        kept = cut(mask, positions)
        vectors = vectors_of(x, positions, dim, mask)
        if slot.fused:
            _observe(slot.state, vectors, dim, slot.sigma, self.every, kept)
        elif kept is None:
            slot.statistic.update(vectors, dim)
        else:
            slot.statistic.update(vectors, dim, mask=kept)

    def explained(self, error: Exception, x: Tensor | None) -> Exception:
        """The error with the name of the layer; in words, if a tensor that cannot be read was the cause."""
        if type(error) not in (RuntimeError, NotImplementedError, TypeError, ValueError):
            return error
        if x is not None and x.device in self.slots:
            try:
                dim = axis(self.key, x.dim())
                allocate(self.key, x.shape[dim], x.device)
                if self.fused:
                    check(self.slots[x.device].state, x, dim, self.every, None)
            except (IndexError, ValueError) as reason:
                error = reason
        return type(error)(f"layer {self.layer.name!r}: {error}")

    def find(self, value: Any) -> Tensor | None:
        """The tensor to read in a structured output."""
        select = self.control.select
        x = first_tensor(value) if select is None else select(value)
        if not isinstance(x, Tensor):
            nothing_found(self.key, select is not None)
            return None
        return x

    # -- compiled ------------------------------------------------------------------------------------------------------

    def trace(self, module: nn.Module, value: Any) -> Any:
        """What :meth:`__call__` does, for the compiler to trace."""
        if not traced_open(self.key, self.control.paused, module.training):
            return None
        x = self.find(value)
        if x is not None:
            self.trace_observe(x, self.control.mask)
        return None

    def trace_observe(self, x: Tensor, mask: Tensor | None) -> None:
        if not is_plain(x):
            mask = None if x.is_nested else mask
            x = plain(x, self.layer.feature_dim)
        if not readable(self.key, x.dim()):
            return
        dim = axis(self.key, x.dim())
        allocate(self.key, len(range(x.shape[dim])), x.device)  # len(range(n)) is n, made a constant of the graph
        slot = self.slots[x.device]
        if not fused(self.key):
            _observe_activation(slot.token, x, observer_number(self.key), mask)
            return
        positions, sigma, every = settings(self.key)
        if mask is not None:
            mask = fit_mask(mask, x, dim)
        kept = cut(mask, positions)
        vectors = vectors_of(x, positions, dim, mask)
        _observe(slot.state, vectors, dim, sigma, every, kept)


class InputHook(Hook):
    """Reads the first tensor a module is called with."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return self.trace(module, (args, kwargs))
        if _current_backward() != -1:
            self.skipped |= Skipped.RECOMPUTED
        elif self.open(module):
            self.read((args, kwargs))
        return None

    def place(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self, with_kwargs=True)

    def find(self, value: Any) -> Tensor | None:
        select = self.control.select
        args, kwargs = value
        x = first_tensor(value) if select is None else select(args, kwargs)
        if not isinstance(x, Tensor):
            nothing_found(self.key, select is not None)
            return None
        return x


class GradientHook(Hook):
    """Reads the gradient with respect to the output of one module.

    Activation checkpoints need no care here: without reentry the recomputed output is never differentiated, with it the
    first one is not.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.trace(module, output)
        if not self.open(module):
            return None
        try:
            x = self.find(output)
        except (TypeError, ValueError) as error:
            raise self.explained(error, None) from error
        if x is None:
            return None
        if not x.requires_grad:
            self.skipped |= Skipped.NO_GRADIENT
            return None
        self.skipped |= Skipped.WAITING
        self.take_place()  # in the order of the forward: gradients come the other way round
        mask = self.control.mask

        def arrived(grad: Tensor) -> None:
            self.gradient(grad, mask)

        x.register_hook(arrived)
        return None

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        """Called during backward; what comes after the recording has ended is not counted."""
        if self.control.live:
            self.skipped &= ~Skipped.WAITING
            try:
                self.observe(grad, mask)
            except (RuntimeError, TypeError, ValueError) as error:
                raise self.explained(error, grad) from error

    def trace(self, module: nn.Module, value: Any) -> Any:
        if not traced_open(self.key, self.control.paused, module.training):
            return None
        x = self.find(value)
        if x is None or not readable(self.key, x.dim()):
            return None
        if not x.requires_grad:
            note(self.key, int(Skipped.NO_GRADIENT))
            return None
        if not holds(value, x):
            not_in_output(self.key)
            return None
        dim = axis(self.key, x.dim())
        allocate(self.key, len(range(x.shape[dim])), x.device)
        return replaced(value, x, _observe_gradient(x, observer_number(self.key), self.control.mask))


def takes_hooks(module: nn.Module) -> bool:
    """Scripted modules take none in new PyTorch, and never call them in old."""
    return not isinstance(module, torch.jit.ScriptModule)


for _kind in (Hook, InputHook, GradientHook):
    never_compile_alone(_kind.__call__)


# -- what happens at trace time, and in eager mode when something is out of the ordinary -----------------------------------


@at_trace_time
def note(hook: Hook, reason: int) -> None:
    hook.skipped |= Skipped(reason)


@at_trace_time
def traced_open(hook: Hook, paused: bool, training: bool) -> bool:
    """As :meth:`Hook.open`; the compiler guards on ``paused`` and on the mode of the module."""
    if torch.compiler.is_exporting():
        hook.skipped |= Skipped.NOT_REAL
        return False
    hook.skipped |= Skipped.TRACED
    if paused:
        hook.skipped |= Skipped.PAUSED
        return False
    if hook.control.training is not None and hook.control.training != training:
        hook.skipped |= Skipped.OTHER_MODE
        return False
    return True


@at_trace_time
def fused(hook: Hook) -> bool:
    """Whether the statistic is an operator, which a compiled graph can hold."""
    return hook.fused


@at_trace_time
def settings(hook: Hook) -> tuple[str, float, int]:
    return hook.control.positions, next(iter(hook.slots.values())).sigma, hook.every


@at_trace_time
def axis(hook: Hook, dims: int) -> int:
    """The dimension of the features in an activation of ``dims`` dimensions."""
    if dims == 0:
        raise ValueError("it gives a single number, which has no features")
    if dims not in hook.dims:
        override = hook.layer.feature_dim
        dim = default_feature_dim(hook.layer, dims) if override is None else override
        if not -dims <= dim < dims:
            raise ValueError(f"its activations have {dims} dimensions, and feature_dim={dim} is none of them")
        hook.dims[dims] = dim
    return hook.dims[dims]


@at_trace_time
def readable(hook: Hook, dims: int) -> bool:
    """Whether there are features, and the positions asked for; a layer that nobody named is then left out, and reported at the end."""
    if not hook.control.lenient or dims > 2 or (hook.control.positions != "patch" and dims == 2):
        return True
    if hook.control.positions == "all" and dims == 1:
        return True
    hook.skipped |= Skipped.NO_POSITIONS if dims else Skipped.NO_TENSOR
    return False


@at_trace_time
def allocate(hook: Hook, width: int, device: torch.device) -> None:
    """Makes the state at the first call, when the width is known."""
    with _allocating, torch.inference_mode(False), torch.no_grad():
        slot = hook.slots.get(device)
        if slot is None:
            slot = Slot(hook.control.factory(width, device))
            hook.slots[device] = slot
            hook.take_place()
        elif slot.statistic.features != width:
            raise ValueError(
                f"its activations were {slot.statistic.features} features wide and are now {width}: the features are "
                f"probably along another dimension; pass feature_dim={{{hook.layer.name!r}: …}}"
            )
    if is_tracing():
        for tensor in slot.static_tensors():
            make_static(tensor)
        allow_graphs(hook.control.graphs)


@at_trace_time
def observer_number(hook: Hook) -> int:
    """Another number for every call: two calls with equal arguments (a shared layer may get one gradient twice) would be merged."""
    return register_observer(hook)


@at_trace_time
def nothing_found(hook: Hook, selected: bool) -> None:
    if hook.control.lenient and not selected:
        hook.skipped |= Skipped.NO_TENSOR
        return
    what = "select gave no tensor" if selected else "it holds no floating-point tensor with features"
    raise TypeError(f"{what}; pass select=, a function from what the module gives to a tensor")


@at_trace_time
def not_in_output(hook: Hook) -> None:
    raise ValueError(
        "under torch.compile the gradient can be read only of a tensor that is itself part of the output; let select= "
        "return one, or run this model without torch.compile"
    )
