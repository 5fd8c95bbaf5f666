"""Accuracy under a shift against unshifted accuracy, both axes in logits: the canonical figure of effective robustness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from torchprobe.rendering.axes import BAND, DASHED, DOTTED, GRID, INK, MUTED, draw_legend, new_figure, safe_text
from torchprobe.rendering.curves import Mark, draw_marks, name_marks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

_TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 97, 99, 99.7, 99.9, 99.97, 99.99)


def logit_scatter(
    marks: Sequence[Mark],
    cloud: Sequence[tuple[float, float]],
    line: Callable[[Floats], Floats],
    band: Callable[[Floats], tuple[Floats, Floats]] | None,
    x_label: str,
    y_label: str,
    *,
    width: float = 9.0,
    height: float | None = None,
) -> Figure:
    """Models against the line of standard models.

    Args:
        marks: the models, percent on both axes. Those at 0 or 100, which have no logit, are left out.
        cloud: unshifted accuracy and accuracy under the shift of each standard model, percent. Empty if they are unknown.
        line: unshifted accuracy → predicted accuracy, percent. Outside of the range of the cloud it is dashed.
        band: unshifted accuracy → the two edges of a band about the line; None: no band.
        x_label, y_label: names of the axes.
        width, height: inches; height None: about as high as wide, at most 5.4.

    >>> figure = logit_scatter([Mark("mine", 60.0, 55.0)], [(60, 48), (70, 58)], lambda x: x - 12, None, "ImageNet, %", "V2, %")
    >>> figure.axes[0].get_lines()[-1].get_xydata().tolist()
    [[60.0, 55.0]]
    """
    wide = width >= 4
    figure, (axes,) = new_figure(width, height or min(5.4, 0.95 * width + 0.4))
    axes.grid(True, axis="x", color=GRID, linewidth=0.6)
    placed = [mark for mark in marks if 0 < mark.x < 100 and 0 < mark.y < 100]
    points = np.array([*cloud, *((mark.x, mark.y) for mark in placed)], dtype=np.float64).reshape(-1, 2)
    ends = [end for mark in placed for end in (mark.y_low, mark.y_high) if 0 < end < 100]
    x_range, y_range = _range(points[:, 0]), _range(np.concatenate([points[:, 1], ends]))
    _set_logit_scale(axes, "x", x_range, width - 1)
    _set_logit_scale(axes, "y", y_range, 3.5)
    start, end = _logits(np.array(x_range)).tolist()
    across = _accuracies(np.linspace(start, end, 200))
    axes.plot(across, across, color=MUTED, linewidth=0.9, linestyle=DOTTED, label="no loss under the shift" if wide else "no loss")
    if band is not None:
        low, high = band(across)
        axes.fill_between(across, low, high, color=BAND, alpha=0.22, linewidth=0, label="95 % of standard models" if wide else "95 % band")
    known = np.array(cloud, dtype=np.float64).reshape(-1, 2)
    inside = (known[:, 0].min(), known[:, 0].max()) if len(known) else (0.0, 100.0)
    within = across[(across >= inside[0]) & (across <= inside[1])]
    within = np.unique(np.concatenate([within, np.clip(inside, *x_range)]))
    for part, style, label in (
        (within, "-", "line of standard models" if wide else "standard line"),
        (across[across < inside[0]], DASHED, "extrapolated"),
        (across[across > inside[1]], DASHED, "extrapolated"),
    ):
        if len(part) > 1:
            named = label if label not in axes.get_legend_handles_labels()[1] else None
            axes.plot(part, line(part), color=MUTED, linewidth=1.4, linestyle=style, label=named)
    if len(known):
        label = f"{len(known)} standard models" if wide else f"{len(known)} models"
        axes.plot(*known.T, linestyle="none", marker="o", markersize=3.5, color=BAND, alpha=0.75, markeredgewidth=0, label=label)
    draw_marks(axes, placed)
    if not placed:
        axes.text(0.5, 0.5, "an accuracy of 0 or 100 % has no logit", transform=axes.transAxes, ha="center", color=INK)
    axes.set_xlabel(safe_text(x_label))
    axes.set_ylabel(safe_text(y_label))
    draw_legend(axes, width)
    along = np.stack([across, line(across)], 1)
    name_marks(axes, placed, np.concatenate([known, along[(along[:, 1] > y_range[0]) & (along[:, 1] < y_range[1])]]))
    return figure


def _range(percent: Floats) -> tuple[float, float]:
    """The ends of an axis, with some room in logits."""
    logits = _logits(percent[(percent > 0) & (percent < 100)])
    low, high = (float(logits.min()), float(logits.max())) if logits.size else (-1.0, 1.0)
    room = max(0.2, 0.08 * (high - low))
    start, end = _accuracies(np.array([low - room, high + room])).tolist()
    return start, end


def _set_logit_scale(axes: Axes, which: Literal["x", "y"], ends: tuple[float, float], room: float) -> None:
    """An axis in logits, labeled in percent at the round numbers that fit into ``room`` inches."""
    from matplotlib.scale import FuncScale
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    setter = axes.set_xscale if which == "x" else axes.set_yscale
    functions: Any = (_logits, _accuracies)
    setter(FuncScale(axis, functions))
    axes.set(**{f"{which}lim": ends})
    low, high = _logits(np.array(ends))
    known = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    if high - low < 1.5 or len(known) < 3:  # over so little, logits are nearly linear
        known = [float(tick) for tick in MaxNLocator(5).tick_values(*ends) if ends[0] <= tick <= ends[1]]
    ticks: list[float] = []
    for tick in known:
        if not ticks or (_logit(tick) - _logit(ticks[-1])) * room / (high - low) > 0.36:
            ticks.append(tick)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _logit(percent: float) -> float:
    return math.log(percent / (100 - percent))


def _logits(percent: Floats) -> Floats:
    """Clipped to what a double can tell from 0 and 100 %, because matplotlib asks about places outside of the axis."""
    inside = np.clip(np.asarray(percent, dtype=np.float64), 1e-9, 100 - 1e-9)
    logits: Floats = np.log(inside / (100 - inside))
    return logits


def _accuracies(logits: Floats) -> Floats:
    accuracies: Floats = 50 * (1 + np.tanh(np.asarray(logits, dtype=np.float64) / 2))
    return accuracies
