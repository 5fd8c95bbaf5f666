"""What a guard found, in words: the first nonfinite tensor of a run, and whether it came in or was made there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torchprobe.common.messages import counted, listing, reason
from torchprobe.recording.layers import OUTPUT
from torchprobe.recording.nonfinite import TensorFacts

MADE, CAME, UNSURE = "made here", "came in", "unsure"
UNCOUNTED = "steps were not counted (call rec.step() once a step)"


class NonfiniteError(RuntimeError):
    """A guard with ``on="raise"`` has found a nonfinite activation or gradient; ``report`` is the :class:`Report`."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


class NonfiniteWarning(UserWarning):
    """A guard with ``on="warn"`` has found a nonfinite activation or gradient."""


@dataclass(frozen=True)
class Event:
    """The first nonfinite tensor of one layer.

    Attributes:
        layer: its canonical name; the model itself is ``""``. Of a parameter, the layer that owns it.
        module: the class of the layer.
        kind: "activation", "gradient" (with respect to the output of the layer), or "parameter gradient".
        verdict: "made here" (what went in was finite), "came in", or "unsure".
        because: one sentence that says by what that is known.
        step: how many calls of ``rec.step()`` came before; None if it was never called, so that no one knows.
        call: which call of the layer since the guard was set, from 0. Of a gradient, the call whose output it belongs to. −1: unknown.
        rank: of ``torch.distributed``; 0 without it.
        order: its place in the order of the run of this process.
        training: the mode of the layer.
        outputs, inputs, parameters: what was found in them; only what is nonfinite, or all if ``whole``.
        after: the guarded layer before it in the order of the run, which was finite; None if it was the first.
        name: of the parameter, if it is the gradient of one.
        rows_found, bad_rows: from an accelerator, which keeps no more: the first nonfinite rows, and how many there are.
    """

    layer: str
    module: str
    kind: str
    verdict: str
    because: str
    step: int | None
    call: int
    rank: int
    order: int
    training: bool = True
    outputs: tuple[TensorFacts, ...] = ()
    inputs: tuple[TensorFacts, ...] = ()
    parameters: tuple[TensorFacts, ...] = ()
    after: str | None = None
    name: str = ""
    rows_found: tuple[int, ...] = ()
    bad_rows: int = 0

    @property
    def title(self) -> str:
        """The layer and its class; the model itself is "(output)"."""
        return f"{shown(self.layer)} ({self.module})"

    @property
    def rows(self) -> tuple[int, ...]:
        """The first rows along dimension 0 of the first nonfinite output, or of the gradient."""
        return next((found.rows for found in self.outputs if found.nonfinite), self.rows_found)

    def __str__(self) -> str:
        if self.kind == "parameter gradient":
            head = f"first nonfinite gradient: parameter {self.name!r} of layer {self.title}"
        elif self.kind == "gradient":
            head = f"first nonfinite gradient: with respect to the output of layer {self.title}"
        else:
            head = f"first nonfinite activation: layer {self.title}, {self.verdict}"
        place = [UNCOUNTED if self.step is None else f"step {self.step}", *([f"call {self.call} of the layer"] if self.call >= 0 else [])]
        lines = [head, f"  {', '.join([*place, f'rank {self.rank}', 'training mode' if self.training else 'eval mode'])}"]
        lines.append(f"  {self.because}")
        lines += [f"  {'gradient' if 'gradient' in self.kind else 'output'} {found}" for found in self.outputs]
        if self.bad_rows:
            more = ", …" if self.bad_rows > len(self.rows_found) else ""
            lines.append(f"  {counted(self.bad_rows, 'row')} of it nonfinite: {', '.join(map(str, self.rows_found))}{more}")
        lines += [f"  input {found}" for found in self.inputs]
        broken = [found for found in self.parameters if found.nonfinite]
        lines += [f"  parameter {found}" for found in broken[:4]]
        if not broken and (known := [found for found in self.parameters if found.values]):
            widest = max(known, key=lambda found: max(abs(found.low), abs(found.high)))
            size = max(abs(widest.low), abs(widest.high))
            lines.append(
                f"  its {counted(len(self.parameters), 'parameter')} and buffers are finite; largest |value| {size:.4g}, in {widest.name}"
            )
        if self.after is not None:
            lines.append(f"  finite before it: {shown(self.after)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What a guard found in one alarm.

    Attributes:
        events: the first nonfinite tensor of every layer, in the order of the run.
        followed: names of further layers that were nonfinite in that step, in the order of the run.
        overflows: steps that a ``GradScaler`` skipped before, whose nonfinite gradients were no alarm.
        files: what the flight recorder wrote.
        notes: layers that could not be guarded, and the like.
    """

    events: tuple[Event, ...]
    followed: tuple[str, ...] = ()
    overflows: int = 0
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def first(self) -> Event:
        """Who went bad first."""
        return self.events[0]

    def __str__(self) -> str:
        lines = [f"torchprobe guard: {self.first}"]
        if later := self._later():
            order = "in the order of the backward, the last layer first" if "gradient" in self.first.kind else "in this order"
            lines.append(f"  after it, {order}: {listing([*map(shown, later)])}")
        if self.overflows:
            lines.append(f"  before it, {counted(self.overflows, 'step')} overflowed under the GradScaler and were skipped, as usual")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  written: {file}" for file in self.files]
        return "\n".join(lines)

    def _later(self) -> list[str]:
        """The other layers, each once: the first one may have a nonfinite gradient of a parameter, too."""
        later = self.events[1:]
        if later and later[0].layer == "" and later[0].kind == self.first.kind == "gradient":
            later = later[1:]  # the output of the last layer is that of the model, so this is the same gradient again
        return [name for name in dict.fromkeys([*(event.layer for event in later), *self.followed]) if name != self.first.layer]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`, also of what :func:`torchprobe.recording.flight.read_flight` returns.

        Raises:
            ValueError: it is something else.
        """
        try:
            events = []
            for event in values["events"]:
                tensors = {key: tuple(map(_tensor_facts, event[key])) for key in ("outputs", "inputs", "parameters")}
                events.append(Event(**{**_tuples(event), **tensors}))
            report = cls(**{**_tuples(values), "events": tuple(events)})
            report.first, str(report)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"this is not the report of a guard: {reason(error)}") from error
        return report

    @classmethod
    def of_ranks(cls, reports: Sequence[Report]) -> Report:
        """One report of several ranks. They have no common clock: the earliest step counts, then the place in the order of the rank."""
        events = sorted(
            (event for report in reports for event in report.events), key=lambda event: (event.step or 0, event.order, event.rank)
        )
        followed = dict.fromkeys(name for report in reports for name in report.followed)
        files = tuple(file for report in reports for file in report.files)
        notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
        return cls(tuple(events), tuple(followed), max(report.overflows for report in reports), files, notes)


