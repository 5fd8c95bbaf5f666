"""The closed windows of a recording: the fields of every layer in every window, and a histogram."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.common.numbers import shown, whole
from torchprobe.common.threads import ordered
from torchprobe.recording.frames import Tabular
from torchprobe.recording.layers import canonical, meant
from torchprobe.recording.transfer import Array, Part, Rows, Transfer
from torchprobe.statistics import Moments, Statistic
from torchprobe.statistics.saved import check_keys, check_mapping, holds_numbers
from torchprobe.statistics.tensors import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Step = int | float
_SHOWN = 8  # steps in a notebook
_LARGEST = 1e308  # a file holds no larger step
_LATER = ("dropped", "repeated", "histograms")  # missing from states of earlier versions
_LINES = {"mean": "vector_kurtosis", "median": "vector_kurtosis_median"}


class History(Tabular):
    """Closed windows in the order of :meth:`~torchprobe.Recorder.snapshot`: ``history[field]`` is an array (steps, layers).

    ``steps`` and ``layers`` name the rows and columns, ``fields`` the numbers: those of the statistic, such as
    :data:`torchprobe.statistics.moments.FIELDS`. A number is nan if the layer did not fire in the window. ``histograms`` holds the
    distribution of the vector kurtosis in each window. Numbers are copied to the host without waiting; reading them waits.

    Args:
        keep: how many windows are kept, the newest ones; ``dropped`` counts the others. Default: all. With Moments a window takes 1.3 kB
            per layer.
        statistic: one of the statistics recorded; it names the fields. Default: :class:`~torchprobe.Moments`.

    Raises:
        ValueError: ``keep`` is not a positive whole number.

    >>> import torch, torchprobe
    >>> model = torch.nn.Linear(4, 3)
    >>> with torchprobe.record(model, keep=2) as rec:
    ...     for step in range(3):
    ...         _ = model(torch.randn(8, 4))
    ...         rec.snapshot(step)
    >>> rec.history.steps, rec.history["vectors"].tolist(), rec.history.dropped
    ([1, 2], [[8.0], [8.0]], 1)
    """

    def __init__(self, keep: int | None = None, statistic: Statistic | None = None) -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"keep must be a whole number of at least 1, or None for all windows; got {keep!r}")
        self.keep = keep
        self.statistic = Moments(1, "cpu") if statistic is None else statistic
        self.fields = tuple(self.statistic.fields)
        self.steps: list[Step] = []
        self.dropped = 0
        self._layers: dict[str, int] = {}  # name → column
        self._transfer = Transfer()
        self._blocks: deque[Rows] = deque()  # on the host; the first ones may hold windows that were dropped
        self._landed = 0  # windows in the blocks

    @ordered
    def append(self, step: Step, layers: list[str], parts: Sequence[Part]) -> None:
        """Adds one window of ``layers``: for each group of layers the names and the numbers, still on the device.

        Numbers have the shape (layers, fields + bins), as :func:`torchprobe.recording.windows.summaries` returns them with histograms.

        Raises:
            TypeError: ``step`` is not a finite number. Numbers of NumPy, and tensors of one number on the CPU, are fine.
        """
        number = plain_number(step)
        self._transfer.put(parts)
        self.steps.append(number)
        self._name(layers)
        self._land(self._transfer.arrived())
        self._drop()

    @property
    def layers(self) -> list[str]:
        """The columns: layers in the order in which they first fired."""
        return list(self._layers)

    @property
    def values(self) -> Array:
        """Everything but the histograms, shape (steps, layers, fields), float64."""
        return self._all()[:, :, : len(self.fields)]

    @property
    def histograms(self) -> Array:
        """How many vectors have a kurtosis in each bin: float64 (steps, layers, bins). Bins are between ``bin_edges``; the last is open.

        >>> History().histograms.shape, History().bin_edges[[0, 8, 16]].tolist()
        ((0, 0, 144), [1.0, 2.0, 4.0])
        """
        return self._all()[:, :, len(self.fields) :]

    @property
    def bin_edges(self) -> Array:
        """The edges of ``histograms``: float64 (bins + 1,); empty if the statistic has no histogram."""
        return self.statistic.histogram_edges().numpy() if self.statistic.histogram_bins else np.empty(0)

    def __getitem__(self, field: str) -> Array:
        if field not in self.fields:
            raise KeyError(f"{field!r} is not a field of the history; it has {', '.join(self.fields)}")
        return self.values[:, :, self.fields.index(field)]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __repr__(self) -> str:
        older = f", {self.dropped} older ones dropped" if self.dropped else ""
        return f"History({len(self.steps)} steps{older} × {len(self._layers)} layers × {len(self.fields)} fields)"

    def _repr_html_(self) -> str:
        """The headline of every layer for a notebook: the ends of the history, and some steps between them."""
        from torchprobe.rendering.notebook import fragment
        from torchprobe.rendering.tables import Column

        values = self[self.headline] if self.fields else np.empty((0, 0))
        chosen = np.unique(np.linspace(0, len(self.steps) - 1, min(len(self.steps), _SHOWN)).round().astype(int)) if self.steps else ()
        name = self.headline.replace("_", " ")
        columns = [Column("layer", "layer", "name within the model", "text")]
        columns += [Column(f"at {i}", str(self.steps[i]), f"{name} of the window of this step") for i in chosen]
        rows = [{"layer": layer, **{f"at {i}": float(values[i, j]) for i in chosen}} for j, layer in enumerate(self.layers)]
        return fragment(repr(self), rows=rows, columns=columns, note=f"The {name} of each layer, by step." if rows else "", of="layers")

    @ordered
    def rows(self) -> list[dict[str, Any]]:
        """One dict for every step and layer that fired: ``step``, ``layer`` and the fields."""
        values = self.values
        return [
            {"step": step, "layer": layer, **dict(zip(self.fields, values[i, j].tolist(), strict=True))}
            for i, step in enumerate(self.steps)
            for j, layer in enumerate(self.layers)
            if not np.isnan(values[i, j]).all()
        ]

    @ordered
    def columns(self) -> dict[str, Any]:
        values = self.values
        step, layer = np.nonzero(~np.isnan(values).all(2))
        steps = np.asarray(self.steps)[step] if self.steps else np.empty(0, dtype=np.int64)
        names = [self.layers[index] for index in layer]
        return {"step": steps, "layer": names, **{field: values[step, layer, i] for i, field in enumerate(self.fields)}}

    def plot(self, field: str | None = None, *, width: float = 9.0) -> Figure:
        """Layers × steps in shades of one color; windows with nonfinite values are crossed. Needs matplotlib.

        Args:
            field: the field to show. Default: the headline of the statistic, the vector kurtosis for Moments.
            width: in inches.

        Raises:
            KeyError: ``field`` is unknown.
        """
        from torchprobe.rendering.heatmap import history_map

        field = field or self.headline
        marked = self["nonfinite"] > 0 if "nonfinite" in self.fields else None
        return history_map(self[field], self.steps, self.layers, field.replace("_", " "), marked=marked, width=width)

    def plot_layer(self, layer: str, *, width: float = 9.0) -> Figure:
        """The distribution of the vector kurtosis of one layer in every window, with its mean and median. Needs matplotlib.

        Raises:
            KeyError: no window has the layer; the message suggests the nearest name.
            ValueError: the statistic keeps no histogram.
        """
        from torchprobe.rendering.heatmap import layer_over_time

        if not self.statistic.histogram_bins:
            raise ValueError(f"{type(self.statistic).__name__} keeps no histogram of its windows; plot(field) shows a field of all layers")
        name = layer if layer in self.layers else canonical(layer)
        if name not in self.layers:
            raise KeyError(f"no layer {layer!r} in the history{meant(layer, self.layers)}")
        column = self.layers.index(name)
        lines = {which: self[field][:, column] for which, field in _LINES.items() if field in self.fields}
        return layer_over_time(self.histograms[:, column], self.bin_edges, self.steps, **lines, layer=name, width=width)

    @property
    def headline(self) -> str:
        """The field that plots show."""
        return self.statistic.headline or next(iter(self.fields), "")

    @ordered
    def copy(self) -> History:
        copy = History(self.keep, self.statistic)
        copy._set(self.steps, self.layers, self._all(), self.dropped)
        return copy

    @ordered
    def extend(self, other: History) -> None:
        """Appends the steps of another history.

        Raises:
            ValueError: both have a window of the same step, and summaries cannot be merged; or they have different fields.
        """
        if other.steps and self.steps and other.fields != self.fields:
            raise ValueError(f"one history has the fields {', '.join(self.fields)}, the other {', '.join(other.fields)}")
        shared = sorted(set(self.steps) & set(other.steps))
        if shared:
            raise ValueError(
                f"both histories hold step {shared[0]}{' and others' if shared[1:] else ''}, and summaries of one step "
                f"cannot be merged: merge the states instead, first.total.merge(second.total)"
            )
        self._land(self._transfer.everything())  # our windows come first
        self._land([(other.layers, other._all().copy())])
        self.steps.extend(other.steps)
        self.dropped += other.dropped
        self._name(other.layers)
        self._drop()

    @ordered
    def state_dict(self) -> dict[str, Any]:
        """``steps``, ``layers``, ``fields``, ``dropped``, ``repeated`` (whether a step has several windows); the tensors ``values`` (steps,
        layers, fields) and ``histograms`` (steps, layers, bins)."""
        values = torch.from_numpy(self.values.copy())
        used = np.flatnonzero((self.histograms > 0).any((0, 1)))
        histograms = torch.from_numpy(self.histograms[:, :, : used[-1] + 1 if used.size else 0].copy())
        about = {"steps": list(self.steps), "layers": self.layers, "fields": list(self.fields), "dropped": self.dropped}
        about["repeated"] = len(set(self.steps)) < len(self.steps)
        return {**about, "values": values, "histograms": histograms}

    @ordered
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned. Fields that this version does not know are left out; fields that it added are nan.

        Histograms may be missing, as in states of an earlier version; they are nan then. At most ``keep`` windows are restored, the newest.

        Raises:
            ValueError: a part is missing, damaged, or does not fit. Nothing is changed then.
        """
        check_mapping("a history", state)
        check_keys("a history", {**dict.fromkeys(_LATER), **state}, (*_LATER, "steps", "layers", "fields", "values"))
        steps, layers, fields = (_listed(name, state[name]) for name in ("steps", "layers", "fields"))
        check_steps(steps, state.get("repeated", True))
        for name, texts in (("layers", layers), ("fields", fields)):
            if not all(isinstance(text, str) for text in texts) or len(set(texts)) < len(texts):
                raise ValueError(f"{name} of the history are different texts")
        dropped = whole("dropped of the history", state.get("dropped", 0))
        values = _array("values", state["values"])
        if values.shape != (len(steps), len(layers), len(fields)):
            raise ValueError(
                f"the history holds values of shape {values.shape} for {len(steps)} steps, {len(layers)} layers and {len(fields)} fields"
            )
        bins = self.statistic.histogram_bins
        histograms = None if state.get("histograms") is None else _array("histograms", state["histograms"])
        if histograms is not None:
            if histograms.shape[:2] != values.shape[:2] or histograms.ndim != 3 or histograms.shape[2] > bins:
                raise ValueError(f"the history holds histograms of shape {histograms.shape} for values of shape {values.shape}")
            if bool((histograms < 0).any()) or bool(np.isinf(histograms).any()):
                raise ValueError("histograms of the history hold negative numbers or inf")
        known = np.full((len(steps), len(layers), len(self.fields) + bins), math.nan)
        for index, field in enumerate(fields):
            if field in self.fields:
                known[:, :, self.fields.index(field)] = values[:, :, index]
        if histograms is not None and bins:
            fired = ~np.isnan(known[:, :, : len(self.fields)]).all(-1, keepdims=True)
            padded = np.pad(histograms, ((0, 0), (0, 0), (0, bins - histograms.shape[2])))
            known[:, :, len(self.fields) :] = np.where(fired, padded, math.nan)
        self._set(steps, layers, known, dropped)

    # -- on the host ---------------------------------------------------------------------------------------------------

    @ordered
    def _all(self) -> Array:
        """Fields and histograms, (steps, layers, fields + bins). It joins all blocks into one."""
        self._land(self._transfer.everything())
        if len(self._blocks) != 1 or self._blocks[0][0] != self.layers or self._landed != len(self.steps):
            joined = np.full((self._landed, len(self._layers), len(self.fields) + self.statistic.histogram_bins), math.nan)
            start = 0
            for names, rows in self._blocks:
                if names:
                    joined[start : start + len(rows), [self._layers[name] for name in names]] = rows
                start += len(rows)
            self._blocks = deque([(self.layers, joined[self._landed - len(self.steps) :].copy())])
            self._landed = len(self.steps)
        return self._blocks[0][1]

    def _set(self, steps: list[Step], layers: list[str], values: Array, dropped: int) -> None:
        self.steps, self.dropped = list(steps), dropped
        self._layers, self._transfer = {}, Transfer()
        self._blocks, self._landed = deque([(list(layers), values.copy())]), len(steps)
        self._name(layers)
        self._drop()

    def _name(self, layers: list[str]) -> None:
        for name in layers:
            self._layers.setdefault(name, len(self._layers))

    def _land(self, blocks: Iterable[Rows]) -> None:
        for block in blocks:
            self._blocks.append(block)
            self._landed += len(block[1])

    def _drop(self) -> None:
        """Forgets the oldest windows; their memory is freed in blocks."""
        if self.keep is None:
            return
        surplus = max(0, len(self.steps) - self.keep)
        del self.steps[:surplus]
        self.dropped += surplus
        while self._blocks and self._landed - len(self._blocks[0][1]) >= self.keep:
            self._landed -= len(self._blocks.popleft()[1])


