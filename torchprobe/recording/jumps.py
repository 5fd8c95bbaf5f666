"""Jumps: fields of layers that change against their own past, found while a run goes on, or in a history."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchprobe.common.messages import listing, reason
from torchprobe.common.threads import ordered
from torchprobe.recording.history import History, Step
from torchprobe.recording.layers import canonical, matches_glob
from torchprobe.recording.transfer import Copy, Part
from torchprobe.recording.verdicts import shown
from torchprobe.rendering.tables import number
from torchprobe.statistics.changes import SCALES, Change, Changes
from torchprobe.statistics.statistic import Statistic

_MOST = 1024  # jumps that are kept
_LEFT_OUT = ("nonfinite", "invalid_vectors")  # that is what a guard is for


class JumpWarning(UserWarning):
    """A field of a layer has changed against its own past."""


@dataclass(frozen=True)
class Jump:
    """One field of one layer that has changed.

    Attributes:
        layer, field: what changed.
        step: of the window that showed it.
        since: of the first window of the block in which it was seen; the change is there, or in the block before.
        windows: in that block: 5 for a sudden change, up to 80 for a slow one.
        before, after: the medians of the last two blocks.
        score: how large the change is, in units of the usual change in that time; inf if there was none.
        threshold: what the score exceeded; it follows from ``false_alarms``.
    """

    layer: str
    field: str
    step: Step
    since: Step
    windows: int
    before: float
    after: float
    score: float
    threshold: float

    def __str__(self) -> str:
        factor = f", × {number(self.after / self.before, 3)}" if self.before > 0 and self.after > 0 else ""
        usual = "it never changed before" if self.score == float("inf") else f"{number(self.score, 3)} times its usual change"
        return (
            f"{self.field} of {shown(self.layer)} went from {number(self.before)} to {number(self.after)}{factor}, "
            f"between steps {self.since} and {self.step} or just before ({usual}; {number(self.threshold, 3)} would be a jump)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


On = Literal["warn"] | Callable[[Jump], object]


@dataclass(frozen=True)
class JumpOptions:
    """The arguments of :meth:`torchprobe.Recorder.watch_jumps`."""

    fields: str | Iterable[str] | None = None
    layers: str | Iterable[str] | None = None
    false_alarms: float = 0.01
    windows: int = 10_000
    least: float = 0.1
    on: On = "warn"
    save: Path | None = None


class Jumps:
    """Watches fields of every layer; :meth:`torchprobe.Recorder.watch_jumps` makes it and describes the arguments.

    Attributes:
        found: every jump so far, the newest 1,024.

    Raises:
        ValueError: an argument is out of range.
        KeyError: the statistic has no such field.
    """

    def __init__(self, statistic: Statistic, options: JumpOptions, save: Callable[[Path], object] | None = None) -> None:
        if options.on != "warn" and not callable(options.on):
            raise ValueError(f'on= is "warn" or a function of the jump; got {options.on!r}')
        known = tuple(statistic.fields)
        default = [field for field in statistic.metric_fields or known if field not in _LEFT_OUT]
        self.fields = default if options.fields is None else [options.fields] if isinstance(options.fields, str) else list(options.fields)
        if unknown := [field for field in self.fields if field not in known]:
            raise KeyError(f"{unknown[0]!r} is not a field of {type(statistic).__name__}; it has {', '.join(known)}")
        self.on = options.on
        self.found: list[Jump] = []
        self._columns = [known.index(field) for field in self.fields]
        self._layers = None if options.layers is None else [options.layers] if isinstance(options.layers, str) else list(options.layers)
        self._changes = Changes(options.false_alarms, options.windows, options.least)
        self._names: dict[str, int] = {}  # of watched layers, in the order in which they first fired
        self._steps: deque[Step] = deque(maxlen=SCALES[-1])  # of the last windows
        self._waiting: deque[tuple[Step, list[tuple[list[str], Copy]]]] = deque()
        self._folder = options.save
        self._save = save

    @property
    def threshold(self) -> float:
        """What a score must exceed, with the layers that have fired so far."""
        return self._changes.threshold

    # -- while a run goes on -------------------------------------------------------------------------------------------

    @ordered
    def put(self, step: Step, parts: Sequence[Part]) -> None:
        """Adds one window: for each group of layers the names and all fields, still on the device. It does not wait."""
        copies = []
        with torch.inference_mode(False), torch.no_grad():
            for names, numbers in parts:
                chosen = [index for index, name in enumerate(names) if self._watched(name)]
                if chosen:
                    rows = numbers if len(chosen) == len(names) else numbers[chosen]
                    copies.append(([names[index] for index in chosen], Copy(_columns(rows, self._columns))))
        self._waiting.append((step, copies))

    @ordered
    def collect(self, wait: bool = False) -> list[Jump]:
        """Looks at the windows that have arrived on the host, in their order; returns the jumps."""
        found: list[Jump] = []
        while self._waiting and (wait or all(copy.arrived() for _, copy in self._waiting[0][1])):
            step, copies = self._waiting.popleft()
            for name in (name for names, _ in copies for name in names):
                self._names.setdefault(name, len(self._names))
            values = np.full((len(self._names), len(self.fields)), np.nan)
            for names, copy in copies:
                values[[self._names[name] for name in names]] = copy.numbers()
            found += self._look(step, values)
        return found

    def tell(self, jumps: Sequence[Jump], stacklevel: int = 5) -> None:
        """Saves the recording, and calls back or warns."""
        if not jumps:
            return
        note = ""
        if self._folder is not None and self._save is not None:
            path = self._folder / f"jump-{jumps[0].step}.safetensors"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._save(path)
                note = f". Written: {path}"
            except Exception as error:  # a full disk does not end a run
                note = f". {path} could not be written: {reason(error)}"
        if callable(self.on):
            for jump in jumps:
                self.on(jump)
        else:
            told = listing([str(jump) for jump in jumps], 4, "; ")
            warnings.warn(f"torchprobe: {told}{note}", JumpWarning, stacklevel=stacklevel)

    def _watched(self, name: str) -> bool:
        return self._layers is None or any(canonical(one) == name or matches_glob(one, name) for one in self._layers)

    def _look(self, step: Step, values: np.ndarray[Any, Any]) -> list[Jump]:
        self._steps.append(step)
        layers = list(self._names)
        jumps = [self._jump(change, step, layers) for change in self._changes.add(values.ravel())]
        self.found = [*self.found, *jumps][-_MOST:]
        return jumps

    def _jump(self, change: Change, step: Step, layers: Sequence[str]) -> Jump:
        layer, field = divmod(change.series, len(self.fields))
        since = self._steps[max(0, len(self._steps) - change.windows)]
        numbers = (change.before, change.after, change.score, change.threshold)
        return Jump(layers[layer], self.fields[field], step, since, change.windows, *numbers)


def _columns(numbers: Tensor, columns: Sequence[int]) -> Tensor:
    return torch.stack([numbers[:, column] for column in columns], 1)


def find_jumps(history: History, **options: Any) -> list[Jump]:
    """The jumps in a history, also in that of a recording that was loaded from a file. Options as in ``rec.watch_jumps``.

    >>> import torch, torchprobe
    >>> model = torch.nn.Linear(4, 3)
    >>> with torchprobe.record(model) as rec:
    ...     for step in range(160):
    ...         if step == 150:
    ...             _ = model.weight.data.mul_(100), model.bias.data.mul_(100)
    ...         _ = model(torch.randn(512, 4, generator=torch.Generator().manual_seed(step)))
    ...         rec.snapshot(step)
    >>> [(jump.layer, jump.field, jump.since, jump.step) for jump in find_jumps(rec.history, fields="std")]
    [('', 'std', 150, 154)]
    """
    if not isinstance(history, History):
        raise TypeError(f"find_jumps takes the history of a recording, rec.history; got {type(history).__name__}")
    jumps = Jumps(history.statistic, JumpOptions(**options))
    names = history.layers
    values = torch.from_numpy(history.values.copy())
    for step, window in zip(history.steps, values, strict=True):
        jumps.put(step, [(names, window)])
        jumps.collect(wait=True)
    return jumps.found
