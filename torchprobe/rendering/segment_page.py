"""The page of units on new pictures: each picture with the regions of its units, all together and one by one."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchprobe.rendering.dissection_page import Thumbnail
from torchprobe.rendering.page import Page, render, write

TEMPLATE = "segment.html.jinja"


@dataclass(frozen=True)
class DrawnUnit:
    """A unit on one picture. ``title``: its concept. ``facts``: its numbers. ``caveat``: what speaks against the name, or "". ``region``:
    its outline, see :func:`torchprobe.rendering.dissection_page.outline`. ``color``: as in CSS."""

    title: str
    facts: str
    region: str
    color: str
    caveat: str = ""


@dataclass(frozen=True)
class DrawnPicture:
    """A picture. ``thumbnail``: with its name, and the grid of all outlines. ``note``: a sentence about it. ``units``: the active ones,
    most certain first. ``frame``: the outline of the part that the network was shown; "" for the whole picture."""

    thumbnail: Thumbnail
    note: str
    units: Sequence[DrawnUnit] = ()
    frame: str = ""

    @property
    def source(self) -> str:
        """The picture as an address."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.thumbnail.jpeg).decode()}"


@dataclass(frozen=True)
class SegmentPage(Page):
    """A :class:`~torchprobe.rendering.page.Page` with pictures before its sections. ``note``: how to read them."""

    pictures: Sequence[DrawnPicture] = ()
    note: str = ""


def render_segments(page: SegmentPage) -> str:
    """The page as HTML; see :func:`torchprobe.rendering.page.render`. It has no script of its own, and nothing is fetched.

    >>> "<title>layer4" in render_segments(SegmentPage("segments", "layer4", "its units on new pictures"))
    True
    """
    return render(page, TEMPLATE)


def write_segments(page: SegmentPage, path: str | os.PathLike[str]) -> Path:
    """Writes :func:`render_segments` of ``page`` to ``path``, whole or not at all, and returns the path."""
    return write(page, path, TEMPLATE)
