"""The result of a recording: a mapping from layer to statistic, without hooks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from torchprobe.common.messages import did_you_mean, listing
from torchprobe.common.threads import lock, ordered
from torchprobe.recording import windows
from torchprobe.recording.frames import Tabular, columns_of
from torchprobe.recording.history import History
from torchprobe.recording.layers import canonical, matches_glob, meant
from torchprobe.recording.shown import table_options
from torchprobe.recording.transfer import to_host
from torchprobe.recording.windows import Entry, Settings, Unread, check_mergeable
from torchprobe.statistics import Statistic
from torchprobe.statistics.tensors import metric_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


FORMAT = 1
_SHOWN = 20  # layers in the text of a recording


class Recording(Mapping[str, Any], Tabular):
    """The statistics of every layer that fired, in the order in which the layers first fired.

    ``recording[layer]`` is a :class:`~torchprobe.Moments`, or the statistic that was requested. For a list of statistics it is a
    :class:`~torchprobe.statistics.Several`. A layer with several names is found under each of them; ``aliases`` maps
    the other names to the canonical one. ``settings`` says how the recording was made.
    """

    def __init__(
        self,
        entries: list[Entry],
        settings: Settings,
        aliases: Mapping[str, str] | None = None,
        template: Statistic | None = None,
        unread: Sequence[Unread] = (),
    ) -> None:
        self._own = {entry.name: entry for entry in entries}
        self.aliases = dict(aliases or {})
        self._template = template if template is not None or not entries else entries[0].statistic
        self.settings = settings
        self.history = History(statistic=self._template)
        self._unsure = list(unread)

    def _unread(self) -> list[Unread]:
        return self._unsure

    def _entries(self) -> list[Entry]:
        return list(self._own.values())

    @ordered
    def copied_entries(self) -> list[Entry]:
        """The entries at this moment: what other threads read or close later does not change them."""
        return [
            replace(entry, statistic=entry.statistic.clone(), closed=None if entry.closed is None else entry.closed.clone())
            for entry in self._entries()
        ]

    def _find(self, name: str) -> Entry | None:
        """The entry of a canonical name: one step, however many layers there are."""
        return self._own.get(name)

    # -- a mapping -----------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Canonical names in firing order; the model itself is ``""``."""
        return [entry.name for entry in self._entries()]

    def __getitem__(self, layer: str) -> Any:
        return self._entry(layer).statistic

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self._entries())

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and self._resolve(layer) is not None

    def _resolve(self, layer: str) -> Entry | None:
        for name in (layer, canonical(layer)):
            if (entry := self._find(name) or self._find(self.aliases.get(name, name))) is not None:
                return entry
        return None

    def _entry(self, layer: str) -> Entry:
        entry = self._resolve(layer)
        if entry is None:
            raise KeyError(self._missing(layer))
        return entry

    def _missing(self, layer: str) -> str:
        return f"no layer {layer!r} was recorded{meant(layer, [*self.layers, *self.aliases])}"

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    @ordered
    def total(self) -> Recording:
        """All windows together, including the running one: a copy, without a history."""
        entries = [replace(entry, statistic=windows.total(entry.closed, entry.statistic), closed=None) for entry in self._entries()]
        return Recording(entries, self.settings, self.aliases, self._template, self._unread())

    @property
    def fields(self) -> Mapping[str, str]:
        """The numbers of one layer: name → one line of help."""
        return {} if self._template is None else self._template.fields

    @ordered
    def rows(self) -> list[dict[str, Any]]:
        """One dict for each layer, for the running window: ``layer``, ``module`` (its class), ``of``, ``features``, ``feature_dim``,
        ``feature_dim_by``, ``positions`` and the :attr:`fields`.

        ``feature_dim_by`` says by what that dimension is known. Where nothing decides it is "unsure". Such layers come last: their
        ``features`` and ``feature_dim`` are None, and their fields are nan.
        """
        entries = self._entries()
        numbers = self._numbers(entries)
        unsure = dict.fromkeys(self.fields, math.nan)
        return [
            *(
                {
                    "layer": entry.name,
                    "module": entry.module,
                    "of": entry.of or self.settings.of,
                    "features": entry.statistic.features,
                    "feature_dim": entry.feature_dim,
                    "feature_dim_by": entry.feature_dim_by,
                    "positions": self.settings.positions,
                    **numbers[index],
                }
                for index, entry in enumerate(entries)
            ),
            *(
                {
                    "layer": layer.name,
                    "module": layer.module,
                    "of": layer.name.rpartition("@")[2] if "@" in layer.name else self.settings.of.partition("+")[0],
                    "features": None,
                    "feature_dim": None,
                    "feature_dim_by": "unsure",
                    "positions": self.settings.positions,
                    **unsure,
                }
                for layer in self._unread()
            ),
        ]

    def columns(self) -> dict[str, Any]:
        about = ("layer", "module", "of", "features", "feature_dim", "feature_dim_by", "positions")
        return columns_of(self.rows(), [*about, *self.fields])

    @ordered
    def metrics(
        self, prefix: str = "", fields: str | Iterable[str] | None = None, layers: str | Iterable[str] | None = None
    ) -> dict[str, float]:
        """``{f"{prefix}{layer}/{field}": number}`` of the running window, for a logger.

        It makes one copy from each device, for any number of layers. Numbers are nan for a layer that has not fired in this window. The
        keys are the same in every window, and on every rank.

        Args:
            prefix: of every key.
            fields: the name of a field, several, or "all". Default: at most five, the ``metric_fields`` of the statistic. Those of Moments
                are vector_kurtosis, nonfinite, abs_max, std and kurtosis_max. Several statistics share the five.
            layers: a name or glob, or several. ``*`` is one component of a name, ``**`` any number. Default: all layers.

        Raises:
            ValueError: a field or a layer is unknown; the message suggests the nearest.

        >>> import torch, torchprobe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3))
        >>> with torchprobe.record(model, "*") as rec:
        ...     _ = model(torch.randn(8, 4))
        >>> rec.metrics(prefix="act/", fields=["vectors", "nonfinite"], layers="1")
        {'act/1/vectors': 8.0, 'act/1/nonfinite': 0.0}
        """
        chosen, entries = self._chosen_fields(fields), self._entries()
        wanted = {*self._watched()} if layers is None else self._chosen_layers(layers)
        entries = [entry for entry in entries if entry.name in wanted]
        found = {entry.name: numbers for entry, numbers in zip(entries, self._numbers(entries), strict=True)}
        found.update({name: dict.fromkeys(chosen, math.nan) for name in self._silent() if name in wanted})
        return {f"{prefix}{name}/{field}": numbers[field] for name, numbers in found.items() for field in chosen}

    def _chosen_fields(self, fields: str | Iterable[str] | None) -> list[str]:
        if self._template is None:  # nothing was ever recorded
            return []
        if fields is None:
            return list(metric_names(self._template))
        chosen = list(self.fields) if fields == "all" else _listed(fields)
        for name in chosen:
            if name not in self.fields:
                hint = did_you_mean(str(name), self.fields)
                raise ValueError(f"{name!r} is not a field of this recording{hint or '; it has ' + ', '.join(self.fields)}")
        return chosen

    def _chosen_layers(self, layers: str | Iterable[str]) -> set[str]:
        """The layers that a name, a glob, or one of several matches."""
        named = {**{name: name for name in self._watched()}, **self.aliases}
        chosen = set[str]()
        for pattern in _listed(layers):
            if not isinstance(pattern, str):
                raise TypeError(f"layers= takes a name or glob, or several of them; got {pattern!r}")
            exact = {named[name] for name in (pattern, canonical(pattern)) if name in named}
            matched = exact or {named[name] for name in named if matches_glob(pattern, name) or name.startswith(f"{pattern}:")}
            if not matched:
                hint = did_you_mean(pattern, named) or meant(pattern, named) or f"; the layers are {listing([*map(repr, named)])}"
                raise ValueError(f"layers=: {pattern!r} is not one of the recorded layers{hint}")
            chosen |= matched
        return chosen

    def _watched(self) -> list[str]:
        """The canonical names of all layers that could fire."""
        return self.layers

    def _silent(self) -> list[str]:
        """Those that have never fired, but may."""
        return []

    def _numbers(self, entries: list[Entry]) -> list[dict[str, float]]:
        parts = windows.summaries([entry.statistic for entry in entries])
        numbers: dict[int, dict[str, float]] = {}
        for (group, _), values in zip(parts, to_host([part for _, part in parts]), strict=True):
            numbers.update({i: dict(zip(self.fields, row, strict=True)) for i, row in zip(group, values.tolist(), strict=True)})
        return [numbers[index] for index in range(len(entries))]

    def table(self) -> Table:
        """The rows as a rich table, for printing."""
        from torchprobe.rendering.tables import WIDER, layer_table

        rows = self.rows()
        return layer_table(
            rows, more=f"{WIDER} rows() has all.", **table_options(self.fields, self._template, self.history, self._empty(rows))
        )

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        from torchprobe.rendering.notebook import fragment

        rows, title = self.rows(), repr(self).partition("\n")[0]
        return fragment(title, rows=rows, of="layers", **table_options(self.fields, self._template, self.history, self._empty(rows)))

    def _empty(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether no layer has fired in the running window."""
        return all(math.isnan(row[name]) for row in rows for name in self.fields)

    def plot(self, what: str = "depth", *, field: str | None = None, width: float = 9.0) -> Figure:
        """A matplotlib figure (``pip install 'torchprobe-interp[report]'``); a notebook shows it.

        Args:
            what: "depth": a field over the layers, for the running window, or for the last closed window while the running one is empty.
                The closed windows are a band behind it. "history": layers × steps, see :meth:`History.plot`. For one layer over the steps
                see :meth:`History.plot_layer`.
            field: the field to show. Default: the headline of the statistic, the vector kurtosis for Moments.
            width: in inches.

        Raises:
            ValueError: ``what`` or ``field`` is unknown.
        """
        if what == "history":
            return self.history.plot(field, width=width)
        if what != "depth":
            way = f"plot(field={what!r})" if what in self.fields else f"history.plot_layer({what!r}) for one layer"
            raise ValueError(f'what must be "depth" or "history", got {what!r}; did you mean {way}?')
        from torchprobe.rendering.plots import depth_profile

        field = field or self.history.headline
        if field not in self.fields:
            raise ValueError(f"{field!r} is not a field of this recording; it has {', '.join(self.fields)}")
        rows, values = self.rows(), self.history[field]
        closed = [[{"layer": layer, field: value} for layer, value in zip(self.history.layers, v, strict=True)] for v in values]
        label = None
        if closed and self._empty(rows):
            label = f"last closed window, {self.history.steps[-1]}"
            last = {row["layer"]: row for row in self.history.rows() if row["step"] == self.history.steps[-1]}
            rows = [{**row, **last.get(row["layer"], {})} for row in rows]
        band = closed if len(closed) > 1 else ()
        return depth_profile(rows, field=field, label=label, band=band, band_label="closed windows", width=width)

    def __repr__(self) -> str:
        entries = self._entries()
        lines = [f"{type(self).__name__}({len(entries)} layers, {len(self.history)} windows closed)"]
        for entry, numbers in zip(entries, self._numbers(entries[:_SHOWN]), strict=False):
            empty = bool(numbers) and all(map(math.isnan, numbers.values()))
            values = ["empty"] if empty else [f"{name}={numbers[name]:.4g}" for name in self._chosen_fields(None)]
            lines.append(f"  {entry.name!r}: {self.settings.statistic}({', '.join([f'{entry.statistic.features} features', *values])})")
        lines += [f"  … and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
        return "\n".join(lines)

    # -- merging and saving -------------------------------------------------------------------------------------------

    @ordered
    def merge(self, other: Recording) -> Recording:
        """Adds, in place, everything ``other`` has seen: running windows, closed windows, and histories one after the other.

        It returns itself. Layers that ``other`` lacks do not change.

        Raises:
            ValueError: ``other`` has other settings, layers that are unknown here, or statistics that cannot merge, such as those of
                another width; or both histories hold the same step. Nothing is changed then.
        """
        self._check_mergeable(other)
        history = self.history.copy()
        history.extend(other.history)
        with torch.inference_mode(False), torch.no_grad():  # tensors created in inference mode could not be changed later
            for theirs in other._entries():
                self._absorb(theirs)
        self._template = other._template if self._template is None else self._template
        self.history = history
        return self

    def _check_mergeable(self, other: Recording) -> None:
        if not isinstance(other, Recording):
            raise TypeError(f"cannot merge a recording with {type(other).__name__}")
        if self.settings != other.settings:
            raise ValueError(f"the recordings were made with different settings: {self.settings} and {other.settings}")
        unknown = [entry.name for entry in other._entries() if not self._knows(entry.name)]
        if unknown:
            raise ValueError(f"the other recording has layers that this one does not have: {', '.join(map(repr, unknown))}")
        check_mergeable(self._entries(), other._entries())

    def _knows(self, layer: str) -> bool:
        return layer in self._own

    def _absorb(self, theirs: Entry) -> None:
        mine = self._own[theirs.name]
        mine.statistic.merge(theirs.statistic)
        mine.closed = windows.merged([mine.closed, theirs.closed])
        mine.calls += theirs.calls

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything, including the history, to one safetensors file; :func:`torchprobe.load` reads it.

        Tensors are named ``"{layer}/{name}"`` (``"/mean"`` for the model itself); the metadata says ``format=1``. A "/" in the name of a
        layer becomes "%2F" there, a "%" becomes "%25".

        Raises:
            FileNotFoundError: the folder does not exist.
            TypeError: a statistic cannot be saved; the message says why.
        """
        from torchprobe.recording import storage  # training code may never need it: `import torchprobe` leaves it out

        with lock:  # other threads go on while it is written
            entries, history, unread = self.copied_entries(), self.history.state_dict(), self._unread()
        storage.save(storage.Saved(entries, self.settings, self.aliases, self._template, history, unread), path)

    @ordered
    def state_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, text and tensors, for ``torch.save`` and :meth:`Recorder.load_state_dict`."""
        layers = {entry.name: entry.state_dict() for entry in self._entries()}
        return {"format": FORMAT, "settings": asdict(self.settings), "layers": layers, "history": self.history.state_dict()}


def _listed(names: Any) -> list[Any]:
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]


def load(path: str | os.PathLike[str], statistic: type[Statistic] | Sequence[type[Statistic]] | None = None) -> Recording:
    """Reads what :meth:`Recording.save` wrote: the same mapping, on the CPU, without hooks.

    Args:
        path: of the file.
        statistic: the class of the statistics, or the list of their classes. Default: the classes with the names in the file, whose modules
            must have been imported. Arguments of statistics are in the file.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: ``statistic`` is not a class or a list of classes.
        ValueError: it is not a recording, or something in it does not fit; the message names the file and the key.
    """
    from torchprobe.recording import storage

    saved = storage.load(path, statistic)
    recording = Recording(saved.entries, saved.settings, saved.aliases, saved.template, saved.unread)
    if saved.history is not None:
        try:
            recording.history.load_state_dict(saved.history)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}, 'history': {error}") from error
    return recording
