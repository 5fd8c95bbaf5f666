"""What runs beside the statistics of one recorder: its guards, and its watches for jumps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torchprobe.recording.bank import Bank
from torchprobe.recording.control import Control
from torchprobe.recording.guard import Guard
from torchprobe.recording.guard_options import GuardOptions
from torchprobe.recording.history import History, Step
from torchprobe.recording.jumps import Jumps
from torchprobe.recording.transfer import Part


class Watchers:
    """The guards of a recorder, and when they tell what they have found.

    Args:
        model: which is recorded; it is not kept alive.
        control, bank: of the recorder.
        guard: the argument of ``record``: False, True for a guard that warns, its ``on``, or its options.
    """

    def __init__(self, model: nn.Module, control: Control, bank: Bank, guard: Any = False) -> None:
        self.control = control
        self.bank = bank
        self.guards: list[Guard] = []
        self.jumps: list[Jumps] = []
        self._model = weakref.ref(model)
        if (options := GuardOptions.of_record(guard)) is not None:
            self.guard(options)

    def guard(self, options: GuardOptions) -> Guard:
        """Makes a guard, by default of the recorded layers. Its hooks are placed later: see :meth:`Guard.place`."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this recorder no longer exists")
        if options.layers is None:
            names = {hook.layer.name for hook in self.bank.hooks.values()}
            options = replace(options, layers=lambda name, module: name in names)
        self.guards.append(Guard(model, self.control, self.bank, options))
        return self.guards[-1]

    def place(self) -> list[Callable[[], object]]:
        """Places the hooks of all; returns what removes them."""
        return [undo for guard in self.guards for undo in guard.place()]

    def end_step(self) -> None:
        """A step has ended."""
        for jumps in self.jumps:
            jumps.tell(jumps.collect())
        for guard in self.guards:
            guard.end_step()

    def end_window(self) -> None:
        """A window is about to end."""
        for guard in self.guards:
            guard.end_window()

    def window(self, history: History, step: Step, names: list[str], parts: Sequence[Part]) -> None:
        """A window is being closed: its summaries, still on the device. Nothing is told yet."""
        for jumps in self.jumps:
            jumps.put(step, parts)
        history.append(step, names, parts)

    def window_closed(self) -> None:
        """A window was closed."""
        for jumps in self.jumps:
            jumps.tell(jumps.collect())
        for guard in self.guards:
            guard.check(ended=self.control.steps is None)

    def end(self, raising: bool) -> None:
        """The recording has ended."""
        for jumps in self.jumps:
            jumps.tell(jumps.collect(wait=True))
        for guard in self.guards:
            guard.close(raising)
