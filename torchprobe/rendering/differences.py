"""Differences with their intervals, one below the other, around 0 (a forest plot)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchprobe.rendering.axes import ACCENT, DOTTED, GRID, INK, MUTED, new_figure, safe_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 24
"""The largest number of differences in one figure."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; nan ends: there is none."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan


def differences(panels: Mapping[str, Sequence[Estimate]], *, width: float = 9.0) -> Figure:
    """One panel for each measure, with the same rows in each. Numbers without an interval are hollow; missing ones are left out.

    Args:
        panels: name of the measure, with its unit → a number for each row, at most :data:`MOST`.
        width: inches.

    Raises:
        ValueError: no panels, or too many rows.

    >>> figure = differences({"Δ accuracy, %": [Estimate("a − b", 2.0, 1.0, 3.0), Estimate("a − c", 1.0)]})
    >>> [line.get_xydata().tolist() for line in figure.axes[0].get_lines()][1:]
    [[[1.0, 0.0], [3.0, 0.0]], [[2.0, 0.0]], [[1.0, 1.0]]]
    """
    rows = max(map(len, panels.values()), default=0)
    if not rows or rows > MOST:
        raise ValueError(f"{rows} rows in {len(panels)} panels cannot be drawn; expected 1 to {MOST} rows")
    figure, all_axes = new_figure(
        width, 0.2 + len(panels) * (0.75 + (0.26 if width >= 5 else 0.36) * rows), panels=len(panels), shared=False
    )
    beside = width >= 5
    for axes, (name, estimates) in zip(all_axes, panels.items(), strict=True):
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=GRID, linewidth=0.6)
        axes.axvline(0, color=MUTED, linewidth=1, linestyle=DOTTED)
        for row, one in enumerate(estimates):
            if math.isfinite(one.low) and math.isfinite(one.high):
                axes.plot([one.low, one.high], [row, row], color=ACCENT, linewidth=1.6, alpha=0.75, solid_capstyle="butt")
            if math.isfinite(one.value):
                face = ACCENT if math.isfinite(one.low) else "none"
                axes.plot([one.value], [row], linestyle="none", marker="o", markersize=5, color=ACCENT, markerfacecolor=face)
        if beside:
            names = [_cut(one.label, int(width * 6.5)) for one in estimates]
            axes.set_yticks(range(len(estimates)), names, color=INK)
            axes.tick_params(axis="y", length=0)
        else:  # above the interval, because beside it there is no room for two names
            axes.set_yticks([])
            for row, one in enumerate(estimates):
                axes.annotate(_cut(one.label, int(width * 13)), (0, row), xycoords=("axes fraction", "data"), xytext=(3, 6),
                              textcoords="offset points", color=INK, fontsize=7.5)  # fmt: skip
        axes.set_ylim(len(estimates) - 0.5, -0.5 if beside else -0.8)
        axes.margins(x=0.08)
        axes.set_xlabel(safe_text(name))
    return figure


def _cut(label: str, longest: int) -> str:
    label = label if len(label) <= longest else f"{label[: longest // 2 - 1]}…{label[-(longest // 2) :]}"
    return safe_text(label)
