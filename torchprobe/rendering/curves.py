"""Curves with bands, and points with names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from torchprobe.rendering.plots import ACCENT, BAND, INK, MUTED, WARM, _figure, _legend, _log_scale, _plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS = (
    (ACCENT, "-", "o"),
    (WARM, (0, (5, 2)), "s"),
    (MUTED, (0, (1, 1.5)), "^"),
    (INK, (0, (5, 1, 1, 1)), "D"),
    (BAND, "-", "v"),
)
"""Colour, line and marker of the first series, the second, …: told apart without colour too."""


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: what it is called.
        x, y: equally many numbers; nan is a gap. Where every x is an int, the axis counts.
        low, high: a band around it, if there is one.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None


@dataclass(frozen=True)
class Mark:
    """One named point. Marks of one ``group`` look alike; those of one ``pair`` are joined by a line."""

    label: str
    x: float
    y: float
    group: str = ""
    pair: str = ""


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
        series: at most as many as can be told apart, 10.
        x_label, y_label: the axes, with their units.
        levels: names and heights of thin horizontal lines to read the curves against.
        limits: of the vertical axis.
        log: of the vertical axis.
        markers: a sign at each point.
        width, height: inches.

    Raises:
        ValueError: more than 10 series.

    >>> len(curves([Series("a", [0, 1], [0.5, 1.0])], "kept", "accuracy").axes)
    1
    """
    from matplotlib.ticker import MaxNLocator

    if len(series) > 2 * len(_LOOKS):
        raise ValueError(f"{len(series)} curves in one figure cannot be told apart; at most {2 * len(_LOOKS)}")
    figure, (axes,) = _figure(width, height)
    for name, at in levels:
        axes.axhline(at, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(_plain(name), (1, at), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                      ha="right", color=MUTED, fontsize=8)  # fmt: skip
    for index, one in enumerate(series):
        colour, line, marker = _LOOKS[index % len(_LOOKS)]
        x, y = np.asarray(one.x, dtype=np.float64), _numbers(one.y)
        if one.low is not None and one.high is not None:
            axes.fill_between(x, _numbers(one.low), _numbers(one.high), color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=line,
            linewidth=1.7,
            marker=marker if markers else None,
            markersize=3.5,
            markerfacecolor="none" if index >= len(_LOOKS) else colour,
            label=_plain(one.label),
        )
    if log:
        _log_scale(axes, "y", np.concatenate([_numbers(one.y).ravel() for one in series] or [np.ones(1)]))
    elif limits is not None:
        axes.set_ylim(*limits)
    if all(isinstance(value, int) for one in series for value in np.asarray(one.x, dtype=object).ravel()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(_plain(x_label))
    axes.set_ylabel(_plain(y_label))
    if len(series) > 1 or series[0].label:
        _legend(axes, width)
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
    """Named points; those of one pair joined.

    Points without a finite place are left out.

    >>> len(scatter([Mark("a", 3.0, 1.0, "zero-shot")], "kurtosis", "robustness").axes)
    1
    """
    figure, (axes,) = _figure(width, height)
    axes.grid(True, axis="x", color=axes.yaxis.get_gridlines()[0].get_color(), linewidth=0.6)
    placed = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    for pair in dict.fromkeys(mark.pair for mark in placed if mark.pair):
        joined = [mark for mark in placed if mark.pair == pair]
        axes.plot([mark.x for mark in joined], [mark.y for mark in joined], color=BAND, linewidth=1, alpha=0.7, zorder=1)
    for index, group in enumerate(dict.fromkeys(mark.group for mark in placed)):
        colour, _, marker = _LOOKS[index % len(_LOOKS)]
        mine = [mark for mark in placed if mark.group == group]
        hollow = "none" if index >= len(_LOOKS) else colour
        axes.plot([mark.x for mark in mine], [mark.y for mark in mine], linestyle="none", marker=marker, markersize=6,
                  color=colour, markerfacecolor=hollow, label=_plain(group or "models"))  # fmt: skip
    for mark, offset in zip(placed, _offsets(placed, log_x, log_y), strict=True):
        axes.annotate(_plain(mark.label), (mark.x, mark.y), xytext=offset, textcoords="offset points", color=MUTED, fontsize=7.5)
    if log_x:
        _log_scale(axes, "x", [mark.x for mark in placed])
    else:
        axes.margins(x=0.12)
    if log_y:
        _log_scale(axes, "y", [mark.y for mark in placed])
    else:
        axes.margins(y=0.12)
    axes.set_xlabel(_plain(x_label))
    axes.set_ylabel(_plain(y_label))
    if any(mark.group for mark in placed):
        _legend(axes, width)
    return figure


def _offsets(marks: Sequence[Mark], log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    """Where each name goes: beside its point, above or below by turns where points are close."""
    if not marks:
        return []
    x = np.array([math.log(max(m.x, 1e-300)) if log_x else m.x for m in marks])
    y = np.array([math.log(max(m.y, 1e-300)) if log_y else m.y for m in marks])
    x, y = ((v - v.min()) / (np.ptp(v) or 1.0) for v in (x, y))
    offsets: list[tuple[float, float]] = []
    for i in range(len(marks)):
        near = sum(abs(x[i] - x[j]) < 0.12 and abs(y[i] - y[j]) < 0.05 for j in range(i))
        offsets.append((6.0, (3.0, -9.0, 13.0, -19.0)[near % 4]))
    return offsets


def _numbers(values: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """As float64; None, as JSON has it for what is not a number, is nan."""
    array = np.asarray(values, dtype=object)
    return np.where(array == None, math.nan, array).astype(np.float64)  # noqa: E711 (element by element)
