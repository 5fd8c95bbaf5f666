"""Recordings of runs that may still go on: read again when their files change, and reduced to what a page or a terminal shows."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import torchprobe
from torchprobe.common.messages import counted, did_you_mean, listing, reason
from torchprobe.recording.layers import matches_glob
from torchprobe.rendering.tables import number, percent, plain_table, text

if TYPE_CHECKING:
    from rich.console import Group

POINTS = 400
"""The largest number of points of a curve. A longer history is shown by the smallest and the largest value of each part."""

LAYERS = 48
"""The largest number of layers that are shown at once; a pattern chooses among more."""

WAITING = "waiting for the file"
"""The problem of a run whose file does not exist yet."""

_MISSING = "does not exist (it is waited for only on a page and in a terminal)"
_BARS = "▁▂▃▄▅▆▇█"
_TREND = 24  # windows in a trend
_PAST = 32  # windows that the last one is compared with


@dataclass
class Run:
    """One file. ``problem`` says why there is nothing new, if so; what was read before stays."""

    name: str
    path: Path
    recording: torchprobe.Recording | None = None
    problem: str = "not read yet"
    written: float = math.nan  # seconds since the epoch
    stamp: tuple[int, ...] = ()

    @property
    def history(self) -> Any:
        return None if self.recording is None else self.recording.history


@dataclass
class Watch:
    """The files of one or several runs.

    Args:
        paths: files that :meth:`torchprobe.Recording.save` or ``Monitor(save=)`` writes; they need not exist yet.

    Raises:
        ValueError: a file is given twice.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> model = torch.nn.Linear(4, 3)
    >>> with torchprobe.record(model) as rec:
    ...     _ = model(torch.randn(8, 4))
    ...     rec.snapshot(1)
    >>> rec.save(folder / "run.safetensors")
    >>> watch = Watch([folder / "run.safetensors"])
    >>> watch.refresh(), watch.refresh(), watch.fields()[:2]
    (True, False, ['vector_kurtosis', 'nonfinite'])
    """

    paths: Sequence[str | os.PathLike[str]]
    runs: list[Run] = field(init=False)

    def __post_init__(self) -> None:
        paths = [Path(path) for path in self.paths]
        if len({path.resolve() for path in paths}) < len(paths):
            raise ValueError("a file is given twice")
        self.runs = [Run(name, path) for name, path in zip(short_names(paths), paths, strict=True)]

    def refresh(self) -> bool:
        """Reads the files that have changed. The result says whether there is anything new to show."""
        news = [_refresh(run) for run in self.runs]
        return any(news)

    def fields(self) -> list[str]:
        """The fields of all runs: first those that ``metrics()`` shows."""
        found: dict[str, None] = {}
        for run in self._read():
            names = run.history.statistic.metric_fields or run.history.fields
            found.update(dict.fromkeys(name for name in names if name in run.history.fields))
        for run in self._read():
            found.update(dict.fromkeys(run.history.fields))
        return list(found)

    def layers(self, pattern: str = "") -> list[str]:
        """The layers of all runs, in the order in which they first fired: those that match a glob, or whose name contains the text."""
        names = dict.fromkeys(name for run in self._read() for name in run.history.layers)
        return [name for name in names if not pattern or matches_glob(pattern, name) or pattern in (name or "(output)")]

    def unmatched(self, pattern: str) -> str:
        """What to say if a run has layers and none of them matches; "" if one does, or no layer is known yet."""
        known = self.layers()
        if not known or self.layers(pattern):
            return ""
        return f"no layer matches {pattern!r}; there are {listing([name or '(output)' for name in known])}"

    def unread(self) -> str:
        """What to say if no file could be read; "" if one was."""
        if self._read():
            return ""
        return "; ".join(f"{run.path} {_MISSING if run.problem == WAITING else f'cannot be read: {run.problem}'}" for run in self.runs)

    def data(self, chosen: str = "", pattern: str = "") -> dict[str, Any]:
        """What the page shows, as plain values; nan for what is missing.

        Args:
            chosen: the field. Default: the headline of the statistic.
            pattern: see :meth:`layers`.

        Raises:
            ValueError: no run has the field; the message suggests the nearest.
        """
        fields, layers = self.fields(), self.layers(pattern)
        chosen = self._chosen(chosen, fields)
        shown = layers[:LAYERS]
        return {
            "field": chosen,
            "fields": [{"name": name, "help": self._help(name)} for name in fields],
            "layers": [{"name": name, "label": name or "(output)"} for name in shown],
            "hidden": len(layers) - len(shown),
            "runs": [self._run(run, chosen, shown) for run in self.runs],
        }

    def terminal(self, chosen: str = "", pattern: str = "") -> Group:
        """What a terminal shows: for one run the fields of ``metrics()``, for several one field of each; with the trend of the last
        windows.

        Raises:
            ValueError: no run has the field.
        """
        from rich.console import Group
        from rich.text import Text

        fields, layers = self.fields(), self.layers(pattern)
        several, picked = len(self.runs) > 1, self._chosen(chosen, fields)
        columns = [picked] if several or chosen else fields[:5]
        heads = [run.name for run in self.runs] if several else [name.replace("_", " ") for name in columns]
        title = picked.replace("_", " ")
        parts = [part for head in heads for part in (head, *(["trend"] if several else []))]
        trends = [] if several else [f"trend of {title}"]
        fewer = [] if several else [head for head in reversed(heads) if head != title]  # in a narrow terminal; the trend stays
        table = plain_table("layer", *parts, *trends, right=heads, dispensable=fewer)
        for name in layers[:LAYERS]:
            cells = [name or "(output)"]
            for run in self.runs:
                curves = [_curve(run, one, name) for one in columns]
                cells += [number(float(curve[-1]) if len(curve) else math.nan) for curve in curves]
                cells.append(trend(_curve(run, picked, name)))
            table.add_row(*map(text, cells))
        states = [f"{run.name}: {self._state(run)}" for run in self.runs]
        more = [f"{len(layers) - LAYERS} more layers; --layers chooses."] if len(layers) > LAYERS else []
        what = [f"{title}: {self._help(picked)}."] if self._help(picked) else []
        unmatched = self.unmatched(pattern)
        lines = Text("\n").join(map(text, [*states, *([f"{unmatched[0].upper()}{unmatched[1:]}."] if unmatched else [*what, *more])]))
        return Group(table, lines) if self._read() and not unmatched else Group(lines)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _read(self) -> list[Run]:
        return [run for run in self.runs if run.recording is not None]

    def _chosen(self, chosen: str, fields: Sequence[str]) -> str:
        if not chosen:
            return next((run.history.headline for run in self._read()), "")
        if fields and chosen not in fields:
            raise ValueError(f"{chosen!r} is not a field of these runs{did_you_mean(chosen, fields) or '; they have ' + ', '.join(fields)}")
        return chosen

    def _help(self, name: str) -> str:
        return next((run.history.statistic.fields[name] for run in self._read() if name in run.history.fields), "")

    def _state(self, run: Run) -> str:
        if run.recording is None:
            return run.problem
        steps = run.history.steps
        last = f"step {steps[-1]:,}, " if steps else ""
        old = f" ({run.problem})" if run.problem else ""
        return f"{last}{counted(len(steps), 'window')}, written {ago(time.time() - run.written)}{old}"

    def _run(self, run: Run, chosen: str, layers: Sequence[str]) -> dict[str, Any]:
        about = {"name": run.name, "state": self._state(run), "problem": run.problem, "old": run.recording is None}
        if run.recording is None:
            return {**about, "steps": [], "curves": [], "facts": []}
        curves = [{**thinned(run.history.steps, _curve(run, chosen, name)), "bad": _bad(run, name)} for name in layers]
        return {**about, "steps": len(run.history.steps), "curves": curves, "facts": facts(run.history, chosen)}


def facts(history: Any, chosen: str) -> list[dict[str, str]]:
    """The few numbers above the curves: where the run is, whether anything is not finite, and what has changed most."""
    if not history.steps:
        return [{"label": "windows", "value": "0", "note": "none is closed yet"}]
    found = [{"label": "step", "value": f"{history.steps[-1]:,}", "note": counted(len(history.steps), "window")}]
    if "nonfinite" in history.fields:
        bad = np.argwhere(np.nan_to_num(history["nonfinite"]) > 0)
        total = int(np.nansum(history["nonfinite"]))
        first = (
            f"first at step {history.steps[bad[0][0]]:,}, layer {history.layers[bad[0][1]] or '(output)'}" if len(bad) else "in all windows"
        )
        found.append({"label": "nan and inf", "value": f"{total:,}", "note": first})
    values = history[chosen] if chosen in history.fields else np.empty((0, 0))
    if len(values) > 1:
        past = values[-1 - _PAST : -1]
        now, usual = values[-1], np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in past.T])
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(now - usual) / np.abs(usual)
        if np.isfinite(change).any():
            at = int(np.argmax(np.where(np.isfinite(change), change, -1)))
            sign = "+" if now[at] >= usual[at] else "−"
            label = f"largest change of {chosen.replace('_', ' ')}"
            before = f"{number(float(usual[at]))}, the median of {counted(len(past), 'window')} before, to {number(float(now[at]))}"
            note = f"layer {history.layers[at] or '(output)'}: from {before}"
            found.append({"label": label, "value": sign + percent(float(change[at])), "note": note})
    return found


def thinned(steps: Sequence[float], values: NDArray[np.float64]) -> dict[str, list[float]]:
    """At most about :data:`POINTS` points of a curve. Of each part of a longer one the smallest and the largest value are kept, so that no
    peak is lost.

    >>> thinned([1, 2], np.array([0.5, 1.5]))
    {'x': [1, 2], 'y': [0.5, 1.5]}
    """
    present = min(len(steps), len(values))
    if present <= POINTS:
        return {"x": list(steps[:present]), "y": values[:present].tolist()}
    kept: set[int] = {0, present - 1}
    for part in np.array_split(np.arange(present), POINTS // 2 - 1):
        inside = values[part]
        kept |= {int(part[0])} if np.isnan(inside).all() else {int(part[np.nanargmin(inside)]), int(part[np.nanargmax(inside)])}
    chosen = sorted(kept)
    return {"x": [steps[index] for index in chosen], "y": values[chosen].tolist()}


def trend(values: NDArray[np.float64]) -> str:
    """The last values as bars, from the smallest to the largest; "·" for what is missing, "!" for what is not finite.

    >>> trend(np.array([1.0, 2.0, np.nan, 3.0, np.inf]))
    '▁▅·█!'
    """
    last = values[-_TREND:]
    finite = last[np.isfinite(last)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "·" if math.isnan(value) else "!"
        return _BARS[round((value - low) / (high - low) * 7)] if high > low else _BARS[0]

    return "".join(map(bar, last.tolist()))


def ago(seconds: float) -> str:
    """A time span for people.

    >>> ago(0.4), ago(75), ago(9000)
    ('just now', '1 min ago', '2 h ago')
    """
    if not seconds >= 2:
        return "just now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without the suffix.

    >>> short_names([Path("a/run.safetensors"), Path("b/run.safetensors"), Path("c/base.safetensors")])
    ['a/run', 'b/run', 'base']
    """
    whole = [path.resolve().with_suffix("").parts for path in paths]

    def name(parts: tuple[str, ...]) -> str:
        for length in range(1, len(parts) + 1):
            if sum(other[-length:] == parts[-length:] for other in whole) == 1:
                return "/".join(parts[-length:])
        return str(paths[whole.index(parts)])

    names = [name(parts) for parts in whole]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _curve(run: Run, chosen: str, layer: str) -> NDArray[np.float64]:
    """One field of one layer in every window; empty if the run does not have it."""
    if run.recording is None or layer not in run.history.layers or chosen not in run.history.fields:
        return np.empty(0)
    column: NDArray[np.float64] = run.history[chosen][:, run.history.layers.index(layer)]
    return column


def _bad(run: Run, layer: str) -> list[float]:
    """The first steps of windows with values that are not finite."""
    steps = np.asarray(run.history.steps)[np.flatnonzero(np.nan_to_num(_curve(run, "nonfinite", layer)) > 0)]
    return steps[:POINTS].tolist()  # type: ignore[no-any-return]


def _refresh(run: Run) -> bool:
    """Reads a file if it is another one than before. A file that cannot be read leaves what was there."""
    before = run.problem
    try:
        found = os.stat(run.path)
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == run.stamp:
            run.problem = ""  # it was away, and is the same as before
            return run.problem != before
        run.recording = torchprobe.load(run.path)
        run.stamp, run.written, run.problem = stamp, found.st_mtime, ""
    except FileNotFoundError:
        run.problem = WAITING
        return run.problem != before
    except (OSError, ValueError) as error:
        run.problem = reason(error)
        return run.problem != before
    return True
