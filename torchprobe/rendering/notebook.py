"""What a notebook shows of a result: its facts and a table, as a fragment of HTML. Every text is escaped, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torchprobe.rendering.page import Fact
from torchprobe.rendering.tables import Column, Row, printable, shown, shown_columns

ROWS = 50
"""How many rows are shown. A notebook keeps what it shows in its file."""


def fragment(
    title: str, facts: Sequence[Fact] = (), rows: Sequence[Row] = (), columns: Sequence[Column] = (), note: str = "", of: str = "rows"
) -> str:
    """The HTML of a title, facts, and a table of at most :data:`ROWS` rows.

    Args:
        title: one line.
        facts: numbers with names, as at the head of a page.
        rows: one mapping for each row of the table.
        columns: of the table, as for :func:`torchprobe.rendering.tables.layer_table`. Their help is shown when the mouse is over a head.
        note: a line below the table.
        of: what the rows are, for the line that counts those left out.

    >>> print(fragment("a < b", rows=[{"layer": "<b>"}], columns=[Column("layer", "layer", "its name", "text")]))
    <div><p><strong>a &lt; b</strong></p>
    <table><thead><tr><th title="its name" style="text-align: left">layer</th></tr></thead>
    <tbody><tr><td style="text-align: left">&lt;b&gt;</td></tr></tbody></table>
    </div>
    """
    lines = [f"<p><strong>{_text(title)}</strong></p>"]
    if facts:
        items = (f"<li>{_text(fact.label)}: <strong>{_text(fact.value)}</strong> {_text(fact.note)}".rstrip() + "</li>" for fact in facts)
        lines.append(f"<ul>{''.join(items)}</ul>")
    if rows:
        chosen = shown_columns(rows, columns)
        sides = [f"text-align: {'right' if column.numeric else 'left'}" for column in chosen]
        heads = (f'<th title="{_text(c.help)}" style="{side}">{_text(c.title)}</th>' for c, side in zip(chosen, sides, strict=True))
        lines.append(f"<table><thead><tr>{''.join(heads)}</tr></thead>")
        body = (
            "".join(f'<td style="{side}">{_text(shown(row, column))}</td>' for column, side in zip(chosen, sides, strict=True))
            for row in rows[:ROWS]
        )
        lines.append(f"<tbody>{''.join(f'<tr>{cells}</tr>' for cells in body)}</tbody></table>")
    more = f"… and {len(rows) - ROWS:,} more {of}." if len(rows) > ROWS else ""
    if below := " ".join(part for part in (more, note) if part):
        lines.append(f"<p>{_text(below)}</p>")
    return "<div>" + "\n".join(lines) + "\n</div>"


def _text(value: object) -> str:
    return escape(printable(value))