def check_steps(steps: Sequence[Any], repeated: Any) -> None:
    """Raises ``ValueError`` unless saved steps are finite numbers, each once unless ``repeated``."""
    if not all(isinstance(step, (int, float)) and not isinstance(step, bool) and -_LARGEST < step < _LARGEST for step in steps):
        raise ValueError("steps are finite numbers")
    if not isinstance(repeated, bool):
        raise ValueError(f"repeated of the history is true or false, got {shown(repeated)}")
    if len(set(steps)) < len(steps) and not repeated:
        twice = next(step for index, step in enumerate(steps) if step in steps[:index])
        raise ValueError(f"steps of the history hold {twice} twice")


def _listed(name: str, found: Any) -> list[Any]:
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{name} of the history is a list, got {type(found).__name__}")
    return list(found)


def _array(name: str, found: Any) -> Array:
    """A saved tensor as an array.

    Raises:
        ValueError: it is not a tensor of numbers.
    """
    if isinstance(found, np.ndarray) and found.dtype.kind in "fiu":
        return np.asarray(found, dtype=np.float64)
    if not isinstance(found, Tensor) or not holds_numbers(found):
        raise ValueError(f"{name} of the history is {describe(found)}, expected a tensor of numbers")
    return found.detach().to("cpu", torch.float64).numpy()


def plain_number(step: Any) -> Step:
    """A step as a plain number.

    Raises:
        TypeError: it is not a finite number.
    """
    if isinstance(step, Tensor) and step.device.type != "cpu":
        raise TypeError(f"a step is a finite number, got a tensor on {step.device}, and reading it would wait: pass step.item()")
    number = step.item() if getattr(step, "shape", None) == () and hasattr(step, "item") else step
    if not isinstance(number, bool) and isinstance(number, Real):
        plain = int(number) if isinstance(number, Integral) else float(number)
        if -_LARGEST < plain < _LARGEST:
            return plain
    raise TypeError(f"a step is a finite number, got {repr(step)[:80]}")
