"""Values as shades of one color: a matrix, a run (layers over steps), and the distribution of one layer over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike, NDArray

from torchprobe.rendering.axes import (
    ACCENT,
    BAND,
    DASHED,
    DOTTED,
    INK,
    MUTED,
    SURFACE,
    WARM,
    draw_legend,
    finite_values,
    new_figure,
    safe_text,
    set_log_scale,
    short_names,
    ticks_that_fit,
)
from torchprobe.rendering.tables import number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

LEVELS = 64
"""Shades between the lowest and the highest value."""

MOST = 300
"""The largest number of rows or columns to draw; if there are more, neighbors are averaged."""

_TURN, _DARKEST = 0.7, 0.5
"""Up to this share of the scale, a shade is the accent color at that opacity. Above it, ink is added on top, up to this opacity: more would
make the upper third of a scale look black."""

_CELL = 0.42, 0.17
"""Inches that a number in a cell needs; the numbers are written if all cells have that."""

FAINTEST = 1e-4
"""The share of the vectors that gets the lightest shade of a distribution. Rarer bins get the same shade."""


def heat_map(
    values: ArrayLike,
    rows: Sequence[object],
    columns: Sequence[object],
    label: str,
    *,
    row_label: str = "",
    column_label: str = "",
    scale: Literal["linear", "log"] = "linear",
    limits: tuple[float, float] | None = None,
    width: float = 9.0,
) -> Figure:
    """A matrix in shades of one color, the first row on top, with a color bar.

    Missing values are hatched: nan, infinities, and on a logarithmic scale values that are not positive. If there are more than
    300 rows or columns, neighbors are averaged, and the axis says so. In cells that are large enough, the number is written.

    Args:
        values: numbers, shape (rows, columns).
        rows, columns: their names, such as layers or steps. A shared prefix is written once; names that do not fit are left out.
        label: what a value is; written at the color bar.
        row_label, column_label: what the rows and the columns are.
        scale: of the colors.
        limits: the values of the lightest and the darkest shade; None: the smallest and the largest value.
        width: inches.

    Raises:
        ValueError: the number of names differs from the number of rows or columns, or the limits do not span a range.

    >>> import torch
    >>> figure = heat_map(torch.eye(2), ["conv", "fc"], ["conv", "fc"], "CKA", limits=(0, 1))
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['conv', 'fc']
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.shape != (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns are named, but the values have shape {matrix.shape}")
    low, high = _limits(matrix, scale, limits)
    row_names, column_names = [str(name) for name in rows], [str(name) for name in columns]
    matrix, row_names, row_label = _averaged(matrix, row_names, row_label)
    transposed, column_names, column_label = _averaged(matrix.T, column_names, column_label)
    matrix = transposed.T

    height = min(max(0.17 * len(row_names) + 1.1, 2.6), width + 0.6)
    figure, (axes,) = new_figure(width, height)
    axes.grid(False)
    _paint(axes, _shades(matrix, low, high, scale), np.arange(len(column_names) + 1) - 0.5, np.arange(len(row_names) + 1) - 0.5)
    axes.set(xlim=(-0.5, max(len(column_names), 1) - 0.5), ylim=(max(len(row_names), 1) - 0.5, -0.5))
    _name(axes, "x", column_names, column_label, width - 2)
    _name(axes, "y", row_names, row_label, height - 1)
    _color_bar(axes, label, low, high, scale)
    room = (width - 2) / max(1, len(column_names)), (height - 1) / max(1, len(row_names))
    if room[0] >= _CELL[0] and room[1] >= _CELL[1]:
        _write_numbers(axes, matrix, _shades(matrix, low, high, scale))
    return figure


def history_map(
    values: ArrayLike,
    steps: Sequence[float],
    layers: Sequence[str],
    label: str = "vector kurtosis",
    *,
    marked: ArrayLike | None = None,
    width: float = 9.0,
) -> Figure:
    """Every layer (rows, the first to run on top) over the steps (columns), in shades of one color.

    The scale is logarithmic if all values are positive. Hatched: the layer has no value in that window.

    Args:
        values: shape (steps, layers), as in ``Recording.history[field]``.
        steps: the number of each window.
        layers: names.
        label: what a value is.
        marked: windows with nonfinite values, bool (steps, layers); each is marked with a cross.
        width: inches.

    >>> figure = history_map([[3.0, 3.1], [3.0, 9.5]], steps=[0, 100], layers=["blocks.0", "blocks.1"])
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['0', '1']
    """
    matrix = np.asarray(values, dtype=np.float64).reshape(len(steps), len(layers))
    shown = finite_values(matrix)
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
        draw_legend(axes, width)
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
    """The distribution of the vector kurtosis of one layer at every step: each column is the histogram of a window.

    The shade is the share of the window's vectors in a bin. It is logarithmic, so a few vectors far from the others stay visible, as in
    fastai's "colorful dimension". Hatched: the layer did not run in that window. In a run of more than 300 windows, neighbors are added up.

    Args:
        histograms: number of vectors by their kurtosis, shape (steps, bins), as in ``Recording.history.histograms[:, layer]``.
        bin_edges: shape (bins + 1,).
        steps: the number of each window.
        mean, median: of each window, shape (steps,), drawn as lines.
        layer: its name, for the axis.
        width: inches.

    >>> figure = layer_over_time([[8, 2, 0], [5, 4, 1]], [2, 4, 8, 16], steps=[0, 100], mean=[3.2, 5.0])
    >>> figure.axes[0].get_yscale()
    'log'
    """
    edges = np.asarray(bin_edges, dtype=np.float64)
    counts = np.asarray(histograms, dtype=np.float64).reshape(len(steps), edges.size - 1)
    lines = {"mean": (mean, "-", 1.8), "median": (median, DASHED, 1.4)}
    figure, (axes,) = new_figure(width, 3.4)
    axes.grid(False)
    _paint_columns(axes, counts, edges)
    x_lines = np.arange(len(steps))
    for name, (line, style, thickness) in lines.items():
        if line is not None:
            numbers = np.asarray(line, dtype=np.float64)
            # A rim in the color of the page, because the line runs where the shades are darkest.
            axes.plot(x_lines, numbers, color=SURFACE, linewidth=thickness + 1.8, alpha=0.8)
            axes.plot(x_lines, numbers, color=WARM, linewidth=thickness, linestyle=style, marker="o" * (len(steps) == 1), label=name)
    axes.axhline(3, color=MUTED, linewidth=1, linestyle=DOTTED, label="many Gaussian features")
    filled = np.flatnonzero(np.nansum(counts, 0)) if counts.size else np.zeros(0, int)
    ends = edges[[filled[0], filled[-1] + 1]] if filled.size else edges[:0]
    set_log_scale(axes, "y", np.concatenate([ends, [3.0], *(finite_values(line) for line, _, _ in lines.values() if line is not None)]))
    axes.set_xlim(-0.5, max(len(steps), 1) - 0.5)
    _name_steps(axes, steps, width - 2)
    axes.set_xlabel("step")
    axes.set_ylabel(f"vector kurtosis, {f'layer {_ending(layer)}' if layer else 'output'}")
    draw_legend(axes, width)
    return figure


def _limits(matrix: NDArray[np.float64], scale: str, limits: tuple[float, float] | None) -> tuple[float, float]:
    if limits is not None:
        low, high = limits
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or (scale == "log" and low <= 0):
            needed = "two numbers above 0" if scale == "log" else "two numbers"
            raise ValueError(f"the limits of a {scale} scale are {needed}, the lower one first; got {limits}")
        return low, high
    shown = finite_values(matrix)
    shown = shown[shown > 0] if scale == "log" else shown
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 10.0)
    if high > low:
        return low, high
    return (low / 1.1, low * 1.1) if scale == "log" else (low - 0.05 * (abs(low) or 1), low + 0.05 * (abs(low) or 1))


