"""An interpretation as files in its folder, and as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from torchprobe.common.files import replacing, to_json
from torchprobe.common.messages import counted
from torchprobe.rendering.page import WIDE, Picture
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.plots import write as write_figure
from torchprobe.rendering.tables import Column, Row, plain_table, shown, shown_columns, text, write_csv
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.accuracy import ACCURACY_COLUMNS, ROBUSTNESS_COLUMNS, accuracy_rows
from torchprobe.studies.interpret.concepts import CONCEPT_COLUMNS
from torchprobe.studies.interpret.page import facts, interpretation_page
from torchprobe.studies.interpret.representation import ABLATION_COLUMNS
from torchprobe.studies.interpret.results import Interpretation

TABLES = ("kurtosis", "features", "layers", "accuracy", "robustness", "directions", "pruning", "ablation", "concepts")
"""The names of all CSV files."""

SHOWN_FEATURES = 8


# -- files ---------------------------------------------------------------------------------------------------------------


def write(found: Interpretation) -> dict[str, Path]:
    """Writes ``results.json``, the tables, the plots as PNG and SVG, and the page; returns the paths by kind.

    Each file replaces an older one at once.
    """
    files = paths(found)
    if files["results"].is_file():  # tables of an earlier run with more inputs do not belong to this run
        for name in set(TABLES) - tables(found).keys():
            (found.folder / f"{name}.csv").unlink(missing_ok=True)
    with replacing(files["results"]) as temporary:
        temporary.write_text(to_json(found.results), encoding="utf-8")
    for name, rows in tables(found).items():
        write_csv(rows, files[name])
    page = interpretation_page(found)
    write_plots(files["plots"], [picture for section in page.sections for picture in section.pictures])
    write_page(page, files["page"])
    return files


def paths(found: Interpretation) -> dict[str, Path]:
    """The paths of the files of an interpretation, by kind; the page last."""
    folder = found.folder
    csv = {name: folder / f"{name}.csv" for name in tables(found)}
    return {"results": folder / "results.json", **csv, "plots": folder / "plots", "page": folder / "index.html"}


def write_plots(folder: Path, pictures: Sequence[Picture]) -> None:
    """Each picture as PNG and as SVG, named by its description."""
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([picture.description for picture in pictures])
    for picture in pictures:
        name = names[picture.description]
        figure = picture.draw(WIDE)
        for suffix in ("png", "svg"):
            write_figure(figure, folder / f"{name}.{suffix}")


def tables(found: Interpretation) -> dict[str, Sequence[Row]]:
    """The rows of each CSV file, by its name."""
    r = found.results
    images = zip(found.ids, found.kurtosis, found.peaks, found.correct or [None] * len(found.ids), strict=True)
    rows: dict[str, Sequence[Row]] = {
        "kurtosis": [{"image": name, "vector_kurtosis": kappa, "peak": peak, "right": correct} for name, kappa, peak, correct in images],
        "features": r.outliers.rows,
    }
    if r.layers:
        rows["layers"] = r.layers.rows
    if r.accuracy:
        rows["accuracy"] = accuracy_rows(r.accuracy)
    if r.robustness:
        rows["robustness"] = r.robustness.rows
    if r.directions:
        rows["directions"] = r.directions.rows()
    if r.pruning:
        rows["pruning"] = r.pruning.rows()
    if r.ablation:
        rows["ablation"] = r.ablation.rows
    if r.concepts:
        rows["concepts"] = r.concepts.rows()
    return rows


# -- the terminal --------------------------------------------------------------------------------------------------------


def print_interpretation(found: Interpretation, out: Console) -> None:
    """The headline numbers, a table for each section, and what was left out."""
    r = found.results
    out.print(text(found.name, "bold"))
    table = plain_table("", "", "", right={""})
    for fact in facts(r):
        table.add_row(text(fact.label), text(fact.value, "bold"), text(fact.note, "dim"))
    out.print(table)
    if rows := r.outliers.rows[: min(SHOWN_FEATURES, len(r.outliers.indices))]:
        print_rows("Outlier features", r.outliers.columns, rows, out)
    if r.accuracy:
        print_rows("Accuracy", ACCURACY_COLUMNS, accuracy_rows(r.accuracy), out)
    if r.robustness:
        print_rows("Effective robustness", ROBUSTNESS_COLUMNS, r.robustness.rows, out)
    if r.ablation:
        print_rows("Without the outlier features", ABLATION_COLUMNS, r.ablation.rows, out)
    if r.concepts:
        print_rows(f"Concepts, AP ≥ {r.concepts.threshold:g}", CONCEPT_COLUMNS, r.concepts.headline_rows(), out)
    for name, data in r.data.items():
        for remark in data.remarks:
            out.print(text(f"{name}: {remark}", "dim"))
        if data.skipped:
            out.print(text(f"{name}: {counted(len(data.skipped), 'image')} left out because they could not be read", "dim"))
    for section, why in r.skipped.items():
        out.print(text(f"Left out: {section} ({why})", "dim"))


def print_rows(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """A table under a title."""
    columns = shown_columns(rows, columns)
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    out.print(text(title, "bold"))
    out.print(table)
