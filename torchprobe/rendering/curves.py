"""Curves with bands, and points with names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from torchprobe.rendering.axes import ACCENT, BAND, DOTTED, INK, MUTED, WARM, draw_legend, new_figure, safe_text, set_log_scale
from torchprobe.rendering.labels import Name, place_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = (
    (ACCENT, "-", "o"),
    (WARM, (0, (5, 2)), "s"),
    (MUTED, (0, (1, 1.5)), "^"),
    (INK, (0, (5, 1, 1, 1)), "D"),
    (BAND, "-", "v"),
)
"""Color, line and marker of the first series, the second, … They can be told apart without color too."""


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: its name.
        x, y: equally many numbers; nan is a gap. If every x is an int, the axis has whole numbers only.
        low, high: the edges of a band around it; None: no band.
        points: draw only its points, because a line through many values that go up and down is a scribble.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    points: bool = False


@dataclass(frozen=True)
class Mark:
    """One named point. Marks of the same ``group`` look alike; marks of the same ``pair`` are joined by a line.

    ``x_low`` to ``x_high`` and ``y_low`` to ``y_high`` are the ends of intervals, drawn as bars; nan: no bar.
    """

    label: str
    x: float
    y: float
    group: str = ""
    pair: str = ""
    x_low: float = math.nan
    x_high: float = math.nan
    y_low: float = math.nan
    y_high: float = math.nan


def curves(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    levels: Sequence[tuple[str, float]] = (),
    limits: tuple[float, float] | None = None,
    log: bool = False,
    markers: bool = True,
    width: float = 9.0,
    height: float = 3.6,
) -> Figure:
    """Several curves over one axis.

    Args:
        series: at most 10, so that they can be told apart.
        x_label, y_label: names of the axes, with their units.
        levels: names and heights of dotted horizontal lines, to compare the curves with.
        limits: of the vertical axis.
        log: make the vertical axis logarithmic.
        markers: draw a marker at each point.
        width, height: inches.

    Raises:
        ValueError: more than 10 series.

    >>> len(curves([Series("a", [0, 1], [0.5, 1.0])], "kept", "accuracy").axes)
    1
    """
    from matplotlib.ticker import MaxNLocator

    if len(series) > 2 * len(_LOOKS):
        raise ValueError(f"{len(series)} curves in one figure cannot be told apart; at most {2 * len(_LOOKS)}")
    figure, (axes,) = new_figure(width, height)
    for name, at in levels:
        axes.axhline(at, color=MUTED, linewidth=1, linestyle=DOTTED, label=safe_text(name))
    for index, one in enumerate(series):
        color, line, marker = _LOOKS[index % len(_LOOKS)]
        x, y = np.asarray(one.x, dtype=np.float64), _numbers(one.y)
        if one.low is not None and one.high is not None:
            axes.fill_between(x, _numbers(one.low), _numbers(one.high), color=color, alpha=0.18, linewidth=0)
        axes.plot(
            x,
            y,
            color=color,
            linestyle="none" if one.points else line,
            linewidth=1.7,
            marker=marker if markers or one.points else None,
            markersize=3.5 if markers else 2.0,
            markerfacecolor="none" if index >= len(_LOOKS) else color,
            label=safe_text(one.label),
        )
    if log:
        set_log_scale(axes, "y", np.concatenate([_numbers(one.y).ravel() for one in series] or [np.ones(1)]))
    elif limits is not None:
        axes.set_ylim(*limits)
    if all(isinstance(value, int) for one in series for value in np.asarray(one.x, dtype=object).ravel()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(safe_text(x_label))
    axes.set_ylabel(safe_text(y_label))
    if len(series) > 1 or series[0].label or levels:
        draw_legend(axes, width)
    return figure


def scatter(
    marks: Sequence[Mark],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    width: float = 9.0,
    height: float = 4.2,
) -> Figure:
    """Named points with their intervals; the points of a pair are joined by a line.

    Points with a nonfinite coordinate are left out. An axis of whole numbers, such as counts, has whole ticks.

    >>> len(scatter([Mark("a", 3.0, 1.0, "zero-shot")], "kurtosis", "robustness").axes)
    1
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = new_figure(width, height)
    axes.grid(True, axis="x", color=axes.yaxis.get_gridlines()[0].get_color(), linewidth=0.6)
    placed = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    for pair in dict.fromkeys(mark.pair for mark in placed if mark.pair):
        joined = [mark for mark in placed if mark.pair == pair]
        axes.plot([mark.x for mark in joined], [mark.y for mark in joined], color=BAND, linewidth=1, alpha=0.7, zorder=1)
    draw_marks(axes, placed)
    if log_x:
        set_log_scale(axes, "x", [end for mark in placed for end in (mark.x_low, mark.x, mark.x_high)])
    else:
        axes.margins(x=0.12)
        if _all_whole([mark.x for mark in placed]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log_y:
        set_log_scale(axes, "y", [end for mark in placed for end in (mark.y_low, mark.y, mark.y_high)])
    else:
        axes.margins(y=0.12)
        if _all_whole([mark.y for mark in placed]):
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(safe_text(x_label))
    axes.set_ylabel(safe_text(y_label))
    if any(mark.group for mark in placed):
        draw_legend(axes, width)
    name_marks(axes, placed)
    return figure


def draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Draws finite ``marks`` with their intervals, without their names. The groups get entries in the legend.

    >>> _, (axes,) = new_figure(4, 3)
    >>> draw_marks(axes, [Mark("a", 1.0, 2.0, x_low=0.5, x_high=1.5)])
    >>> [line.get_xydata().tolist() for line in axes.get_lines()]
    [[[0.5, 2.0], [1.5, 2.0]], [[1.0, 2.0]]]
    """
    for index, group in enumerate(dict.fromkeys(mark.group for mark in marks)):
        color, _, marker = _LOOKS[index % len(_LOOKS)]
        mine = [mark for mark in marks if mark.group == group]
        hollow = "none" if index >= len(_LOOKS) else color
        for bar in (bar for mark in mine for bar in _bars(mark)):
            axes.plot(*zip(*bar, strict=True), color=color, linewidth=1.1, alpha=0.8, solid_capstyle="butt")
        axes.plot([mark.x for mark in mine], [mark.y for mark in mine], linestyle="none", marker=marker, markersize=6,
                  color=color, markerfacecolor=hollow, label=safe_text(group or "models"))  # fmt: skip


def name_marks(axes: Axes, marks: Sequence[Mark], others: ArrayLike = ()) -> None:
    """Writes the names of finite ``marks`` where they hide no other mark, name or interval; ``others`` are points to spare if possible.

    The limits and scales of ``axes`` must be final.
    """
    bars = [bar for mark in marks for bar in _bars(mark)]
    place_names(axes, [Name(mark.label, mark.x, mark.y) for mark in marks], bars, others)


def _bars(mark: Mark) -> list[list[tuple[float, float]]]:
    """The intervals of a mark as lines."""
    both = [[(mark.x_low, mark.y), (mark.x_high, mark.y)], [(mark.x, mark.y_low), (mark.x, mark.y_high)]]
    return [bar for bar in both if all(math.isfinite(value) for point in bar for value in point)]


def _all_whole(values: Sequence[float]) -> bool:
    return bool(values) and all(float(value).is_integer() for value in values)


def _numbers(values: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """As float64; None, which JSON has in place of nan, becomes nan."""
    array = np.asarray(values, dtype=object)
    return np.where(array == None, math.nan, array).astype(np.float64)  # noqa: E711 (element by element)
