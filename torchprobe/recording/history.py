"""What the windows of a recording came to: one row of numbers for every step and layer, and a histogram beside it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchprobe.recording.layers import canonical
from torchprobe.statistics.moments import BINS, FIELDS, bin_edges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Step = int | float
Array = npt.NDArray[np.float64]
_WIDTH = len(FIELDS) + BINS  # what a window keeps of a layer: its fields, then its histogram


class History:
    """Closed windows in the order of :meth:`~torchprobe.Recorder.snapshot`: ``history[field]`` is an array (steps, layers).

    ``steps`` and ``layers`` name the rows and columns, ``fields`` what can be asked for (see
    :data:`torchprobe.statistics.moments.FIELDS`). Nan where a layer did not fire in a window. ``histograms`` holds how the vector
    kurtosis was distributed in each window. Numbers stay on the device until they are asked for.

    >>> import torch, torchprobe
    >>> model = torch.nn.Linear(4, 3)
    >>> with torchprobe.record(model) as rec:
    ...     for step in range(2):
    ...         _ = model(torch.randn(8, 4))
    ...         rec.snapshot(step)
    >>> rec.history.steps, rec.history["vectors"].tolist()
    ([0, 1], [[8.0], [8.0]])
    """

    fields = FIELDS

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._layers: list[str] = []
        self._values: Array = np.empty((0, 0, _WIDTH))
        self._pending: list[list[tuple[list[str], Tensor]]] = []  # for every step: layers and their (layers, _WIDTH)

    def append(self, step: Step, parts: Sequence[tuple[list[str], Tensor]]) -> None:
        """Adds one window: for each group of layers their names and numbers, still on the device.

        Numbers have the shape (layers, fields + bins): what :func:`torchprobe.recording.windows.summaries` gives with histograms.
        """
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not math.isfinite(step):
            raise TypeError(f"a step is a number, got {step!r}")
        self.steps.append(step)
        self._pending.append(list(parts))  # where a bound on the history (`keep`) would drop the oldest

    @property
    def layers(self) -> list[str]:
        """The columns: layers in the order in which they first fired."""
        self._fetch()
        return list(self._layers)

    @property
    def values(self) -> Array:
        """Everything but the histograms, shape (steps, layers, fields), float64."""
        self._fetch()
        return self._values[:, :, : len(FIELDS)]

    @property
    def histograms(self) -> Array:
        """Vectors by their kurtosis, shape (steps, layers, bins), float64; the bins lie between ``bin_edges``, the last is open.

        >>> History().histograms.shape, History().bin_edges[[0, 8, 16]].tolist()
        ((0, 0, 144), [1.0, 2.0, 4.0])
        """
        self._fetch()
        return self._values[:, :, len(FIELDS) :]

    @property
    def bin_edges(self) -> Array:
        """Of ``histograms``, shape (bins + 1,): see :func:`torchprobe.statistics.moments.bin_edges`."""
        return bin_edges().numpy()

    def __getitem__(self, field: str) -> Array:
        if field not in FIELDS:
            raise KeyError(f"{field!r} is no field of the history; it has {', '.join(FIELDS)}")
        return self.values[:, :, FIELDS.index(field)]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[str]:
        return iter(FIELDS)

    def __repr__(self) -> str:
        return f"History({len(self.steps)} steps × {len(self.layers)} layers × {len(FIELDS)} fields)"

    def rows(self) -> list[dict[str, Any]]:
        """One dict for every step and layer that fired: ``step``, ``layer`` and the fields."""
        values = self.values
        return [
            {"step": step, "layer": layer, **dict(zip(FIELDS, values[i, j].tolist(), strict=True))}
            for i, step in enumerate(self.steps)
            for j, layer in enumerate(self.layers)
            if not math.isnan(values[i, j, 0])
        ]

    def plot(self, field: str = "vector_kurtosis", *, width: float = 9.0) -> Figure:
        """Layers × steps in shades of one colour (``pip install torchprobe[report]``); windows with nonfinite values are crossed.

        Raises:
            KeyError: no such field.
        """
        from torchprobe.rendering.history import history_map

        return history_map(self[field], self.steps, self.layers, field.replace("_", " "), marked=self["nonfinite"] > 0, width=width)

    def plot_layer(self, layer: str, *, width: float = 9.0) -> Figure:
        """How the vector kurtosis of one layer is distributed in every window, with its mean and median.

        Raises:
            KeyError: the layer is in no window; the message names the nearest.
        """
        from torchprobe.rendering.history import layer_over_time

        name = layer if layer in self.layers else canonical(layer)
        if name not in self.layers:
            near = difflib.get_close_matches(layer, self.layers, n=1)
            raise KeyError(f"no layer {layer!r} in the history" + (f"; did you mean {near[0]!r}?" if near else ""))
        column = self.layers.index(name)
        mean, median = (self[f"vector_kurtosis{which}"][:, column] for which in ("", "_median"))
        histograms = self.histograms[:, column]
        return layer_over_time(histograms, self.bin_edges, self.steps, mean=mean, median=median, layer=name, width=width)

    def copy(self) -> History:
        copy = History()
        copy._set(self.steps, self.layers, self._all())
        return copy

    def extend(self, other: History) -> None:
        """Appends the steps of another history.

        Raises:
            ValueError: both have windows of the same step; their summaries cannot be merged.
        """
        shared = sorted(set(self.steps) & set(other.steps))
        if shared:
            raise ValueError(
                f"both histories hold step {shared[0]}{' and others' if shared[1:] else ''}, and summaries of one step "
                f"cannot be merged: merge the states instead, first.total.merge(second.total)"
            )
        theirs = other._all()
        for i, step in enumerate(other.steps):
            self.append(step, [(list(other.layers), torch.from_numpy(theirs[i].copy()))])

    def state_dict(self) -> dict[str, Any]:
        """``steps``, ``layers``, ``fields``; the tensors ``values`` (steps, layers, fields), ``histograms`` (steps, layers, bins)."""
        values = torch.from_numpy(self.values.copy())
        used = np.flatnonzero((self.histograms > 0).any((0, 1)))
        histograms = torch.from_numpy(self.histograms[:, :, : used[-1] + 1 if used.size else 0].copy())
        return {"steps": list(self.steps), "layers": list(self.layers), "fields": list(FIELDS), "values": values, "histograms": histograms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; fields that this version does not know are left out, new ones are nan.

        Histograms may be missing, as from an earlier version: they are nan then.

        Raises:
            ValueError: the parts do not fit together.
        """
        steps, layers, fields = list(state["steps"]), list(state["layers"]), list(state["fields"])
        values = np.asarray(state["values"], dtype=np.float64)
        if values.shape != (len(steps), len(layers), len(fields)):
            raise ValueError(
                f"the history holds values of shape {values.shape} for {len(steps)} steps, {len(layers)} layers and {len(fields)} fields"
            )
        histograms = state.get("histograms")
        if histograms is not None:
            histograms = np.asarray(histograms, dtype=np.float64)
            if histograms.shape[:2] != values.shape[:2] or histograms.ndim != 3 or histograms.shape[2] > BINS:
                raise ValueError(f"the history holds histograms of shape {histograms.shape} for values of shape {values.shape}")
        known = np.full((len(steps), len(layers), _WIDTH), math.nan)
        for index, field in enumerate(fields):
            if field in FIELDS:
                known[:, :, FIELDS.index(field)] = values[:, :, index]
        if histograms is not None:
            fired = ~np.isnan(known[:, :, :1])
            known[:, :, len(FIELDS) :] = np.where(fired, np.pad(histograms, ((0, 0), (0, 0), (0, BINS - histograms.shape[2]))), math.nan)
        self._set(steps, layers, known)

    def _all(self) -> Array:
        """Fields and histograms, shape (steps, layers, fields + bins)."""
        self._fetch()
        return self._values

    def _set(self, steps: list[Step], layers: list[str], values: Array) -> None:
        self.steps, self._layers, self._values, self._pending = list(steps), list(layers), values.copy(), []

    def _fetch(self) -> None:
        """Copies what is pending to the host, at once for every device."""
        if not self._pending:
            return
        tensors = [tensor for parts in self._pending for _, tensor in parts]
        numbers = iter(to_host(tensors))
        for parts in self._pending:
            for names, _ in parts:
                self._layers.extend(name for name in names if name not in self._layers)
        grown = np.full((len(self.steps), len(self._layers), _WIDTH), math.nan)
        done, columns = self._values.shape[:2]
        grown[:done, :columns] = self._values
        for index, parts in enumerate(self._pending, start=done):
            for names, _ in parts:
                grown[index, [self._layers.index(name) for name in names]] = next(numbers)
        self._values, self._pending = grown, []


def to_host(tensors: Sequence[Tensor]) -> list[Array]:
    """The tensors as float64 arrays, with one copy for each device."""
    out: dict[int, Array] = {}
    for device in {tensor.device for tensor in tensors}:
        chosen = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen]).to("cpu", torch.float64).numpy()
        for i, part in zip(chosen, np.split(flat, np.cumsum([tensors[i].numel() for i in chosen])[:-1]), strict=True):
            out[i] = part.reshape(tuple(tensors[i].shape))
    return [out[i] for i in range(len(tensors))]
