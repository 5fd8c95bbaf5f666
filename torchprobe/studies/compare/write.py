"""The files of a comparison."""

from __future__ import annotations

import os
from pathlib import Path

from torchprobe.common.files import replacing, to_json
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.tables import write_csv
from torchprobe.studies.compare.comparison import Comparison
from torchprobe.studies.compare.page import comparison_page
from torchprobe.studies.interpret.write import write_plots


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
