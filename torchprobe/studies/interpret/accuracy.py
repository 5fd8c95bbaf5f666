"""Two sections of an interpretation: the accuracy of the head on every set, and effective robustness under the shifts.

Each section is a record of numbers, with a function that measures it and one that writes it for the page.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from torchprobe.analysis.baseline import IMAGENET, MEAN, SHIFTS, SUBSETS, Baseline, Fit, ImagenetClasses
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import Evaluation, evaluate
from torchprobe.analysis.resampling import LEVEL
from torchprobe.analysis.robustness import effective_robustness, robustness
from torchprobe.analysis.robustness_intervals import SIZES
from torchprobe.analysis.shares import share_interval
from torchprobe.common.records import Key, Record, decode
from torchprobe.encoders import Head
from torchprobe.rendering.page import Picture, Section, Table
from torchprobe.rendering.tables import Column, number

# -- accuracy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Accuracy(Record):
    """The accuracy of the head on one set; see :class:`torchprobe.analysis.Evaluation`. ``interval`` is Wilson's, over images."""

    accuracy: float
    top5: float
    interval: tuple[float, float]
    images: int
    classes: int
    unlabeled: Annotated[int, Key("unlabelled")]
    outside: int
    nonfinite: int

    def row(self, name: str) -> dict[str, Any]:
        """The row of the set in a table."""
        low, high = self["interval"]
        return {"set": name, **{column: self[column] for column in self if column != "interval"}, "low": low, "high": high}


ACCURACY_COLUMNS = (
    Column("set", "images", "which images; “imagenet” are the unshifted images, also if they are not ImageNet's", "text"),
    Column("accuracy", "accuracy", "share of the images whose class has the largest logit", "share"),
    Column("low", "from", f"{LEVEL:.0%} interval over images: lower end", "share"),
    Column("high", "to", f"{LEVEL:.0%} interval over images: upper end", "share"),
    Column("top5", "top 5", "share of the images whose class is among the five largest logits", "share"),
    Column("images", "n", "labeled images", "count"),
    Column("classes", "classes", "rows of the head to choose from", "count"),
    Column("unlabelled", "unlabeled", "images left out because their class is unknown", "count", optional=True),
    Column("outside", "outside", "images of other classes, left out", "count", optional=True),
    Column("nonfinite", "nonfinite", "images with nan or inf in their representation; they count as wrong", "count", optional=True),
)


def measure_accuracy(head: Head, sets: Mapping[str, Embeddings]) -> dict[str, Any]:
    """Set → :class:`Accuracy`. For a shift with only some of the classes, also the accuracy on the unshifted images of these classes.

    ``right`` is whether the head is correct on each unshifted image; None if its class is unknown. ``right_under_shift`` is the same for
    each other set.
    """
    images = sets[IMAGENET]
    evaluations = {name: evaluate(head, embeddings) for name, embeddings in sets.items()}
    found: dict[str, Any] = {name: _accuracy(one) for name, one in evaluations.items()}
    found["right"] = _correct_by_image(evaluations[IMAGENET], len(images))
    others = {name: one for name, one in evaluations.items() if name != IMAGENET}
    found["right_under_shift"] = {name: _correct_by_image(one, len(sets[name])) for name, one in others.items()}
    for name, embeddings in sets.items():
        if (subset := with_classes_of(images, embeddings)) is not None and name != IMAGENET:
            found[SUBSETS.get(name, f"{IMAGENET}_on_{name}_classes")] = _accuracy(evaluate(head, subset))
    return found


def with_classes_of(images: Embeddings, shifted: Embeddings) -> Embeddings | None:
    """The unshifted images with the classes of a shift to choose from; rows that stand for one class do so here too, as in ObjectNet.

    None if the shift has all classes, or none of the images has one of its classes.
    """
    if shifted.classes is None or not bool(torch.isin(images.y, torch.tensor(shifted.classes)).any()):
        return None
    return replace(images, classes=shifted.classes, groups=shifted.groups)


def _accuracy(result: Evaluation) -> Accuracy:
    return Accuracy(
        accuracy=result.accuracy,
        top5=result.top5,
        interval=share_interval(int(result.correct.sum()), result.n),
        images=result.n,
        classes=len(result.classes),
        unlabeled=result.unlabeled,
        outside=result.outside,
        nonfinite=result.nonfinite,
    )


def _correct_by_image(result: Evaluation, images: int) -> list[bool | None]:
    each: list[bool | None] = [None] * images
    for i, correct in zip(result.rows.tolist(), result.correct.tolist(), strict=True):
        each[i] = correct
    return each


def accuracy_rows(found: Mapping[str, Accuracy]) -> list[dict[str, Any]]:
    """One row per set."""
    return [one.row(name) for name, one in found.items()]