def _tensor_facts(values: Mapping[str, Any]) -> TensorFacts:
    """JSON knows no nan, so there it is None."""
    edges = {key: math.nan for key in ("low", "high") if values[key] is None}
    return TensorFacts(**{**_tuples(values), **edges})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def silence(ran: int, layers: int, steps: int, gradients: bool) -> str:
    """What it means that a guard has found nothing.

    Args:
        ran: how many of the guarded layers were called.
        layers: how many layers are guarded.
        steps: how many have ended.
        gradients: whether there was a backward.

    >>> silence(2, 3, 4, True)[:79]
    '2 of 3 guarded layers ran in 4 steps. Their outputs and gradients were finite. '
    """
    if not ran:
        return f"none of {counted(layers, 'guarded layer')} has run"
    when = f" in {counted(steps, 'step')}" if steps else f"; {UNCOUNTED}"
    who = f"{ran} of {counted(layers, 'guarded layer')} ran{when}"
    seen = "outputs and gradients were finite" if gradients else "outputs were finite; no gradient was looked at"
    return f"{who}. Their {seen}. If the loss is not, it was made after them: look at the loss."


def shown(layer: str) -> str:
    """The name of a layer in messages.

    >>> shown("fc"), shown("")
    ("'fc'", '(output)')
    """
    return repr(layer) if layer else OUTPUT


