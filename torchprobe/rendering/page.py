"""One self-contained HTML file with text, figures and tables. Nothing is fetched, and every text is escaped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.common.files import replacing
from torchprobe.common.messages import install_hint
from torchprobe.rendering.tables import Column, Row, cell, number, printable, shown, shown_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page: its name, its value, and what to compare it with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, drawn in two widths.

    Args:
        draw: width in inches → figure.
        description: what it shows, for people who cannot see it.
        name: of its files, without the ending; it must not depend on numbers in the results. Empty: made from the description.
        paper: whether its files are also made in the width of a column.
    """

    draw: Callable[[float], Figure]
    description: str
    name: str = ""
    paper: bool = False


@dataclass(frozen=True)
class Table:
    """Rows and columns; a click on the head of a column sorts by it."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, pictures, tables, and definitions. ``terms`` are pairs of a term and its meaning."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    terms: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """The content of a page, for :func:`render`.

    Args:
        kind: the small line above the title, such as "scan".
        title: the heading.
        summary: one or two sentences below the title.
        facts: the numbers at the head of the page.
        sections: the body.
        notice: a highlighted line at the top, for example that the result is partial.
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
"""Widths of the figures in inches, for a wide window and for a phone."""


def render(page: Page, template: str = "page.html.jinja") -> str:
    """The page as HTML.

    Args:
        page: the content.
        template: a template of this package, for pages that have more than sections.

    No resource is loaded from outside: style, script and figures are inline, and a content security policy in the head forbids
    everything else. jinja2 escapes every text; :func:`torchprobe.rendering.plots.svg` escapes the texts of figures.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; ``pip install 'torchprobe-interp[report]'``.

    >>> "&lt;b&gt;" in render(Page("scan", "<b>", "a name with markup"))
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
    """Checks that a page can be written. Call it before a long run, not after it.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; the message says how to install them.
    """
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"a page needs {' and '.join(missing)}: {install_hint('report')}")


def write(page: Page, path: str | os.PathLike[str], template: str = "page.html.jinja") -> Path:
    """Writes :func:`render` of ``page`` to ``path`` and returns the path. A file of that name is replaced as a whole."""
    text = render(page, template)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
