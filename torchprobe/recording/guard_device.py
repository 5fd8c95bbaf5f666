"""The guard on an accelerator: what a call finds stays there, and is read when it has arrived on the host.

For each layer there is a row of numbers on its device, which the first nonfinite call of a layer writes; later ones do not change it. At
the end of a step all rows start to the host, and a later step collects them: nothing waits. A call costs one reduction of each tensor, and
some operations on few numbers. It can be captured in a CUDA graph if it ran before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.recording.guard_hooks import Named, Watch
from torchprobe.recording.nonfinite import ROWS, readable
from torchprobe.recording.transfer import Copy

_BAD, _CLOCK, _INPUT, _MINUS_INF, _COUNT, _CALL = range(6)
_SAMPLED = 4  # rows that are kept for the flight recorder


@dataclass(frozen=True)
class Found:
    """The first nonfinite call of a layer.

    Attributes:
        watch: of the layer.
        backward: whether it is a gradient; ``name`` is that of the parameter, if it is that of one.
        clock: its place in the order of the run of its device.
        call: of the layer, from 0; of a gradient −1, which is unknown.
        input, minus_inf: an input held nan or +inf; or −inf.
        count, rows: how many rows along dimension 0 were nonfinite, and the first of them.
        before: the layer before it in the order of the run; it was finite.
        written: whether a call of the layer has written into its input.
    """

    watch: Watch
    backward: bool
    name: str
    clock: int
    call: int
    input: bool
    minus_inf: bool
    count: int
    rows: tuple[int, ...]
    before: Watch | None
    written: bool = False


@dataclass(frozen=True)
class Arrived:
    """What a step has found, with the scale of the ``GradScaler`` at its end."""

    step: int
    found: list[Found]
    scale: float | None


class _Row:
    """What one layer has found in one direction."""

    def __init__(self, watch: Watch, backward: bool, name: str, like: Tensor) -> None:
        self.watch, self.backward, self.name = watch, backward, name
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        with torch.inference_mode(False):
            self.state = torch.zeros(_CALL + 1 + ROWS, dtype=dtype, device=like.device)
            self.calls = torch.zeros((), dtype=dtype, device=like.device)
        self.samples: dict[str, Tensor] = {}
        self.written = False  # whether a call has written into its input


class Latches:
    """What the calls on accelerators have found.

    Args:
        sampled: keep the first offending rows of inputs and outputs, too.
    """

    def __init__(self, sampled: bool) -> None:
        self.sampled = sampled
        self._rows: dict[tuple[int, bool, str, torch.device], _Row] = {}  # in the order in which they first ran
        self._clocks: dict[torch.device, Tensor] = {}
        self._sent: deque[tuple[int, list[tuple[list[_Row], Copy]], Copy | None]] = deque()
        self._handled: dict[torch.device, int] = {}

    @torch.no_grad()
    def look(self, watch: Watch, inputs: Named, outputs: Named, backward: bool, written: bool = False) -> None:
        """Looks at one call, or with ``backward`` at one gradient. It does not wait for the device."""
        results = [(name, x) for name, tensor in outputs if (x := readable(tensor)) is not None]
        if not results:
            return
        first = results[0][1]
        key = id(watch), backward, results[0][0] if backward else "", first.device
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = _Row(watch, backward, results[0][0] if backward else "", first)
        row.written |= written
        if first.device not in self._clocks:
            with torch.inference_mode(False):
                self._clocks[first.device] = torch.zeros_like(row.calls)
        clock = self._clocks[first.device]
        clock.add_(1)
        given = [(name, x) for name, tensor in inputs if (x := readable(tensor)) is not None and x.device == first.device]
        bad = bad_rows(first, watch.allowed)
        others = [bad_rows(x, watch.allowed).any() for _, x in results[1:] if x.device == first.device]
        wrong = torch.stack([bad.any(), *others]).any()
        ranges = [torch.aminmax(x) for _, x in given if x.numel()]
        no = torch.zeros_like(wrong)
        high = torch.stack([no, *(edge.max.isnan() | (edge.max == math.inf) for edge in ranges)]).any()
        low = torch.stack([no, *(edge.min == -math.inf for edge in ranges)]).any()
        index = torch.arange(bad.numel(), device=bad.device).where(bad, bad.numel())
        index = index.sort().values[:ROWS]
        new = torch.stack([part.to(row.state.dtype) for part in (wrong, clock, high, low, bad.sum(), row.calls)])
        new = torch.cat([new, index.to(row.state.dtype), new.new_full((ROWS - index.numel(),), bad.numel())])
        fresh = wrong & (row.state[_BAD] == 0)
        if self.sampled:
            _sample(row, fresh, index, bad.numel(), [("output/" + n, x) for n, x in results] + [("input/" + n, x) for n, x in given])
        row.state.copy_(new.where(fresh, row.state))
        row.calls.add_(1)

    @property
    def used(self) -> bool:
        """Whether anything ran on an accelerator."""
        return bool(self._rows)

    @torch.no_grad()
    def send(self, step: int, scaler: Any = None) -> None:
        """Starts the copies of this step. It does not wait for the device."""
        if not self._rows:
            return
        devices: dict[torch.device, list[_Row]] = {}
        for row in self._rows.values():
            devices.setdefault(row.state.device, []).append(row)
        copies = [(rows, Copy(torch.stack([row.state for row in rows]))) for rows in devices.values()]
        scale = getattr(scaler, "_scale", None)  # on its device: get_scale() would wait
        self._sent.append((step, copies, Copy(scale.detach().clone()) if isinstance(scale, Tensor) else None))

    def collect(self, wait: bool = False) -> list[Arrived]:
        """The steps that have arrived, in their order."""
        arrived = list[Arrived]()
        while self._sent and (wait or all(copy.arrived() for _, copy in self._sent[0][1])):
            step, copies, scale = self._sent.popleft()
            found = [one for rows, copy in copies for one in self._read(rows, copy.numbers())]
            arrived.append(Arrived(step, sorted(found, key=lambda one: one.clock), None if scale is None else float(scale.numbers())))
        return arrived

    def samples(self, found: Found) -> dict[str, Tensor]:
        """The offending rows of a call, and their indices."""
        row = next(row for row in self._rows.values() if (row.watch, row.backward, row.name) == (found.watch, found.backward, found.name))
        kept = {name: sample[: found.count].cpu() for name, sample in row.samples.items()}
        return {**kept, "rows": torch.tensor(found.rows[:_SAMPLED], dtype=torch.int64)} if kept else {}

    @torch.no_grad()
    def forget(self) -> None:
        """Starts anew on every device: what was found has been told."""
        for row in self._rows.values():
            row.state.zero_()

    def _read(self, rows: Sequence[_Row], numbers: Any) -> list[Found]:
        """What is new in the rows of one device. Copies that were sent before :meth:`forget` show what is known already."""
        device = rows[0].state.device
        known = self._handled.get(device, 0)
        found, before = list[Found](), list[_Row]()
        for row, values in zip(rows, numbers.tolist(), strict=True):
            if values[_BAD] and values[_CLOCK] > known:
                indices = tuple(int(index) for index in values[_CALL + 1 :][: int(values[_COUNT])])
                previous = next((one.watch for one in reversed(before) if one.backward == row.backward), None)
                call = -1 if row.backward else int(values[_CALL])
                numbers_of = int(values[_CLOCK]), call, bool(values[_INPUT]), bool(values[_MINUS_INF]), int(values[_COUNT])
                found.append(Found(row.watch, row.backward, row.name, *numbers_of, indices, previous, row.written))
            before.append(row)
        if found:
            self._handled[device] = max(one.clock for one in found)
        return found


def bad_rows(x: Tensor, allowed: frozenset[str]) -> Tensor:
    """Which rows along dimension 0 hold a nonfinite value that is not allowed: bool (rows,)."""
    rows = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.bool, device=x.device)
    if not allowed:
        edges = torch.aminmax(rows, dim=1)  # one pass; nan is the smallest and the largest
        return ~(edges.min.isfinite() & edges.max.isfinite())
    bad = ~rows.isfinite()
    for kind, found in (("nan", rows.isnan()), ("inf", rows == math.inf), ("-inf", rows == -math.inf)):
        if kind in allowed:
            bad = bad & ~found
    return bad.any(1)


def _sample(row: _Row, fresh: Tensor, index: Tensor, length: int, tensors: Named) -> None:
    """Keeps the first offending rows of tensors with so many rows, if this call is the first one."""
    chosen = index[:_SAMPLED].clamp(max=max(length - 1, 0))
    for name, x in tensors:
        if x.dim() > 1 and x.shape[0] == length:
            sample = x.index_select(0, chosen)
            held = row.samples.get(name)
            if held is None or held.shape != sample.shape or held.dtype != sample.dtype:
                with torch.inference_mode(False):
                    held = row.samples[name] = torch.zeros_like(sample)
            held.copy_(sample.where(fresh, held))
