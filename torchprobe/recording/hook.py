"""The hooks that connect a module with the operator.

A hook has two halves. In eager mode it is called in every forward, and its cost is Python. In a compiled graph it is traced once, and only
the operator remains. So the traced half changes nothing and reads nothing on the host. Everything else that tracing needs is in functions
marked ``at_trace_time``.
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
_allocating, _counting = threading.Lock(), threading.Lock()


class Hook:
    """Reads the output of one module. A copy or a pickle of a hook does nothing."""

    def __init__(self, layer: Layer, control: Control) -> None:
        self.layer = layer
        self.control = control
        self.slots: dict[torch.device, Slot] = {}
        self.dims: dict[int, int] = {}  # number of dimensions of an activation → the dimension of its features
        self.loaded_dim: int | None = None  # the dimension of the features in a loaded state
        self.order = -1
        self.failure = ""  # why a call could not be read
        self.skipped = Skipped(0)
        self.key = register(self)
        self.every = control.every
        self.fused = control.factory.template.fused
        self.direct = self.fused and control.positions == "all"  # then only the operator is needed

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
        """Gives the layer its place in the order of firing; later calls do nothing."""
        if self.order < 0:
            self.order = self.control.fired
            self.control.fired += 1

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()

    # -- eager ---------------------------------------------------------------------------------------------------------

    def open(self, module: nn.Module) -> bool:
        """Whether this call counts."""
        control = self.control
        if control.paused:
            self.skipped |= Skipped.PAUSED
            return False
        if control.training is not None and control.training != module.training:
            self.skipped |= Skipped.OTHER_MODE
            return False
        return True

    def read(self, value: Any) -> None:
        """Reads the tensor in the output of the module."""
        x: Tensor | None = None
        try:
            x = value if type(value) is Tensor and self.control.select is None else self.find(value)
            if x is not None:
                self.observe(x, self.control.mask)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self.explained(error, x) from error

    def observe(self, x: Tensor, mask: Tensor | None) -> None:
        """Reads one tensor, in the shortest way if possible."""
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
        raise NotImplementedError("only a GradientHook reads gradients")

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
            mask = None if x.is_nested else mask  # a nested tensor has no padding
            x = plain(x, self.layer.feature_dim)
        if not readable(self.key, x.dim()):
            return
        dim = axis(self.key, x.dim())
        allocate(self.key, x.shape[dim], x.device)
        slot = self.slots[x.device]
        if not slot.fused and not self.counted(slot):  # the operator counts calls itself
            return
        positions = self.control.positions
        if mask is not None:
            mask = fit_mask(mask, x, dim)
        kept = cut(mask, positions)
        vectors = vectors_of(x.detach(), positions, dim, mask)
        if slot.fused:
            _observe(slot.state, vectors, dim, slot.sigma, self.every, kept)
        else:
            slot.update(vectors, dim, kept)

    def counted(self, slot: Slot) -> bool:
        """Counts a call, and says whether ``every`` selects it."""
        with _counting:  # threads may share a layer
            slot.calls += 1
            return (slot.calls - 1) % self.every == 0

    def explained(self, error: Exception, x: Tensor | None) -> Exception:
        """The error with the name of the layer. If the tensor cannot be read, the message says why."""
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
        self.failure = str(error)
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
        """As :meth:`__call__`, for the compiler to trace."""
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
        positions, sigma, every = settings(self.key)
        if sigma is None:
            _observe_activation(slot.token, x, observer_number(self.key), mask)
            return
        if mask is not None:
            mask = fit_mask(mask, x, dim)
        kept = cut(mask, positions)
        vectors = vectors_of(x, positions, dim, mask)
        _observe(slot.state, vectors, dim, sigma, every, kept)


class InputHook(Hook):
    """Reads the first tensor in the arguments of a module."""

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

    Activation checkpoints need no special case here. Of the two outputs, one is never differentiated: the first one in a reentrant
    checkpoint, the recomputed one in any other.
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
        self.take_place()  # in the order of the forward; gradients arrive in reverse order
        mask = self.control.mask

        def arrived(grad: Tensor) -> None:
            self.gradient(grad, mask)

        x.register_hook(arrived)
        return None

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        """Called during backward. Gradients that arrive after the recording has ended do not count."""
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
    """Scripted modules refuse hooks in new versions of PyTorch, and never call them in old ones."""
    return not isinstance(module, torch.jit.ScriptModule)


for _kind in (Hook, InputHook, GradientHook):
    never_compile_alone(_kind.__call__)


# -- what runs while a graph is traced, and in eager mode off the shortest way -----------------------------------------------


@at_trace_time
def note(hook: Hook, reason: int) -> None:
    hook.skipped |= Skipped(reason)


@at_trace_time
def traced_open(hook: Hook, paused: bool, training: bool) -> bool:
    """As :meth:`Hook.open`. The compiler guards on ``paused`` and on the mode of the module."""
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
def settings(hook: Hook) -> tuple[str, float | None, int]:
    """``positions``, ``outlier_sigma`` and ``every``; no ``outlier_sigma`` if the statistic is not an operator."""
    return hook.control.positions, next(iter(hook.slots.values())).sigma if hook.fused else None, hook.every


@at_trace_time
def axis(hook: Hook, dims: int) -> int:
    """The dimension of the features in an activation of ``dims`` dimensions."""
    if dims == 0:
        raise ValueError("it holds a single number, which has no features")
    if dims not in hook.dims:
        override = hook.layer.feature_dim
        dim = default_feature_dim(hook.layer, dims) if override is None else override
        if not -dims <= dim < dims:
            raise ValueError(f"its activations have {dims} dimensions, and feature_dim={dim} is not one of them")
        hook.dims[dims] = dim
    return hook.dims[dims]


@at_trace_time
def readable(hook: Hook, dims: int) -> bool:
    """Whether there are features and the requested positions. If not, a layer selected by default is left out, and reported at the end."""
    if not hook.control.lenient or dims > 2 or (hook.control.positions != "patch" and dims == 2):
        return True
    if hook.control.positions == "all" and dims == 1:
        return True
    hook.skipped |= Skipped.NO_POSITIONS if dims else Skipped.NO_TENSOR
    return False


@at_trace_time
def allocate(hook: Hook, width: int, device: torch.device) -> None:
    """Creates the state in the first call, when the width is known."""
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
    """A new number for every call. The compiler would merge two calls with equal arguments, such as those of a shared layer."""
    return register_observer(hook)


@at_trace_time
def nothing_found(hook: Hook, selected: bool) -> None:
    if hook.control.lenient and not selected:
        hook.skipped |= Skipped.NO_TENSOR
        return
    if selected:
        raise TypeError("select must return a tensor")
    raise TypeError("it holds no floating-point tensor with features; pass select=, a function that returns the tensor to read")


@at_trace_time
def not_in_output(hook: Hook) -> None:
    raise ValueError(
        "under torch.compile only the gradient of a tensor that is part of the output can be read; let select= return one, "
        "or run this model without torch.compile"
    )
