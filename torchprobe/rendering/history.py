"""A run as a picture: every layer over all steps, and the distribution of one layer over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.rendering.heatmap import MOST, _colour_bar, _paint, _shades, heat_map
from torchprobe.rendering.plots import MUTED, SURFACE, WARM, _figure, _finite, _legend, _log_scale, _plain
from torchprobe.rendering.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINTEST = 1e-4
"""The share of the vectors that gets the lightest shade of a distribution; what is rarer gets it too."""


def history_map(
    values: ArrayLike,
    steps: Sequence[float],
    layers: Sequence[str],
    label: str = "vector kurtosis",
    *,
    marked: ArrayLike | None = None,
    width: float = 9.0,
) -> Figure:
    """Every layer (rows, the first to run on top) over the steps (columns), in shades of one colour.

    The scale is logarithmic where all values are positive. Hatched: the layer gave no value in that window.

    Args:
        values: shape (steps, layers), as ``Recording.history[field]`` gives them.
        steps: what the windows are called, numbers.
        layers: names.
        label: what a value is.
        marked: windows with nonfinite values, bool (steps, layers): a cross goes over them.
        width: inches.

    >>> figure = history_map([[3.0, 3.1], [3.0, 9.5]], steps=[0, 100], layers=["blocks.0", "blocks.1"])
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['0', '1']
    """
    matrix = np.asarray(values, dtype=np.float64).reshape(len(steps), len(layers))
    shown = _finite(matrix)
    scale: Any = "log" if shown.size and shown.min() > 0 else "linear"
    figure = heat_map(matrix.T, layers, steps, label, row_label="layer", column_label="step", scale=scale, width=width)
    axes = figure.axes[0]
    if len(axes.get_ylabel()) > 9 * figure.get_figheight():  # longer than the axis
        axes.set_ylabel(f"layer {_ending(axes.get_ylabel())}")
    together = max(1, math.ceil(len(steps) / MOST))
    _name_steps(axes, steps, width - 2, together)
    if marked is not None and np.any(marked):
        step, layer = np.nonzero(np.asarray(marked, dtype=bool).reshape(matrix.shape))
        rows_together = max(1, math.ceil(len(layers) / MOST))
        axes.plot(
            step // together,
            layer // rows_together,
            linestyle="none",
            marker="x",
            markersize=5,
            markeredgewidth=1.4,
            color=WARM,
            label="nonfinite values",
        )
        _legend(axes, width)
    return figure


def layer_over_time(
    histograms: ArrayLike,
    bin_edges: ArrayLike,
    steps: Sequence[float],
    *,
    mean: ArrayLike | None = None,
    median: ArrayLike | None = None,
    layer: str = "",
    width: float = 9.0,
) -> Figure:
    """How the vector kurtosis of one layer is distributed at every step: a column is the histogram of a window.

    The shade is the share of the window's vectors in a bin, logarithmic, so that a few vectors far from the others are seen
    beside them, as in fastai's "colorful dimension". Hatched: the layer did not run in that window. Of more than 300 windows neighbours are
    added up.

    Args:
        histograms: vectors by their kurtosis, shape (steps, bins), as in ``Recording.history.histograms[:, layer]``.
        bin_edges: shape (bins + 1,).
        steps: what the windows are called, numbers.
        mean, median: of each window, shape (steps,), drawn as lines.
        layer: its name, for the axis.
        width: inches.

    >>> figure = layer_over_time([[8, 2, 0], [5, 4, 1]], [2, 4, 8, 16], steps=[0, 100], mean=[3.2, 5.0])
    >>> figure.axes[0].get_yscale()
    'log'
    """
    edges = np.asarray(bin_edges, dtype=np.float64)
    counts = np.asarray(histograms, dtype=np.float64).reshape(len(steps), edges.size - 1)
    lines = {"mean": (mean, "-", 1.8), "median": (median, (0, (4, 2)), 1.4)}
    figure, (axes,) = _figure(width, 3.4)
    axes.grid(False)
    _paint_columns(axes, counts, edges)
    x_lines = np.arange(len(steps))
    for name, (line, style, thickness) in lines.items():
        if line is not None:
            numbers = np.asarray(line, dtype=np.float64)
            # A rim in the colour of the page, since the line runs where the shades are darkest.
            axes.plot(x_lines, numbers, color=SURFACE, linewidth=thickness + 1.8, alpha=0.8)
            axes.plot(x_lines, numbers, color=WARM, linewidth=thickness, linestyle=style, marker="o" * (len(steps) == 1), label=name)
    axes.axhline(3, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="Gaussian features, many of them")
    filled = np.flatnonzero(np.nansum(counts, 0)) if counts.size else np.zeros(0, int)
    ends = edges[[filled[0], filled[-1] + 1]] if filled.size else edges[:0]
    _log_scale(axes, "y", np.concatenate([ends, [3.0], *(_finite(line) for line, _, _ in lines.values() if line is not None)]))
    axes.set_xlim(-0.5, max(len(steps), 1) - 0.5)
    _name_steps(axes, steps, width - 2)
    axes.set_xlabel("step")
    axes.set_ylabel(f"vector kurtosis, {f'layer {_ending(layer)}' if layer else 'output'}")
    _legend(axes, width)
    return figure


def _paint_columns(axes: Axes, counts: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    """The histograms as columns, a window wide, with a colour bar."""
    together = max(1, math.ceil(len(counts) / MOST))
    starts = np.arange(0, len(counts), together)
    x = np.append(starts, len(counts)) - 0.5
    summed = np.add.reduceat(np.nan_to_num(counts), starts, axis=0) if len(counts) else counts
    vectors = summed.sum(1, keepdims=True)
    share = np.divide(summed, vectors, out=np.zeros_like(summed), where=vectors > 0)
    low = max(float(share[share > 0].min(initial=0.3)), FAINTEST) / 3  # so that what is rarest is still seen
    shades = np.where(share > 0, _shades(share, low, 1.0, "log").clip(0), 0)
    _paint(axes, np.where(vectors > 0, shades, -1).T, x, edges)
    _colour_bar(axes, "share of the vectors", low, 1.0, "log")


def _ending(layer: str, most: int = 20) -> str:
    """The last components of a name: as many as there is room for."""
    text = printable(layer)
    return _plain(text if len(text) <= most else f"…{text[-most:].partition('.')[2] or text[-most:]}")


def _name_steps(axes: Axes, steps: Sequence[float], room: float, together: int = 1) -> None:
    """Numbers along an axis of ``room`` inches: of few windows their steps, of many round ones, each where it lies between the windows.

    ``together``: so many neighbours share one column.
    """
    numbers = np.asarray(steps, dtype=np.float64)
    most = max(2, int(room / 0.7))
    if numbers.size <= most or not (np.diff(numbers) > 0).all():  # each by its name, as far as there is room
        every = max(1, math.ceil(numbers.size / most))
        axes.set_xticks(np.arange(numbers.size)[::every] // together, [f"{step:,.12g}" for step in steps[::every]], rotation=0, ha="center")
        return
    low, high = float(numbers[0]), float(numbers[-1])
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    apart = next(size * times for times in (1, 2, 5, 10, 20) if (high - low) / (size * times) <= most)
    ticks = np.arange(math.ceil(low / apart), math.floor(high / apart) + 1) * apart
    columns = (np.interp(ticks, numbers, np.arange(numbers.size)) - (together - 1) / 2) / together
    axes.set_xticks(columns, [f"{tick:,.12g}" for tick in ticks], rotation=0, ha="center")
