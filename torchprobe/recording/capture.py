"""CUDA graphs captured while recording: a replay runs the operators again, and none of our Python.

A graph holds the addresses of the states it writes to. So a state lies outside the memory of the graph, is never freed, since nobody tells
us of the end of the graph, and leaves the recording when that ends. What replays add during a pause is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchprobe.recording.control import Slot
from torchprobe.recording.windows import duplicate, plainly

_held: list[Tensor] = []  # states that a graph may still write to: they are never freed


def capturing(x: Tensor) -> bool:
    """Whether what is done with ``x`` goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def hold(slot: Slot | None) -> None:
    """Called for every slot that an operator in the making of a graph writes to.

    Raises:
        RuntimeError: there is no state yet, and one made now would lie in the memory of the graph.
    """
    if slot is None:
        raise RuntimeError(
            "it is met for the first time while a CUDA graph is captured: start recording before the warm-up runs that come "
            "before a capture, so that its state exists"
        )
    if not slot.captured:
        slot.captured = True
        _held.append(slot.state)


@plainly
def keep_contents(slots: Sequence[Slot]) -> Callable[[], None]:
    """Remembers what the captured ones among the slots hold; the result puts it back."""
    states = [slot.state for slot in slots if slot.captured]
    before = [state.clone() for state in states]

    @plainly
    def put_back() -> None:
        for state, content in zip(states, before, strict=True):
            state.copy_(content)

    return put_back


def leave(slots: dict[torch.device, Slot]) -> None:
    """Leaves captured states to their graphs, and goes on with copies."""
    for device, slot in slots.items():
        if slot.captured:
            slots[device] = Slot(duplicate(slot.statistic))
            slots[device].closed = slot.closed
