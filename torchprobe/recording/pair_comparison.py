"""The result of :func:`torchprobe.record_pair`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torchprobe.common.messages import counted, listing
from torchprobe.recording.tensor_difference import Difference

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerPair:
    """One tensor that one call of a layer gives, in both models.

    Attributes:
        layer: the name in ``a``; ``""`` is the model.
        place: of the tensor in the output; "" for the only one.
        call: which call of the layer, from 0.
        module: its class in ``a``.
        given: the first tensor that went in, compared; None if none did.
        output: what came out, compared.
        own: the error that this layer adds by itself; None without ``isolate``, or if the layer could not run alone.
        own_at: "" if that is in its output; else the inner layer (its name in ``b``) that it hands this error to.
        own_problem: why it could not.
    """

    layer: str
    place: str
    call: int
    module: str
    given: Difference | None
    output: Difference
    own: Difference | None = None
    own_at: str = ""
    own_problem: str = ""

    @property
    def name(self) -> str:
        """With its place and call, as far as they tell something."""
        return f"{self.layer or '(output)'}{':' + self.place if self.place else ''}{f' (call {self.call + 1})' if self.call else ''}"

    @property
    def growth(self) -> float:
        """The relative error that came out, over the one that went in, which counts as one unit roundoff at least. Nan for whole numbers,
        which jump."""
        if self.output.whole:
            return math.nan
        entered = 0.0 if self.given is None or self.given.problem else self.given.relative
        floor = self.output.rounding if math.isfinite(self.output.rounding) else 0.0
        least = max(entered, floor)
        return self.output.size / least if least else math.nan

    @property
    def own_size(self) -> float:
        """The relative error of ``own``; 0 if it is not known."""
        return 0.0 if self.own is None else self.own.size

    def adds(self, tolerance: float = 0.0) -> bool:
        """Whether this layer is known to add an error above ``tolerance`` by itself."""
        return self.own is not None and self.own.apart(tolerance)

    def row(self) -> dict[str, Any]:
        """For a table."""
        return {
            "layer": self.name,
            "module": self.module,
            "given_relative": None if self.given is None else self.given.relative,
            **asdict(self.output),
            "own_relative": None if self.own is None else self.own.relative,
            "own_at": self.own_at,
            "own_problem": self.own_problem or ("" if self.own is None else self.own.problem),
        }


@dataclass(frozen=True)
class PairComparison:
    """Two models on the same input; see :func:`torchprobe.record_pair`.

    Attributes:
        rows: in the order in which the layers of ``a`` end, so inner layers come before the block around them.
        isolated: whether the layers of ``b`` also ran alone.
        tolerance: the relative error up to which outputs count as equal.
        remarks: what a reader must know, in words.
        caveats: those of the remarks that may make the answer a wrong one. The answer ends with them.
    """

    rows: Sequence[LayerPair]
    isolated: bool
    tolerance: float
    remarks: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)

    @property
    def first_row(self) -> LayerPair | None:
        """The first row whose outputs differ beyond the tolerance."""
        return next((row for row in self.rows if row.output.apart(self.tolerance)), None)

    @property
    def first(self) -> str | None:
        """The first layer whose outputs differ beyond the tolerance; None if none does."""
        return None if self.first_row is None else self.first_row.layer

    @property
    def culprit_row(self) -> LayerPair | None:
        """The row that adds the largest relative error; None if nothing differs.

        With ``isolate`` by its ``own`` error. Without, it is an estimate: of the rows that differ, that of the largest ``growth``. A layer
        may enlarge an error that came in without being to blame.
        """
        if self.isolated:
            known = [row for row in self.rows if row.own is not None and row.own.apart()]
            return max(known, key=lambda row: row.own_size, default=None)
        parted = [row for row in self.rows if row.output.apart(self.tolerance)]
        return max(parted, key=lambda row: row.growth if not math.isnan(row.growth) else 0.0, default=None)

    @property
    def culprit(self) -> str | None:
        """The layer of :attr:`culprit_row`."""
        return None if self.culprit_row is None else self.culprit_row.layer

    def largest(self, most: int | None = None) -> list[LayerPair]:
        """The rows that differ, the largest error first.

        With ``isolate`` by the error that a row adds by itself (``row.own``), so those that only pass an error on come last. Without, and
        among those, by the relative error of what comes out.

        Args:
            most: the number of rows. Default: all that differ.

        >>> import copy, torch, torchprobe
        >>> a = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> b = copy.deepcopy(a)
        >>> _ = b[0].weight.data.mul_(1.01), b[2].weight.data.mul_(1.1)
        >>> [row.layer for row in torchprobe.record_pair(a, b, torch.randn(4, 8), isolate=True).largest(2)]
        ['2', '0']
        """
        apart = [row for row in self.rows if row.output.apart(self.tolerance) or row.adds(self.tolerance)]
        return sorted(apart, key=lambda row: (row.own_size, row.output.size), reverse=True)[:most]

    def answer(self) -> str:
        """The result in a few sentences."""
        return " ".join([self._answer(), *(f"But {caveat}." for caveat in self.caveats)])

    def _answer(self) -> str:
        first, worst, end = self.first_row, self.culprit_row, self.rows[-1]
        last = max((row for row in self.rows if (row.layer, row.call) == (end.layer, end.call)), key=lambda row: row.output.size)
        if first is None:
            same = "are the same" if self.tolerance == 0 else f"agree to a relative error of {self.tolerance:g}"
            compared = sum(row.output.compared for row in self.rows)
            more = "" if compared == len(self.rows) else f" {len(self.rows) - compared} others could not be compared."
            return f"All {compared} outputs {same}.{more}"
        parts = [f"The first output that differs is that of {first.name} ({_told(first.output)})."]
        if worst is not None and self.isolated:
            where = f", in what it hands to {worst.own_at}" if worst.own_at else ""
            parts.append(f"{worst.name} adds the largest error by itself ({_told(worst.own)}{where}).")
            adding = [row for row in self.largest() if row is not worst and row.adds(self.tolerance)]
            if adding:
                others = [f"{row.name} ({row.own_size:.3g})" for row in adding]
                parts.append(f"Then come {listing(others, _NAMED - 1)}.")
        elif worst is not None and not math.isnan(worst.growth):
            parts.append(f"The error grows most in {worst.name}, by {worst.growth:.3g}; isolate=True tells whether it is made there.")
        return " ".join([*parts, f"At the end: {_told(last.output)}."])

    def summary(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        own = {"answer": self.answer(), "first": self.first, "culprit": self.culprit, "isolated": self.isolated}
        return {**own, "tolerance": self.tolerance, "remarks": self.remarks, "rows": [row.row() for row in self.rows]}

    def table(self, most: int | None = None) -> Table:
        """The rows as a rich table, for printing.

        Args:
            most: the number of rows, those of :meth:`largest`, in the order of the run. Default: all rows.
        """
        from torchprobe.rendering.tables import WIDER, Column, plain_table, shown, shown_columns, text

        columns = [Column(*column[:3], **column[3]) for column in _COLUMNS]
        largest = self.rows if most is None else self.largest(most)
        chosen = [row for row in self.rows if any(row is one for one in largest)]
        more = 0 if most is None else len(self.largest()) - len(chosen)
        rows = [row.row() for row in chosen]
        columns = shown_columns(rows, columns)
        table = plain_table(
            *(column.title for column in columns),
            right={column.title for column in columns if column.numeric},
            dispensable=_DISPENSABLE,
            more=f"{WIDER} rows has all.",
            caption=f"{counted(more, 'more row')} {'differs' if more == 1 else 'differ'} less; rows has all." if more else "",
        )
        worst = self.culprit_row
        for pair, row in zip(chosen, rows, strict=True):
            table.add_row(*(text(shown(row, column), "bold" if pair is worst else "") for column in columns))
        return table

    def __repr__(self) -> str:
        return f"PairComparison({len(self.rows)} outputs: {self.answer()})"


_NAMED = 5  # layers that the answer names by their own error

_COLUMNS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("layer", "layer", "name in a", {"kind": "text"}),
    ("module", "module", "its class", {"kind": "text"}),
    ("given_relative", "error in", "relative L2 error of the first tensor that went in", {}),
    ("relative", "error out", "relative L2 error of what came out", {}),
    ("own_relative", "own error", "the error that this layer adds by itself", {"optional": True}),
    ("own_at", "seen in", "the inner layer that is handed this error; empty: it is in the output", {"kind": "text", "optional": True}),
    ("max_abs", "max |b − a|", "the largest difference of an element", {}),
    ("ulps", "ulps", "the largest distance in units in the last place", {"optional": True}),
    ("equal_share", "equal", "share of the elements that are equal", {"kind": "share"}),
    ("cosine", "cosine", "of the angle between both", {}),
    ("nonfinite_differ", "nonfinite", "positions that are nonfinite in only one, or in another way", {"kind": "count", "optional": True}),
    ("problem", "problem", "why they cannot be compared", {"kind": "text", "optional": True}),
    ("own_problem", "alone", "why the layer could not run alone", {"kind": "text", "optional": True}),
)

_DISPENSABLE = ("module", "cosine", "equal", "ulps", "max |b − a|")
"""The heads that a narrow terminal leaves out first."""


def _told(found: Difference | None) -> str:
    if found is None:
        return "unknown"
    if found.problem:
        return found.problem
    if found.whole:
        apart = found.elements - round(found.elements * found.equal_share)
        return f"{apart} of {counted(found.elements, 'whole number')} {'differs' if apart == 1 else 'differ'}"
    bad = f", {found.nonfinite_differ} nonfinite positions differ" if found.nonfinite_differ else ""
    return f"relative error {found.relative:.3g}{bad}"
