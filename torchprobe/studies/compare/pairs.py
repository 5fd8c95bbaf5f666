"""The difference of two encoders, with an interval where images can be paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import nn

from torchprobe.analysis.resampling import bootstrap_interval
from torchprobe.analysis.robustness_intervals import paired_robustness
from torchprobe.analysis.shares import paired_difference
from torchprobe.analysis.similarity import MIN_BATCH, cka
from torchprobe.common.records import Record
from torchprobe.studies.compare.saved import Saved

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True, eq=False)
class Difference(Record):
    """One encoder minus another. A number that is missing for one of them is nan, or None for a count.

    Attributes:
        pair: the name of the row.
        a, b: the names of the encoders.
        backbone: of both; empty if unknown.
        images: number of common images with a vector kurtosis.
        kurtosis, kurtosis_low, kurtosis_high: mean over the common images, and its bootstrap interval.
        accuracy, accuracy_low, accuracy_high: on the common unshifted images, and Bonett and Price's interval, see
            :func:`torchprobe.analysis.paired_difference`.
        robustness: mean effective robustness over the common shifts.
        robustness_low, robustness_high: its interval, see :func:`torchprobe.analysis.robustness_intervals.paired_robustness`; nan unless
            both have seen the same images, and are compared with the same line on all classes.
        remark: what is unlike in the two, apart from their weights; empty if nothing is.
        shifts: number of common shifts.
        concepts, polysemanticity, outlier_features: of the units.
        shared_concepts: number of concepts that both encode.
        cka: see :func:`representation_cka`.
    """

    pair: str
    a: str
    b: str
    backbone: str
    images: int
    kurtosis: float
    kurtosis_low: float
    kurtosis_high: float
    accuracy_low: float
    accuracy_high: float
    shifts: int
    accuracy: float
    robustness: float
    concepts: int | None
    polysemanticity: float
    outlier_features: int
    shared_concepts: int | None
    cka: float
    robustness_low: float = math.nan
    robustness_high: float = math.nan
    remark: str = ""


def pairs_within(saved: Sequence[Saved]) -> list[tuple[Saved, Saved]]:
    """Pairs with the same backbone: a zero-shot encoder with every other, the zero-shot encoder first; without roles, all pairs.

    Encoders without a backbone, which were interpreted one by one, count as encoders of one backbone.
    """
    found = []
    for one, other in combinations(saved, 2):
        if one.about("backbone") != other.about("backbone"):
            continue
        roles = (one.about("role"), other.about("role"))
        if ZERO_SHOT in roles or not any(roles):
            found.append((other, one) if roles[1] == ZERO_SHOT and roles[0] != ZERO_SHOT else (one, other))
    return found


def pair_name(one: Saved, other: Saved) -> str:
    """The name of a pair."""
    return f"{one.name} → {other.name}"


def difference(one: Saved, other: Saved, seed: int = 0) -> Difference:
    """``one`` minus ``other``.

    The intervals are over the common images: a bootstrap of the differences for kurtosis, paired intervals for accuracy and robustness.
    They are nan for fewer than 20 images.
    """
    mine, theirs = one.summary(), other.summary()
    shared = [name for name in one.kurtosis if name in other.kurtosis]
    each = np.array([one.kurtosis[name] - other.kurtosis[name] for name in shared], dtype=np.float64)
    known = each[np.isfinite(each)]
    kurtosis_low, kurtosis_high = bootstrap_interval(known, seed)
    accuracy, accuracy_low, accuracy_high = paired_difference(*_paired(one.correct, other.correct))
    if not one.correct or not other.correct:  # nothing is known of single images
        accuracy = mine.accuracy - theirs.accuracy
    robustness, their_robustness, shifts = common_robustness(one, other)
    robustness_low, robustness_high = _robustness_interval(one, other)
    concepts, their_concepts = one.concepts(), other.concepts()
    return Difference(
        pair=f"{one.name} − {other.name}",
        a=one.name,
        b=other.name,
        backbone=one.about("backbone"),
        images=len(known),
        kurtosis=float(known.mean()) if known.size else math.nan,
        kurtosis_low=kurtosis_low,
        kurtosis_high=kurtosis_high,
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        shifts=shifts,
        accuracy=accuracy,
        robustness=robustness - their_robustness,
        concepts=None if mine.concepts is None or theirs.concepts is None else mine.concepts - theirs.concepts,
        polysemanticity=mine.polysemanticity - theirs.polysemanticity,
        outlier_features=mine.outlier_features - theirs.outlier_features,
        shared_concepts=None if concepts is None or their_concepts is None else len(concepts & their_concepts),
        cka=representation_cka(one, other),
        robustness_low=robustness_low,
        robustness_high=robustness_high,
        remark=unlike(one, other),
    )


def unlike(one: Saved, other: Saved) -> str:
    """What is unlike in two encoders apart from their weights, so that their numbers differ for that reason too; empty if nothing is."""
    mine, theirs = one.results, other.results
    found = []
    if mine.features != theirs.features:
        found.append(f"{mine.features} features against {theirs.features}: the ceiling of the kurtosis and the number of units differ")
    if mine.kurtosis.nonnegative != theirs.kurtosis.nonnegative:
        found.append("only one is never negative, as after a ReLU, which alone raises the kurtosis to 5 or more")
    found += [
        f"{key} {one.about(key) or 'unknown'} against {other.about(key) or 'unknown'}"
        for key in ("modality", "layer", "position")
        if one.about(key) != other.about(key)
    ]
    if one.kurtosis.keys() != other.kurtosis.keys():
        shared = len(one.kurtosis.keys() & other.kurtosis.keys())
        found.append(f"other images: {shared} of {len(one.kurtosis)} and {len(other.kurtosis)} are common")
    found += _unlike_shifts(one, other)
    if mine.outliers.rule != theirs.outliers.rule:
        found.append(f"outlier features by the {mine.outliers.rule} rule against the {theirs.outliers.rule} one")
    if not one.about("backbone"):
        found.append("the backbone is unknown (--backbone)")
    return "; ".join(found)


def _unlike_shifts(one: Saved, other: Saved) -> list[str]:
    """What is unlike in the two effective robustnesses."""
    mine, theirs = one.results.robustness, other.results.robustness
    if mine is None or theirs is None:
        return []
    found = []
    if mine.accuracies != theirs.accuracies:
        found.append(f"accuracies under shift {mine.accuracies} against {theirs.accuracies}")
    lines, their_lines = ({row.shift: row.fit() for row in each.rows} for each in (mine, theirs))
    if any(lines[shift] != their_lines[shift] for shift in mine.by_shift() if shift in theirs.by_shift()):
        found.append("the effective robustness is from other lines of standard models")
    for shift, images in one.correct_under_shift.items():
        if (others := other.correct_under_shift.get(shift)) and images.keys() != others.keys():
            shared = len(images.keys() & others.keys())
            found.append(f"other images under {shift}: {shared} of {len(images)} and {len(others)} are common")
    return found


def _paired(one: dict[str, bool], other: dict[str, bool]) -> tuple[list[bool], list[bool]]:
    """Whether each of the two is right, on their common images."""
    common = [name for name in one if name in other]
    return [one[name] for name in common], [other[name] for name in common]


def _robustness_interval(one: Saved, other: Saved) -> tuple[float, float]:
    """The interval of the difference in mean effective robustness over the common shifts; nan if the two are not measured alike."""
    mine, theirs = one.results.robustness, other.results.robustness
    if mine is None or theirs is None or one.correct.keys() != other.correct.keys():
        return math.nan, math.nan
    rows = {row.shift: row for row in theirs.rows}
    shifts = [shift for shift in mine.by_shift() if shift in theirs.by_shift()]
    common = [(row.fit(), rows[row.shift].fit()) for row in mine.rows if row.shift in shifts]
    for fit, their_fit in common:
        right, their_right = (each.correct_under_shift.get(fit.shift, {}) for each in (one, other))
        if fit != their_fit or math.isnan(fit.residual_std) or not right or right.keys() != their_right.keys():
            return math.nan, math.nan
        if fit.imagenet_classes != "full" or not mine.accuracies == theirs.accuracies == "measured":
            return math.nan, math.nan
    pairs = [_paired(one.correct_under_shift[fit.shift], other.correct_under_shift[fit.shift]) for fit, _ in common]
    correlation = None
    if mine.correlation is not None:
        at = [list(mine.by_shift()).index(shift) for shift in shifts]
        correlation = np.array(mine.correlation)[np.ix_(at, at)]
    return paired_robustness([fit for fit, _ in common], pairs, _paired(one.correct, other.correct), correlation=correlation)[1:]


def common_robustness(one: Saved, other: Saved) -> tuple[float, float, int]:
    """The mean effective robustness of each encoder over the common shifts, nan without any, and the number of these shifts."""
    mine, theirs = one.robustness(), other.robustness()
    shared = [shift for shift in mine if shift in theirs]
    if not shared:
        return math.nan, math.nan, 0
    first, second = (math.fsum(values[shift] for shift in shared) / len(shared) for values in (mine, theirs))
    return first, second, len(shared)


def representation_cka(one: Saved, other: Saved, batch: int = 256) -> float:
    """Linear CKA of the two representations over the common images; nan without representations or with fewer than four such images.

    See :func:`torchprobe.analysis.cka`. Batches have equal sizes, so the images that do not fill a batch are left out, unless there is only
    one batch.
    """
    a, b = one.embeddings(), other.embeddings()
    if a is None or b is None:
        return math.nan
    where = {name: i for i, name in enumerate(b.ids)}
    common = torch.tensor([(i, where[name]) for i, name in enumerate(a.ids) if name in where], dtype=torch.int64)
    if len(common) < MIN_BATCH:
        return math.nan
    whole = common[: max(batch, len(common) // batch * batch)]
    return float(cka(nn.Identity(), nn.Identity(), [(a.h[rows[:, 0]], b.h[rows[:, 1]]) for rows in whole.split(batch)], "", "")[0, 0])
