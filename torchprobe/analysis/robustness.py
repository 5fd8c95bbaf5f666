"""Effective robustness: accuracy under a distribution shift beyond what ImageNet accuracy predicts.

    ER = accuracy − logit⁻¹(slope · logit(ImageNet accuracy) + intercept)

with the line of standard models (Taori et al. 2020, https://arxiv.org/abs/2007.00644). Accuracies are in percent, effective
robustness in percentage points.

=====================================  =================================================================================
:func:`effective_robustness`           of one shift; with ``shift="mean"``, the ER of the mean accuracy over the five shifts
:func:`mean_effective_robustness`      the mean of the five ERs, which is a different number
:func:`robustness`                     both, and every shift with its predicted accuracy, an interval and a note
:data:`FITS`, :class:`Baseline`        the lines: published ones, and lines through your own models
=====================================  =================================================================================
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.analysis.baseline import FITS, MEAN, SHIFTS, SUBSETS, Baseline, Fit, ImagenetClasses, check_names, imagenet_name, published
from torchprobe.analysis.resampling import FEWEST
from torchprobe.analysis.robustness_intervals import Measured, mean_robustness_interval, robustness_interval
from torchprobe.analysis.standard_models import standard_models
from torchprobe.common.deprecation import renamed_arguments

__all__ = [
    "effective_robustness",
    "mean_effective_robustness",
    "robustness",
    "RobustnessTable",
    "RobustnessRow",
    "MeanRobustness",
    "FITS",
    "SHIFTS",
    "SUBSETS",
    "MEAN",
    "Fit",
    "Baseline",
]


@dataclass(frozen=True)
class RobustnessRow:
    """One shift.

    Attributes:
        shift: one of :data:`SHIFTS`, or ``"mean"``.
        accuracy: under the shift, percent.
        imagenet: ImageNet accuracy, percent; on the classes of the shift if the fit is for "subset".
        predicted: the accuracy under the shift of a standard model with the same ImageNet accuracy; nan if ``imagenet`` is 0 or 100, which
            have no logit.
        effective_robustness: ``accuracy − predicted``, percentage points.
        interval: 95 % interval of the effective robustness. It includes the scatter of the standard models, the fit of the line, and, for
            known numbers of images, the sampling of images. If it contains 0, a standard model could have been measured with this accuracy.
        line_interval: the same without the scatter: how certain the distance from the line is. Nan without numbers of images.
        images, imagenet_images: number of images of either accuracy; 0 if unknown.
        extrapolated: whether ``imagenet`` is outside the range of ImageNet accuracies that the line was fitted on.
        note: warnings in words; empty if there are none.
        fit: the line.
    """

    shift: str
    accuracy: float
    imagenet: float
    predicted: float
    effective_robustness: float
    interval: tuple[float, float]
    extrapolated: bool
    note: str
    fit: Fit
    line_interval: tuple[float, float] = (math.nan, math.nan)
    images: int = 0
    imagenet_images: int = 0

    def row(self) -> dict[str, Any]:
        """Plain values for a table: the attributes, the interval as ``low`` and ``high``, and the numbers of the fit."""
        plain = {key: value for key, value in vars(self).items() if key not in ("interval", "line_interval", "fit", "note")}
        fit = {key: getattr(self.fit, key) for key in ("slope", "intercept", "r2", "n", "source", "residual_std", "x_mean", "x_squares")}
        ends = dict(zip(("low", "high", "line_low", "line_high"), (*self.interval, *self.line_interval), strict=True))
        return {**plain, **ends, "x": self.fit.imagenet_classes, **fit, "note": self.note}


@dataclass(frozen=True)
class MeanRobustness:
    """The mean of the effective robustnesses under several shifts.

    Attributes:
        shifts: that have one.
        effective_robustness: the mean, percentage points.
        interval, line_interval: as those of :class:`RobustnessRow`; see
            :func:`torchprobe.analysis.robustness_intervals.mean_robustness_interval`.
        correlation: (shifts, shifts), of the residuals of the standard models.
    """

    shifts: tuple[str, ...]
    effective_robustness: float
    interval: tuple[float, float]
    line_interval: tuple[float, float]
    correlation: NDArray[np.float64]


@dataclass(frozen=True)
class RobustnessTable:
    """The result of :func:`robustness`.

    Attributes:
        shifts: one row for each measured shift, in the order of :data:`SHIFTS`.
        mean: the mean over these shifts, with its intervals.
        of_mean: the row of the mean accuracy; its ``effective_robustness`` is the ER of the mean. None unless all five shifts were measured
            and ``imagenet_classes`` is "full".
        mean_effective_robustness: the mean of the five ERs; nan unless all five shifts were measured.
    """

    shifts: tuple[RobustnessRow, ...]
    mean: MeanRobustness
    of_mean: RobustnessRow | None
    mean_effective_robustness: float

    def __getitem__(self, shift: str) -> RobustnessRow:
        named = {row.shift: row for row in self._rows()}
        if shift not in named:
            raise KeyError(f"{shift!r} was not measured; measured are {', '.join(named)}")
        return named[shift]

    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain values, the row of the mean last."""
        return [row.row() for row in self._rows()]

    def _rows(self) -> list[RobustnessRow]:
        return [*self.shifts] if self.of_mean is None else [*self.shifts, self.of_mean]


