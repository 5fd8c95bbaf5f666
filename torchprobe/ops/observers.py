"""Operators that call Python code from a compiled graph: they show an activation or a gradient to an observer.

Schemas::

    observe_activation_(Tensor(a!) token, Tensor x, int observer, Tensor? mask=None) -> ()
    observe_output(Tensor x, int observer, Tensor? mask=None) -> Tensor
    observe_gradient(Tensor x, int observer, Tensor? mask=None) -> Tensor
    observe_gradient_backward(Tensor grad, int observer, Tensor? mask=None) -> Tensor
    observe_call_(Tensor(a!) token, Tensor[] inputs, Tensor[] outputs, int observer) -> ()

``observe_activation_`` runs a statistic that has no operator, with any Python code. The operator increments the number ``token``, since the
compiler removes operators that change nothing.

``observe_call_`` does the same with everything that went into a module and everything that came out. Calls with one token stay in their
order.

``observe_output`` is the identity, and shows the activation on the way. It is for regions of a graph where no operator may change anything.

``observe_gradient`` is the identity, whose backward shows the gradient. In eager mode a tensor hook on the output reads its gradient for
free. A compiled graph cannot contain such a hook. It can contain an operator with a backward, which costs a copy of the activation and one
of the gradient. Only compiled graphs use this operator.

A number identifies the observer; its state is not an argument of the operator. Otherwise autograd would save the state for backward, and
raise if anything changed it in between: the backward of another micro-batch, or the end of a window.

Every operator refuses a tensor that reaches beyond its storage, and those with a token one that shares memory with what they show:
``ValueError``, with the name of the argument.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from torchprobe.ops.library import define, resolve_views
from torchprobe.ops.memory import check_memory

ACTIVATION = "observe_activation_(Tensor(a!) token, Tensor x, int observer, Tensor? mask=None) -> ()"
CALL = "observe_call_(Tensor(a!) token, Tensor[] inputs, Tensor[] outputs, int observer) -> ()"
OUTPUT = "observe_output(Tensor x, int observer, Tensor? mask=None) -> Tensor"
SCHEMAS = (
    "observe_gradient(Tensor x, int observer, Tensor? mask=None) -> Tensor",
    "observe_gradient_backward(Tensor grad, int observer, Tensor? mask=None) -> Tensor",
)


class Observer(Protocol):
    """Reads the activation or its gradient."""

    def activation(self, x: Tensor, mask: Tensor | None) -> None:
        """Called in every forward."""

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        """Called in every backward, with the mask of the forward."""


class CallObserver(Protocol):
    """Reads a call of a module."""

    def called(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Called in every forward."""


_observers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_observer(observer: Observer | CallObserver) -> int:
    """Returns a number by which the operators find ``observer``. Keep a reference to it: without the observer the operators do nothing.

    The compiler merges calls with equal arguments, so use a different number for every call.

    >>> import torch
    >>> class Print:
    ...     def activation(self, x, mask): ...
    ...     def gradient(self, grad, mask):
    ...         print(grad.tolist())
    >>> observer = Print()
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = torch.ops.torchprobe.observe_gradient(x, register_observer(observer))
    >>> (3 * y).sum().backward()
    [3.0, 3.0]
    """
    number = next(_numbers)
    _observers[number] = observer
    return number


def _forward(x: Tensor, observer: int, mask: Tensor | None = None) -> Tensor:
    check_memory({}, {"x": x, "mask": mask})
    return x.clone()  # an operator may not return its own input


def _backward(grad: Tensor, observer: int, mask: Tensor | None = None) -> Tensor:
    check_memory({}, {"grad": grad, "mask": mask})
    if (target := _observers.get(observer)) is not None:
        target.gradient(grad, mask)
    return grad.clone()


def _output(x: Tensor, observer: int, mask: Tensor | None = None) -> Tensor:
    check_memory({}, {"x": x, "mask": mask})
    if (target := _observers.get(observer)) is not None:
        target.activation(x, mask)
    return x.clone()


def _activation(token: Tensor, x: Tensor, observer: int, mask: Tensor | None = None) -> None:
    check_memory({"token": token}, {"x": x, "mask": mask})
    _count(token)
    if (target := _observers.get(observer)) is not None:
        target.activation(x, mask)


def _call(token: Tensor, inputs: list[Tensor], outputs: list[Tensor], observer: int) -> None:
    shown = {f"{name}[{index}]": x for name, part in (("inputs", inputs), ("outputs", outputs)) for index, x in enumerate(part)}
    check_memory({"token": token}, shown)
    _count(token)
    if (target := _observers.get(observer)) is not None:
        target.called(inputs, outputs)


def _count(token: Tensor) -> None:
    if token.dim() or not (token.is_floating_point() or token.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"token must be a single number, got {token.dtype} of shape {tuple(token.shape)}")
    token += 1


def _fake_activation(token: Tensor, x: Tensor, observer: int, mask: Tensor | None = None) -> None:
    pass


def _fake_call(token: Tensor, inputs: list[Tensor], outputs: list[Tensor], observer: int) -> None:
    pass


def _fake(x: Tensor, observer: int, mask: Tensor | None = None) -> Tensor:
    check_memory({}, {"x": x})  # PyTorch comes here also if only the mask is on "meta"
    return x.clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.observer, mask = inputs
    ctx.save_for_backward(*([] if mask is None else [mask]))


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    mask = ctx.saved_tensors[0] if ctx.saved_tensors else None
    return torch.ops.torchprobe.observe_gradient_backward(grad, ctx.observer, mask), None, None


def _autograd_again(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None  # the gradient itself is not shown


def register(library: torch.library.Library) -> None:
    """Defines the operators. All devices share one implementation, since the observer does the work."""
    define(library, ACTIVATION, _activation, _fake_activation)
    define(library, CALL, _call, _fake_call)
    names = ("observe_gradient", "observe_gradient_backward", "observe_output")
    for schema, name, kernel in zip((*SCHEMAS, OUTPUT), names, (_forward, _backward, _output), strict=True):
        library.define(schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        resolve_views(library, name)
        torch.library.register_fake(f"torchprobe::{name}", _fake, lib=library)
    torch.library.register_autograd(f"torchprobe::{names[0]}", _autograd, setup_context=_setup_context, lib=library)
    for name in names[1:]:
        torch.library.register_autograd(f"torchprobe::{name}", _autograd_again, lib=library)
