"""What was recorded: a mapping from layer to statistic, without hooks."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from torchprobe.recording import windows
from torchprobe.recording.history import History, to_host
from torchprobe.recording.layers import canonical
from torchprobe.statistics import Moments, Statistic
from torchprobe.statistics.moments import FIELDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass
class Entry:
    """One layer of a recording."""

    name: str
    module: str  # the class of the module
    feature_dim: int | None  # the dimension that held the features
    statistic: Statistic  # the running window
    closed: Statistic | None = None  # all windows that a snapshot has closed


@dataclass(frozen=True)
class Settings:
    """How a recording was made; two recordings merge only if theirs are equal."""

    of: str = "output"
    positions: str = "all"
    outlier_sigma: float = 6.0
    statistic: str = "Moments"


class Recording(Mapping[str, Moments]):
    """The statistics of every layer that fired, in the order in which they first did.

    ``recording[layer]`` is a :class:`~torchprobe.Moments`; a layer that is known under several names answers to all of
    them. ``settings`` says how it was made.
    """

    def __init__(self, entries: list[Entry], settings: Settings, aliases: Mapping[str, str] | None = None) -> None:
        self._own = {entry.name: entry for entry in entries}
        self._aliases = dict(aliases or {})
        self.settings = settings
        self.history = History()

    def _entries(self) -> list[Entry]:
        return list(self._own.values())

    # -- a mapping -----------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Canonical names in firing order; the model itself is ``""``."""
        return [entry.name for entry in self._entries()]

    def __getitem__(self, layer: str) -> Moments:
        return cast(Moments, self._entry(layer).statistic)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self._entries())

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and self._resolve(layer) is not None

    def _resolve(self, layer: str) -> Entry | None:
        entries = {entry.name: entry for entry in self._entries()}
        for name in (layer, canonical(layer)):
            entry = entries.get(name) or entries.get(self._aliases.get(name, name))
            if entry is not None:
                return entry
        return None

    def _entry(self, layer: str) -> Entry:
        entry = self._resolve(layer)
        if entry is None:
            raise KeyError(self._missing(layer))
        return entry

    def _missing(self, layer: str) -> str:
        near = difflib.get_close_matches(layer, [*self.layers, *self._aliases], n=1)
        return f"no layer {layer!r} was recorded" + (f"; did you mean {near[0]!r}?" if near else "")

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> Recording:
        """All windows together, the running one included; a copy, without a history."""
        entries = [Entry(e.name, e.module, e.feature_dim, _total(e.closed, e.statistic)) for e in self._entries()]
        return Recording(entries, self.settings, self._aliases)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each layer: ``layer``, ``module`` (its class), ``features``, ``feature_dim``, ``positions`` and
        the fields of :data:`torchprobe.statistics.moments.FIELDS`, of the running window."""
        entries = self._entries()
        numbers = self._numbers(entries)
        return [
            {
                "layer": entry.name,
                "module": entry.module,
                "features": entry.statistic.features,
                "feature_dim": entry.feature_dim,
                "positions": self.settings.positions,
                **numbers[index],
            }
            for index, entry in enumerate(entries)
        ]

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """``{f"{prefix}{layer}/{field}": number}`` of the running window, for a logger.

        One copy from each device however many layers there are. Nan for a layer that has not fired in this window.

        >>> import torch, torchprobe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3))
        >>> with torchprobe.record(model, "*") as rec:
        ...     _ = model(torch.randn(8, 4))
        >>> rec.metrics(prefix="act/")["act/1/vectors"]
        8.0
        """
        entries = self._entries()
        numbers = self._numbers(entries)
        return {f"{prefix}{entry.name}/{field}": value for index, entry in enumerate(entries) for field, value in numbers[index].items()}

    def _numbers(self, entries: list[Entry]) -> list[dict[str, float]]:
        parts = windows.summaries(only_moments([entry.statistic for entry in entries]))
        numbers: dict[int, dict[str, float]] = {}
        for (group, _), values in zip(parts, to_host([part for _, part in parts]), strict=True):
            numbers.update({i: dict(zip(FIELDS, row, strict=True)) for i, row in zip(group, values.tolist(), strict=True)})
        return [numbers[index] for index in range(len(entries))]

    def table(self) -> Table:
        """The rows as a rich table, to print."""
        from torchprobe.rendering.tables import layer_table

        return layer_table(self.rows())

    def plot(self, what: str = "depth", *, width: float = 9.0) -> Figure:
        """A picture, as a matplotlib figure (``pip install torchprobe-interp[report]``); a notebook shows it.

        Args:
            what: "depth": the vector kurtosis over the layers, of the running window, or while that is empty of the last closed one;
                the closed windows are a band behind it. "history": layers × steps, see :meth:`History.plot`;
                for one layer over the steps see :meth:`History.plot_layer`.
            width: inches.

        Raises:
            ValueError: no such picture.
        """
        if what == "history":
            return self.history.plot(width=width)
        if what != "depth":
            raise ValueError(f'what must be "depth" or "history", got {what!r}; for one layer: history.plot_layer({what!r})')
        from torchprobe.rendering.plots import depth_profile

        rows, values = self.rows(), self.history["vector_kurtosis"]
        windows = [
            [{"layer": layer, "vector_kurtosis": value} for layer, value in zip(self.history.layers, v, strict=True)] for v in values
        ]
        if windows and not any(row["vectors"] > 0 for row in rows):
            last = {row["layer"]: row for row in self.history.rows() if row["step"] == self.history.steps[-1]}
            rows = [{**row, **last.get(row["layer"], {})} for row in rows]
        return depth_profile(rows, band=windows if len(windows) > 1 else (), band_label="closed windows", width=width)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({len(self)} layers, {len(self.history)} windows closed)"]
        lines += [f"  {name!r}: {statistic!r}" for name, statistic in self.items()]
        return "\n".join(lines)

    # -- joining and keeping -------------------------------------------------------------------------------------------

    def merge(self, other: Recording) -> Recording:
        """Adds, in place, everything ``other`` saw: running windows, closed windows, and histories one after the other.

        Returns itself. Layers that ``other`` lacks stay as they are.

        Raises:
            ValueError: ``other`` was made with other settings, has layers that are unknown here or of another width, or
                both histories hold one step. Nothing is changed then.
        """
        self._check_mergeable(other)
        history = self.history.copy()
        history.extend(other.history)
        for theirs in other._entries():
            self._absorb(theirs)
        self.history = history
        return self

    def _check_mergeable(self, other: Recording) -> None:
        if not isinstance(other, Recording):
            raise TypeError(f"cannot merge a recording with {type(other).__name__}")
        if self.settings != other.settings:
            raise ValueError(f"the recordings were made differently: {self.settings} and {other.settings}")
        unknown = [entry.name for entry in other._entries() if not self._knows(entry.name)]
        if unknown:
            raise ValueError(f"the other recording has layers that this one has not: {', '.join(map(repr, unknown))}")
        mine = {entry.name: entry.statistic.features for entry in self._entries()}
        for entry in other._entries():
            width = mine.get(entry.name, entry.statistic.features)
            if width != entry.statistic.features:
                raise ValueError(f"layer {entry.name!r} is {width} features wide here and {entry.statistic.features} there")

    def _knows(self, layer: str) -> bool:
        return layer in self._own

    def _absorb(self, theirs: Entry) -> None:
        mine = self._own[theirs.name]
        mine.statistic.merge(theirs.statistic)
        mine.closed = windows.merged([mine.closed, theirs.closed])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one safetensors file, history included; :func:`torchprobe.load` reads it.

        Tensors are named ``"{layer}/{field}"`` (``"/mean"`` for the model itself); the metadata says ``format=1``.

        Raises:
            TypeError: the statistic is not :class:`~torchprobe.Moments`.
        """
        from torchprobe.recording.storage import save

        save(self, path)


def only_moments(statistics: list[Statistic]) -> list[Moments]:
    """The same list.

    Raises:
        TypeError: another statistic is among them.
    """
    for statistic in statistics:
        if not isinstance(statistic, Moments):
            raise TypeError(
                f"rows, metrics, windows and files hold Moments, not {type(statistic).__name__}: read recording[layer], and "
                f"keep recorder.state_dict() with torch.save"
            )
    return cast(list[Moments], statistics)


def _total(closed: Statistic | None, window: Statistic) -> Statistic:
    total = windows.duplicate(window) if closed is None else windows.merged([closed, window])
    assert total is not None
    if closed is not None and isinstance(total, Moments) and isinstance(window, Moments):
        with torch.inference_mode(False):
            total.parts()["calls"].copy_(window.parts()["calls"])  # the counter of the window was never set back
    return total
