"""What :func:`torchprobe.analysis.provenance` returns: tables of parts, of parameters, and of changes, with their file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.common.checked import read_checked, write_checked
from torchprobe.common.messages import counted
from torchprobe.common.records import Record, decode
from torchprobe.rendering.tables import Column, number, percent, plain_table, text

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = 1
"""The format of the file."""

_LARGEST_FILE = 1 << 26  # bytes; a thousand features of a network of a hundred blocks take a third of it


@dataclass(frozen=True, eq=False)
class PartRow(Record):
    """What one part of the network adds to a feature.

    Attributes:
        feature: index within the representation.
        block: the name of the block; "" before the first and after the last.
        part: the name of the module within it, or of a bias after the last block; "(before the blocks)" is the stem.
        kind: "attention", "mlp", "convolution", "shortcut", "branch", "stem" or "bias".
        contribution: mean over images of the part times the sign of h_f. The contributions of a feature sum to the mean of |h_f|.
        share: of that sum. Shares may be negative or above 1.
        mean: mean over images of what the part adds to h_f.
        std: its population standard deviation over images.
    """

    feature: int
    block: str
    part: str
    kind: str
    contribution: float
    share: float
    mean: float
    std: float


@dataclass(frozen=True, eq=False)
class ParameterRow(Record):
    """A parameter on which a feature hangs.

    Attributes:
        feature: index within the representation.
        parameter: the full name.
        index: the entry: a feature of the stream, or of the representation; of a matrix, its row.
        kind: "bias", which is added; "gain", which multiplies; "row", of a matrix.
        value: of the entry; of a gain, its absolute value; of a row, its length. Of an embedding of positions, the value that is furthest
            from its peers.
        median: of its peers, the other entries of the parameter.
        deviation: (value − median) in robust standard deviations of the peers; see :func:`deviations`.
        contribution: mean over images of what passes through it, times the sign of h_f. Gains and rows multiply what biases and other
            parts add, so contributions of parameters overlap and do not sum to anything.
        excess: mean over images of (value − median) · ∂h_f/∂θ times the sign of h_f, along the direct path: how much of the feature is due
            to the value's being unlike its peers. Rows are in the order of |size − excess|, what would be left of the feature.
        excess_share: excess as a share of the mean of |h_f|.
    """

    feature: int
    parameter: str
    index: int
    kind: str
    value: float
    median: float
    deviation: float
    contribution: float
    excess: float
    excess_share: float


@dataclass(frozen=True, eq=False)
class StemRow(Record):
    """What one parameter before the first block adds to a feature; ``contribution`` and ``share`` as in :class:`PartRow`."""

    feature: int
    parameter: str
    contribution: float
    share: float


@dataclass(frozen=True, eq=False)
class ChangeRow(Record):
    """What happens when one entry of one parameter is changed, and the whole network runs again.

    Attributes:
        feature, parameter, index: as in :class:`ParameterRow`.
        how: "median", the entry has the median of its peers (a gain, their size; a row, their length); or "zero".
        relative_size_before, relative_size: mean |h_f| over images, divided by its mean over features.
        outlier_share_before, outlier_share: the share of the images in which the feature is an outlier.
        feature_kurtosis_before, feature_kurtosis: kurtosis of h_f over images.
        vector_kurtosis_before, vector_kurtosis: mean over images.
        cosine: mean over images of the cosine between the representations before and after.
        agreement: share of the images for which the head decides as before; nan without a head.
        accuracy_before, accuracy: of the head; nan without a head or labels.
    """

    feature: int
    parameter: str
    index: int
    how: str
    relative_size_before: float
    relative_size: float
    outlier_share_before: float
    outlier_share: float
    feature_kurtosis_before: float
    feature_kurtosis: float
    vector_kurtosis_before: float
    vector_kurtosis: float
    cosine: float
    agreement: float
    accuracy_before: float
    accuracy: float


PART_COLUMNS = (
    Column("feature", "feature", "index within the representation", "index"),
    Column("block", "block", "name of the block; empty before the first and after the last", "text"),
    Column("part", "part", "name of the module within the block", "text"),
    Column("kind", "kind", "what it is", "text"),
    Column("contribution", "contribution", "mean over images of what the part adds to |h|; they sum to the mean |h|"),
    Column("share", "share", "contribution as a share of the mean |h|; it may be negative or above 100 %", "share"),
    Column("mean", "mean", "mean over images of what the part adds to h"),
    Column("std", "std", "its standard deviation over images"),
)
PARAMETER_COLUMNS = (
    Column("feature", "feature", "index within the representation", "index"),
    Column("parameter", "parameter", "name of the parameter", "text"),
    Column("index", "entry", "index of the entry; of a matrix, its row", "index"),
    Column("kind", "kind", "a bias is added, a gain multiplies, a row is one of a matrix", "text"),
    Column("value", "value", "of the entry; of a gain, its absolute value; of a row, its length"),
    Column("median", "median", "of its peers, the other entries"),
    Column("deviation", "deviation", "distance from the median, in robust standard deviations"),
    Column("contribution", "contribution", "mean over images of what passes through it; these overlap"),
    Column("excess_share", "excess", "what being unlike its peers adds to the mean |h|, as a share of it", "share"),
)
STEM_COLUMNS = (
    Column("feature", "feature", "index within the representation", "index"),
    Column("parameter", "parameter", "name of the parameter", "text"),
    Column("contribution", "contribution", "mean over images of what it adds to |h|; they sum to the part before the blocks"),
    Column("share", "share", "contribution as a share of the mean |h|", "share"),
)
CHANGE_COLUMNS = (
    Column("feature", "feature", "index within the representation", "index"),
    Column("parameter", "parameter", "name of the parameter that is changed", "text"),
    Column("index", "entry", "index of the entry; of a matrix, its row", "index"),
    Column("how", "set to", "the median of its peers (a gain: their size; a row: their length), or zero", "text"),
    Column("relative_size_before", "size", "mean |h| of the feature over that of all features, before"),
    Column("relative_size", "→", "after"),
    Column("outlier_share_before", "outlier share", "share of the images in which the feature is an outlier, before", "share"),
    Column("outlier_share", "→", "after", "share"),
    Column("vector_kurtosis_before", "vector κ", "mean over images, before"),
    Column("vector_kurtosis", "→", "after"),
    Column("feature_kurtosis_before", "feature κ", "kurtosis of the feature over images, before"),
    Column("feature_kurtosis", "→", "after"),
    Column("cosine", "cosine", "mean over images, between the representations before and after"),
    Column("agreement", "same decision", "share of the images for which the head decides as before", "share", optional=True),
    Column("accuracy_before", "accuracy", "of the head, before", "share", optional=True),
    Column("accuracy", "→", "after", "share", optional=True),
)


@dataclass(frozen=True, eq=False)
class Provenance(Record):
    """Where features of a representation come from.

    Attributes:
        format: of the file.
        name: of the encoder.
        features: the features that were attributed.
        images: number of images.
        sizes: for each of the features, the mean of |h_f| over images.
        parts: what each part of the network adds, largest first, feature by feature. Exact; see ``error``.
        parameters: the parameters on which each feature hangs most, the first one first, feature by feature.
        stem: what each parameter before the blocks adds. Empty if these are not a sum, as in a convolutional stem.
        changes: what happens when one parameter is changed.
        error: the largest difference between h_f and the sum of its parts, over images and features, as a share of the largest |h_f|.
        remarks: what is not known, in words.
    """

    format: int
    name: str
    features: list[int]
    images: int
    sizes: list[float]
    parts: list[PartRow]
    parameters: list[ParameterRow]
    stem: list[StemRow]
    changes: list[ChangeRow]
    error: float
    remarks: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """The parameters, in their order, feature by feature."""
        return [dict(row) for row in self.parameters]

    def summary(self) -> str:
        """One paragraph for each feature."""
        lines = [self._sentences(feature, size) for feature, size in zip(self.features, self.sizes, strict=True)]
        return "\n".join(lines) if lines else "No feature was given, and none is an outlier feature."

    def table(self, most: int = 5) -> Group:
        """Tables for a terminal or a notebook: the ``most`` largest parts and parameters of each feature, and all changes."""
        from rich.console import Group

        parts, parameters, changes = (plain_table(*heads, right=set(heads[2:])) for heads in _TERMINAL)
        for part in first(self.parts, most):
            name = ".".join(filter(None, (part.block, part.part)))
            _add(parts, part.feature, name, number(part.contribution), percent(part.share), number(part.std))
        for row in first(self.parameters, most):
            numbers = number(row.value), number(row.median), number(row.deviation, 3), percent(row.excess_share)
            _add(parameters, row.feature, f"{row.parameter}[{row.index}]", *numbers)
        for change in self.changes:
            pairs = (
                f"{number(change.relative_size_before, 3)} → {number(change.relative_size, 3)}",
                f"{number(change.vector_kurtosis_before, 3)} → {number(change.vector_kurtosis, 3)}",
            )
            name = f"{change.parameter}[{change.index}] = {change.how}"
            _add(changes, change.feature, name, *pairs, number(change.cosine, 3), percent(change.agreement), percent(change.accuracy))
        tables = []
        for title, table in (
            ("Parts of the residual stream", parts),
            ("Parameters", parameters),
            ("One parameter changed, everything else computed again", changes),
        ):
            table.title, table.title_justify = text(title), "left"
            tables += [table] if table.row_count else []
        return Group(*tables, text(self.note()))

    def note(self) -> str:
        """What is exact, and what is not."""
        return " ".join(
            [
                f"{counted(self.images, 'image')}. Parts sum to the feature up to {self.error:.0e} of its largest value, with the scale of",
                "the LayerNorms outside the blocks and the gates of ReLUs held. A part stands for the direct path: what it does to later",
                "blocks counts as theirs. Parameters are ranked by their excess on that path; changes run the whole network.",
                *self.remarks,
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file with a checksum; it replaces an older one only when everything is on the disk."""
        write_checked(path, dict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Provenance:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: another kind of file, or a damaged one.
        """
        path = Path(path)
        plain = read_checked(path, required=False)  # earlier versions wrote no checksum
        try:
            found = decode(cls, plain)
        except ValueError as error:
            raise ValueError(f"{path} is not a file of provenance: {error}") from error
        if found.format != FORMAT:
            raise ValueError(f"{path} has the format {found.format}; this version reads {FORMAT}")
        return found

    def _sentences(self, feature: int, size: float) -> str:
        parts = [row for row in self.parts if row.feature == feature][:2]
        parameters = [row for row in self.parameters if row.feature == feature][:1]
        changes = [row for row in self.changes if row.feature == feature and row.how == "median"][:1]
        sentence = f"Feature {feature}, mean |h| {number(size)}: " + ", ".join(
            f"{percent(row.share)} from {'.'.join(filter(None, (row.block, row.part)))}" for row in parts
        )
        for row in parameters:
            what = {"row": "length", "gain": "size"}.get(row.kind, "value")
            sentence += (
                f". It hangs most on {row.parameter}[{row.index}], {what} {number(row.value)}, median of its peers {number(row.median)}, "
                f"excess {percent(row.excess_share)}"
            )
        for change in changes:
            sentence += (
                f". With the median in its place, the relative size goes from {number(change.relative_size_before)} to "
                f"{number(change.relative_size)}"
            )
        return sentence + "."


_TERMINAL = (
    ("feature", "part", "adds", "share", "± std"),
    ("feature", "parameter", "value", "median", "robust σ", "excess"),
    ("feature", "changed", "size", "vector κ", "cosine", "same", "accuracy"),
)
"""The heads of the tables in a terminal."""


def _add(table: Any, feature: int, name: str, *numbers: str) -> None:
    table.add_row(*(text(value) for value in (str(feature), name, *numbers)))


def first(rows: Sequence[Any], most: int) -> list[Any]:
    """The first rows of each feature."""
    count: dict[int, int] = {}
    kept = []
    for row in rows:
        count[row.feature] = count.get(row.feature, 0) + 1
        if count[row.feature] <= most:
            kept.append(row)
    return kept
