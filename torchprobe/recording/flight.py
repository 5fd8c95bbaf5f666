"""The flight recorder: what is written of an alarm.

While all is well it keeps four numbers of every layer and step in a ring on the device, which come from the states of Moments; nothing
waits for them. Of the first nonfinite tensor it keeps the rows that hold it, and what went in there. An alarm writes a safetensors file,
which :func:`read_flight` reads, and a page.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.common.messages import reason
from torchprobe.common.storage import File, write
from torchprobe.ops import layout, states
from torchprobe.recording.bank import Bank
from torchprobe.recording.flight_page import write_page
from torchprobe.recording.guard_hooks import Named
from torchprobe.recording.nonfinite import readable
from torchprobe.recording.verdicts import Event, Report
from torchprobe.recording.windows import without_grad

KIND = "guard report"
STEPS = 64
"""The length of the ring."""
_ENTRIES = 2 * STEPS + 1  # a window may end within a step, and the first entry is only what the second one began with
MOST_BYTES = 1 << 26
"""Of the rows that are kept."""
FIELDS = ("values", "rms", "abs_max", "nonfinite")
"""Of every layer and step in the ring: finite values in the step, the root of their mean square, the largest abs(x) of the window, and the
nonfinite values of the window."""

Array = NDArray[np.float64]


class Flight:
    """Keeps what an alarm needs.

    Args:
        folder: for the files; it is made when it is needed.
        bank: of the recorder.
    """

    def __init__(self, folder: Path, bank: Bank) -> None:
        self.folder = folder
        self._bank = bank
        self._rings: dict[torch.device, _Ring] = {}
        self._window = 0
        self._trouble = ""
        self._kept: dict[str, Tensor] = {}
        self._left_out: list[str] = []

    def end_window(self, step: int) -> None:
        """A window is about to end."""
        self.note(step)
        self._window += 1

    def note(self, step: int) -> None:
        """Adds a step to the ring, or the part of one before a window ends. If that fails, the run goes on, and the report says so."""
        try:
            self._note(step)
        except Exception as error:
            self._trouble = reason(error)

    @without_grad
    def _note(self, step: int) -> None:
        groups: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
        for stream in list(self._bank.streams()):
            for device, slot in list(stream.slots.items()):
                if slot.fused:
                    groups.setdefault((device, slot.state.shape[0]), []).append((stream.name, slot.state))
        found: dict[torch.device, list[tuple[list[str], Tensor]]] = {}
        for (device, _), members in groups.items():
            found.setdefault(device, []).append(([name for name, _ in members], _summary(states.read([state for _, state in members]))))
        for device, parts in found.items():
            names = [name for group, _ in parts for name in group]
            self._rings.setdefault(device, _Ring(device)).add((step, self._window), names, torch.cat([numbers for _, numbers in parts]))

    @without_grad
    def keep(self, inputs: Named, outputs: Named) -> None:
        """Keeps the rows of the first nonfinite output, and of what went in. Tensors without these rows are kept whole, if they are
        small."""
        self._kept, self._left_out = {}, []
        results = [(name, x) for name, tensor in outputs if (x := readable(tensor)) is not None]
        wrong = next((x for _, x in results if not x.isfinite().all()), None)
        if wrong is None:
            return
        length = wrong.shape[0] if wrong.dim() > 0 else -1
        rows = (~wrong.isfinite()).reshape(max(length, 1), -1).any(1).nonzero().flatten() if length > 0 else None
        room = MOST_BYTES
        for prefix, named in (("output", results), ("input", [(name, readable(x)) for name, x in inputs])):
            for name, x in named:
                if x is None:
                    continue
                part = x
                if rows is not None and x.dim() > 0 and x.shape[0] == length:
                    size = max(1, x.nbytes // length)
                    part = x[rows[: room // size]]
                if part.nbytes > room or (part.numel() == 0 and x.numel() > 0):
                    self._left_out.append(f"{prefix} {name}".strip())
                    continue
                room -= part.nbytes
                self._kept[f"{prefix}/{name}"] = part.to("cpu", copy=True).contiguous()
        if rows is not None:
            self._kept["rows"] = rows.cpu()

    def keep_samples(self, samples: dict[str, Tensor]) -> None:
        """Keeps what an accelerator has sampled."""
        self._kept, self._left_out = dict(samples), []

    def write(self, report: Report) -> Report:
        """Writes the files; returns the report with their names, or with the reason why there are none."""
        steps, names, numbers = self.last_steps()
        files = []
        notes = [f"not every step of the ring was kept: {self._trouble}"] if self._trouble else []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stem = self._stem(report.first)
            tensors = {**self._kept, "steps": torch.tensor(steps, dtype=torch.int64), "last": torch.from_numpy(numbers)}
            values = {
                "report": _plain(report.to_dict()),
                "text": str(report),
                "layers": names,
                "fields": list(FIELDS),
                "left_out": self._left_out,
            }
            write(self.folder / f"{stem}.safetensors", KIND, tensors, values)
            files.append(str(self.folder / f"{stem}.safetensors"))
            write_page(self.folder / f"{stem}.html", report, steps, names, FIELDS, numbers)
            files.append(str(self.folder / f"{stem}.html"))
        except Exception as error:  # a full disk, or no jinja2: the alarm is told all the same
            notes.append(f"{'the page' if files else 'the flight recorder'} could not be written: {reason(error)}")
        return replace(report, files=tuple(files), notes=(*report.notes, *notes))

    def _stem(self, event: Event) -> str:
        """The name of the files, which replace no others: those of another guard, of an earlier run, or of a loop without ``step()``."""
        stem = f"nonfinite-{'' if event.step is None else f'step{event.step}-'}rank{event.rank}"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not any((self.folder / f"{name}.{kind}").exists() for kind in ("safetensors", "html")))

    def last_steps(self) -> tuple[list[int], list[str], Array]:
        """The steps in the ring, the layers, and the :data:`FIELDS`, (steps, layers, fields). It waits for the device."""
        read = [ring.read() for ring in self._rings.values()]
        if not read:
            return [], [], np.empty((0, 0, len(FIELDS)))
        steps = read[0][0]
        together = [(names, numbers) for found, names, numbers in read if found == steps]
        return steps, [name for names, _ in together for name in names], np.concatenate([numbers for _, numbers in together], 1)


class _Ring:
    """The last steps of the layers on one device: counts and sums since the beginning of the window."""

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []
        self.entries: list[tuple[int, int]] = []  # the step and the window of each entry
        self.added = 0
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.memory = torch.full((_ENTRIES, 0, len(FIELDS)), math.nan, device=device, dtype=dtype)

    def add(self, entry: tuple[int, int], names: list[str], numbers: Tensor) -> None:
        if new := [name for name in names if name not in self.names]:  # layers that fired for the first time
            self.names += new
            self.memory = torch.cat([self.memory, self.memory.new_full((_ENTRIES, len(new), len(FIELDS)), math.nan)], 1)
        if names != self.names:
            numbers = numbers[[names.index(name) for name in self.names]]
        self.memory[self.added % _ENTRIES].copy_(numbers)
        self.added += 1
        self.entries = [*self.entries, entry][-_ENTRIES:]

    def read(self) -> tuple[list[int], list[str], Array]:
        first = self.added - len(self.entries)
        held = self.memory.to("cpu", torch.float64).numpy()[[(first + index) % _ENTRIES for index in range(len(self.entries))]]
        values: dict[int, Array] = {}
        for index, (step, window) in enumerate(self.entries):
            now = held[index].copy()
            if index and self.entries[index - 1][1] == window:  # the sums go on
                earlier = held[index - 1, :, :2]
                now[:, :2] -= np.where(earlier <= now[:, :2], earlier, 0)
                idle = (now[:, 0] == 0) & (held[index, :, 3] == held[index - 1, :, 3])  # the window is not of this step
                now[idle, 2:] = math.nan, 0
            elif index == 0 and first > 0:
                continue  # what came before is not known any more
            if step in values:
                now[:, :2] += values[step][:, :2]
                now[:, 2] = np.fmax(now[:, 2], values[step][:, 2])
                now[:, 3] += values[step][:, 3] if self.entries[index - 1][1] != window else 0
            values[step] = now
        steps = list(values)[-STEPS:]
        found = np.stack([values[step] for step in steps]) if steps else np.empty((0, len(self.names), len(FIELDS)))
        with np.errstate(divide="ignore", invalid="ignore"):
            found[:, :, 1] = np.sqrt(np.maximum(found[:, :, 1], 0) / found[:, :, 0])
        return steps, self.names, found


def _summary(contents: Tensor) -> Tensor:
    """Values, their sum of squares, the largest abs(x) and nonfinite values of states (n, slots): (n, 4)."""
    rows = dict(zip(layout.ROWS, layout.rows(contents).unbind(-2), strict=True))
    count = rows["count"]
    square = (rows["m2"] + count * rows["mean"].square()).sum(-1)
    largest = torch.maximum(rows["max"].abs(), rows["min"].abs()).where(count > 0, 0).amax(-1)
    return torch.stack([count.sum(-1), square, largest, rows["nonfinite"].sum(-1)], -1)


def _plain(value: Any) -> Any:
    """Without nan and inf, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_flight(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the flight recorder has written: plain values, and tensors.

    Values: ``report`` (see :class:`Report`), ``text``, ``layers``, ``fields``, ``left_out`` (tensors that were too large). Tensors:
    ``steps`` and ``last`` (steps, layers, fields), the last steps; ``rows``, the indices of the rows that were kept, and these rows as
    ``output/…`` and ``input/…``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another one, or damaged.
    """
    file = File(path, KIND, checked=True)
    values = {
        key: file.value(key, kind)
        for key, kind in (("report", dict), ("text", str), ("layers", list), ("fields", list), ("left_out", list))
    }
    return values, {key: file.tensor(key) for key in file.keys}
