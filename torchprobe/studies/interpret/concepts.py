"""One section of an interpretation: the concepts that units and directions encode, with controls and chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchprobe.analysis.concepts import DIRECTIONS, ROTATION, SHUFFLED, UNITS, concept_names, concept_sweep
from torchprobe.common.messages import counted
from torchprobe.common.records import Record
from torchprobe.dissection import Dissection
from torchprobe.rendering.curves import Series, curves
from torchprobe.rendering.page import Picture, Section, Table
from torchprobe.rendering.tables import Column

HEADLINE = 0.9
"""Threshold of average precision of the headline numbers (we chose it)."""


@dataclass(frozen=True, eq=False)
class SweepRow(Record):
    """The encoded concepts at one threshold of average precision; see :func:`torchprobe.analysis.concept_sweep`."""

    threshold: float
    unique: int
    encoding: int
    polysemanticity: float
    polysemanticity_encoding: float
    distribution: list[int]


@dataclass(frozen=True, eq=False)
class Detector(Record):
    """A unit or direction and the concept that it detects best; see :meth:`torchprobe.dissection.Dissection.best`.

    ``encodes`` is whether the pair counts as encoded at the headline threshold; None in results of earlier versions.
    """

    unit: int
    label: str
    category: str
    average_precision: float | None
    prevalence: float | None
    gain: float
    p_value: float | None
    encodes: bool | None = None


@dataclass(frozen=True, eq=False)
class Concepts(Record):
    """The concepts that each basis encodes.

    Attributes:
        images, labels: their numbers.
        threshold: the average precision of the headline numbers.
        sweep: basis → one row per threshold.
        names: basis → names of the concepts at the headline threshold.
        best: basis → the detectors with the largest gain.
    """

    images: int
    labels: int
    threshold: float
    sweep: dict[str, list[SweepRow]]
    names: dict[str, list[str]]
    best: dict[str, list[Detector]]

    def headline(self, basis: str) -> SweepRow:
        """The row of a basis at the headline threshold."""
        for row in self.sweep[basis]:
            if row.threshold == self.threshold:
                return row
        raise ValueError(f"the sweep of {basis} has no threshold {self.threshold:g}")

    def headline_rows(self) -> list[dict[str, Any]]:
        """One row per basis, at the headline threshold."""
        return [{"basis": basis, **self.headline(basis)} for basis in self.sweep]

    def rows(self) -> list[dict[str, Any]]:
        """One row per basis and threshold, without the distributions."""
        return [
            {"basis": basis, **{name: row[name] for name in row if name != "distribution"}}
            for basis, sweep in self.sweep.items()
            for row in sweep
        ]


CONCEPT_COLUMNS = (
    Column("basis", "basis", "the axes, the directions of the head, and the controls", "text"),
    Column("unique", "unique concepts", "concepts that at least one direction encodes", "count"),
    Column("encoding", "encoding", "directions with at least one concept", "count"),
    Column("polysemanticity", "polysemanticity", "concepts per direction, mean over all directions"),
    Column("polysemanticity_encoding", "per encoding one", "the same, mean over the directions with at least one concept"),
)

DETECTOR_COLUMNS = (
    Column("basis", "basis", "axes, or directions of the head", "text"),
    Column("unit", "index", "of the unit or direction", "index"),
    Column("label", "concept", "the concept with the largest gain", "text"),
    Column("encodes", "encoded", "whether the pair counts at the headline threshold; a large gain alone does not", "text", optional=True),
    Column("category", "category", "of the concept", "text"),
    Column("average_precision", "AP", "average precision"),
    Column("prevalence", "prevalence", "share of the annotated images that show the concept, about the AP of chance", "share"),
    Column("gain", "gain", "(AP − prevalence) / (1 − prevalence)"),
    Column("p_value", "p", "of this pair alone, uncorrected"),
)


def summarize_concepts(found: Mapping[str, Dissection]) -> Concepts:
    """The number of concepts that each basis encodes over a sweep of thresholds, and their names at the headline threshold."""
    units = found[UNITS]
    named = {name: one for name, one in found.items() if name in (UNITS, DIRECTIONS)}
    encoded = {name: one.encoded(HEADLINE) for name, one in named.items()}
    return Concepts(
        images=len(units.images),
        labels=len(units.labels),
        threshold=HEADLINE,
        sweep={name: [SweepRow(**row) for row in concept_sweep(one)] for name, one in found.items()},
        names={name: concept_names(one, HEADLINE) for name, one in named.items()},
        best={
            name: [
                Detector(
                    row.unit,
                    row.label,
                    row.category,
                    row.average_precision,
                    row.prevalence,
                    row.score,
                    row.p_value,
                    bool(encoded[name][row.unit, row.index]),
                )
                for row in one.best("gain")[:20]
                if row.index >= 0  # a unit may have a gain for no concept, as one that is constant
            ]
            for name, one in named.items()
        },
    )


def concepts_section(found: Concepts) -> Section:
    """Unique concepts and polysemanticity, with the nulls."""
    best = [
        {"basis": name, **row, "encodes": "" if row.encodes is None else "yes" if row.encodes else "no"}
        for name, detectors in found.best.items()
        for row in detectors[:10]
    ]
    return Section(
        "Concepts",
        [
            f"Every unit, and every direction of the head, ranks {counted(found.images, 'image')}. It encodes a concept if the average "
            "precision of that ranking reaches the threshold t, and is significant after correction for all pairs and both signs, and if "
            "its gain over the share of images that show the concept is at least 2t − 1. The figures show the number of distinct "
            "concepts, and of concepts per direction, as the threshold rises. Where a curve is flat, significance decides, "
            "not the threshold.",
            "A random rotation of the units shows whether the axes are special; shuffled labels show chance. In the paper, the count "
            "coincides with language supervision, and is not an indicator of robustness.",
        ],
        [
            Picture(partial(_sweep, found, "unique", "unique concepts"), "Unique concepts against the threshold", "concepts"),
            Picture(
                partial(_sweep, found, "polysemanticity", "concepts per direction"),
                "Concepts per direction against the threshold",
                "concepts-per-direction",
            ),
        ],
        [
            Table(found.headline_rows(), CONCEPT_COLUMNS, f"At AP ≥ {found.threshold:g}; the sweep is in concepts.csv"),
            Table(best, DETECTOR_COLUMNS, "The pairs with the largest gain"),
        ],
    )


def _sweep(found: Concepts, what: str, label: str, width: float) -> Any:
    names = [name for name in (UNITS, DIRECTIONS, ROTATION, SHUFFLED) if name in found.sweep]
    series = [
        Series(name, [row.threshold for row in found.sweep[name]], [getattr(row, what) for row in found.sweep[name]]) for name in names
    ]
    return curves(series, "threshold of average precision", label, width=width, height=3.0)
