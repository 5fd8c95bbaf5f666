"""Who went bad first: a guard finds the first nonfinite activation or gradient of a run."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import counted, listing
from torchprobe.common.threads import ordered
from torchprobe.recording import compiled
from torchprobe.recording.bank import Bank
from torchprobe.recording.control import Control
from torchprobe.recording.flight import Flight
from torchprobe.recording.guard_device import Found, Latches
from torchprobe.recording.guard_hooks import Batch, Named, Watch
from torchprobe.recording.guard_options import GuardOptions
from torchprobe.recording.guard_scaler import ScalerRule
from torchprobe.recording.guard_writes import Written
from torchprobe.recording.hook import takes_hooks
from torchprobe.recording.layers import Layer, named_layers, select_layers
from torchprobe.recording.nonfinite import TensorFacts, facts, readable, weights_of
from torchprobe.recording.structure import writes
from torchprobe.recording.verdicts import CAME, UNSURE, Event, NonfiniteError, NonfiniteWarning, Report, judge, judge_flags, shown, silence

_WHOLE = 4  # events of an alarm that are described in full
_MOST = 64  # reports that are kept
_MINUS_INF = frozenset({"-inf"})


class Guard:
    """Finds the first nonfinite activation or gradient; :meth:`torchprobe.Recorder.guard` makes it and describes the arguments.

    What is found during a step is told at its end. An alarm is told once; when a step was finite again, the next one is told, too.
    ``str(guard)`` says what it has looked at so far, and what it means that it has found nothing. It does not wait for a device.

    Attributes:
        reports: the alarms so far, the newest 64.
    """

    def __init__(self, model: nn.Module, control: Control, bank: Bank, options: GuardOptions) -> None:
        chosen = select_layers(model, options.layers, None, options.exclude)
        allowed = options.allowed(chosen)
        self.control = control
        self.on = options.on
        self.reports: list[Report] = []
        self._model = weakref.ref(model)
        self._watches = [Watch(layer, self, kinds, options.gradients) for layer, kinds in zip(chosen, allowed, strict=True)]
        self._sentinels = _sentinels(model, chosen, self) if options.gradients else []
        self._batch = Batch(self)
        self._flight = None if options.dump is None else Flight(Path(options.dump), bank)
        self._latches = Latches(sampled=options.dump is not None)
        self._tokens: dict[torch.device, Tensor] = {}
        self._rule = ScalerRule(options.scaler)
        self._uncovered: dict[str, str] = {}
        self._steps = 0  # that it has seen the end of
        self._backward = False  # a gradient was looked at
        self._on_host = False  # something was found without an accelerator
        self._alarmed = False  # the running trouble was told
        self._events: list[Event] = []
        self._followed: list[str] = []
        self._untold: list[Report | None] = []  # known already, because someone asked
        self._order = 0
        self._threads = threading.local()  # .last: the layer before, in the calls of one thread
        self._last_gradient: tuple[int, str | None] = -1, None  # the backward it belongs to

    # -- starting and stopping -----------------------------------------------------------------------------------------

    def place(self) -> list[Callable[[], object]]:
        """Places the hooks; returns what removes them."""
        modules = {type(module) for watch in self._watches if (module := watch.layer.alive) is not None}
        compiled.drop_graphs(modules)
        handles: list[Any] = []
        model = self._model()
        root = None if model is None else named_layers(model)[""].module
        if root is not None and takes_hooks(root):
            handles += self._batch.place(root)
        for watch in self._watches:
            if (module := watch.layer.alive) is not None and takes_hooks(module):
                handles += watch.place(module)
            else:
                self.uncovered(watch, "it takes no hooks: a scripted module, or one that was deleted")
        for watch in self._sentinels:
            if (module := watch.layer.alive) is not None:
                handles += watch.place_on_parameters(module)
        return [*(handle.remove for handle in handles), *(watch.release for watch in self._watches)]

    @property
    def layers(self) -> list[str]:
        """The names of the guarded layers."""
        return [watch.layer.name for watch in self._watches]

    def __str__(self) -> str:
        ran = sum(watch.calls > 0 for watch in self._watches)
        told = silence(ran, len(self._watches), self._steps, self._backward)
        if self._events and not self._alarmed:
            told = "something nonfinite was found in the running step: see rec.guard_report()"
        elif self.reports:
            told = f"{counted(len(self.reports), 'alarm')}, the newest:\n{self.reports[-1]}"
        overflows = f"\n  {counted(self.overflows, 'step')} overflowed under the GradScaler, as usual" if self.overflows else ""
        return "\n".join([f"torchprobe guard: {told}{overflows}", *self._notes()])

    # -- what the hooks tell -------------------------------------------------------------------------------------------

    @ordered
    def activation(self, watch: Watch, module: nn.Module | None, inputs: Named, outputs: Named, written: Written) -> None:
        """Outputs on the CPU are nonfinite."""
        self.event(watch, "activation", watch.calls - 1, watch.layer.module if module is None else module, inputs, outputs, written)

    def event(self, watch: Watch, kind: str, call: int, module: nn.Module, inputs: Named, outputs: Named, written: Written) -> None:
        """Notes the first nonfinite output of a layer in this step."""
        order = self._next()
        if self._alarmed or len(self._events) >= _WHOLE:
            self._followed.append(watch.layer.name)
            return
        given, found = _facts_of(inputs), _facts_of(outputs)
        weights = weights_of(module)
        last: str | None = getattr(self._threads, "last", None)
        batch = [found for found in _facts_of(self._batch.tensors()) if found.bad(_MINUS_INF)]
        gave, count = getattr(self._threads, "gave", (lambda: None, None))
        finite = {name for name, x in inputs if x is gave() and name in written and written[name] == count is not None}
        verdict, because = judge(given, weights, batch, last, written, finite)
        self._events.append(
            Event(
                watch.layer.name,
                watch.layer.kind,
                kind,
                verdict,
                because,
                self.step,
                call,
                _rank(),
                order,
                module.training,
                tuple(found),
                tuple(given),
                tuple(weights),
                last,
            )
        )
        if self._flight is not None and len(self._events) == 1:
            self._flight.keep(inputs, outputs)

    def begin(self) -> None:
        """The model is called."""
        self._threads.last = None
        self._threads.gave = lambda: None, None

    def finite(self, watch: Watch, outputs: Named) -> None:
        """A call gave finite outputs only."""
        if outputs:
            self._threads.gave = weakref.ref(outputs[0][1]), writes(outputs[0][1])
        self._threads.last = watch.layer.name or None  # the model is the last of a call

    @ordered
    def gradient(self, watch: Watch, call: int, grad: Tensor, name: str) -> None:
        """A gradient on the CPU is nonfinite."""
        order, layer = self._next(), watch.layer
        if any(event.kind == "activation" for event in self._events):
            return  # nonfinite activations have nonfinite gradients
        if self._alarmed or len(self._events) >= _WHOLE:
            self._followed.append(layer.name)
            return
        backward, before = self._last_gradient
        before = before if backward == torch._C._current_graph_task_id() else None
        training = layer.module.training
        kind = "parameter gradient" if name else "gradient"
        self._events.append(
            Event(
                layer.name,
                layer.kind,
                kind,
                UNSURE if name else CAME,
                backward_cause(layer.name, name, before, bool(self._tokens)),
                self.step,
                call,
                _rank(),
                order,
                training,
                (facts("", grad),),
                name=name,
                after=before,
            )
        )
        if self._flight is not None and len(self._events) == 1:
            self._flight.keep((), [("gradient", grad)])

    def finite_gradient(self, watch: Watch, name: str) -> None:
        """A gradient was finite."""
        self._backward = True
        where = f"parameter {name!r} of {shown(watch.layer.name)}" if name else f"the output of {shown(watch.layer.name)}"
        self._last_gradient = torch._C._current_graph_task_id(), where

    def latch(self, watch: Watch, call: int, inputs: Named, outputs: Named, backward: bool, written: bool = False) -> None:
        """Looks at tensors on an accelerator, without waiting for it."""
        self._backward = self._backward or backward
        self._latches.look(watch, inputs, outputs, backward, written)

    @ordered
    def token(self, device: torch.device) -> Tensor:
        """The number that keeps the calls of a compiled graph in order."""
        if device not in self._tokens:
            with torch.inference_mode(False), torch.no_grad():
                self._tokens[device] = torch.zeros((), device=device, dtype=torch.float32)
            compiled.make_static(self._tokens[device])
        compiled.allow_graphs(self.control.graphs)
        return self._tokens[device]

    def uncovered(self, watch: Watch, why: str) -> None:
        """Something could not be looked at."""
        self._uncovered.setdefault(watch.layer.name, why)

    def _next(self) -> int:
        self._order += 1
        self._on_host = True
        return self._order

    @property
    def step(self) -> int:
        """How many steps have ended."""
        return self.control.steps or 0

    # -- telling -------------------------------------------------------------------------------------------------------

    @property
    def overflows(self) -> int:
        """Steps whose gradients overflowed under the ``GradScaler``, which was no alarm."""
        return self._rule.overflows

    def end_step(self) -> None:
        """Tells what this step has found, or on an accelerator what has arrived of earlier ones."""
        self._steps += 1
        if self._flight is not None:
            self._flight.note(self.step)
        self._latches.send(self.step, self._rule.scaler)
        self.check(ended=True)

    def end_window(self) -> None:
        """A window is about to end."""
        if self._flight is not None:
            self._flight.end_window(self.step)

    @ordered
    def check(self, ended: bool = False, wait: bool = False, raising: bool = True, stacklevel: int = 7) -> None:
        """Tells an alarm, if there is one.

        Args:
            ended: a step has ended.
            wait: for the accelerator.
            raising: whether ``on="raise"`` may raise; otherwise it warns.
            stacklevel: of the warning, to point at the line of the user.
        """
        reports, self._untold = [*self._untold, *self._arrived(wait)], []
        if not self._latches.used or self._on_host:
            reports.append(self._decide(ended, None))
        for report in reports:
            if report is not None:
                self._tell(report, raising, stacklevel)

    @ordered
    def peek(self) -> Report | None:
        """What is known now, without telling it: of the running trouble, else the newest alarm."""
        if self._rule.scaler is None:  # with one, only the end of a step can tell an overflow
            self._latches.send(self.step)
            self._untold += self._arrived(wait=True)
        if self._events and not self._alarmed and not (self._rule.scaler is not None and self._gradients_only()):
            return self._report(write=False)
        return self.reports[-1] if self.reports else None

    def close(self, raising: bool) -> None:
        """The end of the recording."""
        self._latches.send(self.step, self._rule.scaler)
        self.check(ended=True, wait=True, raising=raising, stacklevel=8)
        if self._uncovered:
            named = [f"{shown(name)} ({why})" for name, why in self._uncovered.items()]
            warnings.warn(f"torchprobe guard: not every call of these layers was guarded: {listing(named)}", NonfiniteWarning, stacklevel=5)
            self._uncovered = {}

    def _arrived(self, wait: bool) -> list[Report | None]:
        """The alarms of steps that have arrived from an accelerator."""
        reports = list[Report | None]()
        for arrived in self._latches.collect(wait):
            forward = any(not found.backward for found in arrived.found)
            for found in arrived.found:
                if not (forward and found.backward):  # nonfinite activations have nonfinite gradients
                    self._take(found, arrived.step)
            reports.append(self._decide(True, arrived.scale))
        return reports

    def _take(self, found: Found, step: int) -> None:
        """Notes what an accelerator has found. Of the numbers only the rows are known."""
        if self._alarmed or len(self._events) >= _WHOLE:
            self._followed.append(found.watch.layer.name)
            return
        layer, module = found.watch.layer, found.watch.layer.alive
        before = None if found.before is None else found.before.layer.name
        weights: list[TensorFacts] = []
        if found.backward:
            kind = "parameter gradient" if found.name else "gradient"
            verdict = UNSURE if found.name else CAME
            where = None if before is None else f"the output of {shown(before)}"
            because = backward_cause(layer.name, found.name, where, bool(self._tokens))
        else:
            weights = [] if module is None else weights_of(module)
            kind, (verdict, because) = "activation", judge_flags(found.input, found.minus_inf, weights, before, found.written)
        training = module is None or module.training
        details = (tuple[TensorFacts, ...](), tuple[TensorFacts, ...](), tuple(weights), before, found.name, found.rows, found.count)
        event = Event(layer.name, layer.kind, kind, verdict, because, step, found.call, _rank(), found.clock, training, *details)
        self._events.append(event)
        if self._flight is not None and len(self._events) == 1:
            self._flight.keep_samples(self._latches.samples(found))

    def _decide(self, ended: bool, scale: float | None) -> Report | None:
        """What the running step, or one that has arrived, has come to."""
        judgment = self._rule.judge(bool(self._events) and self._gradients_only(), ended, scale)
        report = None
        if self._events and judgment == "alarm" and not self._alarmed:
            report = self._report(write=True)
            self.reports = [*self.reports, report][-_MOST:]
            self._alarmed = True
        if ended and judgment != "wait":
            if self._events or self._followed:
                self._latches.forget()
            else:
                self._alarmed = False  # a step was finite again
            self._forget()
        return report

    def _gradients_only(self) -> bool:
        return all(event.kind != "activation" for event in self._events)

    def _forget(self) -> None:
        self._events, self._followed, self._on_host = [], [], False
        self._threads.last = None
        for watch in (*self._watches, *self._sentinels):
            watch.seen = watch.seen_gradient = False

    def _report(self, write: bool) -> Report:
        events = tuple(sorted(self._events, key=lambda event: event.order))
        if self.control.steps is None and not self._steps:
            events = tuple(replace(event, step=None) for event in events)
        files, notes = tuple[str, ...](), tuple(self._notes())
        if self._rule.scaler is None and events[0].kind != "activation" and events[0].outputs and events[0].outputs[0].dtype == "float16":
            notes = (*notes, "gradients in float16 overflow now and then under a GradScaler: pass guard(scaler=scaler)")
        report = Report(events, tuple(self._followed), self.overflows, files, notes)
        return report if self._flight is None or not write else self._flight.write(report)

    def _notes(self) -> list[str]:
        return [f"not guarded in every call: {shown(name)}, {why}" for name, why in self._uncovered.items()]

    def _tell(self, report: Report, raising: bool, stacklevel: int) -> None:
        if callable(self.on):
            self.on(report)
        elif self.on == "raise" and raising:
            raise NonfiniteError(report)
        else:
            warnings.warn(str(report), NonfiniteWarning, stacklevel=stacklevel)


def backward_cause(layer: str, name: str, before: str | None, compiled_graphs: bool) -> str:
    """Where a nonfinite gradient was made, as far as that is known; ``before``: the last finite one of this backward."""
    if name and compiled_graphs:
        return "parameters in compiled graphs get their gradients in no particular order, so others may come before it in the backward"
    if name:
        return f"it was made in the backward between {before} and here" if before else "no gradient of this backward was seen before it"
    if before:
        return f"it came in: it was made in the backward of what runs after {shown(layer)}; the gradient at {before} was finite"
    return "it came in, and no gradient of this backward was seen before it: look at the loss, or at what runs after this layer"


def _facts_of(tensors: Named) -> list[TensorFacts]:
    return [facts(name, x) for name, tensor in tensors if (x := readable(tensor)) is not None]


def _sentinels(model: nn.Module, chosen: Sequence[Layer], guard: Guard) -> list[Watch]:
    """One for each module inside of the guarded layers."""
    inside = {id(module) for layer in chosen for module in layer.module.modules()}
    layers = {id(layer): layer for layer in named_layers(model).values()}.values()
    return [Watch(layer, guard) for layer in layers if id(layer.module) in inside]


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
