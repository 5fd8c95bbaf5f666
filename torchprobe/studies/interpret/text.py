"""An interpretation for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from torchprobe.analysis.outliers import PEAK, feature_columns
from torchprobe.rendering.tables import Column, plain_table, shown, shown_columns, text
from torchprobe.studies.interpret.columns import ABLATION_COLUMNS, ACCURACY_COLUMNS, CONCEPT_COLUMNS, ROBUSTNESS_COLUMNS
from torchprobe.studies.interpret.page import facts
from torchprobe.studies.interpret.result import Interpretation
from torchprobe.studies.interpret.sections import accuracy_rows, concept_rows, images, robustness_rows

SHOWN_FEATURES = 8


def print_interpretation(found: Interpretation, out: Console) -> None:
    """The numbers at the head, a table for each part, and what was left out."""
    r = found.results
    out.print(text(found.name, "bold"))
    table = plain_table("", "", "", right={""})
    for fact in facts(r):
        table.add_row(text(fact.label), text(fact.value, "bold"), text(fact.note, "dim"))
    out.print(table)
    if rows := r["outliers"]["rows"][: min(SHOWN_FEATURES, len(r["outliers"]["indices"]))]:
        print_rows("Outlier features", (*feature_columns(r["outliers"]["sigma"]), PEAK), rows, out)
    if "accuracy" in r:
        print_rows("Accuracy", ACCURACY_COLUMNS, accuracy_rows(r), out)
    if "robustness" in r:
        print_rows("Effective robustness", ROBUSTNESS_COLUMNS, robustness_rows(r), out)
    if "ablation" in r:
        print_rows("Without the outlier features", ABLATION_COLUMNS, r["ablation"]["rows"], out)
    if "concepts" in r:
        print_rows(f"Concepts, AP ≥ {r['concepts']['threshold']:g}", CONCEPT_COLUMNS, concept_rows(r), out)
    for name, data in r["data"].items():
        for remark in data["remarks"]:
            out.print(text(f"{name}: {remark}", "dim"))
        if data["skipped"]:
            out.print(text(f"{name}: left out because they could not be read: {images(len(data['skipped']))}", "dim"))
    for section, why in r["skipped"].items():
        out.print(text(f"Left out: {section} ({why})", "dim"))


def print_rows(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """A table under a title."""
    columns = shown_columns(rows, columns)
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    out.print(text(title, "bold"))
    out.print(table)
