"""A scan in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from torchprobe.analysis.outliers import FEATURE_COLUMNS
from torchprobe.rendering.tables import layer_table, number, plain_table, shown, text
from torchprobe.studies.scan import DEFINITIONS, Scan
from torchprobe.studies.scan_page import layer_columns, outlier_sentence, relu_note

SHOWN = 10


def print_scan(scan: Scan, out: Console) -> None:
    """The whole of it: the representation beside what it is read against, outlier features, layers, definitions."""
    out.print(text(f"{scan.model}: {scan.images:,} images", "bold"))
    if scan.unreadable:
        out.print(text(f"{len(scan.unreadable)} of {scan.total:,} files could not be read and are left out:", "yellow"))
        for file, reason in scan.unreadable[:SHOWN]:
            out.print(text(f"  {file}: {reason}"))
        if len(scan.unreadable) > SHOWN:
            out.print(text(f"  … and {len(scan.unreadable) - SHOWN} more, all in summary.json"))
    out.print()
    print_representation(scan, out)
    out.print(text(relu_note(scan)))
    out.print()
    out.print(text("Outlier features: |h_i − mean h| > 6 std of the vector", "bold"))
    out.print(text(outlier_sentence(scan)))
    if rows := scan.outliers()[:SHOWN]:
        titles = [column.title for column in FEATURE_COLUMNS]
        table = plain_table(*titles, right=titles)
        for row in rows:
            table.add_row(*(text(shown(row, column)) for column in FEATURE_COLUMNS))
        out.print(table)
    out.print()
    out.print(text("Layers", "bold"))
    out.print(layer_table(scan.layers(), columns=layer_columns(), width=out.width))
    out.print(text("Definitions", "bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for term, meaning in DEFINITIONS.items():
        table.add_row(text(term), text(meaning, "dim"))
    out.print(table)


def print_representation(scan: Scan, out: Console, at_random: Sequence[float] = ()) -> None:
    """The numbers of the representation beside what they are read against.

    Args:
        scan: of the encoder.
        out: where to.
        at_random: vector kurtosis of the same network at random initialisations, if there are any.
    """
    r = scan.summary()["representation"]
    low, high = r["interval"]
    interval = f"{r['interval_level']:.0%} interval {number(low)} … {number(high)}"
    lines = [
        ("vector kurtosis", number(r["vector_kurtosis"]), interval),
        ("  median over images", number(r["vector_kurtosis_median"]), ""),
        ("  Gaussian features", number(r["gaussian"]), f"± {number(r['gaussian_std'], 2)} from vector to vector"),
        ("  ceiling", number(r["ceiling"]), f"for {number(r['features'])} features"),
        ("max|h| / mean|h|", number(r["peak"]), "mean over images"),
    ]
    if at_random:
        between = f"{number(min(at_random))} … {number(max(at_random))}"
        lines.insert(2, ("  at random initialisation", between, f"{len(at_random)} seeds"))
    if skipped := r["constant_vectors"] + r["invalid_vectors"]:
        why = f"{number(r['constant_vectors'])} constant, {number(r['invalid_vectors'])} with a nonfinite element"
        lines.append(("left out", number(skipped), why))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column()
    for line in lines:
        table.add_row(*map(text, line))
    out.print(text("The representation: one vector per image, the interval over images", "bold"))
    out.print(table)
