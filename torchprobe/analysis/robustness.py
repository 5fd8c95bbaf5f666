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
from torchprobe.common.deprecation import renamed_arguments

__all__ = [
    "effective_robustness",
    "mean_effective_robustness",
    "robustness",
    "RobustnessTable",
    "RobustnessRow",
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
        interval: of the effective robustness, from the 95 % prediction interval of a standard model. If it contains 0, a standard model
            could have this accuracy too. It does not include the sampling of images.
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

    def row(self) -> dict[str, Any]:
        """Plain values for a table: the attributes, the interval as ``low`` and ``high``, and slope, intercept, R² and n of the fit."""
        plain = {key: value for key, value in vars(self).items() if key not in ("interval", "fit", "note")}
        fit = {key: getattr(self.fit, key) for key in ("slope", "intercept", "r2", "n", "source")}
        return {**plain, "low": self.interval[0], "high": self.interval[1], "x": self.fit.imagenet_classes, **fit, "note": self.note}


@dataclass(frozen=True)
class RobustnessTable:
    """The result of :func:`robustness`.

    Attributes:
        shifts: one row for each measured shift, in the order of :data:`SHIFTS`.
        of_mean: the row of the mean accuracy; its ``effective_robustness`` is the ER of the mean. None unless all five shifts were measured
            and ``imagenet_classes`` is "full".
        mean_effective_robustness: the mean of the five ERs; nan unless all five shifts were measured.
    """

    shifts: tuple[RobustnessRow, ...]
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
    accuracies: Mapping[str, float], *, imagenet_classes: ImagenetClasses = "full", baseline: Baseline | None = None
) -> RobustnessTable:
    """Effective robustness under every measured shift.

    Args:
        accuracies: name → top-1 accuracy in percent: ``"imagenet"`` and some of :data:`SHIFTS`, and for ``imagenet_classes="subset"`` the
            names in :data:`SUBSETS`. Other names are ignored.
        imagenet_classes, baseline: as for :func:`effective_robustness`.

    Raises:
        ValueError: no shift, no ImageNet accuracy for one of the shifts, or as for :func:`effective_robustness`. An ImageNet accuracy of 0
            or 100 is not an error here; it gives nan and a note.

    >>> table = robustness({"imagenet": 32.75, "imagenet_v2": 27.93, "objectnet": 17.72})
    >>> row = table["imagenet_v2"]
    >>> row.extrapolated, row.note
    (True, 'extrapolated: the lowest ImageNet accuracy of the standard models is 56.52 %')
    """
    own = () if baseline is None else baseline.shifts
    known = tuple(dict.fromkeys((*SHIFTS, *own)))
    measured = [shift for shift in known if shift in accuracies]
    if not measured:
        raise ValueError(f"no accuracy under any of {', '.join(known)}; the given ones are {', '.join(accuracies) or 'none'}")
    rows = tuple(
        _row(shift, accuracies[shift], _imagenet(accuracies, shift, imagenet_classes, own), _fit(shift, imagenet_classes, baseline))
        for shift in measured
    )
    _warn_of_fractions(*(np.asarray([row.accuracy, row.imagenet]) for row in rows))
    complete = set(SHIFTS) <= set(measured)
    of_mean = None
    if complete and imagenet_classes == "full":
        mean = float(np.mean([accuracies[shift] for shift in SHIFTS]))
        of_mean = _row(MEAN, mean, _imagenet(accuracies, MEAN), _fit(MEAN, "full", baseline))
    mean_of_each = float(np.mean([row.effective_robustness for row in rows if row.shift in SHIFTS])) if complete else math.nan
    return RobustnessTable(rows, of_mean, mean_of_each)


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


def _row(shift: str, accuracy: float, imagenet: float, fit: Fit) -> RobustnessRow:
    accuracy, imagenet = float(_percentages(accuracy, shift)), float(_percentages(imagenet, "ImageNet"))
    notes = []
    predicted, low, high = math.nan, math.nan, math.nan
    if imagenet in (0, 100):
        notes.append(f"an ImageNet accuracy of {imagenet:g} % has no logit, so it predicts nothing")
    else:
        predicted, (low, high) = float(fit.predict(imagenet)), map(float, fit.interval(imagenet))
        if imagenet < fit.lowest_x:
            notes.append(f"extrapolated: the lowest ImageNet accuracy of the standard models is {fit.lowest_x:.2f} %")
        elif imagenet > fit.highest_x:
            notes.append(f"extrapolated: the highest ImageNet accuracy of the standard models is {fit.highest_x:.2f} %")
    if fit.poor:
        notes.append(f"a poor fit: R² is {fit.r2:.3f}")
    return RobustnessRow(
        shift=shift,
        accuracy=accuracy,
        imagenet=imagenet,
        predicted=predicted,
        effective_robustness=accuracy - predicted,
        interval=(accuracy - high, accuracy - low),
        extrapolated=fit.extrapolates(imagenet),
        note="; ".join(notes),
        fit=fit,
    )


def _percentages(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if (bad := array[~np.isnan(array) & ~((array >= 0) & (array <= 100))]).size:
        raise ValueError(f"{bad.flat[0]:g} is not an accuracy on {what}: accuracies are in percent, 0 to 100")
    return array


def _warn_of_fractions(*accuracies: NDArray[np.float64]) -> None:
    if 0 < max(np.nanmax(values, initial=0.0) for values in accuracies) <= 1:
        warnings.warn("no accuracy is above 1: these look like fractions; accuracies are in percent, so multiply by 100", stacklevel=3)
