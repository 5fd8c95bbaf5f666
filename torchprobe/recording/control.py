"""What the hooks of one recorder share, and the state of one layer on one device.

A CUDA graph that is captured while recording holds the addresses of the states it writes to. A replay runs the operators again, but none of
our Python. So a state is outside the memory of the graph. It is never freed, because we cannot know when the graph is deleted. When the
recording ends, it continues with a copy of the state. What replays add during a pause is subtracted again.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from enum import IntFlag, auto

import torch
from torch import Tensor

from torchprobe.recording.trail import Trail
from torchprobe.recording.windows import without_grad
from torchprobe.statistics import Statistic
from torchprobe.statistics.factory import Factory

_held: list[Tensor] = []  # states that a CUDA graph may still write to; they are never freed


class Skipped(IntFlag):
    """Why a call was not read, for the report at the end."""

    PAUSED = auto()
    OTHER_MODE = auto()
    RECOMPUTED = auto()
    NO_TENSOR = auto()
    NO_POSITIONS = auto()
    NOT_REAL = auto()
    NO_GRADIENT = auto()
    WAITING = auto()
    TRACED = auto()
    NO_PARAMETER = auto()


NOTHING_TO_READ = Skipped.NO_TENSOR | Skipped.NO_POSITIONS | Skipped.NO_PARAMETER
"""The layer was not named by the user, and its output holds nothing to read."""


class Control:
    """What all hooks of one recorder share."""

    def __init__(
        self,
        factory: Factory,
        trail: Trail,
        positions: str = "all",
        every: int = 1,
        when: str = "always",
        select: Callable[..., Tensor] | None = None,
        strict: bool = False,
    ) -> None:
        self.factory = factory
        self.trail = trail
        self.positions = positions
        self.every = every
        self.training = {"always": None, "train": True, "eval": False}[when]
        self.select = select
        self.strict = strict  # whether whatever cannot be read is an error
        self.live = False
        self.paused = False
        self.skipping = False  # whether `every` leaves this step out
        self.open = False  # live, and neither paused nor skipping: the one flag that hooks look at
        self.steps: int | None = None  # closed by `step`; None while `every` counts calls
        self.stride = every  # of steps
        self.masks: dict[str, Tensor] = {}  # by name or glob
        self.swapped: dict[int, bool | None] = {}  # id(layer) → whether tokens come before the batch
        self.places = itertools.count()  # of layers that have a state, in their order; threads may take them
        self.graphs: set[str] = set()  # compiled graphs that met a layer for the first time
        self.warned: set[str] = set()  # causes that a warning has told

    def update(self) -> None:
        self.open = self.live and not self.paused and not self.skipping

    def end_step(self, number: int | None = None) -> bool:
        """Ends a step: the ``number``-th, or one more than before. In the first call ``every`` begins to count steps; the result says
        whether that changes what is read."""
        first = self.steps is None
        if first:
            self.every = 1
        self.steps = (self.steps or 0) + 1 if number is None else number
        self.skipping = self.steps % self.stride != 0
        self.update()
        return first and self.stride > 1


class Slot:
    """The statistics of one layer on one device: the running window, and all closed windows."""

    def __init__(self, statistic: Statistic, calls: int = 0) -> None:
        self.statistic = statistic
        self.fused = statistic.fused
        if statistic.fused:  # the arguments of the operator
            self.state: Tensor = statistic.state
            self.sigma: float = statistic.outlier_sigma
        else:
            with torch.inference_mode(False):
                self.token = torch.zeros((), device=statistic.device)  # see torchprobe.ops.observers
        self.closed: Statistic | None = None
        self.captured = False  # whether a CUDA graph writes to it
        self.calls = calls  # of the layer, unless the statistic counts them itself

    def static_tensors(self) -> list[Tensor]:
        """The tensors that a compiled graph writes to."""
        return [self.state] if self.fused else [self.token]

    def update(self, vectors: Tensor, feature_dim: int, mask: Tensor | None) -> None:
        """Updates a statistic without an operator. An error in its code names it."""
        try:
            if mask is None:
                self.statistic.update(vectors, feature_dim)  # a class with the verbs of the earlier protocol may take no mask
            else:
                self.statistic.update(vectors, feature_dim, mask=mask)
        except (AttributeError, ArithmeticError, AssertionError, LookupError, NameError) as error:
            raise RuntimeError(f"{type(self.statistic).__name__} raised {type(error).__name__}: {error}") from error

    def call_count(self) -> Tensor:
        """How often the layer was called."""
        counter = self.statistic.call_counter
        return torch.tensor(float(self.calls), device="cpu") if counter is None else counter


def capturing(x: Tensor) -> bool:
    """Whether operations on ``x`` are being captured in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def hold(slot: Slot | None, every: int) -> None:
    """Keeps the state of a slot for a CUDA graph that is being captured.

    Raises:
        RuntimeError: there is no state yet, and a new one would be in the memory of the graph; or the statistic needs Python in every
            call, which a replay does not run.
    """
    if slot is None:
        raise RuntimeError(
            "it is called for the first time while a CUDA graph is captured: start recording before the warm-up runs, "
            "so that its state exists before the capture"
        )
    if not slot.statistic.capturable:
        raise RuntimeError(f"{type(slot.statistic).__name__} cannot be captured in a CUDA graph, since it needs Python in every call")
    if every > 1 and not slot.fused:
        raise RuntimeError(f"every={every} cannot be captured in a CUDA graph with {type(slot.statistic).__name__}: record every call")
    if not slot.captured:
        slot.captured = True
        _held.extend(slot.statistic.tensors().values())


@without_grad
def keep_contents(slots: Sequence[Slot], everything: bool = False) -> Callable[[], None]:
    """Remembers the contents of the captured slots, or of all; the result restores them."""
    states = [tensor for slot in slots if everything or slot.captured for tensor in slot.statistic.tensors().values()]
    before = [state.clone() for state in states]

    @without_grad
    def restore() -> None:
        for state, content in zip(states, before, strict=True):
            state.copy_(content)

    return restore


def leave(slots: dict[torch.device, Slot]) -> None:
    """Leaves captured states to their graphs; the slots continue with copies."""
    for device, slot in slots.items():
        if slot.captured:
            slots[device] = Slot(slot.statistic.clone(), slot.calls)
            slots[device].closed = slot.closed


def abandon(reference: weakref.ref[Control], undo: list[Callable[[], object]]) -> None:
    """What remains to be done when a running recorder is deleted."""
    if (state := reference()) is not None:
        state.live = False
        state.update()
    while undo:
        undo.pop()()


@contextlib.contextmanager
def with_masks(state: Control, masks_before: dict[str, Tensor]) -> Iterator[None]:
    """The masks of before come back at the end of the block."""
    try:
        yield
    finally:
        state.masks = masks_before
