"""The words of a page for inputs that are no images: a page of texts says "texts" wherever one of images says "images"."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import Column, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE = "image"

WORDS = ("what", "note", "vector")
"""The keys of cells that hold our words. Other cells hold names, which stay as they are."""

_IMAGE = re.compile(r"(?<![\w./:=-])(an? )?([Ii])mage(s?)(?![\w/:=-]|\.\w)")


def worded(text: str, unit: str) -> str:
    """A sentence of ours about inputs of another kind. Names of files and models stay as they are.

    >>> worded("One vector is an image, on 5 images of data/images/val.", "text")
    'One vector is a text, on 5 texts of data/images/val.'
    >>> worded("One vector is an image.", "image")
    'One vector is an image.'
    """

    def put(found: re.Match[str]) -> str:
        article = f"{found[1][0]} " if found[1] else ""
        return article + (unit.capitalize() if found[2] == "I" else unit) + found[3]

    return text if unit == IMAGE else _IMAGE.sub(put, text)


def worded_columns(columns: Sequence[Column], unit: str) -> list[Column]:
    """The columns with other words in their heads; keys stay."""
    return [replace(column, title=worded(column.title, unit), help=worded(column.help, unit)) for column in columns]


def worded_rows(rows: Sequence[Row], unit: str) -> Sequence[Row]:
    """The rows with other words in cells that hold ours, see :data:`WORDS`."""
    if unit == IMAGE:
        return rows
    return [{key: worded(row[key], unit) if key in WORDS and isinstance(row[key], str) else row[key] for key in row} for row in rows]


def worded_page(page: Page, unit: str) -> Page:
    """The page with other words in everything but its title."""
    if unit == IMAGE:
        return page
    return replace(
        page,
        summary=worded(page.summary, unit),
        notice=worded(page.notice, unit),
        facts=[Fact(worded(fact.label, unit), fact.value, worded(fact.note, unit)) for fact in page.facts],
        sections=[_section(section, unit) for section in page.sections],
        footer=[worded(line, unit) for line in page.footer],
    )


def _section(section: Section, unit: str) -> Section:
    return Section(
        worded(section.title, unit),
        [worded(paragraph, unit) for paragraph in section.paragraphs],
        [replace(picture, draw=_drawn(picture, unit), description=worded(picture.description, unit)) for picture in section.pictures],
        [
            Table(worded_rows(table.rows, unit), worded_columns(table.columns, unit), worded(table.caption, unit))
            for table in section.tables
        ],
        [(term, worded(meaning, unit)) for term, meaning in section.terms],
    )


def _drawn(picture: Picture, unit: str) -> Callable[[float], Figure]:
    def draw(width: float) -> Figure:
        from matplotlib.text import Text

        figure = picture.draw(width)
        found: list[Any] = figure.findobj(Text)
        for text in found:
            if (new := worded(text.get_text(), unit)) != text.get_text():
                text.set_text(new)
        return figure

    return draw