def _averaged(matrix: NDArray[np.float64], names: list[str], label: str) -> tuple[NDArray[np.float64], list[str], str]:
    """At most MOST rows. Each is the mean of the finite values of equally many neighbors and has the name of the first."""
    together = math.ceil(len(names) / MOST)
    if together <= 1:
        return matrix, names, label
    starts = np.arange(0, len(names), together)
    seen = np.isfinite(matrix)
    count = np.add.reduceat(seen.astype(np.float64), starts, axis=0)
    total = np.add.reduceat(np.where(seen, matrix, 0), starts, axis=0)
    mean: NDArray[np.float64] = total / np.where(count > 0, count, math.nan)
    return mean, names[::together], f"{label} (means of {together})".strip()


def _shades(matrix: NDArray[np.float64], low: float, high: float, scale: str) -> NDArray[np.int64]:
    """The shade of each value, from 0 to LEVELS − 1; −1 for a missing value."""
    known = np.isfinite(matrix) & ((matrix > 0) | (scale != "log"))
    values = np.where(known, matrix, low)
    share = (np.log(values) - np.log(low)) / (np.log(high) - np.log(low)) if scale == "log" else (values - low) / (high - low)
    shades: NDArray[np.int64] = np.where(known, (share.clip(0, 1) * LEVELS).astype(np.int64).clip(0, LEVELS - 1), -1)
    return shades


