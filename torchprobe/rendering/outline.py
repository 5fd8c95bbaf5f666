"""A region of pixels as the path of its outline, to be drawn over a picture at any size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def outline(mask: NDArray[np.bool_]) -> str:
    """The borders of a mask (h, w) as an SVG path in pixels; "" where nothing is set.

    Each border is closed and runs along the edges of pixels with the region to its right, so the path may be stroked, and filled by either
    rule: holes stay holes. Regions that touch at a corner only have a border each.

    >>> outline(np.array([[True, True], [True, False]]))
    'M0 0h2v1h-1v1h-1z'
    """
    inside = np.pad(np.asarray(mask, bool), 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner → the directions in which a border leaves it
    core = inside[1:-1, 1:-1]
    for outside, corner, step in (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),  # nothing above: along the top to the right
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(core & ~outside).tolist():
            steps.setdefault((x + corner[0], y + corner[1]), []).append(step)
    return "".join(_border(steps, start) for start in sorted(steps, key=lambda at: (at[1], at[0])) for _ in range(len(steps[start])))


def _border(steps: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> str:
    """Takes the border that leaves ``start`` out of ``steps``, and writes it down with equal steps in one."""
    if not steps[start]:
        return ""  # taken with another
    runs: list[list[int]] = []
    (x, y), before = start, (0, 0)
    while True:
        leaving = steps[x, y]
        # Where two regions touch at a corner, turn right: that stays with the same region.
        step = next((s for s in leaving if s == (-before[1], before[0])), leaving[0])
        leaving.remove(step)
        if step == before:
            runs[-1] = [runs[-1][0] + step[0], runs[-1][1] + step[1]]
        else:
            runs.append(list(step))
        x, y, before = x + step[0], y + step[1], step
        if (x, y) == start:
            break
    if len(runs) > 1 and (runs[0][0] == 0) == (runs[-1][0] == 0):  # the start lies within a straight line
        runs[-1] = [runs[-1][0] + runs[0][0], runs[-1][1] + runs[0][1]]
        start = (start[0] + runs[0][0], start[1] + runs[0][1])
        runs = runs[1:]
    return f"M{start[0]} {start[1]}" + "".join(f"h{dx}" if dx else f"v{dy}" for dx, dy in runs[:-1]) + "z"  # z draws the last


def reduced(mask: NDArray[Any], longest: int) -> NDArray[Any]:
    """An array (h, w) with at most ``longest`` pixels a side: of each new pixel, the value at its centre.

    >>> reduced(np.eye(4, dtype=bool), 2)
    array([[ True, False],
           [False,  True]])
    """
    h, w = mask.shape
    scale = min(1.0, longest / max(h, w, 1))
    rows, columns = (max(1, round(n * scale)) for n in (h, w))
    at_row, at_column = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in ((rows, h), (columns, w)))
    picked: NDArray[Any] = mask[at_row[:, None], at_column]
    return picked
