"""What the hooks of one recorder share, and the state of one layer on one device.

A CUDA graph that is captured while recording holds the addresses of the states it writes to: a replay runs the operators again, and none of
our Python. So a state lies outside the memory of the graph and is never freed, since nobody tells us when the graph ends. It leaves the
recording when that ends. What replays add during a pause is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntFlag, auto

import torch
from torch import Tensor

from torchprobe.recording.windows import plainly
from torchprobe.statistics import Statistic
from torchprobe.statistics.factory import Factory

_held: list[Tensor] = []  # states that a graph may still write to: they are never freed


class Skipped(IntFlag):
    """Why a call was not read; for the report at the end."""

    PAUSED = auto()
    OTHER_MODE = auto()
    RECOMPUTED = auto()
    NO_TENSOR = auto()
    NO_POSITIONS = auto()
    NOT_REAL = auto()
    NO_GRADIENT = auto()
    WAITING = auto()
    TRACED = auto()


NOTHING_TO_READ = Skipped.NO_TENSOR | Skipped.NO_POSITIONS
"""A layer that nobody asked for by name, and that turned out to hold nothing to read."""


class Control:
    """What all hooks of one recorder look at."""

    def __init__(
        self,
        factory: Factory,
        positions: str = "all",
        every: int = 1,
        when: str = "always",
        select: Callable[..., Tensor] | None = None,
        lenient: bool = False,
    ) -> None:
        self.factory = factory
        self.positions = positions
        self.every = every
        self.training = {"always": None, "train": True, "eval": False}[when]
        self.select = select
        self.lenient = lenient  # layers that nobody asked for by name may turn out to hold nothing to read
        self.live = False
        self.paused = False
        self.mask: Tensor | None = None
        self.fired = 0  # layers that have a state, which gives them their order
        self.graphs: set[str] = set()  # compiled graphs in which a layer was first met


class Slot:
    """The statistics of one layer on one device: the running window, and all windows that are closed."""

    def __init__(self, statistic: Statistic, calls: int = 0) -> None:
        self.statistic = statistic
        self.fused = statistic.fused
        if statistic.fused:  # what the operator takes
            self.state: Tensor = statistic.state  # type: ignore[attr-defined]
            self.sigma: float = statistic.outlier_sigma  # type: ignore[attr-defined]
        else:
            with torch.inference_mode(False):
                self.token = torch.zeros((), device=statistic.device)  # see torchprobe.ops.observers
        self.closed: Statistic | None = None
        self.captured = False  # whether a CUDA graph writes to it, too
        self.calls = calls  # of the layer, unless the statistic counts them itself

    def static_tensors(self) -> list[Tensor]:
        """What a compiled graph writes to."""
        return [self.state] if self.fused else [self.token]

    def call_count(self) -> Tensor:
        """How often the layer was called."""
        counter = self.statistic.call_counter
        return torch.tensor(float(self.calls)) if counter is None else counter


def capturing(x: Tensor) -> bool:
    """Whether what is done with ``x`` goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def hold(slot: Slot | None, every: int) -> None:
    """Called for every slot that an operator in the making of a graph writes to.

    Raises:
        RuntimeError: there is no state yet, and one made now would be in the memory of the graph; or the statistic needs Python in every
            call, which a replay does not run.
    """
    if slot is None:
        raise RuntimeError(
            "it is called for the first time while a CUDA graph is captured: start recording before the warm-up runs that come "
            "before a capture, so that its state exists"
        )
    if not slot.statistic.tensors():
        raise RuntimeError(f"{type(slot.statistic).__name__} cannot be captured in a CUDA graph, since it needs Python in every call")
    if every > 1 and not slot.fused:
        raise RuntimeError(f"every={every} cannot be captured in a CUDA graph with {type(slot.statistic).__name__}: record every call")
    if not slot.captured:
        slot.captured = True
        _held.extend(slot.statistic.tensors().values())


@plainly
def keep_contents(slots: Sequence[Slot]) -> Callable[[], None]:
    """Remembers what the captured ones among the slots hold; the result puts it back."""
    states = [tensor for slot in slots if slot.captured for tensor in slot.statistic.tensors().values()]
    before = [state.clone() for state in states]

    @plainly
    def put_back() -> None:
        for state, content in zip(states, before, strict=True):
            state.copy_(content)

    return put_back


def leave(slots: dict[torch.device, Slot]) -> None:
    """Leaves captured states to their graphs, and continues with copies."""
    for device, slot in slots.items():
        if slot.captured:
            slots[device] = Slot(slot.statistic.clone(), slot.calls)
            slots[device].closed = slot.closed