@overload
def effective_robustness(
    shift_accuracy: float,
    imagenet_accuracy: float,
    *,
    shift: str,
    imagenet_classes: ImagenetClasses = "full",
    baseline: Baseline | None = None,
    x: ImagenetClasses | None = None,
) -> float: ...


@overload
def effective_robustness(
    shift_accuracy: ArrayLike,
    imagenet_accuracy: ArrayLike,
    *,
    shift: str,
    imagenet_classes: ImagenetClasses = "full",
    baseline: Baseline | None = None,
    x: ImagenetClasses | None = None,
) -> NDArray[np.float64]: ...


def effective_robustness(
    shift_accuracy: ArrayLike,
    imagenet_accuracy: ArrayLike,
    *,
    shift: str,
    imagenet_classes: ImagenetClasses = "full",
    baseline: Baseline | None = None,
    x: ImagenetClasses | None = None,
) -> float | NDArray[np.float64]:
    """The accuracy of a model under a shift, minus that of standard models with the same ImageNet accuracy, in percentage points.

    Args:
        shift_accuracy: top-1 accuracy under the shift, percent, 0 to 100; a number, or an array over models (the result is float64).
        imagenet_accuracy: top-1 accuracy on the ImageNet validation set, percent, above 0 and below 100; nan stays nan.
        shift: ``"imagenet_v2"``, ``"imagenet_r"``, ``"imagenet_sketch"``, ``"objectnet"`` or ``"imagenet_a"``, or another shift of the
            baseline. ``"mean"`` if ``shift_accuracy`` is the mean over these five. The result is then the ER of the mean, not the mean of
            the ERs (:func:`mean_effective_robustness`).
        imagenet_classes: "full": ``imagenet_accuracy`` is on all 1000 classes. "subset": it is on the classes of the shift, of which
            ImageNet-R has 200, ObjectNet 113 and ImageNet-A 200. For the other two shifts, which have all classes, both are the same.
        baseline: your own standard models; None: the published fits, :data:`FITS`.
        x: a short name of ``imagenet_classes``.

    Raises:
        ValueError: an unknown shift, a number outside 0 to 100, an ImageNet accuracy of 0 or 100, which have no logit, or a baseline
            without these accuracies. Numbers that look like fractions, none above 1, give a UserWarning.

    >>> round(effective_robustness(69.33, 63.32, shift="imagenet_r"), 1)  # OpenAI's ViT-B/32
    44.4
    """
    fit = _fit(shift, x or imagenet_classes, baseline)
    accuracy, imagenet = _percentages(shift_accuracy, shift), _percentages(imagenet_accuracy, "ImageNet")
    if (bad := imagenet[(imagenet == 0) | (imagenet == 100)]).size:
        raise ValueError(f"an ImageNet accuracy of {bad.flat[0]:g} % has no logit, so it predicts nothing")
    _warn_of_fractions(accuracy, imagenet)
    result = accuracy - fit.predict(imagenet)
    return result if result.ndim else float(result)