def _paint(axes: Axes, shades: NDArray[np.int64], x: NDArray[Any], y: NDArray[Any]) -> None:
    """Draws one path for each shade, because a page must not load a bitmap. ``x`` and ``y``: the edges of columns and rows."""
    from matplotlib.patches import PathPatch

    # add_artist, because add_patch would visit every corner to update the data limits.
    for shade in np.unique(shades):
        path = _rectangles(shades == shade, x, y)
        if shade < 0:
            axes.add_artist(PathPatch(path, facecolor="none", edgecolor=BAND, hatch="////", linewidth=0))
            continue
        share = (shade + 1) / LEVELS
        layers = [(ACCENT, min(1.0, share / _TURN))]
        if share > _TURN:
            layers.append((INK, _DARKEST * (share - _TURN) / (1 - _TURN)))
        for color, alpha in layers:
            axes.add_artist(PathPatch(path, facecolor=color, alpha=alpha, linewidth=0, antialiased=False))


def _write_numbers(axes: Axes, matrix: NDArray[np.float64], shades: NDArray[np.int64]) -> None:
    """Each number in its cell, in the color of the page where the shade is dark."""
    for (row, column), shade in np.ndenumerate(shades):
        if shade >= 0:
            color = SURFACE if shade >= LEVELS // 2 else INK
            axes.text(column, row, number(float(matrix[row, column]), 2), ha="center", va="center", color=color, fontsize=7)


def _rectangles(where: NDArray[np.bool_], x: NDArray[Any], y: NDArray[Any]) -> Path:
    """The cells in which ``where`` is true; neighbors in a row become one rectangle."""
    from matplotlib.path import Path

    change = np.diff(where.astype(np.int8), axis=1, prepend=0, append=0)
    (row, start), (_, end) = np.nonzero(change == 1), np.nonzero(change == -1)
    left, right, top, bottom = x[start], x[end], y[row], y[row + 1]
    border = np.stack([left, top, right, top, right, bottom, left, bottom, left, top])
    corners = rearrange(border, "(corner xy) cell -> (cell corner) xy", xy=2)
    return Path(corners, np.tile([Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY], len(row)))


def _name(axes: Axes, which: Literal["x", "y"], names: Sequence[str], label: str, room: float) -> None:
    """Writes names along an axis of ``room`` inches: the shared part once, and only as many names as fit."""
    shared, short = short_names(names)
    longest = max(map(len, short), default=0)
    slanted = which == "x" and longest > 6
    each = 0.16 if which == "y" else 0.22 if slanted else 0.08 * longest + 0.12
    ticks = ticks_that_fit(len(names), max(room, 0.5), each)
    texts = [safe_text(short[i]) for i in ticks]
    parts = [safe_text(part) for part in (label, f"{shared}*" if shared else "") if part]
    title = (": " if which == "x" else "\n").join(parts)  # the vertical axis has less room
    if which == "y":
        axes.set_yticks(ticks, texts)
        axes.set_ylabel(title)
    else:
        axes.set_xticks(ticks, texts, rotation=45 if slanted else 0, rotation_mode="anchor", ha="right" if slanted else "center")
        axes.set_xlabel(title)


