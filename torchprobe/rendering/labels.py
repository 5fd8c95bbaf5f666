"""Names of points where they hide nothing: no other name, point or bar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.rendering.axes import BAND, MUTED, safe_text
from torchprobe.rendering.style import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

SIZE = 7.5
"""Points of the letters."""

_MARKER = 5.0  # half the width of a marker and its rim, in points, as all lengths here
_NEAR, _FAR = (7.0, 13.0), (24.0, 38.0, 56.0)  # from the point to its name; a far one gets a line to its point


class Name(NamedTuple):
    """A name and its point, in the coordinates of the data."""

    text: str
    x: float
    y: float


def place_names(axes: Axes, names: Sequence[Name], bars: Sequence[ArrayLike] = (), others: ArrayLike = ()) -> None:
    """Writes each name next to its point, at the first of several places that hides nothing, or else the one that hides the least.

    The limits and scales of ``axes`` must be final. A name has no influence on the layout, and does not leave the axes unless it is longer.

    Args:
        axes: of a figure.
        names: in the order in which they are placed.
        bars: lines that a name should not cross, (points, 2) each.
        others: points that a name should not cover if that can be, (points, 2).

    >>> from torchprobe.rendering.axes import new_figure
    >>> _, (axes,) = new_figure(4, 3)
    >>> place_names(axes, [Name("a", 0.5, 0.5), Name("b", 0.5, 0.5)])
    >>> len({text.get_position() for text in axes.texts})
    2
    """
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    with styled():
        figure.draw_without_rendering()  # so that the layout is known
    points_per_pixel = 72 / figure.dpi
    bounds = axes.get_window_extent()
    room = np.array([bounds.x0, bounds.y0, bounds.x1, bounds.y1]) * points_per_pixel

    def place(points: ArrayLike) -> Floats:
        data = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return np.asarray(axes.transData.transform(data), dtype=np.float64) * points_per_pixel

    points = place([(name.x, name.y) for name in names])
    lines = [_along(place(bar)) for bar in bars if len(np.asarray(bar))]
    crossed = np.concatenate(lines) if lines else np.zeros((0, 2))
    covered = place(others)
    boxes = [np.concatenate((point - _MARKER, point + _MARKER)) for point in points]
    for name, point in zip(names, points, strict=True):
        text = safe_text(name.text)
        found = min(_candidates(point, _extent(text), room), key=lambda one: _cost(one, room, boxes, crossed, covered))
        boxes.append(found.box)
        line: dict[str, Any] = {"arrowstyle": "-", "color": BAND, "linewidth": 0.6, "shrinkA": 0, "shrinkB": _MARKER}
        axes.annotate(
            text,
            (name.x, name.y),
            xytext=tuple(((found.box[:2] + found.box[2:]) / 2 - point).tolist()),
            textcoords="offset points",
            ha="center",
            va="center",
            color=MUTED,
            fontsize=SIZE,
            arrowprops=line if found.distance >= _FAR[0] else None,
        ).set_in_layout(False)


class _Place(NamedTuple):
    """A box (left, bottom, right, top), how far it is from the point, and how late it comes in the order of preference."""

    box: Floats
    distance: float
    rank: int


def _candidates(point: Floats, extent: tuple[float, float], room: Floats) -> Iterator[_Place]:
    """Places around a point: to the right, to the left, above and below (there moved into the axes), the nearest first."""
    width, height = extent
    turns = [(1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (1, 0), (-1, 0), (0, 1), (0, -1)]
    rank = 0
    for distance in (*_NEAR, *_FAR):
        for across, up in turns:
            x, y = point[0] + across * (distance + width / 2), point[1] + up * (distance + height / 2 - (2 if across else 0))
            if not across:
                x = max(room[0] + width / 2, min(room[2] - width / 2, x))
            yield _Place(np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]), distance, rank)
            rank += 1


def _cost(one: _Place, room: Floats, boxes: Sequence[Floats], crossed: Floats, covered: Floats) -> float:
    """What a place hides, in square points, and how far it is."""
    box = one.box
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    hidden = sum(_overlap(box, other) for other in boxes)
    spared = 15 * _within(box, crossed) + 8 * _within(box, covered)
    return 30 * (area - _overlap(box, room)) + 10 * hidden + spared + one.distance + one.rank / 10


def _overlap(one: Floats, other: Floats) -> float:
    """The common area of two boxes."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(np.prod(sides.clip(min=0)))


def _within(box: Floats, points: Floats) -> int:
    return int(((points >= box[:2] - 1) & (points <= box[2:] + 1)).all(1).sum())


def _along(line: Floats) -> Floats:
    """Points along a line, one every 2 points."""
    parts = [line[:1]]
    for start, end in itertools.pairwise(line):
        count = min(1000, max(1, math.ceil(float(np.hypot(*(end - start))) / 2)))
        parts.append(start + np.linspace(0, 1, count + 1)[1:, None] * (end - start))
    return np.concatenate(parts)


def _extent(text: str) -> tuple[float, float]:
    """The width and the height of a text."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    with styled():
        size = TextPath((0, 0), text or " ", prop=FontProperties(size=SIZE), usetex=False).get_extents()
    return max(1.0, float(size.width)) + 2, SIZE * 1.15
