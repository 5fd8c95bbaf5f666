"""The page of a dissection: bars of concepts, a table of units to search and sort, and the pictures that each unit responds to."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.rendering.page import Page, Section, render, write
from torchprobe.rendering.tables import Column, Row, printable

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = "dissection.html.jinja"
LINKED = 12
"""Units that a concept links to."""
THUMBNAIL = 112
"""Longer side of an embedded picture, in pixels."""
QUALITY = 72
"""JPEG quality; a picture has about 3 kB."""


@dataclass(frozen=True)
class Thumbnail:
    """A picture, embedded once, however many units show it. ``rows`` and ``columns``: the grid of the paths that are drawn over it."""

    name: str
    jpeg: bytes
    width: int
    height: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Shown:
    """A picture on which a unit has a high score.

    Args:
        thumbnail: index of the picture among the thumbnails of the page.
        score: of the unit.
        region: outline of the region where the unit is above its threshold; None: unknown.
        concept: outline of the concept of the unit; "": the concept is absent; None: the picture is not annotated for its category.
        whole: the concept is a label of the whole picture.
        evidence: index of the thumbnail that shows the contribution of each pixel; None: not computed.
    """

    thumbnail: int
    score: float
    region: str | None = None
    concept: str | None = None
    whole: bool = False
    evidence: int | None = None


@dataclass(frozen=True)
class UnitRow:
    """A unit. ``values``: its cells, with ``unit``, ``label`` and ``category``; ``search``: more words to find it by."""

    values: Row
    shown: Sequence[Shown] = ()
    search: str = ""


@dataclass(frozen=True)
class ConceptRow:
    """A concept. ``values``: its cells, with ``label`` and ``category``. ``encoded_by``, ``detected_by``: its units, best first."""

    values: Row
    encoded_by: Sequence[int] = ()
    detected_by: Sequence[int] = ()

    @property
    def found(self) -> bool:
        """Whether it has a unit."""
        return bool(self.encoded_by or self.detected_by)


@dataclass(frozen=True)
class CategoryBar:
    """The concepts of one category that units detect. ``concepts``: pairs of a name and a number of units, largest number first."""

    name: str
    concepts: Sequence[tuple[str, int]]

    @property
    def units(self) -> int:
        return sum(units for _, units in self.concepts)


@dataclass(frozen=True)
class DissectionPage(Page):
    """A :class:`~torchprobe.rendering.page.Page` with bars and units before its sections.

    Args:
        lead: sections between bars and units.
        bars: one for each category, in the order shown.
        bars_note: what counts as detected.
        concepts: each with its units; those without units are folded away.
        concepts_note: what it means that a unit encodes or detects a concept.
        concept_columns: of the table of concepts; the units come after the first two.
        units: in the order first shown.
        units_note: how to read the table and the pictures.
        columns: of the table.
        thumbnails: the pictures.
        annotated: whether the pictures have labels, so that a picture without the concept of a unit says so.
        detectors: what the box says that hides all other units.
    """

    bars: Sequence[CategoryBar] = ()
    bars_note: str = ""
    concepts: Sequence[ConceptRow] = ()
    concepts_note: str = ""
    concept_columns: Sequence[Column] = ()
    units: Sequence[UnitRow] = ()
    units_note: str = ""
    columns: Sequence[Column] = ()
    thumbnails: Sequence[Thumbnail] = ()
    lead: Sequence[Section] = ()
    annotated: bool = True
    detectors: str = "detectors only"

    @property
    def linked(self) -> int:
        """Units that a concept links to."""
        return LINKED

    @property
    def rows(self) -> list[Row]:
        """The cells of all units, for :func:`torchprobe.rendering.tables.shown_columns`."""
        return [unit.values for unit in self.units]

    @property
    def most(self) -> int:
        """Units of the longest bar."""
        return max((units for bar in self.bars for _, units in bar.concepts), default=1)

    def data(self) -> dict[str, Any]:
        """The data that the script draws. Every text is data: the script sets it as text, never as markup."""
        return {
            "annotated": self.annotated,
            "thumbnails": [
                [printable(t.name), base64.b64encode(t.jpeg).decode(), t.width, t.height, t.rows, t.columns] for t in self.thumbnails
            ],
            "units": [
                [[s.thumbnail, _finite(s.score), s.region, s.concept, int(s.whole), s.evidence] for s in unit.shown] for unit in self.units
            ],
        }


def thumbnail(image: Image, name: str, grid: tuple[int, int], longest: int = THUMBNAIL) -> Thumbnail:
    """A small copy of a picture, without metadata.

    Args:
        image: PIL.
        name: its name; untrusted.
        grid: rows and columns of the grid of the paths that are drawn over it.
        longest: longer side in pixels; never more than that of the picture.
    """
    scale = min(1.0, longest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    resized = image.convert("RGB").resize((width, height))
    resized.info.clear()  # otherwise comments and other metadata are written too
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=QUALITY, optimize=True)
    return Thumbnail(name, file.getvalue(), width, height, *grid)


def render_dissection(page: DissectionPage) -> str:
    """The page as HTML; see :func:`torchprobe.rendering.page.render`. Nothing is fetched. Pictures are drawn when they come into view.

    >>> "<title>layer4" in render_dissection(DissectionPage("dissection", "layer4", "what its units respond to"))
    True
    """
    return render(page, TEMPLATE)


def write_dissection(page: DissectionPage, path: str | os.PathLike[str]) -> Path:
    """Writes :func:`render_dissection` of ``page`` to ``path``, whole or not at all, and returns the path."""
    return write(page, path, TEMPLATE)


def outline(mask: NDArray[np.bool_]) -> str:
    """The borders of a mask (h, w) as an SVG path in pixels; "" for an empty mask. The path can be drawn over a picture of any size.

    Each border is closed and runs along the edges of pixels with the region on its right. So the path can be stroked, or filled with either
    fill rule, and holes stay holes. Regions that touch only at a corner have separate borders.

    >>> outline(np.array([[True, True], [True, False]]))
    'M0 0h2v1h-1v1h-1z'
    """
    inside = np.pad(np.asarray(mask, bool), 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner → directions in which borders leave it
    core = inside[1:-1, 1:-1]
    for outside, corner, step in (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),  # empty above: along the top edge to the right
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(core & ~outside).tolist():
            steps.setdefault((x + corner[0], y + corner[1]), []).append(step)
    return "".join(_border(steps, start) for start in sorted(steps, key=lambda at: (at[1], at[0])) for _ in range(len(steps[start])))


def _border(steps: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> str:
    """Removes the border that leaves ``start`` from ``steps``, and returns its path; equal steps are joined."""
    if not steps[start]:
        return ""  # already part of another border
    runs: list[list[int]] = []
    (x, y), before = start, (0, 0)
    while True:
        leaving = steps[x, y]
        # Where two regions touch at a corner, turn right to stay with the same region.
        step = next((s for s in leaving if s == (-before[1], before[0])), leaving[0])
        leaving.remove(step)
        if step == before:
            runs[-1] = [runs[-1][0] + step[0], runs[-1][1] + step[1]]
        else:
            runs.append(list(step))
        x, y, before = x + step[0], y + step[1], step
        if (x, y) == start:
            break
    if len(runs) > 1 and (runs[0][0] == 0) == (runs[-1][0] == 0):  # the start is inside a straight line
        runs[-1] = [runs[-1][0] + runs[0][0], runs[-1][1] + runs[0][1]]
        start = (start[0] + runs[0][0], start[1] + runs[0][1])
        runs = runs[1:]
    return f"M{start[0]} {start[1]}" + "".join(f"h{dx}" if dx else f"v{dy}" for dx, dy in runs[:-1]) + "z"  # z draws the last line


def reduced(mask: NDArray[Any], longest: int) -> NDArray[Any]:
    """An array (h, w) with at most ``longest`` pixels on each side; each new pixel has the value at its center.

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


def _finite(value: float) -> float | None:
    """The value, or None for nan and inf, which JSON does not have."""
    return float(value) if abs(value) < float("inf") else None
