"""A dissection for people: a page for each layer, tables for the terminal, and the earlier dissections to compare with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.common.progress import CountCallback
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, random_rotation
from torchprobe.dissection.batches import find_preprocess, stack, to_tensor
from torchprobe.dissection.report import Report, write_report
from torchprobe.dissection.report_text import COMPARISON, OWN
from torchprobe.rendering.tables import Column, Row, number, plain_table, shown, text
from torchprobe.studies.dissect import file_names

if TYPE_CHECKING:
    from rich.console import Console

Nulls = Mapping[str, Mapping[str, Dissection]]
"""Name → layer → dissection."""

CALIBRATION = 512
"""Images from which the batch norm statistics of a network with random weights are measured."""

SHOWN_UNITS = 8
"""Units in a table for the terminal."""


def write_pages(
    folder: str | os.PathLike[str],
    results: Mapping[str, Dissection],
    broden: Broden,
    encoder: nn.Module,
    nulls: Nulls | None = None,
    top_images: int = 5,
    evidence: int = 0,
    rotated: bool = False,
    progress: CountCallback | None = None,
) -> dict[str, Path]:
    """Writes ``<layer>.html`` for each layer; returns {layer: path}.

    Args:
        folder: where to write.
        results: see :func:`torchprobe.studies.dissect.dissect_folder`.
        broden, encoder: the data set and the network of the results.
        nulls: dissections to compare with; each is shown for the layers that it has.
        top_images: top images of each unit.
        evidence: number of units whose evidence is shown.
        rotated: whether the units are those of a random rotation with the seed of the metadata.
        progress: called with (steps done, steps in all): a page is one step, and the evidence of each unit is one step.
    """
    names = file_names(results)
    files = {}
    for before, (layer, dissection) in enumerate(results.items()):
        basis = random_rotation(dissection.units, int(dissection.metadata.get("seed", 0))) if rotated else None
        path = Path(folder) / f"{names[layer]}.html"

        def tell(done: int, steps: int, before: int = before) -> None:
            if progress is not None:
                progress(before * steps + done, len(results) * steps)

        files[layer or "(output)"] = write_report(
            dissection, path, broden, encoder,
            nulls=_of_layer(nulls or {}, layer), top_images=top_images, evidence=evidence, basis=basis, progress=tell,
        )  # fmt: skip
    return files


def print_dissections(results: Mapping[str, Dissection], nulls: Nulls, out: Console) -> None:
    """Prints each layer and its nulls; for a single layer also the units with the highest scores.

    Args:
        results: layer → dissection.
        nulls: dissections to compare with.
        out: where to print.
    """
    reports = [Report(dissection, _of_layer(nulls, layer)) for layer, dissection in results.items()]
    rows = []
    for report in reports:
        name = report.dissection.layer or "(output)"
        for row in report.comparison():
            own = row["layer"] == OWN
            rows.append({**row, "layer": f"{name}, {number(report.dissection.units)} units" if own else f"  {row['layer']}"})
    _print([column for column in COMPARISON if any(column.key in row for row in rows)], rows, out)
    if len(reports) == 1:
        columns = [column for column in reports[0].columns() if column.key not in ("threshold", "others")]
        _print(columns, [unit.values for unit in reports[0].units()[:SHOWN_UNITS]], out)
    if not nulls:
        advice = "Dissect with random weights and with shuffled labels as well, and name those folders with --null."
        out.print(text(f"No null was given. {advice}"))


def _print(columns: Sequence[Column], rows: Sequence[Row], out: Console) -> None:
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(row[column.key] if column.key == "layer" else shown(row, column)) for column in columns))
    out.print(table)


def earlier(folders: Iterable[str | os.PathLike[str]]) -> dict[str, dict[str, Dissection]]:
    """Earlier dissections, by the name of their folder and by layer; see :func:`torchprobe.studies.dissect.dissect_folder`.

    Raises:
        ValueError: a folder does not hold a finished dissection, or holds a damaged one.
    """
    found: dict[str, dict[str, Dissection]] = {}
    for folder in map(Path, folders):
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            names = [str(layer["file"]) for layer in summary["layers"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} does not hold a finished dissection: summary.json is missing or damaged ({error})") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder}: summary.json names {outside[0]!r}, which is not a file of the folder")
        results = [Dissection.load(folder / f"{name}.safetensors") for name in names]
        found[_free(folder.resolve().name, found)] = {result.layer: result for result in results}
    return found


def recalibrate(encoder: nn.Module, broden: Broden, batch_size: int = 32, limit: int = CALIBRATION) -> None:
    """Measures the statistics of all batch norms anew, in place, on the first images of ``broden``, whose order is random.

    Otherwise the layers of an untrained network would have very different scales.
    """
    preprocess = find_preprocess(broden, encoder)
    parts = (range(start, min(start + batch_size, limit, len(broden))) for start in range(0, min(limit, len(broden)), batch_size))
    recalibrate_batch_norms(encoder, (stack([to_tensor(preprocess, broden.image(row)) for row in part], broden, part) for part in parts))


def _of_layer(nulls: Nulls, layer: str) -> dict[str, Dissection]:
    return {name: layers[layer] for name, layers in nulls.items() if layer in layers}


def _free(name: str, taken: Mapping[str, object]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name} ({count})"
    return free
