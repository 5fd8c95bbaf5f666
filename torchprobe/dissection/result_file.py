"""Reads result files: the CSV of Network Dissection, and that of :meth:`torchprobe.dissection.Dissection.to_csv`.

Such a file holds the best label of each unit in each category. The other pairs, the images and the thresholds are unknown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from torchprobe.common.csv_files import read_rows
from torchprobe.datasets.broden import Label
from torchprobe.dissection import summaries
from torchprobe.dissection.average_precision import Support
from torchprobe.dissection.csv_tables import AP_COLUMNS, IOU_COLUMNS, UNIT_COLUMNS, write_csv
from torchprobe.dissection.layer_tables import TABLES, same
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.scores import LayerScores, UnitConcept

MAX_PAIRS = 1 << 26
"""The largest file, and the most pairs of a unit and a label."""

_UNKNOWN = -1
_NO_LABEL = frozenset({"", "-", "unlabeled"})  # what a file says where every IoU of a category is 0
_ROUNDED = 1e-5  # scores may be rounded to five places


@dataclass(eq=False, repr=False)
class ResultFile(LayerScores):
    """What a result file says about a layer.

    The tables have nan for the pairs that the file does not hold; their counts are −1. ``best``, ``rows``, ``unique_detectors`` and
    ``to_csv`` give what they give for the dissection that the file was written from. Methods that need other pairs or the images raise
    ``ValueError``; so does ``images``. ``thresholds`` is None.

    Labels that were not given have the number, frequency and coverage −1.

    Attributes:
        best_by: the score whose best labels the file holds: "iou", "ap" or "gain".
    """

    best_by: str = "iou"

    def table(self, score: str) -> Tensor:
        """The table of the score of the file, (U, L); nan where the file says nothing.

        Raises:
            ValueError: the file was written for another score.
        """
        if score in TABLES and score != self.best_by:
            self._unknown(f"the table by {score}")
        return super().table(score)

    def rows(self, score: str | None = None) -> list[dict[str, Any]]:
        """:meth:`best` as dicts, one for each unit; ``score``: default that of the file."""
        return super().rows(score or self.best_by)

    def best(self, score: str | None = None) -> list[UnitConcept]:
        """The best label of every unit, best unit first; ``score``: default that of the file."""
        return super().best(score or self.best_by)

    def to_csv(self, path: str | os.PathLike[str], score: str | None = None) -> Path:
        """Writes the file again; see :meth:`torchprobe.dissection.Dissection.to_csv`."""
        return write_csv(self, path, score or self.best_by)

    def unique_detectors(self, rule: str = "paper", threshold: float = summaries.THRESHOLD) -> summaries.Detectors:
        """Distinct concepts that units detect by IoU; see :func:`unique_detectors`. The best labels decide, so it is exact."""
        return summaries.unique_detectors(self.table("iou").nan_to_num(nan=0), self.category, self.categories, rule, threshold)

    def summary(self, thresholds: Sequence[float] = ()) -> dict[str, Any]:
        """What the file says as plain numbers: ``layer``, ``units``, ``metadata``, the 20 ``best`` units, and for IoU ``detectors`` by both
        rules. ``images`` and ``labels`` are None, unknown."""
        found: dict[str, Any] = {"layer": self.layer, "units": self.units, "images": None, "labels": None, "metadata": self.metadata}
        if self.best_by == "iou":
            found["detectors"] = {rule: self.unique_detectors(rule)._asdict() for rule in summaries.RULES}
        return {**found, "best": self.rows()[:20]}

    @property  # type: ignore[misc]
    def images(self) -> Tensor:
        """Unknown: an error."""
        self._unknown("which images were read")

    @images.setter
    def images(self, value: Tensor) -> None:
        """Leaves it unknown; the class above sets it."""

    @property
    def never_active(self) -> Tensor | None:
        """Unknown: None."""
        return None

    def adjusted_p_values(self, method: str = "holm") -> NoReturn:
        self._unknown("the correction over all pairs")

    def encoded(self, *args: Any, **options: Any) -> NoReturn:
        self._unknown("the correction over all pairs")

    def concepts(self, *args: Any, **options: Any) -> NoReturn:
        self._unknown("a list of concepts with all their units")

    def permutation_test(self, permutations: int = 99, seed: int = 0) -> NoReturn:
        self._unknown("a permutation test")

    def merge(self, other: LayerScores) -> NoReturn:
        self._unknown("a merge")

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        self._unknown("a file of everything")

    def report(self, *args: Any, **options: Any) -> NoReturn:
        self._unknown("a page")

    def _unknown(self, what: str) -> NoReturn:
        source = self.metadata.get("source", "a result file")
        held = f"only the best label of each unit and category by {self.best_by}, and no images"
        raise ValueError(f"layer {self.layer!r}: {source} holds {held}, so that {what} is unknown: use the dissection (Dissection.load)")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ResultFile):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "images")

    def __repr__(self) -> str:
        return f"ResultFile({self.layer!r}: {self.units} units, {len(self.labels)} labels, best by {self.best_by})"


def read_csv(path: str | os.PathLike[str], layer: str | None = None, labels: Sequence[Label] | None = None) -> ResultFile:
    """See :meth:`torchprobe.dissection.Dissection.from_csv`."""
    lines = _Lines(Path(path))
    units = [line.count("unit") for line in lines.lines]
    if sorted(units) != list(range(1, len(units) + 1)):
        seen: set[int] = set()
        twice = [unit for unit in units if unit in seen or seen.add(unit)]  # type: ignore[func-returns-value]
        missing = next(unit for unit in range(1, len(units) + 2) if unit not in seen)  # not up to max(units)
        what = f"unit {twice[0]} has two lines" if twice else f"unit {missing} is missing"
        raise ValueError(f"{lines.path}: {what}; a result file has one line for each unit, counted from 1")
    found = _labels_of(lines, labels)
    if len(units) * len(found.labels) > MAX_PAIRS:
        raise ValueError(f"{lines.path}: {len(units)} units and {len(found.labels)} labels are more than {MAX_PAIRS} pairs")
    result = ResultFile(
        layer=lines.path.stem if layer is None else layer,
        labels=found.labels,
        categories=tuple(lines.categories),
        category=torch.tensor(found.category, dtype=torch.int64),
        units=len(units),
        images=torch.empty(0, dtype=torch.int64),
        metadata={"source": lines.path.name},
    )
    if lines.columns == IOU_COLUMNS:
        result.counts = _counts(lines, found)
        _check_best(lines, "iou")
    else:
        result.average_precision, result.p_values, result.support = _ranked(lines, found)
        result.best_by = _check_best(lines, "ap", "gain")
    return result


class _Line(NamedTuple):
    """One line of a file. ``cells``: column → text."""

    path: Path
    number: int
    cells: Mapping[str, str]

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} line {self.number}: {what}")

    def value(self, column: str) -> float:
        """A number ≥ 0."""
        try:
            value = float(self.cells[column])
        except ValueError:
            value = math.nan
        if not 0 <= value < 2.0**53:
            raise self.error(f"{column} is {self.cells[column][:40]!r}; expected a number ≥ 0")
        return value

    def count(self, column: str) -> int:
        """A whole number; the original writes some of them with a decimal point."""
        if not (value := self.value(column)).is_integer():
            raise self.error(f"{column} is {self.cells[column][:40]!r}; expected a whole number ≥ 0")
        return int(value)

    def share(self, column: str) -> float:
        if (value := self.value(column)) > 1:
            raise self.error(f"{column} is {self.cells[column][:40]!r}; expected a number from 0 to 1")
        return value

    def label(self, category: str, score: str) -> str | None:
        """The best label in a category; None if there is none, because every score is 0."""
        name = self.cells[f"{category}-label"]
        return None if name in _NO_LABEL and not self.value(f"{category}-{score}") else name


class _Lines:
    """The lines of a file, whose columns are right. ``columns``: those of each category."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            lines = read_rows(path)
            _, header = next(lines, (1, []))
            self.categories, self.columns = self._layout(header)
            self.lines = []
            for number, values in lines:
                if len(values) != len(header):
                    raise ValueError(f"{path} line {number}: {len(values)} fields; the header has {len(header)}")
                self.lines.append(_Line(path, number, dict(zip(header, values, strict=True))))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); expected a result file of Network Dissection") from error
        if not self.lines:
            raise ValueError(f"{path} has no line for any unit")

    def _layout(self, header: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """The categories, and the columns that each has."""
        if missing := [name for name in UNIT_COLUMNS if name not in header]:
            raise ValueError(
                f"{self.path}: no column {', '.join(missing)}; a result file has {', '.join(UNIT_COLUMNS)}, then the categories"
            )
        if len(set(header)) < len(header):
            raise ValueError(f"{self.path}: a column occurs twice")
        for columns, mark in ((IOU_COLUMNS, "-iou"), (AP_COLUMNS, "-ap")):
            if categories := [name.removesuffix(mark) for name in header if name.endswith(mark)]:
                if absent := [f"{name}-{column}" for name in categories for column in columns if f"{name}-{column}" not in header]:
                    raise ValueError(f"{self.path}: no column {absent[0]}; each category has {', '.join(columns)}")
                return categories, columns
        raise ValueError(
            f"{self.path}: no column ends in -iou or -ap, so it holds no category; expected a result file of Network Dissection"
        )


class _Labels(NamedTuple):
    """``category``: of each label. ``column``: (category, name) → its column."""

    labels: tuple[Label, ...]
    category: list[int]
    column: dict[tuple[str, str], int]


def _labels_of(lines: _Lines, given: Sequence[Label] | None) -> _Labels:
    """The labels given, or those of the file by category and name."""
    score = lines.columns[-1] if lines.columns == IOU_COLUMNS else "ap"
    pairs = ((line, category, line.label(category, score)) for line in lines.lines for category in lines.categories)
    held = {(category, name): line for line, category, name in pairs if name is not None}
    own = [
        Label(_UNKNOWN, name, category, (category,), _UNKNOWN, float(_UNKNOWN))
        for category, name in sorted(held, key=lambda key: (lines.categories.index(key[0]), key[1]))
    ]
    # Some published files have a label without a name, with pixels of its own.
    given = own if given is None else [*given, *(label for label in own if not label.name)]
    if strange := [label for label in given if label.category not in lines.categories]:
        raise ValueError(
            f"{lines.path} has no category {strange[0].category!r}, to which the label {strange[0].name!r} belongs; it has "
            f"{', '.join(lines.categories)}: give the labels of these, Broden(…, categories=…).labels"
        )
    column = {(label.category, label.name): at for at, label in enumerate(given)}
    for (category, name), line in held.items():
        if (category, name) not in column:
            raise line.error(f"the label {name!r} of {category} is not among those given: take the labels of the same data set")
    return _Labels(tuple(given), [lines.categories.index(label.category) for label in given], column)


def _counts(lines: _Lines, labels: _Labels) -> Counts:
    shape = len(lines.lines), len(labels.labels)
    counts = Counts(*(torch.full(size, _UNKNOWN, dtype=torch.int64) for size in (shape, shape, shape[1:])))
    for line in lines.lines:
        unit = line.count("unit") - 1
        for name in lines.categories:
            if (label := line.label(name, "iou")) is None:
                continue
            at = labels.column[name, label]
            truth, active, common = (line.count(f"{name}-{column}") for column in IOU_COLUMNS[1:4])
            iou, union = line.value(f"{name}-iou"), truth + active - common
            if union < 0 or abs(common / max(union, 1) - iou) > _ROUNDED:
                raise line.error(f"{name}-iou is {iou:g}, but its counts give {common} / ({truth} + {active} − {common})")
            counts.intersection[unit, at], counts.activation[unit, at] = common, active
            _same_everywhere(counts.truth, at, truth, line, f"{name}-truth")
    return counts


def _ranked(lines: _Lines, labels: _Labels) -> tuple[Tensor, Tensor, Support]:
    """Average precision, p-values, and among how many images each label was ranked."""
    shape = len(lines.lines), len(labels.labels)
    ap, p = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    support = Support(*(torch.full(shape[1:], _UNKNOWN, dtype=torch.int64) for _ in range(2)))
    for line in lines.lines:
        unit = line.count("unit") - 1
        for name in lines.categories:
            if (label := line.label(name, "ap")) is None:
                continue
            at = labels.column[name, label]
            images, positives = line.count(f"{name}-images"), line.count(f"{name}-positives")
            prevalence = line.share(f"{name}-prevalence")
            if not 0 < positives <= images or abs(positives / images - prevalence) > _ROUNDED:
                raise line.error(f"{name}-prevalence is {prevalence:g}, but {positives} of {images} images show {label!r}")
            ap[unit, at], p[unit, at] = line.share(f"{name}-ap"), line.share(f"{name}-p")
            _same_everywhere(support.images, at, images, line, f"{name}-images")
            _same_everywhere(support.positives, at, positives, line, f"{name}-positives")
    return ap, p, support


def _same_everywhere(numbers: Tensor, at: int, number: int, line: _Line, column: str) -> None:
    """Notes a number of a label, which is the same in every line."""
    if (before := int(numbers[at])) not in (_UNKNOWN, number):
        raise line.error(f"{column} is {number}, but {before} in a line before for the same label")
    numbers[at] = number


def _check_best(lines: _Lines, *scores: str) -> str:
    """Which of the scores the best label of each unit has, according to its category; the first that fits all lines.

    Raises:
        ValueError: none does.
    """
    wrong = [next((line for line in lines.lines if not _fits(lines, line, score)), None) for score in scores]
    if wrong[0] is not None and None not in wrong:
        category, label, best = wrong[0].cells["category"], wrong[0].cells["label"], wrong[0].value("score")
        raise wrong[0].error(f"the best label is {label!r} of {category!r} with {best:g}, but the columns of {category} do not say so")
    return scores[wrong.index(None)]


def _fits(lines: _Lines, line: _Line, score: str) -> bool:
    """Whether the best label of a unit is that of its category, with the same score."""
    category, label, best = line.cells["category"], line.cells["label"], line.value("score")
    if best == 0 and label in _NO_LABEL:
        return True
    if category not in lines.categories:
        raise line.error(f"the category {category!r} has no columns; there are {', '.join(lines.categories)}")
    value = line.value(f"{category}-{'iou' if score == 'iou' else 'ap'}")
    if score == "gain":
        prevalence = line.share(f"{category}-prevalence")
        value = (value - prevalence) / (1 - prevalence) if prevalence < 1 else math.nan
    return line.cells[f"{category}-label"] == label and abs(value - best) <= _ROUNDED
