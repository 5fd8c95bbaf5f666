"""The page of a dissection: bars of concepts, a table of units that can be searched and sorted, and what each unit responds to."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.rendering.page import Page, Section, render, write
from torchprobe.rendering.tables import Column, Row, printable

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = "dissection.html.jinja"
THUMBNAIL = 112
"""The longer side of an embedded picture in pixels."""
QUALITY = 72
"""Of its JPEG: about 3 kB a picture."""


@dataclass(frozen=True)
class Thumbnail:
    """A picture that is embedded once, however many units show it. ``rows`` and ``columns``: the grid that paths over it are drawn in."""

    name: str
    jpeg: bytes
    width: int
    height: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Shown:
    """A picture that drives a unit.

    Args:
        thumbnail: its place among the page's thumbnails.
        score: of the unit on it.
        region: outline of where the unit is above its threshold; None: not known.
        concept: outline of the unit's concept; "": it is not there; None: the picture is not annotated for its category.
        whole: the concept is a label of the whole picture.
        evidence: how much each pixel speaks for the unit, as a picture of its own; None: not computed.
    """

    thumbnail: int
    score: float
    region: str | None = None
    concept: str | None = None
    whole: bool = False
    evidence: int | None = None


@dataclass(frozen=True)
class UnitRow:
    """A unit. ``values``: its cells, with ``unit``, ``label`` and ``category``; ``search``: further words by which it is found."""

    values: Row
    shown: Sequence[Shown] = ()
    search: str = ""


@dataclass(frozen=True)
class CategoryBar:
    """The concepts of one category that units detect: ``concepts`` are pairs of a name and the units that detect it, most first."""

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
        bars: one for each category, in the order they are shown in.
        bars_note: what counts as detected.
        units: in the order they are first shown in.
        units_note: how to read the table and the pictures.
        columns: of the table.
        thumbnails: the pictures.
    """

    bars: Sequence[CategoryBar] = ()
    bars_note: str = ""
    units: Sequence[UnitRow] = ()
    units_note: str = ""
    columns: Sequence[Column] = ()
    thumbnails: Sequence[Thumbnail] = ()
    lead: Sequence[Section] = ()

    @property
    def rows(self) -> list[Row]:
        """The cells of all units: what :func:`torchprobe.rendering.tables.shown_columns` asks."""
        return [unit.values for unit in self.units]

    @property
    def most(self) -> int:
        """The longest bar."""
        return max((units for bar in self.bars for _, units in bar.concepts), default=1)

    def data(self) -> dict[str, Any]:
        """What the script draws from. Every text is data: the script sets it as text, never as markup."""
        return {
            "thumbnails": [
                [printable(t.name), base64.b64encode(t.jpeg).decode(), t.width, t.height, t.rows, t.columns] for t in self.thumbnails
            ],
            "units": [
                [[s.thumbnail, _finite(s.score), s.region, s.concept, int(s.whole), s.evidence] for s in unit.shown] for unit in self.units
            ],
        }


def thumbnail(image: Image, name: str, grid: tuple[int, int], longest: int = THUMBNAIL) -> Thumbnail:
    """A picture made small and without metadata.

    Args:
        image: PIL.
        name: what it is called; untrusted.
        grid: rows and columns of the grid that paths over it are drawn in.
        longest: pixels of the longer side, no more than the picture has.
    """
    scale = min(1.0, longest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.convert("RGB").resize((width, height))
    small.info.clear()  # comments and the like would be written too
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return Thumbnail(name, file.getvalue(), width, height, *grid)


def render_dissection(page: DissectionPage) -> str:
    """The page as HTML; see :func:`torchprobe.rendering.page.render`. Nothing is fetched; pictures are drawn when they come into view.

    >>> "<title>layer4" in render_dissection(DissectionPage("dissection", "layer4", "what its units respond to"))
    True
    """
    return render(page, TEMPLATE)


def write_dissection(page: DissectionPage, path: str | os.PathLike[str]) -> Path:
    """Writes :func:`render_dissection` of ``page`` to ``path``, at once, and returns the path."""
    return write(page, path, TEMPLATE)


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return float(value) if abs(value) < float("inf") else None
