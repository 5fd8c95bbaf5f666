"""A comparison as files in a folder, and as tables in the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from torchprobe.common.files import replacing, to_json
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.tables import text, write_csv
from torchprobe.studies.compare.comparison import Comparison
from torchprobe.studies.compare.page import CORRELATION_COLUMNS, MODEL_COLUMNS, PAIR_COLUMNS, comparison_page
from torchprobe.studies.interpret.write import print_rows, write_plots


def write(found: Comparison, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes ``comparison.json``, tables as CSV, plots as PNG and SVG, and the page into ``folder``; returns the paths by kind.

    Each file replaces an older one at once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "comparison.json") as temporary:
        temporary.write_text(to_json(found.summary()), encoding="utf-8")
    files = {"comparison": folder / "comparison.json"}
    for name in ("models", "pairs", "correlations", "overlaps"):
        if rows := getattr(found, name):
            files[name] = write_csv(rows, folder / f"{name}.csv")
    page = comparison_page(found)
    files["plots"] = folder / "plots"
    write_plots(files["plots"], [picture for section in page.sections for picture in section.pictures])
    files["page"] = write_page(page, folder / "index.html")
    return files


def print_comparison(found: Comparison, out: Console) -> None:
    """Encoders, pairs, correlations, and the encoders that were not run."""
    print_rows("Encoders", [column for column in MODEL_COLUMNS if column.key not in ("kurtosis_low", "kurtosis_high")], found.models, out)
    if found.pairs:
        print_rows("Pairs", PAIR_COLUMNS, found.pairs, out)
    if found.correlations:
        print_rows("Rank correlations", CORRELATION_COLUMNS, found.correlations, out)
    for remark in found.remarks:
        out.print(text(remark))
    for one in found.skipped:
        out.print(text(f"Left out: {one.model} ({one.why})", "dim"))
