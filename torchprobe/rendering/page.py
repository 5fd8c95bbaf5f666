"""One self-contained HTML file: text, figures and tables, nothing fetched, everything escaped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.common.distribution import install_hint
from torchprobe.common.files import replacing
from torchprobe.rendering.tables import Column, Row, cell, number, printable, shown, shown_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page: what it is, its value, and what to read it against."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure in two widths.

    Args:
        draw: takes a width in inches and gives a figure of :mod:`torchprobe.rendering.plots`.
        description: what it shows, for people who do not see it.
    """

    draw: Callable[[float], Figure]
    description: str


@dataclass(frozen=True)
class Table:
    """Rows under columns; a click on a head sorts by it."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and what follows them. ``terms`` are pairs of a term and what it means."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    terms: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """What :func:`render` turns into a page.

    Args:
        kind: the small line above the title, such as "scan".
        title: the heading.
        summary: one or two sentences below it.
        facts: the numbers at the head.
        sections: the body.
        notice: a line set apart at the top, such as that the result is partial.
        footer: lines about versions and settings.
    """

    kind: str
    title: str
    summary: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    notice: str = ""
    footer: Sequence[str] = field(default_factory=tuple)


WIDE, NARROW = 9.0, 4.6
"""Widths of the figures in inches, for a page that is wide and for one as narrow as a telephone."""


def render(page: Page, template: str = "page.html.jinja") -> str:
    """The page as HTML.

    Args:
        page: what it says.
        template: of this package, for pages that have more than sections.

    No resource is loaded from anywhere: style, script and figures are inline, and a content security policy in the
    head forbids all else. Every text is escaped by jinja2; the figures' by :func:`torchprobe.rendering.plots.svg`.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; ``pip install 'torchprobe-interp[report]'``.

    >>> "&lt;b&gt;" in render(Page("scan", "<b>", "a name that wants to be bold"))
    True
    """
    require()
    import jinja2
    from markupsafe import Markup

    from torchprobe.rendering import plots

    def figure(picture: Picture, width: float) -> Markup:
        return Markup(plots.svg(picture.draw(width), picture.description))

    def heads(table: Table) -> list[Column]:
        return shown_columns(table.rows, table.columns)

    def sort_key(value: Any) -> str:
        return "" if number(value) == "–" else str(value)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchprobe.rendering"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(figure=figure, heads=heads, cell=cell, shown=shown, sort_key=sort_key, wide=WIDE, narrow=NARROW)
    return environment.get_template(template).render(page=page)


def require() -> None:
    """Says at once, rather than after a long run, when a page cannot be made.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; the message has the command.
    """
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"a page needs {' and '.join(missing)}: {install_hint('report')}")


def write(page: Page, path: str | os.PathLike[str], template: str = "page.html.jinja") -> Path:
    """Writes :func:`render` of ``page`` to ``path``, at once, and returns the path."""
    text = render(page, template)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