def accuracy_section(found: Mapping[str, Accuracy]) -> Section:
    """The accuracy on every set."""
    text = (
        "The share of images whose class has the largest logit, with an interval over images. A shift with only some of the classes is "
        "evaluated on these. The accuracy on the unshifted images of the same classes has its own row."
    )
    return Section("Accuracy", [text], tables=[Table(accuracy_rows(found), ACCURACY_COLUMNS)])


# -- effective robustness ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShiftRow(Record):
    """One shift; see :class:`torchprobe.analysis.robustness.RobustnessRow`.

    In results of earlier versions ``low`` and ``high`` do not include the sampling of images, and ``images`` is 0.
    """

    shift: str
    accuracy: float
    imagenet: float
    predicted: float
    effective_robustness: float
    extrapolated: bool
    low: float
    high: float
    imagenet_classes: Annotated[ImagenetClasses, Key("x")]
    slope: float
    intercept: float
    r2: float
    n: int
    source: str
    note: str
    line_low: float = math.nan
    line_high: float = math.nan
    images: int = 0
    imagenet_images: int = 0
    residual_std: float = math.nan
    x_mean: float = math.nan
    x_squares: float = math.nan

    def fit(self) -> Fit:
        """The line; without the range of its models, which an interval does not need."""
        line = {key: getattr(self, key) for key in ("shift", "imagenet_classes", "slope", "intercept", "r2", "n", "source")}
        return Fit(**line, lowest_x=0.0, highest_x=100.0, residual_std=self.residual_std, x_mean=self.x_mean, x_squares=self.x_squares)


@dataclass(frozen=True, eq=False)
class Robustness(Record):
    """Effective robustness in percentage points.

    Attributes:
        rows: one row per shift, and one of the mean accuracy over the five ImageNet shifts if all were measured.
        mean_effective_robustness: over the five ImageNet shifts; nan unless all were measured.
        imagenet_classes: see :func:`torchprobe.analysis.effective_robustness`.
        accuracies: "measured" or "published".
        baseline: a description of the standard models.
        left_out: shift → why it has no effective robustness.
        mean_interval, mean_line_interval: of :meth:`mean`; see :class:`torchprobe.analysis.robustness.MeanRobustness`. Nan in results of
            earlier versions.
        correlation: of the residuals of the standard models, for the shifts of :meth:`by_shift`; None in results of earlier versions.
        standard_models: shift → unshifted accuracy and accuracy under the shift of each standard model of a baseline of your own. None for
            the published fits, whose models :func:`torchprobe.analysis.standard_models.cloud` has.
    """

    rows: list[ShiftRow]
    mean_effective_robustness: float
    imagenet_classes: Annotated[ImagenetClasses, Key("x")]
    accuracies: str
    baseline: str
    left_out: dict[str, str]
    standard_models: dict[str, list[tuple[float, float]]] | None = None
    mean_interval: tuple[float, float] = (math.nan, math.nan)
    mean_line_interval: tuple[float, float] = (math.nan, math.nan)
    correlation: list[list[float]] | None = None

    def by_shift(self) -> dict[str, float]:
        """Shift → effective robustness, for the shifts that have one."""
        each = {row.shift: row.effective_robustness for row in self.rows if row.shift != MEAN}
        return {shift: value for shift, value in each.items() if not math.isnan(value)}

    def mean(self) -> tuple[float, int]:
        """The mean over the shifts that have an effective robustness, nan without any, and their number."""
        found = self.by_shift().values()
        return (math.fsum(found) / len(found) if found else math.nan), len(found)

    @property
    def extrapolated(self) -> bool:
        """Whether the unshifted accuracy lies outside the range of the standard models for some shift."""
        return any(row.extrapolated for row in self.rows)


ROBUSTNESS_COLUMNS = (
    Column("shift", "shift", "the shifted images; “mean”: the mean accuracy over the five ImageNet shifts", "text"),
    Column("effective_robustness", "ER", "accuracy − predicted, percentage points"),
    Column(
        "low", "from", f"{LEVEL:.0%} interval of ER, lower end: sampling of images, the line, and the scatter of standard models about it"
    ),
    Column("high", "to", "its upper end; if the interval contains 0, a standard model could have been measured with this accuracy"),
    Column("accuracy", "accuracy %", "accuracy under the shift, percent"),
    Column("imagenet", "unshifted %", "accuracy on the unshifted images, percent: the x axis of the fit"),
    Column("predicted", "predicted %", "accuracy under the shift of a standard model with the same unshifted accuracy"),
    Column("line_low", "line from", f"{LEVEL:.0%} interval of the distance from the line, without the scatter: lower end"),
    Column("line_high", "to", "its upper end"),
    Column("note", "note", "outside the range of the standard models; a poor fit", "text"),
)


