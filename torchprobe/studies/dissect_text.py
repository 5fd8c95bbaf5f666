"""A dissection for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from torchprobe.dissection import Dissection
from torchprobe.dissection.report import Report
from torchprobe.dissection.report_text import COMPARISON, OWN
from torchprobe.rendering.tables import Column, Row, number, plain_table, shown, text

SHOWN_UNITS = 8


def print_dissections(results: Mapping[str, Dissection], nulls: Mapping[str, Mapping[str, Dissection]], out: Console) -> None:
    """What each layer comes to, beside its nulls; of a single layer also the units with the highest scores.

    Args:
        results: layer → dissection.
        nulls: name → layer → dissection.
        out: where to.
    """
    reports = [Report(d, {name: layers[layer] for name, layers in nulls.items() if layer in layers}) for layer, d in results.items()]
    rows = []
    for report in reports:
        name = report.dissection.layer or "(output)"
        for beside in report.comparison():
            own = beside["layer"] == OWN
            rows.append({**beside, "layer": f"{name}, {number(report.dissection.units)} units" if own else f"  {beside['layer']}"})
    _print([column for column in COMPARISON if any(column.key in row for row in rows)], rows, out)
    if len(reports) == 1:
        columns = [column for column in reports[0].columns() if column.key not in ("threshold", "others")]
        _print(columns, [unit.values for unit in reports[0].units()[:SHOWN_UNITS]], out)
    if not nulls:
        out.print(
            text("No null was given: dissect at random initialisation and with shuffled labels too, and name those folders as --null.")
        )


def _print(columns: Sequence[Column], rows: Sequence[Row], out: Console) -> None:
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(row[column.key] if column.key == "layer" else shown(row, column)) for column in columns))
    out.print(table)
