"""Two sections of an interpretation: the privileged directions of the head, and pruning them.

Each section is a record of numbers, with a function that measures it and one that writes it for the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from torchprobe.analysis.baseline import IMAGENET, SHIFTS, SUBSETS, Baseline, ImagenetClasses
from torchprobe.analysis.directions import Directions, centered, privileged_directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.pruning import FRACTIONS, accuracies, kept_directions
from torchprobe.analysis.resampling import LEVEL, band
from torchprobe.analysis.shares import share_interval
from torchprobe.common.messages import counted
from torchprobe.common.records import Key, Record
from torchprobe.encoders import Head
from torchprobe.rendering.curves import Series, curves
from torchprobe.rendering.page import Picture, Section, Table
from torchprobe.rendering.tables import Column, percent
from torchprobe.studies.interpret.accuracy import effective_robustness_along, with_classes_of
from torchprobe.studies.interpret.representation import SHOWN

SEEDS = 5
"""Random orders of a pruning curve, for its band. It is their range, which holds one more of them with a probability of 67 %."""

ORDERS = {"importance": "by importance", "sigma": "by singular value", "random": f"at random, {SEEDS} seeds"}
"""The orders of pruning, with their names in a figure."""


# -- directions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Direction(Record):
    """One singular direction of a head; see :class:`torchprobe.analysis.Directions`."""

    direction: int
    singular_value: float
    importance: float
    alignment: float
    gap: float
    importance_rank: int


@dataclass(frozen=True, eq=False)
class HeadDirections(Record):
    """The singular directions of the head, and of the head minus its mean over classes.

    Attributes:
        rank: of the head.
        images: number of images that importance is measured on.
        zero_vectors, invalid_vectors: numbers of images left out of these.
        alignment_by_chance: the mean alignment of random directions with the outlier features.
        outlier_features: number of outlier features.
        centered: the directions of the head minus its mean over classes; empty if that is zero.
        head: the directions of the head.
    """

    rank: int
    images: int
    zero_vectors: int
    invalid_vectors: int
    alignment_by_chance: float
    outlier_features: int
    centered: Annotated[list[Direction], Key("centred")]
    head: list[Direction]

    def rows(self) -> list[dict[str, Any]]:
        """One row per direction of either head."""
        both = {"head": self.head, "centred": self.centered}
        return [{"head": name, **row} for name, directions in both.items() for row in directions]


def by_importance(found: Sequence[Direction]) -> list[dict[str, Any]]:
    """Directions as rows, the most important first, with σ² and importance as shares of their sums over all directions."""
    energy, importance = math.fsum(one.singular_value**2 for one in found), math.fsum(one.importance for one in found)
    return [
        {**one, "energy_share": one.singular_value**2 / energy, "importance_share": one.importance / importance if importance else math.nan}
        for one in _by_importance(found)
    ]


DIRECTION_COLUMNS = (
    Column("direction", "direction", "index, in descending order of singular values", "index"),
    Column("singular_value", "σ", "singular value of the head"),
    Column("energy_share", "σ² share", "σ² as a share of Σ σ², the squared length of the head", "share"),
    Column("importance", "importance", "σ · mean |cos(v, h)| over images"),
    Column("importance_share", "of all", "importance as a share of its sum over all directions", "share"),
    Column("alignment", "alignment", "Σ v_j² over the outlier features: how far the direction lies along them", "share", optional=True),
    Column("gap", "gap", "distance to the nearest other σ, in units of the largest σ; near 1e-7 the direction is not determined"),
)


def measure_directions(head: Head, found: Directions, images: Embeddings, features: Sequence[int]) -> HeadDirections:
    """The singular directions of the head, their importance on ``images``, and their alignment with the outlier features."""
    without_mean = centered(head)
    has_rest = bool(without_mean.weight.any())  # otherwise all classes have the same row
    return HeadDirections(
        rank=found.rank,
        images=found.vectors,
        zero_vectors=found.zero_vectors,
        invalid_vectors=found.invalid_vectors,
        alignment_by_chance=len(features) / head.in_features,
        outlier_features=len(features),
        centered=_directions(privileged_directions(without_mean, images.h), features) if has_rest else [],
        head=_directions(found, features),
    )


def _directions(found: Directions, features: Sequence[int]) -> list[Direction]:
    columns = (found.singular_values, found.importance, found.alignment(list(features)), found.gaps(), found.order("importance").argsort())
    rows = zip(*(column[: found.rank].tolist() for column in columns), strict=True)
    return [Direction(i, *row) for i, row in enumerate(rows)]


def directions_section(found: HeadDirections) -> Section:
    """The singular directions of the head."""
    pictures = [
        Picture(partial(_spectrum, directions), f"Singular values and importance of the directions {title}", name)
        for directions, title, name in (
            (found.head, "of the head", "directions"),
            (found.centered, "of the head without the mean over classes", "directions-centered"),
        )
        if directions
    ]
    aligned = "There are no outlier features that a direction could lie along."
    if found.outlier_features:
        aligned = "The last figure shows how far each direction lies along the outlier features; the dotted line is chance."
        pictures.append(
            Picture(
                partial(_alignment, found.head, found.alignment_by_chance),
                "How far each direction lies along the outlier features",
                "alignment",
            )
        )
    heads = (
        "The first figure is for the head, the second for the head minus its mean over classes, which no decision depends on. "
        if found.centered
        else "All classes have the same row, so the head minus its mean over classes is zero. "
    )
    return Section(
        "Privileged directions",
        [
            "The head reads the representation along its singular directions. Importance is the singular value times the mean |cosine| "
            f"between the direction and the representations of {counted(found.images, 'image')}. Pruning and ablation are not evaluated on "
            "these images.",
            heads + aligned,
        ],
        pictures,
        [
            Table(
                by_importance(found.head)[:SHOWN],
                DIRECTION_COLUMNS,
                "The most important directions of the head; all are in directions.csv",
            )
        ],
    )


def _by_importance(found: Sequence[Direction]) -> list[Direction]:
    return sorted(found, key=lambda direction: direction.importance_rank)


def _spectrum(found: Sequence[Direction], width: float) -> Any:
    ordered = _by_importance(found)
    index = list(range(1, len(ordered) + 1))
    series = [
        Series("importance", index, _relative([one.importance for one in ordered])),
        Series("singular value", index, _relative([one.singular_value for one in ordered]), points=len(index) > 60),
    ]
    names = ("direction, in descending order of importance", "relative to the largest")
    return curves(series, *names, markers=len(index) <= 60, log=True, width=width, height=3.0)


def _alignment(found: Sequence[Direction], chance: float, width: float) -> Any:
    ordered = _by_importance(found)
    index = list(range(1, len(ordered) + 1))
    highest = max([chance, *(one.alignment for one in ordered)])
    return curves(
        [Series("", index, [one.alignment for one in ordered])],
        "direction, in descending order of importance",
        "share along outlier features",
        levels=[("chance", chance)],
        limits=(-0.02 * highest, min(1.02, 1.15 * highest)) if highest > 0 else (-0.02, 1.02),
        markers=len(index) <= 60,
        width=width,
        height=2.6,
    )


def _relative(values: Sequence[float]) -> list[float]:
    largest = max(values, default=1.0) or 1.0
    return [value / largest for value in values]


# -- pruning -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curve(Record):
    """One order of pruning: ``accuracy`` or ``effective_robustness`` at each fraction of the rank, and a band.

    The band of random orders is their range. That of an accuracy in one order is the 95 % interval over images, for each point alone;
    results of earlier versions have none.
    """

    keep: list[float]
    kept: list[int]
    accuracy: list[float] | None = None
    effective_robustness: list[float] | None = None
    low: list[float] | None = None
    high: list[float] | None = None

    def distinct(self) -> list[int]:
        """The points to draw: of fractions that keep as many directions, which a small rank has, only the last."""
        return [i for i, kept in enumerate(self.kept) if kept not in self.kept[i + 1 :]]

    def rows(self) -> list[dict[str, Any]]:
        """One row per fraction."""
        return [dict(zip(self, point, strict=True)) for point in zip(*self.values(), strict=True)]


@dataclass(frozen=True, eq=False)
class Pruning(Record):
    """Accuracy and effective robustness along pruning.

    Attributes:
        curves: set → order → accuracy.
        robustness: shift → order → effective robustness.
        images: set → number of images that were evaluated.
        seeds: number of random orders.
        imagenet_classes: see :func:`torchprobe.analysis.effective_robustness`.
    """

    curves: dict[str, dict[str, Curve]]
    robustness: dict[str, dict[str, Curve]]
    images: dict[str, int]
    seeds: int
    imagenet_classes: Annotated[ImagenetClasses, Key("x")]

    def rows(self) -> list[dict[str, Any]]:
        """One row per point of all curves."""
        return [
            {"images": name, "order": order, **point}
            for sets in (self.curves, self.robustness)
            for name, orders in sets.items()
            for order, curve in orders.items()
            for point in curve.rows()
        ]


def measure_pruning(
    head: Head, found: Directions, sets: Mapping[str, Embeddings], classes: ImagenetClasses, baseline: Baseline | None, seed: int
) -> Pruning:
    """Accuracy against the share of directions kept, in three orders, on every set; and effective robustness under the shifts.

    Effective robustness compares with the unshifted accuracy of the same pruned head, for ``classes`` = "subset" on the classes of the
    shift. For random orders it is computed for each draw.
    """
    measured, images = dict[str, dict[str, NDArray[np.float64]]](), dict[str, int]()
    for name, embeddings in sets.items():
        measured[name], images[name] = _curves(head, found, embeddings, seed)
    along: dict[str, dict[str, Curve]] = {}
    for name, shifted in sets.items():
        if name == IMAGENET or name not in (SHIFTS if baseline is None else baseline.shifts):
            continue
        base = measured[IMAGENET]
        if classes == "subset" and name in SUBSETS:
            subset = with_classes_of(sets[IMAGENET], shifted)
            if subset is None:
                continue
            base, _ = _curves(head, found, subset, seed)
        try:
            along[name] = {
                order: _curve(
                    found, "effective_robustness", effective_robustness_along(100 * mine, 100 * base[order], name, classes, baseline)
                )
                for order, mine in measured[name].items()
            }
        except ValueError:  # the baseline has no line for this shift; the section on effective robustness says so
            continue
    return Pruning(
        curves={
            name: {order: _curve(found, "accuracy", mine, images[name]) for order, mine in orders.items()}
            for name, orders in measured.items()
        },
        robustness=along,
        images=images,
        seeds=SEEDS,
        imagenet_classes=classes,
    )


def _curves(head: Head, found: Directions, embeddings: Embeddings, seed: int) -> tuple[dict[str, NDArray[np.float64]], int]:
    """Order → accuracy, (points,), or (draws, points) for random orders; from one pass over the embeddings. And the number of images that
    it is of: those whose class is among the classes to choose from."""
    random = [found.order("random", seed + draw) for draw in range(SEEDS)]
    kept = torch.tensor([kept_directions(found, fraction) for fraction in FRACTIONS])
    accuracy, images = accuracies(head, found, embeddings, [found.order("importance"), found.order("sigma"), *random], kept)
    return {"importance": accuracy[0].numpy(), "sigma": accuracy[1].numpy(), "random": accuracy[2:].numpy()}, images


def _curve(found: Directions, what: Literal["accuracy", "effective_robustness"], values: NDArray[np.float64], images: int = 0) -> Curve:
    """The points of one order with their intervals over ``images``, or the mean and the band of several draws."""
    curve = Curve(list(FRACTIONS), [kept_directions(found, fraction) for fraction in FRACTIONS])
    if values.ndim > 1:
        drawn = band(values)
        curve, values = replace(curve, low=drawn.low.tolist(), high=drawn.high.tolist()), values.mean(0)
    elif images:
        low, high = zip(*(share_interval(round(accuracy * images), images) for accuracy in values.tolist()), strict=True)
        curve = replace(curve, low=list(low), high=list(high))
    return replace(curve, accuracy=values.tolist()) if what == "accuracy" else replace(curve, effective_robustness=values.tolist())


def pruning_section(found: Pruning) -> Section:
    """Accuracy and effective robustness along pruning."""
    pictures = [
        Picture(partial(_accuracy_figure, orders), f"Accuracy on {name} against the share of directions kept", f"pruning-{name}")
        for name, orders in found.curves.items()
    ]
    pictures += [
        Picture(partial(_robustness_figure, orders), f"Effective robustness under {name} along pruning", f"pruning-robustness-{name}")
        for name, orders in found.robustness.items()
    ]
    figures = "The figures show the accuracy on " + ", ".join(f"{name} ({counted(found.images[name], 'image')})" for name in found.curves)
    if found.robustness:
        figures += f", then the effective robustness under {', '.join(found.robustness)}"
    paragraphs = [
        "The head with only some of its directions: the most important ones, those with the largest singular values, or equally many at "
        f"random (mean, and the range of {found.seeds} orders, which holds one more of them with a probability of "
        f"{percent(max(0.0, (found.seeds - 1) / (found.seeds + 1)))} at each point). Around the first is the {LEVEL:.0%} interval of "
        f"each accuracy over images (Wilson); pruning.csv has that of the second too. {figures}.",
        "If a curve stays flat, the pruned directions were not needed on these images. Importance was not measured on any of them, shifted "
        "or not, so the right end is not exactly the accuracy on all images.",
    ]
    if found.robustness:
        paragraphs.append(
            "Effective robustness compares the accuracy of each pruned head under the shift with the unshifted accuracy of the same pruned "
            "head. Far below the standard models, the line is only an extrapolation."
        )
    return Section("Pruning directions", paragraphs, pictures)


def _accuracy_figure(orders: Mapping[str, Curve], width: float) -> Any:
    series = [_series(order, curve, curve.accuracy, 100.0) for order, curve in orders.items()]
    return curves(series, "directions kept, % of the rank", "accuracy, %", width=width)


def _robustness_figure(orders: Mapping[str, Curve], width: float) -> Any:
    series = [_series(order, curve, curve.effective_robustness, 1.0) for order, curve in orders.items()]
    return curves(series, "directions kept, % of the rank", "effective robustness, points", levels=[("on the line", 0.0)], width=width)


def _series(order: str, curve: Curve, values: list[float] | None, scale: float) -> Series:
    ends = (None, None) if order == "sigma" else (curve.low, curve.high)  # three bands in one figure would hide each other
    at = curve.distinct()
    y, low, high = (None if points is None else [scale * points[i] for i in at] for points in (values, *ends))
    return Series(ORDERS[order], [100 * curve.keep[i] for i in at], y or [], low, high)