def measure_robustness(
    accuracies: Mapping[str, float],
    shifts: Sequence[str],
    classes: ImagenetClasses,
    baseline: Baseline | None,
    source: str,
    images: Mapping[str, int] | None = None,
) -> Robustness:
    """Effective robustness of accuracies in percent.

    Args:
        accuracies: by set.
        shifts: the sets under a shift.
        classes, baseline: see :func:`torchprobe.analysis.robustness`.
        source: "measured" or "published".
        images: number of images by set, for the intervals; None: the sizes of the released sets.

    Returns:
        The section. A shift is in ``left_out`` if the standard models were not measured on it, or the unshifted accuracy is missing.
    """
    left_out: dict[str, str] = {}
    for shift in shifts:
        if shift not in (SHIFTS if baseline is None else baseline.shifts):
            left_out[shift] = "there are no standard models that were measured on it (--baseline)"
        elif why := _refused({name: value for name, value in accuracies.items() if name == shift or name not in shifts}, classes, baseline):
            left_out[shift] = why
    rows, mean, across = [], math.nan, None
    if len(left_out) < len(shifts):
        with _near_chance():
            kept = {name: value for name, value in accuracies.items() if name not in left_out}
            table = robustness(kept, imagenet_classes=classes, baseline=baseline, images=SIZES if images is None else images)
        rows, mean, across = [decode(ShiftRow, row) for row in table.rows()], table.mean_effective_robustness, table.mean
    fits = "the published fits to the standard models of the ImageNet testbed"
    models = None if baseline is None else {row.shift: baseline.points(row.shift, classes) for row in rows}
    found = Robustness(rows, mean, classes, source, fits if baseline is None else baseline.source, left_out, models)
    if across is None:
        return found
    return replace(found, mean_interval=across.interval, mean_line_interval=across.line_interval, correlation=across.correlation.tolist())


def effective_robustness_along(
    accuracy: ArrayLike, base: ArrayLike, shift: str, classes: ImagenetClasses, baseline: Baseline | None
) -> NDArray[np.float64]:
    """Effective robustness point by point, of accuracies in percent; nan if the unshifted accuracy is 0 or 100, which have no logit."""
    base = np.asarray(base, dtype=np.float64)
    usable = np.where((base > 0) & (base < 100), base, math.nan)
    with _near_chance():
        return effective_robustness(
            np.asarray(accuracy, dtype=np.float64), usable, shift=shift, imagenet_classes=classes, baseline=baseline
        )


def _refused(accuracies: Mapping[str, float], classes: ImagenetClasses, baseline: Baseline | None) -> str | None:
    try:
        with _near_chance():
            robustness(accuracies, imagenet_classes=classes, baseline=baseline)
    except ValueError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _near_chance() -> Iterator[None]:
    """Accuracies near chance among 1000 classes are below 1 %. They look like fractions but need no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no accuracy is above 1")
        yield


def robustness_section(found: Robustness, pictures: Sequence[Picture] = ()) -> Section:
    """Accuracy under shift beyond what the unshifted accuracy predicts."""
    images = "so they are not of the images of this page" if found.accuracies == "published" else "on the sets above"
    classes = "the classes of the shift" if found.imagenet_classes == "subset" else "all classes"
    return Section(
        "Effective robustness",
        [
            "Accuracy under a shift, minus that of standard models with the same unshifted accuracy; 0 is on their line. It depends "
            f"on that line ({found.baseline}). Outside the range of the standard models, the line is only an extrapolation.",
            f"The accuracies are {found.accuracies}, {images}; the unshifted accuracy is on {classes}.",
            *_mean_text(found),
            *(f"No effective robustness under {name}: {why}." for name, why in found.left_out.items()),
            *(
                [
                    "The figures have logit axes. The band holds 95 % of standard models; the bar of the encoder is its interval without "
                    "their scatter (line from … to). Both are in the table."
                ]
                if pictures
                else []
            ),
        ],
        pictures,
        tables=[Table(found.rows, ROBUSTNESS_COLUMNS)],
    )


def _mean_text(found: Robustness) -> list[str]:
    """The mean over several shifts with its intervals, in words."""
    mean, count = found.mean()
    if count < 2:
        return []

    def ends(interval: tuple[float, float]) -> str:
        return "withheld" if math.isnan(interval[0]) else f"{number(interval[0], 3)} to {number(interval[1], 3)}"

    return [
        f"The mean over these {count} shifts is {number(mean, 3)} points ({LEVEL:.0%} interval {ends(found.mean_interval)}; without the "
        f"scatter of standard models {ends(found.mean_line_interval)}). A standard model above one line is often above the others; the "
        "interval includes that."
    ]
