"""Two dissections on disk, compared: tables, a page, and the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torchprobe
from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder
from torchprobe.common.messages import listing
from torchprobe.dissection import Dissection, DissectionComparison, compare_dissections
from torchprobe.dissection.comparing import CHANGES
from torchprobe.dissection.scores import LayerScores
from torchprobe.rendering.page import Fact, Page, Section, Table
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.tables import Column, Row, number, plain_table, shown, shown_columns, text, write_csv
from torchprobe.studies.dissect import earlier, file_names

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12
"""Rows of a table for the terminal."""

_COUNTING = {"iou": "IoU", "gain": "gain of average precision over prevalence"}

UNIT_COLUMNS = (
    Column("unit", "unit", "index of the unit within the layer, from 0", "index"),
    Column("change", "change", "kept: counts for the same concept in both; other: for another one; gained, lost; none: in neither", "text"),
    Column("label_before", "concept before", "best label before", "text"),
    Column("score_before", "score before", "its score before"),
    Column("label_after", "concept after", "best label after", "text"),
    Column("score_after", "score after", "its score after"),
    Column("difference", "difference", "best score after, minus best score before"),
    Column("before_now", "earlier concept after", "score after, with the best label before"),
)
CONCEPT_COLUMNS = (
    Column("label", "concept", "name of the concept", "text"),
    Column("category", "category", "its category", "text"),
    Column(
        "change",
        "change",
        "it has a unit in both (kept), only after (gained), only before (lost), or in neither; missing: one shows it not",
        "text",
    ),
    Column("units", "units lost and gained", "indices of the units that encode or detect it only before (−), only after (+)", "text"),
    Column("detected_before", "detectors before", "units that detect it by IoU, before", "count"),
    Column("detected_after", "detectors after", "units that detect it by IoU, after", "count"),
    Column("iou_before", "IoU before", "highest IoU of a unit, before", optional=True),
    Column("iou_after", "IoU after", "highest IoU of a unit, after", optional=True),
    Column("encoded_before", "encoders before", "units that encode it, before", "count", optional=True),
    Column("encoded_after", "encoders after", "units that encode it, after", "count", optional=True),
    Column("ap_before", "AP before", "highest average precision of a unit, before", optional=True),
    Column("ap_after", "AP after", "highest average precision of a unit, after", optional=True),
)


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str], **rule: Any) -> dict[str, DissectionComparison]:
    """Compares dissections on disk.

    Args:
        first, second: files of :meth:`Dissection.save`, result files as CSV (see :meth:`Dissection.from_csv`), or folders of
            ``torchprobe dissect``. Of folders, the layers that both have are compared; if each has one layer only, these two.
        rule: the thresholds of :func:`torchprobe.dissection.compare_dissections`.

    Returns:
        Layer of the first → comparison.

    Raises:
        ValueError: a folder holds no finished dissection, a file is damaged, or the folders have no layer in common.
        FileNotFoundError: the file does not exist.
    """
    a, b = _read(first), _read(second)
    pairs = {layer: (one, b[layer]) for layer, one in a.items() if layer in b}
    if not pairs and len(a) == len(b) == 1:
        pairs = {layer: (one, next(iter(b.values()))) for layer, one in a.items()}
    if not pairs:
        raise ValueError(f"no layer is in both: {first} has {listing([*a])}, {second} has {listing([*b])}. Name two files instead")
    return {layer: compare_dissections(*pair, **rule) for layer, pair in pairs.items()}


def _read(path: str | os.PathLike[str]) -> Mapping[str, LayerScores]:
    if Path(path).is_dir():
        return next(iter(earlier([path]).values()))
    found: LayerScores = Dissection.from_csv(path) if Path(path).suffix.lower() == ".csv" else Dissection.load(path)
    return {found.layer: found}


def write_diff(
    found: dict[str, DissectionComparison], folder: str | os.PathLike[str], names: Sequence[str], *, overwrite: bool = False
) -> dict[str, Path]:
    """Writes ``comparison.json``, and for each layer a page and tables of units and concepts; returns the paths by kind.

    Args:
        found: see :func:`diff`.
        folder: created if missing.
        names: what the two are called.
        overwrite: replace the results of another run in the folder; its files are removed, and no others.

    Raises:
        OtherRunError: the folder holds another run.
    """
    with output_folder(folder, "diff", of=" and ".join(names), overwrite=overwrite):
        return _write(found, Path(folder), names)


def _write(found: dict[str, DissectionComparison], folder: Path, names: Sequence[str]) -> dict[str, Path]:
    with replacing(folder / "comparison.json") as temporary:
        temporary.write_text(to_json({"layers": [one.summary() for one in found.values()]}), encoding="utf-8")
    files = {"comparison": folder / "comparison.json"}
    for layer, name in file_names(found).items():
        one = found[layer]
        for score, rows in one.units.items():
            write_csv(rows, folder / f"{name}-units-{score}.csv")
        write_csv([{**row, "units_before": _units(row.units_before), "units_after": _units(row.units_after)} for row in one.concepts],
                  folder / f"{name}-concepts.csv")  # fmt: skip
        files[layer or "(output)"] = write_page(diff_page(one, names), folder / f"{name}.html")
    return files


def diff_page(found: DissectionComparison, names: Sequence[str]) -> Page:
    """The page of one layer."""
    changes = found.summary()
    facts = [Fact(f"Concepts {change}", number(len(labels)), listing(labels, 6)) for change, labels in changes["concepts"].items()]
    sections = [
        Section(
            "Concepts",
            [
                "A concept is gained if a unit encodes or detects it only after, and lost if only before. Labels are matched by name and "
                "category."
            ],
            tables=[Table([_concept_row(row) for row in found.concepts], CONCEPT_COLUMNS)],
        )
    ]
    for score, rows in found.units.items():
        count = changes["units"][score]
        told = ", ".join(f"{change} {number(count[change])}" for change in CHANGES)
        paragraph = f"Units are matched by index; the largest differences come first. By {_COUNTING[score]}: {told}."
        sections.append(Section(f"Units by {_COUNTING[score]}", [paragraph], tables=[Table(rows, UNIT_COLUMNS)]))
    what = f"{names[0]} and {names[1]}"
    return Page(
        kind="diff",
        title=f"{found.before.layer or 'output'}: {what}",
        summary="What changed between two dissections, unit by unit and concept by concept. Other data or settings change the numbers too; "
        "what differs is said here.",
        notice=" ".join(found.remarks),
        facts=facts,
        sections=sections,
        footer=[f"torchprobe {torchprobe.__version__}, Python {platform.python_version()}."],
    )


def print_diff(found: dict[str, DissectionComparison], out: Console) -> None:
    """Prints remarks, numbers, and the first rows of each table."""
    for layer, one in found.items():
        out.print(text(layer or "(output)", "bold"))
        for remark in one.remarks:
            out.print(text(remark))
        changes = one.summary()
        for change, labels in changes["concepts"].items():
            out.print(text(f"concepts {change}: {len(labels)}" + (f" ({listing(labels)})" if labels else "")))
        changed = [_concept_row(row) for row in one.concepts if row.change != "none"]
        _print(CONCEPT_COLUMNS, changed[:SHOWN], out)
        for score, rows in one.units.items():
            told = ", ".join(f"{change} {count}" for change, count in changes["units"][score].items())
            out.print(text(f"units by {_COUNTING[score]}: {told}"))
            _print(UNIT_COLUMNS, rows[:SHOWN], out)


def _print(columns: Sequence[Column], rows: Sequence[Row], out: Console) -> None:
    columns = shown_columns(rows, columns)
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    out.print(table)


def _concept_row(row: Any) -> Row:
    before, after = set(row.units_before), set(row.units_after)
    lost, gained = _some(sorted(before - after)), _some(sorted(after - before))
    return {**row, "units": ", ".join(filter(None, [f"− {lost}" if lost else "", f"+ {gained}" if gained else ""]))}


def _some(units: Sequence[int]) -> str:
    return listing([str(unit) for unit in units], 8)


def _units(units: Sequence[int]) -> str:
    return " ".join(map(str, units))