def _color_bar(axes: Axes, label: str, low: float, high: float, scale: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    bar = axes.inset_axes((1.02, 0, 0.025, 1))
    bar.set_facecolor("none")
    bar.spines[:].set_visible(False)
    bar.set_xticks([])
    edges = np.geomspace(low, high, LEVELS + 1) if scale == "log" else np.linspace(low, high, LEVELS + 1)
    _paint(bar, np.arange(LEVELS)[:, None], np.array([0.0, 1.0]), edges)
    if scale == "log":
        set_log_scale(bar, "y", [low, high])
        if sum(low <= tick <= high for tick in bar.get_yticks()) < 2:  # one tick alone does not show a scale
            bar.yaxis.set_major_locator(FixedLocator([low, high]))
            bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    else:
        bar.yaxis.set_major_locator(MaxNLocator(5))
    bar.set(xlim=(0, 1), ylim=(low, high))
    bar.yaxis.set_label_position("right")
    bar.yaxis.tick_right()
    bar.tick_params(length=3, width=0.6, color=MUTED, labelcolor=MUTED, labelsize=8)
    bar.set_ylabel(safe_text(label), color=INK, fontsize=9)


def _paint_columns(axes: Axes, counts: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    """Draws the histograms as columns, one window wide, with a color bar."""
    together = max(1, math.ceil(len(counts) / MOST))
    starts = np.arange(0, len(counts), together)
    x = np.append(starts, len(counts)) - 0.5
    summed = np.add.reduceat(np.nan_to_num(counts), starts, axis=0) if len(counts) else counts
    vectors = summed.sum(1, keepdims=True)
    share = np.divide(summed, vectors, out=np.zeros_like(summed), where=vectors > 0)
    low = max(float(share[share > 0].min(initial=0.3)), FAINTEST) / 3  # so that the rarest bins stay visible
    shades = np.where(share > 0, _shades(share, low, 1.0, "log").clip(0), 0)
    _paint(axes, np.where(vectors > 0, shades, -1).T, x, edges)
    _color_bar(axes, "share of the vectors", low, 1.0, "log")


def _ending(layer: str, most: int = 20) -> str:
    """The last components of a name, as many as fit."""
    text = printable(layer)
    return safe_text(text if len(text) <= most else f"…{text[-most:].partition('.')[2] or text[-most:]}")


def _name_steps(axes: Axes, steps: Sequence[float], room: float, together: int = 1) -> None:
    """Writes numbers along an axis of ``room`` inches.

    Few windows are named by their steps. Many windows get round numbers, each placed between the windows it lies between.
    ``together``: the number of neighbors that share one column.
    """
    numbers = np.asarray(steps, dtype=np.float64)
    most = max(2, int(room / 0.7))
    if numbers.size <= most or not (np.diff(numbers) > 0).all():  # the steps themselves, as many as fit
        every = max(1, math.ceil(numbers.size / most))
        axes.set_xticks(np.arange(numbers.size)[::every] // together, [f"{step:,.12g}" for step in steps[::every]], rotation=0, ha="center")
        return
    low, high = float(numbers[0]), float(numbers[-1])
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    apart = next(size * times for times in (1, 2, 5, 10, 20) if (high - low) / (size * times) <= most)
    ticks = np.arange(math.ceil(low / apart), math.floor(high / apart) + 1) * apart
    columns = (np.interp(ticks, numbers, np.arange(numbers.size)) - (together - 1) / 2) / together
    axes.set_xticks(columns, [f"{tick:,.12g}" for tick in ticks], rotation=0, ha="center")
