"""Whole states of :func:`torchprobe.ops.observe_`: read, taken, merged and replaced while other threads observe.

Schemas::

    observe_read(Tensor[] states) -> Tensor
    observe_take_(Tensor(a!)[] states, Tensor(b!) out, bool calls=False) -> ()
    observe_merge_(Tensor(a!) state, Tensor other) -> ()
    observe_write_(Tensor(a!) state, Tensor new) -> ()

Each is one step for every state: an ``observe_`` of another thread comes before it or after it, so no vector is lost, and no read is torn.
A copy made with other operations has no such promise. The native kernels are in ``csrc/cpu/states.cpp`` and ``csrc/cuda/states.cpp``. The
reference in PyTorch is ordered with the reference of ``observe_``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprobe.common.threads import ordered
from torchprobe.ops import layout
from torchprobe.ops.library import define
from torchprobe.ops.memory import check_memory
from torchprobe.ops.observe import check_state, merge_states

READ = "observe_read(Tensor[] states) -> Tensor"
TAKE = "observe_take_(Tensor(a!)[] states, Tensor(b!) out, bool calls=False) -> ()"
MERGE = "observe_merge_(Tensor(a!) state, Tensor other) -> ()"
WRITE = "observe_write_(Tensor(a!) state, Tensor new) -> ()"


def read(states: Sequence[Tensor]) -> Tensor:
    """A copy of states of one size: (n, slots). Every row is what one moment found.

    Raises:
        ValueError: there is none, they are no states, or they have different sizes or devices.

    >>> from torchprobe.ops import new_state
    >>> read([new_state(2), new_state(2)]).shape == (2, layout.size(2))
    True
    """
    try:
        copies: Tensor = torch.ops.torchprobe.observe_read(list(states))
    except (RuntimeError, TypeError, AttributeError):
        _check_states(states)  # a clear message, if an argument was the cause
        raise
    return copies


def take(states: Sequence[Tensor], out: Tensor, calls: bool = False) -> None:
    """Moves what states hold to the rows of ``out``, (n, slots), and empties them; the counter of calls only with ``calls``.

    Raises:
        ValueError: as :func:`read`; or ``out`` does not fit.
    """
    try:
        torch.ops.torchprobe.observe_take_(list(states), out, calls)
    except (RuntimeError, TypeError, AttributeError):
        _check_take(states, out)
        raise


def merge(state: Tensor, other: Tensor) -> None:
    """Adds to a state what another one of the same size holds, which nothing changes meanwhile. Calls add up. Both may be matrices, with a
    state in every row: each is one step, and all take the same few launches.

    Raises:
        ValueError: one is not a state; or they have different sizes or devices, or share memory.
    """
    try:
        torch.ops.torchprobe.observe_merge_(state, other)
    except (RuntimeError, TypeError, AttributeError):
        _check_pair(state, other, "other", rows=True)
        raise


def write(state: Tensor, new: Tensor) -> None:
    """Replaces the contents of a state by those of another one, which nothing changes meanwhile.

    Raises:
        ValueError: as :func:`merge`.
    """
    try:
        torch.ops.torchprobe.observe_write_(state, new)
    except (RuntimeError, TypeError, AttributeError):
        _check_pair(state, new, "new")
        raise


def _check_states(states: Sequence[Tensor]) -> None:
    if not states:
        raise ValueError("states is empty")
    for state in states:
        check_state("states", state)
        if state.shape != states[0].shape or state.device != states[0].device or state.dtype != states[0].dtype:
            raise ValueError(f"states have different sizes, types or devices: {_describe(states[0])} and {_describe(state)}")
        check_memory({}, {"states": state})


def _describe(state: Tensor) -> str:
    return f"{tuple(state.shape)} of {state.dtype} on {state.device}"


def _check_take(states: Sequence[Tensor], out: Tensor) -> None:
    _check_states(states)
    if tuple(out.shape) != (len(states), states[0].numel()) or out.dtype != states[0].dtype or out.device != states[0].device:
        raise ValueError(f"out must have a row for each of {len(states)} states of {_describe(states[0])}, got {_describe(out)}")
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    for state in states:
        check_memory({"states": state, "out": out}, {})


def _check_pair(state: Tensor, other: Tensor, name: str, rows: bool = False) -> None:
    check_state("state", state, rows)
    check_state(name, other, rows)
    if state.shape != other.shape or state.device != other.device or state.dtype != other.dtype:
        raise ValueError(f"{name} is {_describe(other)}, and the state {_describe(state)}: both must be of one size, type and device")
    check_memory({"state": state}, {name: other})


@ordered
def _read(states: Sequence[Tensor]) -> Tensor:
    _check_states(states)
    return torch.stack(list(states))


@ordered
def _take(states: Sequence[Tensor], out: Tensor, calls: bool = False) -> None:
    _check_take(states, out)
    torch.stack(list(states), out=out)
    empty = torch.zeros_like(out)
    if not calls:
        empty[:, layout.CALLS] = out[:, layout.CALLS]
    torch._foreach_copy_(list(states), list(empty.unbind(0)))


def _merge(state: Tensor, other: Tensor) -> None:
    """In the order of the caller, who must not be made to wait here: csrc/cuda/states.cpp calls it in the turn of a launch."""
    _check_pair(state, other, "other", rows=True)
    state.copy_(merge_states(state, other))


@ordered
def _write(state: Tensor, new: Tensor) -> None:
    _check_pair(state, new, "new")
    state.copy_(new)


def register(library: torch.library.Library) -> None:
    """Defines the operators, except for native kernels. They are for the host: a graph does not contain them."""
    for schema, reference in ((READ, _read), (TAKE, _take), (MERGE, ordered(_merge)), (WRITE, _write)):
        define(library, schema, reference)
    define(library, MERGE.replace("merge_", "merge_reference_"), _merge)
