"""The files of an interpretation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchprobe.common.files import replacing, to_json
from torchprobe.rendering.page import WIDE, Picture
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.plots import write as write_figure
from torchprobe.rendering.tables import write_csv
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.page import interpretation_page
from torchprobe.studies.interpret.result import Interpretation
from torchprobe.studies.interpret.sections import accuracy_rows, robustness_rows

TABLES = ("kurtosis", "features", "layers", "accuracy", "robustness", "directions", "pruning", "ablation", "concepts")
"""The CSV files there may be."""


def write(found: Interpretation) -> dict[str, Path]:
    """Writes ``results.json``, the tables, the plots as PNG and SVG, and the page; returns the paths by kind.

    Each file replaces an older one at once.
    """
    files = paths(found)
    if files["results"].is_file():  # what an earlier run with more inputs left would be taken for a part of this one
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
    """Where the files of an interpretation lie, by kind; the page last."""
    folder = found.folder
    csv = {name: folder / f"{name}.csv" for name in tables(found)}
    return {"results": folder / "results.json", **csv, "plots": folder / "plots", "page": folder / "index.html"}


def write_plots(folder: Path, pictures: Sequence[Picture]) -> None:
    """Each picture as PNG and as SVG, named by what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([picture.description for picture in pictures])
    for picture in pictures:
        name = names[picture.description]
        figure = picture.draw(WIDE)
        for suffix in ("png", "svg"):
            write_figure(figure, folder / f"{name}.{suffix}")


def tables(found: Interpretation) -> dict[str, list[dict[str, Any]]]:
    """Everything that has rows, for CSV files of these names."""
    r = found.results
    rows = {
        "kurtosis": [
            {"image": name, "vector_kurtosis": value, "peak": peak, "right": right}
            for name, value, peak, right in zip(found.ids, found.kurtosis, found.peaks, found.right or [None] * len(found.ids), strict=True)
        ],
        "features": r["outliers"]["rows"],
    }
    if "layers" in r:
        rows["layers"] = r["layers"]["rows"]
    if "accuracy" in r:
        rows["accuracy"] = [{key: value for key, value in row.items() if key != "interval"} for row in accuracy_rows(r)]
    if "robustness" in r:
        rows["robustness"] = robustness_rows(r)
    if "directions" in r:
        rows["directions"] = [{"head": name, **row} for name in ("head", "centred") for row in r["directions"][name]]
    if "pruning" in r:
        rows["pruning"] = [
            {"images": name, "order": order, **{key: curve[key][i] for key in curve}}
            for curves in (r["pruning"]["curves"], r["pruning"]["robustness"])
            for name, orders in curves.items()
            for order, curve in orders.items()
            for i in range(len(curve["keep"]))
        ]
    if "ablation" in r:
        rows["ablation"] = r["ablation"]["rows"]
    if "concepts" in r:
        rows["concepts"] = [
            {"basis": name, **{key: value for key, value in row.items() if key != "distribution"}}
            for name, sweep in r["concepts"]["sweep"].items()
            for row in sweep
        ]
    return rows
