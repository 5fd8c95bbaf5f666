"""The layer table: its columns, in the terminal and as CSV."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchprobe.common.csv_files import write_rows
from torchprobe.statistics.moments import gaussian_kurtosis

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Row = Mapping[str, Any]
"""One row of a table: column key → value. ``Recording.rows()`` returns one for each layer."""


@dataclass(frozen=True)
class Column:
    """One column of a table of rows.

    Args:
        key: the key in a row, or ``"gaussian"`` for the Gaussian reference of the row's width.
        title: the head of the column.
        help: what the number is, in one line.
        kind: ``"text"``, ``"index"`` or ``"count"`` (whole numbers), ``"share"`` (shown in percent) or ``"number"``.
        optional: show the column only if a row has a value other than 0, nan or None.
    """

    key: str
    title: str
    help: str
    kind: Literal["text", "index", "count", "share", "number"] = "number"
    optional: bool = False

    @property
    def numeric(self) -> bool:
        """Whether the column is right-aligned and sorted as numbers."""
        return self.kind != "text"


LAYER_COLUMNS = (
    Column("layer", "layer", "name within the model; “(output)” is the output of the model itself", "text"),
    Column("vector_kurtosis", "vector κ", "kurtosis across the features of one vector, mean over vectors"),
    Column("vector_kurtosis_median", "median", "its median over vectors"),
    Column("gaussian", "Gauss", "the value of independent Gaussian features of that width: 3(d − 1)/(d + 1)"),
    Column("outlier_features", "outliers", "features that are outliers in at least half of the vectors", "count"),
    Column("vector_kurtosis_std", "± std", "standard deviation of vector κ over vectors"),
    Column("kurtosis_median", "feature κ", "kurtosis of one feature over all its values, median over features"),
    Column("kurtosis_max", "max", "the largest kurtosis of a feature over all its values"),
    Column("std", "std", "square root of the mean variance of the features"),
    Column("mean_abs_max", "max mean|x|", "the largest mean |x| of a feature"),
    Column("features", "d", "number of features: the length of one vector", "count"),
    Column("vectors", "vectors", "number of activation vectors that were counted", "count"),
    Column("module", "module", "class of the layer", "text"),
    Column("feature_dim", "dim", "the dimension of the layer's output that holds the features; “unsure” where nothing decides", "count"),
    Column("feature_dim_by", "dim by", "by what that dimension is known", "text", optional=True),
    Column("nonfinite", "nonfinite", "number of nan and inf values; excluded from all other columns", "count", optional=True),
    Column("constant_vectors", "constant", "vectors excluded because their variance is 0", "count", optional=True),
    Column("invalid_vectors", "invalid", "vectors excluded because an element is nonfinite", "count", optional=True),
)
"""The columns of a table of layers, the most important first, because a phone shows only these."""

UNSURE = "unsure"
"""What ``feature_dim_by`` says of a layer where nothing decides; it has no numbers."""

_DISPENSABLE = (
    *("feature_dim_by", "mean_abs_max", "module", "std", "kurtosis_max", "kurtosis_median", "long_tokens", "massive"),
    *(
        "vector_kurtosis_std",
        "outlier_indices",
        "outlier_features",
        "feature_dim",
        "vectors",
        "vectors_per_image",
        "features",
        "vector_kurtosis_median",
    ),
)
"""The columns that a narrow terminal leaves out, the first one first."""

WIDER = "A wider terminal shows all (in a pipe: COLUMNS=200)."
"""Where the columns are that a narrow terminal leaves out."""


def printable(text: object) -> str:
    r"""``text`` with escapes in place of characters that are not printable, so that no name can move the cursor or reverse a line.

    >>> printable("a\x1b[31m")
    'a\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def number(value: object, digits: int = 4) -> str:
    """A number for people: an int in groups of three digits, a float with ``digits`` significant digits, nan and None as ``–``.

    >>> number(12608), number(3.14159), number(float("nan")), number(1.5e-7)
    ('12,608', '3.142', '–', '1.50e-07')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return printable(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits - 2}e}"


def percent(share: float, digits: int = 3) -> str:
    """A share for people.

    >>> percent(0.0833), percent(float("nan"))
    ('8.33 %', '–')
    """
    return "–" if number(share) == "–" else f"{number(100 * share, digits)} %"


def cell(row: Row, column: Column) -> Any:
    """The value of ``column`` in ``row``: a count as int, a missing value as None."""
    if column.key == "gaussian":
        features = row.get("features")
        return gaussian_kurtosis(int(features)) if features else None
    if column.key == "layer":
        return row.get("layer") or "(output)"
    if column.key == "feature_dim" and row.get("feature_dim_by") == UNSURE:
        return UNSURE
    value = row.get(column.key)
    if column.kind in ("index", "count") and isinstance(value, float) and math.isfinite(value):
        return int(value)
    return value


def shown(row: Row, column: Column) -> str:
    """The value of ``column`` in ``row`` as text.

    >>> shown({"share": 0.0833}, Column("share", "share", "", "share"))
    '8.33 %'
    """
    value = cell(row, column)
    if column.kind == "share":
        return percent(value)
    return str(value) if column.kind == "index" and isinstance(value, int) else number(value)


def shown_columns(rows: Sequence[Row], columns: Iterable[Column] = LAYER_COLUMNS) -> list[Column]:
    """``columns`` without the optional ones that are empty in all rows."""
    return [c for c in columns if not c.optional or any(shown(row, c) not in ("–", "0", "0 %", "") for row in rows)]


def statistic_columns(fields: Mapping[str, str]) -> tuple[Column, ...]:
    """The columns of a table of layers whose rows hold these fields (name → help).

    >>> [column.key for column in statistic_columns({"zero_share": "share of values that are exactly 0"})]
    ['layer', 'features', 'module', 'feature_dim', 'feature_dim_by', 'zero_share']
    """
    given = {
        "layer",
        "module",
        "features",
        "feature_dim",
        "feature_dim_by",
        *fields,
        *(["gaussian"] if "vector_kurtosis" in fields else []),
    }
    known = {column.key for column in LAYER_COLUMNS}
    others = (Column(name, name.replace("_", " "), text) for name, text in fields.items() if name not in known)
    return (*(column for column in LAYER_COLUMNS if column.key in given), *others)


def layer_table(
    rows: Sequence[Row],
    *,
    columns: Sequence[Column] = LAYER_COLUMNS,
    title: str | None = None,
    width: int | None = None,
    note: str = "",
    more: str = WIDER,
) -> Table:
    """The table of layers for a terminal or a notebook.

    Args:
        rows: one mapping per layer, as ``Recording.rows()`` returns them.
        columns: the columns to show.
        title: printed above the table.
        width: the widest that it may be, in characters; None: the width of the terminal where it is printed. If the table is wider,
            less important columns are left out, but never the vector kurtosis and its Gaussian value. A line below says how many.
        note: one more sentence below the table.
        more: where the columns are that are left out.

    >>> rows = [{"layer": "blocks.0", "features": 768, "feature_dim": -1, "vectors": 64, "vector_kurtosis": 3.02}]
    >>> layer_table(rows).row_count
    1
    """
    from torchprobe.rendering.fitting import FittingTable

    columns = shown_columns(rows, columns)
    positions = sorted({str(row["positions"]) for row in rows if row.get("positions")})
    caption = f"One vector = the features (along dim) of one position; positions: {', '.join(positions) or 'all'}."
    if any(row.get("feature_dim_by") == UNSURE for row in rows):
        note = f"Unsure: nothing says which dimension holds the features; feature_dim= does. {note}"
    at = {column.key: index for index, column in enumerate(columns)}
    table = FittingTable(
        [text(column.title) for column in columns],
        [column.numeric for column in columns],
        styles=["bold" if column.key == "vector_kurtosis" else "" for column in columns],
        dispensable=[at[key] for key in _DISPENSABLE if key in at],
        needed=[at[key] for key in ("vector_kurtosis", "gaussian") if key in at],
        more=more,
        limit=width,
        title=text(title) if title else None,
        caption=f"{caption} {note}".rstrip(),
    )
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    return table


def text(value: object, style: str = "") -> Text:
    """``value`` for rich, never interpreted as markup: names and paths are data.

    >>> text("[red]").plain
    '[red]'
    """
    from rich.text import Text

    return Text(printable(value), style=style)


def plain_table(*heads: str, right: Container[str] = (), dispensable: Sequence[str] = (), more: str = WIDER, caption: str = "") -> Table:
    """An empty rich table with these heads.

    Args:
        heads: of the columns.
        right: heads of the columns of numbers. They are right-aligned and never folded.
        dispensable: heads of the columns that a narrow terminal leaves out first, the first one first; then the last ones follow.
        more: where the columns are that are left out.
        caption: printed below the table.
    """
    from torchprobe.rendering.fitting import FittingTable

    first = [heads.index(head) for head in dispensable if head in heads]
    numeric = [head in right for head in heads]
    return FittingTable([text(head) for head in heads], numeric, dispensable=first, more=more, caption=caption, head_style="bold")


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """Writes ``rows`` as CSV, with a column for every key in any row, in order of appearance. Returns the path.

    Numbers are written in full precision, nan as ``nan``, a missing value as an empty cell. The encoding is UTF-8. A text that a
    spreadsheet would take for a formula gets an apostrophe in front; see :mod:`torchprobe.common.csv_files`. An existing file is replaced
    as a whole: after an interruption, either the old file or the new file is there.

    >>> import tempfile
    >>> write_csv([{"layer": "fc", "std": 1.0}, {"layer": ""}], Path(tempfile.mkdtemp(), "layers.csv")).read_text()
    'layer,std\\nfc,1.0\\n,\\n'
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return write_rows(path, [keys, *([row.get(key, "") for key in keys] for row in rows)])
