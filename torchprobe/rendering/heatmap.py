"""A matrix as a picture: two lists of names, and a colour for each pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.rendering.plots import ACCENT, BAND, INK, MUTED, _figure, _finite, _log_scale, _plain, _shared_prefix
from torchprobe.rendering.tables import number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

LEVELS = 64
"""Shades between the lowest and the highest value."""

MOST = 300
"""Rows or columns that are drawn; of more, neighbours are averaged."""

_TURN = 0.65
"""Up to here of the scale a shade is so much of the accent colour; beyond, ink goes over it. Both are the page's, light or dark."""


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
    """A matrix in shades of one colour, the first row on top, with a colour bar.

    What is missing is hatched: nan, infinities, and on a logarithmic scale what is not positive. Of more than 300 rows or
    columns neighbours are averaged, and the axis says so.

    Args:
        values: numbers, shape (rows, columns).
        rows, columns: their names, such as layers or steps; what all share is said once, and not more are written than fit.
        label: what a value is; it stands at the colour bar.
        row_label, column_label: what the rows and the columns are.
        scale: of the colours.
        limits: the values of the lightest and the darkest shade; from the values when None.
        width: inches.

    Raises:
        ValueError: names that are not as many as the rows or columns, or limits without a range.

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
    figure, (axes,) = _figure(width, height)
    axes.grid(False)
    _paint(axes, _shades(matrix, low, high, scale), np.arange(len(column_names) + 1) - 0.5, np.arange(len(row_names) + 1) - 0.5)
    axes.set(xlim=(-0.5, max(len(column_names), 1) - 0.5), ylim=(max(len(row_names), 1) - 0.5, -0.5))
    _name(axes, "x", column_names, column_label, width - 2)
    _name(axes, "y", row_names, row_label, height - 1)
    _colour_bar(axes, label, low, high, scale)
    return figure


def _limits(matrix: NDArray[np.float64], scale: str, limits: tuple[float, float] | None) -> tuple[float, float]:
    if limits is not None:
        low, high = limits
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or (scale == "log" and low <= 0):
            needed = "two numbers above 0" if scale == "log" else "two numbers"
            raise ValueError(f"the limits of a {scale} scale are {needed}, the lower one first; got {limits}")
        return low, high
    shown = _finite(matrix)
    shown = shown[shown > 0] if scale == "log" else shown
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 10.0)
    if high > low:
        return low, high
    return (low / 1.1, low * 1.1) if scale == "log" else (low - 0.05 * (abs(low) or 1), low + 0.05 * (abs(low) or 1))


def _averaged(matrix: NDArray[np.float64], names: list[str], label: str) -> tuple[NDArray[np.float64], list[str], str]:
    """At most MOST rows, each the mean of equally many neighbours without what is not finite, under the name of the first."""
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
    """The shade of each value, from 0 to LEVELS − 1; −1 where there is none."""
    known = np.isfinite(matrix) & ((matrix > 0) | (scale != "log"))
    values = np.where(known, matrix, low)
    share = (np.log(values) - np.log(low)) / (np.log(high) - np.log(low)) if scale == "log" else (values - low) / (high - low)
    shades: NDArray[np.int64] = np.where(known, (share.clip(0, 1) * LEVELS).astype(np.int64).clip(0, LEVELS - 1), -1)
    return shades


def _paint(axes: Axes, shades: NDArray[np.int64], x: NDArray[Any], y: NDArray[Any]) -> None:
    """One path for each shade, since a page may load no picture within the picture. ``x`` and ``y``: the edges of columns and rows."""
    from matplotlib.patches import PathPatch

    # add_artist, because add_patch would look at every corner to find out how large the picture is.
    for shade in np.unique(shades):
        path = _rectangles(shades == shade, x, y)
        if shade < 0:
            axes.add_artist(PathPatch(path, facecolor="none", edgecolor=BAND, hatch="////", linewidth=0))
            continue
        share = (shade + 1) / LEVELS
        layers = [(ACCENT, min(1.0, share / _TURN))]
        if share > _TURN:
            layers.append((INK, 0.8 * (share - _TURN) / (1 - _TURN)))
        for colour, alpha in layers:
            axes.add_artist(PathPatch(path, facecolor=colour, alpha=alpha, linewidth=0, antialiased=False))


def _rectangles(where: NDArray[np.bool_], x: NDArray[Any], y: NDArray[Any]) -> Path:
    """The cells in which ``where`` is true; neighbours in a row are one rectangle."""
    from matplotlib.path import Path

    change = np.diff(where.astype(np.int8), axis=1, prepend=0, append=0)
    (row, start), (_, end) = np.nonzero(change == 1), np.nonzero(change == -1)
    left, right, top, bottom = x[start], x[end], y[row], y[row + 1]
    corners = np.stack([left, top, right, top, right, bottom, left, bottom, left, top], -1).reshape(-1, 2)
    return Path(corners, np.tile([Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY], len(row)))


def _name(axes: Axes, which: Literal["x", "y"], names: Sequence[str], label: str, room: float) -> None:
    """Names along an axis of ``room`` inches, without the part that all share, thinned out where there is no room for all."""
    shared = _shared_prefix([name for name in names if name])
    short = [printable(name[len(shared) :]) if name else "output" for name in names]
    short = [name if len(name) <= 22 else f"{name[:8]}…{name[-13:]}" for name in short]
    longest = max(map(len, short), default=0)
    aslant = which == "x" and longest > 6
    each = 0.16 if which == "y" else 0.22 if aslant else 0.08 * longest + 0.12
    ticks = range(0, len(names), max(1, math.ceil(len(names) * each / max(room, 0.5))))
    texts = [_plain(short[i]) for i in ticks]
    parts = [_plain(part) for part in (label, f"{shared}*" if shared else "") if part]
    title = (": " if which == "x" else "\n").join(parts)  # what stands upright has less room
    if which == "y":
        axes.set_yticks(ticks, texts)
        axes.set_ylabel(title)
    else:
        axes.set_xticks(ticks, texts, rotation=45 if aslant else 0, rotation_mode="anchor", ha="right" if aslant else "center")
        axes.set_xlabel(title)


def _colour_bar(axes: Axes, label: str, low: float, high: float, scale: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    bar = axes.inset_axes((1.02, 0, 0.025, 1))
    bar.set_facecolor("none")
    bar.spines[:].set_visible(False)
    bar.set_xticks([])
    edges = np.geomspace(low, high, LEVELS + 1) if scale == "log" else np.linspace(low, high, LEVELS + 1)
    _paint(bar, np.arange(LEVELS)[:, None], np.array([0.0, 1.0]), edges)
    if scale == "log":
        _log_scale(bar, "y", [low, high])
        if sum(low <= tick <= high for tick in bar.get_yticks()) < 2:  # one number is no scale
            bar.yaxis.set_major_locator(FixedLocator([low, high]))
            bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    else:
        bar.yaxis.set_major_locator(MaxNLocator(5))
    bar.set(xlim=(0, 1), ylim=(low, high))
    bar.yaxis.set_label_position("right")
    bar.yaxis.tick_right()
    bar.tick_params(length=3, width=0.6, color=MUTED, labelcolor=MUTED, labelsize=8)
    bar.set_ylabel(_plain(label), color=INK, fontsize=9)