def judge(
    inputs: Sequence[TensorFacts],
    parameters: Sequence[TensorFacts],
    batch: Sequence[TensorFacts],
    after: str | None,
    written: Collection[str] = (),
    finite: Collection[str] = (),
) -> tuple[str, str]:
    """The verdict on a nonfinite output, and the sentence that says by what it is known.

    An input with −inf and no other nonfinite value may be an additive mask, which is legitimate. So it does not show that the damage came
    in; it is unsure, unless the input is called a mask.

    Args:
        inputs: of the layer.
        parameters: of the layer.
        batch: nonfinite inputs of the whole model.
        after: the guarded layer before it.
        written: names of inputs that the layer has written to, or may have: what is in them now may have been made here.
        finite: those of them that are known to have been finite before.
    """
    kept = [found for found in inputs if found.name not in written]
    wrong = [found for found in kept if found.bad(frozenset({"-inf"}))]
    if wrong:
        source = f"its input {wrong[0].name!r} was nonfinite already"
        if batch:
            return CAME, f"{source}: it is in the batch; {batch[0]}"
        if after is None:
            return CAME, f"{source}, and no guarded layer ran before it: look at the batch, or guard the layers before it"
        return CAME, f"{source}: it was made after {shown(after)}, outside of the guarded layers; guard '**' to see more of them"
    changed = [found.name for found in inputs if found.name in written and found.nonfinite]
    if unknown := [name for name in changed if name not in finite]:
        return UNSURE, f"its input {unknown[0]!r} is nonfinite now, but is what it writes to or gives back: it may have been finite before"
    if broken := [found for found in parameters if found.nonfinite]:
        return MADE, f"its inputs were finite, but its parameter {broken[0].name!r} was nonfinite: look at the step before"
    if changed:
        return MADE, f"its input {changed[0]!r} was finite, and it writes into it"
    masks = [found for found in kept if found.minus_inf]
    if any("mask" not in found.name.lower() for found in masks):
        unclear = next(found for found in masks if "mask" not in found.name.lower())
        return UNSURE, f"its input {unclear.name!r} held −inf and nothing else that is nonfinite: it may be a mask, or the cause"
    if masks:
        return MADE, f"its inputs were finite, but for −inf in {masks[0].name!r}; a row of a mask that is −inf everywhere gives nan"
    return MADE, "its inputs were finite, and so were its parameters" if parameters else "its inputs were finite"


def judge_flags(
    nonfinite: bool, minus_inf: bool, parameters: Sequence[TensorFacts], after: str | None, written: bool = False
) -> tuple[str, str]:
    """As :func:`judge`, where an accelerator has kept of the inputs only whether they held nan or +inf, or −inf.

    Args:
        nonfinite: an input held nan or +inf.
        minus_inf: an input held −inf.
        parameters: of the layer, read when the alarm arrived.
        after: the guarded layer before it.
        written: whether the layer has written into an input, or may have.
    """
    if nonfinite and written:
        return UNSURE, "an input is nonfinite now, but is what it writes to or gives back: it may have been finite before"
    if nonfinite:
        if after is None:
            return (
                CAME,
                "an input was nonfinite already, and no guarded layer ran before it: look at the batch, or guard the layers before it",
            )
        return CAME, f"an input was nonfinite already: it was made after {shown(after)}, outside of the guarded layers"
    if broken := [found for found in parameters if found.nonfinite]:
        return MADE, f"its inputs were finite; its parameter {broken[0].name!r} is nonfinite by now, which is the cause or the consequence"
    if minus_inf:
        return UNSURE, "an input held −inf and nothing else that is nonfinite: it may be a mask, or the cause"
    return MADE, "its inputs were finite"
