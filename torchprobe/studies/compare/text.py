"""A comparison for the terminal."""

from __future__ import annotations

from rich.console import Console

from torchprobe.rendering.tables import text
from torchprobe.studies.compare.comparison import Comparison
from torchprobe.studies.compare.page import CORRELATION_COLUMNS, MODEL_COLUMNS, PAIR_COLUMNS
from torchprobe.studies.interpret.text import print_rows


def print_comparison(found: Comparison, out: Console) -> None:
    """Encoders, pairs, correlations, and who was left out."""
    print_rows("Encoders", [column for column in MODEL_COLUMNS if column.key not in ("kurtosis_low", "kurtosis_high")], found.models, out)
    if found.pairs:
        print_rows("Pairs", PAIR_COLUMNS, found.pairs, out)
    if found.correlations:
        print_rows("Rank correlations", CORRELATION_COLUMNS, found.correlations, out)
    for remark in found.remarks:
        out.print(text(remark))
    for one in found.skipped:
        out.print(text(f"Left out: {one['model']} ({one['why']})", "dim"))
