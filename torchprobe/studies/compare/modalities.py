"""The gaps between the modalities of one model, among interpretations that are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch

from torchprobe.analysis.modality import SEPARATED, ModalityGap, modality_gap
from torchprobe.analysis.resampling import LEVEL
from torchprobe.common.records import Record
from torchprobe.rendering.curves import Series, curves
from torchprobe.rendering.page import Picture, Section, Table
from torchprobe.rendering.tables import Column, percent
from torchprobe.studies.compare.saved import Saved

MODALITY = "modality"
"""The fact about an interpretation that says what its rows stand for."""

SHOWN, DRAWN = 10, 100
"""Features of a gap in the table of the page, and in the figure."""


@dataclass(frozen=True, eq=False)
class Gap(Record):
    """The gap between two modalities of one model; see :class:`torchprobe.analysis.modality.ModalityGap`.

    Attributes:
        gap: the name of the row.
        a, b: the names of the two interpretations.
        pairs: number of common rows; 0 if they have none and all rows were taken.
        half, most: the smallest number of features that carry 50 % and 90 % of the squared length.
        outlier_share: the share of the squared length that the outlier features of either set carry.
    """

    gap: str
    a: str
    b: str
    pairs: int
    length: float
    low: float
    high: float
    by_chance: float
    relative: float
    paired_cosine: float
    unpaired_cosine: float
    within_a: float
    within_b: float
    features: int
    effective_features: float
    half: int
    most: int
    outlier_share: float
    left_out: int


@dataclass(frozen=True, eq=False)
class GapFeature(Record):
    """One feature of a gap. ``outlier`` says in which of the two interpretations it is an outlier feature."""

    gap: str
    feature: int
    share: float
    cumulative: float
    difference: float
    mean_a: float
    mean_b: float
    separation: float
    outlier: str


GAP_COLUMNS = (
    Column("gap", "gap", "the mean of the first set minus that of the second, vectors scaled to length 1", "text"),
    Column("length", "length", "of the difference of the means: 0 to 2"),
    Column("low", "from", f"{LEVEL:.0%} interval over rows, around the length without sampling noise: lower end"),
    Column("high", "to", "its upper end"),
    Column("by_chance", "by chance", "length if it made no difference which vector is in which set, root mean square"),
    Column("half", "50 % in", "number of features that carry half of the squared length", "count"),
    Column("most", "90 % in", "number of features that carry 90 % of it", "count"),
    Column("effective_features", "effective", "1 / Σ share²: the number of features if all carried the same"),
    Column("outlier_share", "outliers carry", "share of the squared length in the outlier features of either set", "share"),
    Column("relative", "relative", "distance of pairs / (distance within a set + distance of pairs), cosine distances"),
    Column("paired_cosine", "cos, pairs", "mean cosine of pairs"),
    Column("unpaired_cosine", "cos, others", "mean cosine of a vector of one set and another one of the other"),
    Column("within_a", "cos, first", "mean cosine of two vectors of the first set"),
    Column("within_b", "cos, second", "mean cosine of two vectors of the second set"),
    Column("pairs", "pairs", "number of common rows; 0: none, all rows were taken", "count"),
    Column("left_out", "left out", "rows of zeros, or with nan or inf", "count", optional=True),
)

FEATURE_COLUMNS = (
    Column("gap", "gap", "which gap", "text"),
    Column("feature", "feature", "index within the representation", "index"),
    Column("share", "share", "of the squared length of the gap", "share"),
    Column("cumulative", "with those before", "share of the squared length of this feature and those with a larger share", "share"),
    Column("mean_a", "mean, first", "mean of the feature over the first set"),
    Column("mean_b", "mean, second", "mean over the second set"),
    Column("separation", "tells apart", f"area under the ROC curve of this feature alone, ½ … 1; for the {SEPARATED} largest shares"),
    Column("outlier", "outlier of", "the set in which it is an outlier feature", "text"),
)


def modality(saved: Saved) -> str:
    """What the rows of an interpretation stand for; images if they were computed from images."""
    return saved.about(MODALITY) or ("" if saved.results.given else "image")


def gaps(saved: Sequence[Saved]) -> tuple[list[Gap], list[GapFeature]]:
    """The gaps between interpretations of different modalities that have the same backbone, pretraining and width."""
    rows: list[Gap] = []
    features: list[GapFeature] = []
    for one, other in combinations(saved, 2):
        named = modality(one), modality(other)
        same = all(one.about(key) == other.about(key) for key in ("backbone", "pretraining"))
        if not all(named) or named[0] == named[1] or not same or one.results.features != other.results.features:
            continue
        a, b = one.embeddings(), other.embeddings()
        if a is None or b is None:
            continue
        where = {name: i for i, name in enumerate(b.ids)}
        common = torch.tensor([(i, where[name]) for i, name in enumerate(a.ids) if name in where], dtype=torch.int64)
        paired = len(common) > 1
        if paired and a.ids != b.ids:
            a, b = a.select(common[:, 0]), b.select(common[:, 1])
        try:
            found = modality_gap(a, b, paired)
        except ValueError:  # fewer than two vectors that have a direction
            continue
        gap = _gap(found, one, other)
        rows.append(gap)
        features += _features(found, gap.gap, one, other)
    return rows, features


def _gap(found: ModalityGap, one: Saved, other: Saved) -> Gap:
    outliers = sorted({*one.results.outliers.indices, *other.results.outliers.indices})
    return Gap(
        gap=f"{one.name} − {other.name}",
        a=one.name,
        b=other.name,
        pairs=found.pairs,
        length=found.length,
        low=found.interval[0],
        high=found.interval[1],
        by_chance=found.by_chance,
        relative=found.relative,
        paired_cosine=found.paired_cosine,
        unpaired_cosine=found.unpaired_cosine,
        within_a=found.within[0],
        within_b=found.within[1],
        features=len(found.share),
        effective_features=found.effective_features,
        half=found.carrying(0.5),
        most=found.carrying(0.9),
        outlier_share=math.fsum(found.share[outliers].tolist()),
        left_out=found.left_out,
    )


def _features(found: ModalityGap, gap: str, one: Saved, other: Saved) -> list[GapFeature]:
    order = found.order()
    names = {0: "", 1: one.name, 2: other.name, 3: "both"}
    outlier = [{*one.results.outliers.indices}, {*other.results.outliers.indices}]
    cumulative = found.share[order].cumsum(0).tolist()
    rows = []
    for feature, so_far in zip(order.tolist(), cumulative, strict=True):
        share, difference, separation = (float(each[feature]) for each in (found.share, found.difference, found.separation))
        mean_a, mean_b = found.means[:, feature].tolist()
        where = names[(feature in outlier[0]) + 2 * (feature in outlier[1])]
        rows.append(GapFeature(gap, feature, share, so_far, difference, mean_a, mean_b, separation, where))
    return rows


def modality_sections(rows: Sequence[Gap], features: Sequence[GapFeature]) -> list[Section]:
    """The gaps, and the features that carry them; empty without a gap."""
    if not rows:
        return []
    text = (
        "Two modalities of one model share a space, but do not lie in the same place of it. All vectors are scaled to length 1; the gap is "
        "the difference of their means (Liang et al. 2022). The figure shows how many features carry it: the share of its squared length "
        "that the features with the largest shares hold together. An untrained model has a gap too; compare which features carry it."
    )
    carried = [
        f"{row.gap}: {row.half} of {row.features} features carry half of the gap, {row.most} carry 90 %; the outlier features of either "
        f"set carry {percent(row.outlier_share)}."
        for row in rows
    ]
    shown = [one for row in rows for one in [feature for feature in features if feature.gap == row.gap][:SHOWN]]
    return [
        Section(
            "Gaps between modalities",
            [text, *carried],
            [Picture(partial(_figure, rows, features), "Share of the gap that the largest features carry", "gaps")],
            [
                Table(rows, GAP_COLUMNS, "Each gap with the values to compare it with"),
                Table(shown, FEATURE_COLUMNS, f"The {SHOWN} features with the largest shares; all are in gap_features.csv"),
            ],
        )
    ]


def _figure(rows: Sequence[Gap], features: Sequence[GapFeature], width: float) -> Any:
    series = []
    for row in rows[:10]:
        carried = [100 * one.cumulative for one in features if one.gap == row.gap][:DRAWN]
        series.append(Series(row.gap, list(range(1, len(carried) + 1)), carried))
    names = ("features, in descending order of their share", "share of the squared gap, %")
    return curves(series, *names, markers=False, limits=(0, 102), width=width)
