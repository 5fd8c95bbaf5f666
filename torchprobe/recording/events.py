"""What layers gave, one after the other, and what that says of another tensor."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.recording.axes import UNSURE, Axis, fits, square


class Event(NamedTuple):
    """A layer gave a tensor whose dimension of the features is known."""

    module: int
    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dim: int
    tensor: Callable[[], Tensor | None]

    @property
    def width(self) -> int:
        return self.shape[self.dim]


class Seen(threading.local):
    """What a thread has seen: each one runs a forward of its own."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.given: object = None  # the arguments of the layer that is being read

    def __reduce__(self) -> tuple[type[Seen], tuple[()]]:
        return Seen, ()  # a copy of the model has seen nothing


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same numbers in memory: one object, or a view that another hook has put around it."""
    if a is None or b is None or a is b:
        return a is b and a is not None
    if a.shape != b.shape or type(a) is not Tensor or type(b) is not Tensor or a.is_meta or b.is_meta or a.is_nested or b.is_nested:
        return False
    if a.layout is not torch.strided or b.layout is not torch.strided or a.device != b.device:
        return False
    return a.stride() == b.stride() and a.data_ptr() == b.data_ptr() and a.numel() > 0


def shares_memory(a: Tensor | None, b: Tensor) -> bool:
    """Whether one is a view of the other."""
    if a is None or any(type(x) is not Tensor or x.is_meta or x.is_nested or x.layout is not torch.strided for x in (a, b)):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def same_tensor(events: Sequence[Event], x: Tensor) -> Axis | None:
    event = next((event for event in reversed(events) if event.shape == tuple(x.shape) and is_same(event.tensor(), x)), None)
    return None if event is None else Axis(event.dim, f"the output of {event.name!r}")


def permuted(events: Sequence[Event], x: Tensor) -> int | None:
    """Where the features are in a tensor that is what a layer gave, or that with its dimensions in another order; None if it is neither."""
    for event in reversed(events):
        source = event.tensor()
        if source is None or not event.strides or source.numel() != x.numel() or not shares_memory(source, x):
            continue
        if tuple(x.shape) == event.shape and x.stride() == event.strides:
            return event.dim
        there = [dim for dim in range(x.dim()) if x.stride(dim) == event.strides[event.dim] and x.shape[dim] == event.width]
        if sorted(x.shape) == sorted(event.shape) and len(there) == 1:
            return there[0]
    return None


def outside(events: Sequence[Event], inside: Sequence[Event]) -> list[Event]:
    """The events that are not among those inside of a block."""
    known = {id(event) for event in inside}  # comparing two events would compare their tensors
    return [event for event in events if id(event) not in known]


def contradicted(event: Event, shape: tuple[int, ...], dims_found: list[int], others: Sequence[Event]) -> bool:
    """Whether the one dimension that is as wide as what a layer gave is another one than there, and other activations of this very shape
    have their features elsewhere: then a layer mixes positions, or a vector for each input scales and shifts what passes."""
    moved = len(dims_found) == 1 and (dims_found[0] != event.dim or len(event.shape) != len(shape))
    return moved and any(other.shape == shape and other.dim != dims_found[0] for other in others)


def same_shape(events: Sequence[Event], x: Tensor) -> Axis | None:
    shape = tuple(x.shape)
    alike = [event for event in events if event.shape == shape]
    if not alike or len({event.dim for event in alike}) > 1:
        return None
    return square(Axis(alike[-1].dim, f"as {alike[-1].name!r}", sure=False), shape)


def resized(last: Event, shape: tuple[int, ...], events: Sequence[Event]) -> Axis | None:
    """As the last layer but for the width: parts side by side, or a map as one vector."""
    dims = len(shape)
    axis = None
    alike = [
        event
        for event in events
        if len(event.shape) == dims and all(shape[dim] == event.shape[dim] for dim in range(dims) if dim != event.dim)
    ]
    if alike and len({event.dim for event in alike}) == 1:
        axis = Axis(alike[-1].dim, f"as {alike[-1].name!r}, in another width", sure=False)
    elif dims == 2 < len(last.shape) and last.width > 1 and shape == (last.shape[0], math.prod(last.shape[1:])):
        axis = Axis(1, f"{last.name!r} as one vector", sure=False)
    if axis is None or axis.dim is None or shape[axis.dim] == 1:
        return None
    size = shape[axis.dim]
    others = {shape[dim] for dim in range(dims) if dim != axis.dim} if dims < 4 else set()
    batches = {event.shape[0] for event in events if event.shape} if dims < 4 else set()
    if size in others | batches or (dims == 2 and shape[0] > 1 and size % shape[0] == 0):  # may depend on the number of inputs
        return Axis(None, UNSURE, tuple(fits(shape, size, 0)), size, sure=False)
    return axis


def moved_or_resized(event: Event, shape: tuple[int, ...], dim: int) -> bool:
    """Whether a dimension that is as wide is another one than before, and another width along the same one explains the shape as well."""
    dims = len(shape)
    return dims == len(event.shape) and dim != event.dim and all(shape[i] == event.shape[i] for i in range(dims) if i != event.dim)


def multiplied(module: nn.Module, last: Event, shape: tuple[int, ...]) -> Axis | None:
    """A product with a parameter, such as the projection of CLIP: (width of the last layer, width of the output)."""
    if last.dim != len(last.shape) - 1 or last.width == 1:
        return None
    for name, parameter in module.named_parameters():
        if tuple(parameter.shape) == (last.width, shape[-1]) and shape[-1] > 1 and "weight" not in name:
            return Axis(len(shape) - 1, f"width {shape[-1]} of {name!r}")
    return None