@renamed_arguments(x="imagenet_classes")
def mean_effective_robustness(
    accuracies: Mapping[str, float], *, imagenet_classes: ImagenetClasses = "full", baseline: Baseline | None = None
) -> float:
    """The mean of the five effective robustnesses, in percentage points. It is not the ER of the mean accuracy.

    Args:
        accuracies: as for :func:`robustness`, with all five shifts.
        imagenet_classes, baseline: as for :func:`effective_robustness`.

    Raises:
        ValueError: a shift is missing, or as for :func:`effective_robustness`.

    >>> clip = {"imagenet": 75.54, "imagenet_v2": 69.83, "imagenet_r": 87.84, "imagenet_sketch": 59.59, "objectnet": 68.89}
    >>> round(mean_effective_robustness({**clip, "imagenet_a": 70.75}), 1)  # OpenAI's ViT-L/14
    38.9
    """
    if missing := [shift for shift in SHIFTS if shift not in accuracies]:
        raise ValueError(f"the mean over the five shifts needs {', '.join(missing)} as well")
    each = [
        effective_robustness(
            accuracies[shift],
            _imagenet(accuracies, shift, imagenet_classes),
            shift=shift,
            imagenet_classes=imagenet_classes,
            baseline=baseline,
        )
        for shift in SHIFTS
    ]
    return float(np.mean(each))


@renamed_arguments(x="imagenet_classes")
def robustness(
    accuracies: Mapping[str, float],
    *,
    imagenet_classes: ImagenetClasses = "full",
    baseline: Baseline | None = None,
    images: Mapping[str, int] | None = None,
) -> RobustnessTable:
    """Effective robustness under every measured shift.

    Args:
        accuracies: name → top-1 accuracy in percent: ``"imagenet"`` and some of :data:`SHIFTS`, and for ``imagenet_classes="subset"`` the
            names in :data:`SUBSETS`. Other names are ignored.
        imagenet_classes, baseline: as for :func:`effective_robustness`.
        images: name → number of images of that accuracy, for the intervals. Sets without a number count as not sampled, and the note says
            so. :data:`torchprobe.analysis.robustness_intervals.SIZES` has the numbers of the released sets.

    Raises:
        ValueError: no shift, no ImageNet accuracy for one of the shifts, or as for :func:`effective_robustness`. An ImageNet accuracy of 0
            or 100 is not an error here; it gives nan and a note.

    >>> clip = {"imagenet": 63.32, "imagenet_v2": 55.92}
    >>> row = robustness(clip, images={"imagenet": 50_000, "imagenet_v2": 10_000})["imagenet_v2"]
    >>> [round(end, 1) for end in (row.effective_robustness, *row.interval)]
    [5.8, 4.3, 7.2]
    """
    own = () if baseline is None else baseline.shifts
    known = tuple(dict.fromkeys((*SHIFTS, *own)))
    measured = [shift for shift in known if shift in accuracies]
    if not measured:
        raise ValueError(f"no accuracy under any of {', '.join(known)}; the given ones are {', '.join(accuracies) or 'none'}")
    counts = images or {}

    def unshifted(shift: str, classes: ImagenetClasses) -> Measured:
        return Measured(_imagenet(accuracies, shift, classes, own), counts.get(imagenet_name(shift, classes)))

    def row(shift: str, of: Sequence[str], classes: ImagenetClasses) -> RobustnessRow:
        shifted = [Measured(accuracies[name], counts.get(name)) for name in of]
        return _row(shift, shifted, unshifted(shift, classes), _fit(shift, classes, baseline))

    rows = tuple(row(shift, [shift], imagenet_classes) for shift in measured)
    _warn_of_fractions(*(np.asarray([row.accuracy, row.imagenet]) for row in rows))
    complete = set(SHIFTS) <= set(measured)
    of_mean = None
    if complete and imagenet_classes == "full":
        of_mean = row(MEAN, SHIFTS, "full")
    mean_of_each = float(np.mean([row.effective_robustness for row in rows if row.shift in SHIFTS])) if complete else math.nan
    having = [row for row in rows if not math.isnan(row.effective_robustness)]
    each = [(Measured(row.accuracy, counts.get(row.shift)), unshifted(row.shift, imagenet_classes)) for row in having]
    return RobustnessTable(rows, _mean(having, each, baseline or standard_models(), imagenet_classes), of_mean, mean_of_each)


def _mean(
    rows: Sequence[RobustnessRow], measured: Sequence[tuple[Measured, Measured]], baseline: Baseline, classes: ImagenetClasses
) -> MeanRobustness:
    """The mean of rows, whose accuracies under the shift and on ImageNet are these."""
    shifts, none = tuple(row.shift for row in rows), (math.nan, math.nan)
    correlation = baseline.residual_correlation(shifts, classes)
    if not rows:
        return MeanRobustness(shifts, math.nan, none, none, correlation)
    mean = math.fsum(row.effective_robustness for row in rows) / len(rows)
    shifted, unshifted = zip(*measured, strict=True)
    arguments = ([row.fit for row in rows], shifted, unshifted, correlation)
    line = none if any(one.images is None for pair in measured for one in pair) else mean_robustness_interval(*arguments, scatter=False)
    return MeanRobustness(shifts, mean, mean_robustness_interval(*arguments), line, correlation)


def _fit(shift: str, classes: ImagenetClasses, baseline: Baseline | None) -> Fit:
    return published(shift, classes) if baseline is None else baseline.fit(shift, classes)


def _imagenet(accuracies: Mapping[str, float], shift: str, classes: ImagenetClasses = "full", shifts: Sequence[str] = SHIFTS) -> float:
    """The ImageNet accuracy to compare a shift with."""
    check_names(shift, classes, shifts)
    name = imagenet_name(shift, classes)
    if name not in accuracies:
        raise ValueError(
            f"the effective robustness of {shift} with imagenet_classes={classes!r} needs the accuracy {name!r}; the given ones are "
            f"{', '.join(accuracies)}"
        )
    return accuracies[name]


def _row(shift: str, shifted: Sequence[Measured], unshifted: Measured, fit: Fit) -> RobustnessRow:
    accuracy = float(np.mean([_percentages(one.accuracy, shift) for one in shifted]))
    imagenet = float(_percentages(unshifted.accuracy, "ImageNet"))
    counts = [one.images for one in (*shifted, unshifted)]
    notes = []
    predicted, interval, line = math.nan, (math.nan, math.nan), (math.nan, math.nan)
    if imagenet in (0, 100):
        notes.append(f"an ImageNet accuracy of {imagenet:g} % has no logit, so it predicts nothing")
    else:
        predicted, interval = float(fit.predict(imagenet)), robustness_interval(fit, shifted, unshifted)
        if None not in counts:
            line = robustness_interval(fit, shifted, unshifted, scatter=False)
        if imagenet < fit.lowest_x:
            notes.append(f"extrapolated: the lowest ImageNet accuracy of the standard models is {fit.lowest_x:.2f} %")
        elif imagenet > fit.highest_x:
            notes.append(f"extrapolated: the highest ImageNet accuracy of the standard models is {fit.highest_x:.2f} %")
    if None in counts:
        notes.append("the interval does not include the sampling of images, because their number is unknown")
    elif min(known := [count for count in counts if count is not None]) < FEWEST:
        notes.append(f"no interval: {min(known)} images, and below {FEWEST} none keeps its level")
    if fit.poor:
        notes.append(f"a poor fit: R² is {fit.r2:.3f}")
    return RobustnessRow(
        shift=shift,
        accuracy=accuracy,
        imagenet=imagenet,
        predicted=predicted,
        effective_robustness=accuracy - predicted,
        interval=interval,
        extrapolated=fit.extrapolates(imagenet),
        note="; ".join(notes),
        fit=fit,
        line_interval=line,
        images=sum(one.images or 0 for one in shifted),
        imagenet_images=unshifted.images or 0,
    )


def _percentages(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if (bad := array[~np.isnan(array) & ~((array >= 0) & (array <= 100))]).size:
        raise ValueError(f"{bad.flat[0]:g} is not an accuracy on {what}: accuracies are in percent, 0 to 100")
    return array


def _warn_of_fractions(*accuracies: NDArray[np.float64]) -> None:
    if 0 < max(np.nanmax(values, initial=0.0) for values in accuracies) <= 1:
        warnings.warn("no accuracy is above 1: these look like fractions; accuracies are in percent, so multiply by 100", stacklevel=3)
