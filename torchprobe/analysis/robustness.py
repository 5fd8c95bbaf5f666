"""Effective robustness: accuracy under a distribution shift beyond what the accuracy on ImageNet lets expect.

    ER = accuracy − logit⁻¹(slope · logit(ImageNet accuracy) + intercept)

with the line of standard models (Taori et al. 2020, https://arxiv.org/abs/2007.00644). Accuracies are in per cent, effective
robustness in percentage points.

=====================================  =================================================================================
:func:`effective_robustness`           of one shift; with ``shift="mean"``, the ER of the mean accuracy over the five shifts
:func:`mean_effective_robustness`      the mean of the five ERs, which is another number
:func:`robustness`                     both and every shift, with what was expected, its interval, and what to beware of
:data:`FITS`, :class:`Baseline`        the lines: the published ones, and one through models of your own
=====================================  =================================================================================
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.analysis.baseline import FITS, MEAN, SHIFTS, SUBSETS, Baseline, Fit, X, check_names, imagenet_name, published

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
        accuracy: under the shift, per cent.
        imagenet: on ImageNet, per cent; on the classes that the shift has when the fit says "subset".
        predicted: the accuracy under the shift of a standard model that is as good on ImageNet; nan where ``imagenet`` is 0
            or 100, which has no logit.
        effective_robustness: ``accuracy − predicted``, percentage points.
        interval: of the effective robustness, from the 95 % prediction interval of a standard model: one that contains 0 is
            what a standard model might show as well. It is no interval for the sampling of images.
        extrapolated: the models of the fit are all better, or all worse, on ImageNet.
        note: what to beware of, in words; empty when there is nothing.
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
        values = {key: value for key, value in vars(self).items() if key not in ("interval", "fit", "note")}
        fit = {key: asdict(self.fit)[key] for key in ("x", "slope", "intercept", "r2", "n", "source")}
        return {**values, "low": self.interval[0], "high": self.interval[1], **fit, "note": self.note}


@dataclass(frozen=True)
class RobustnessTable:
    """What :func:`robustness` gives.

    Attributes:
        shifts: one row for each shift that was measured, in the order of :data:`SHIFTS`.
        of_mean: the row of the mean accuracy, whose ``effective_robustness`` is the ER of the mean; None unless all five shifts
            were measured and x is "full".
        mean_effective_robustness: the mean of the five ERs; nan unless all five were measured.
    """

    shifts: tuple[RobustnessRow, ...]
    of_mean: RobustnessRow | None
    mean_effective_robustness: float

    def __getitem__(self, shift: str) -> RobustnessRow:
        named = {row.shift: row for row in self._rows()}
        if shift not in named:
            raise KeyError(f"{shift!r} was not measured; there are {', '.join(named)}")
        return named[shift]

    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain values, that of the mean last."""
        return [row.row() for row in self._rows()]

    def _rows(self) -> list[RobustnessRow]:
        return [*self.shifts] if self.of_mean is None else [*self.shifts, self.of_mean]


@overload
def effective_robustness(
    shift_accuracy: float, imagenet_accuracy: float, *, shift: str, x: X = "full", baseline: Baseline | None = None
) -> float: ...


@overload
def effective_robustness(
    shift_accuracy: ArrayLike, imagenet_accuracy: ArrayLike, *, shift: str, x: X = "full", baseline: Baseline | None = None
) -> NDArray[np.float64]: ...


def effective_robustness(
    shift_accuracy: ArrayLike, imagenet_accuracy: ArrayLike, *, shift: str, x: X = "full", baseline: Baseline | None = None
) -> float | NDArray[np.float64]:
    """How much more accurate a model is under a shift than standard models that are as good on ImageNet, in percentage points.

    Args:
        shift_accuracy: top-1 accuracy under the shift, per cent, 0 to 100; one number, or an array of models (float64 comes out).
        imagenet_accuracy: top-1 accuracy on the ImageNet validation set, per cent, above 0 and below 100; nan stays nan.
        shift: ``"imagenet_v2"``, ``"imagenet_r"``, ``"imagenet_sketch"``, ``"objectnet"`` or ``"imagenet_a"``, or another one
            that the baseline has; ``"mean"`` when
            ``shift_accuracy`` is the mean over these five: the ER of the mean, not the mean of the ERs
            (:func:`mean_effective_robustness`).
        x: "full": ``imagenet_accuracy`` is on all 1000 classes. "subset": on the classes that ImageNet-R (200), ObjectNet (113)
            or ImageNet-A (200) has. The other two have all classes, so the two are one.
        baseline: standard models of your own instead of the published fits, :data:`FITS`.

    Raises:
        ValueError: an unknown shift, a number that is no percentage, an accuracy of 0 or 100 on ImageNet, which has no logit,
            or a baseline without these accuracies. Numbers that look like fractions, none above 1, give a UserWarning.

    >>> round(effective_robustness(69.33, 63.32, shift="imagenet_r"), 1)  # OpenAI's ViT-B/32
    44.4
    """
    fit = _fit(shift, x, baseline)
    accuracy, imagenet = _percentages(shift_accuracy, shift), _percentages(imagenet_accuracy, "ImageNet")
    if (bad := imagenet[(imagenet == 0) | (imagenet == 100)]).size:
        raise ValueError(f"an accuracy of {bad.flat[0]:g} % on ImageNet has no logit, so nothing can be expected from it")
    _warn_of_fractions(accuracy, imagenet)
    result = accuracy - fit.predict(imagenet)
    return result if result.ndim else float(result)


def mean_effective_robustness(accuracies: Mapping[str, float], *, x: X = "full", baseline: Baseline | None = None) -> float:
    """The mean of the five effective robustnesses, in percentage points; it is not the ER of the mean accuracy.

    Args:
        accuracies: as for :func:`robustness`; all five shifts.

    Raises:
        ValueError: a shift is missing, or as for :func:`effective_robustness`.

    >>> clip = {"imagenet": 75.54, "imagenet_v2": 69.83, "imagenet_r": 87.84, "imagenet_sketch": 59.59, "objectnet": 68.89}
    >>> round(mean_effective_robustness({**clip, "imagenet_a": 70.75}), 1)  # OpenAI's ViT-L/14
    38.9
    """
    if missing := [shift for shift in SHIFTS if shift not in accuracies]:
        raise ValueError(f"the mean over the five shifts needs {', '.join(missing)} as well")
    each = [
        effective_robustness(accuracies[shift], _imagenet(accuracies, shift, x), shift=shift, x=x, baseline=baseline) for shift in SHIFTS
    ]
    return float(np.mean(each))


def robustness(accuracies: Mapping[str, float], *, x: X = "full", baseline: Baseline | None = None) -> RobustnessTable:
    """Effective robustness under every shift that was measured.

    Args:
        accuracies: name → top-1 accuracy in per cent: ``"imagenet"`` and some of :data:`SHIFTS`; with ``x="subset"`` the names in
            :data:`SUBSETS` as well. Other names are left aside.
        x, baseline: as for :func:`effective_robustness`.

    Raises:
        ValueError: no shift, no accuracy on ImageNet that goes with one, or as for :func:`effective_robustness`; an accuracy of 0 or
            100 on ImageNet, however, gives nan and a note.

    >>> table = robustness({"imagenet": 32.75, "imagenet_v2": 27.93, "objectnet": 17.72})
    >>> row = table["imagenet_v2"]
    >>> row.extrapolated, row.note
    (True, 'extrapolated: the lowest ImageNet accuracy of the standard models is 56.52 %')
    """
    own = () if baseline is None else baseline.shifts
    known = tuple(dict.fromkeys((*SHIFTS, *own)))
    measured = [shift for shift in known if shift in accuracies]
    if not measured:
        raise ValueError(f"no accuracy under any of {', '.join(known)}; there are {', '.join(accuracies) or 'none'}")
    rows = tuple(_row(shift, accuracies[shift], _imagenet(accuracies, shift, x, own), _fit(shift, x, baseline)) for shift in measured)
    _warn_of_fractions(*(np.asarray([row.accuracy, row.imagenet]) for row in rows))
    complete = set(SHIFTS) <= set(measured)
    of_mean = None
    if complete and x == "full":
        mean = float(np.mean([accuracies[shift] for shift in SHIFTS]))
        of_mean = _row(MEAN, mean, _imagenet(accuracies, MEAN, x), _fit(MEAN, x, baseline))
    mean_of_each = float(np.mean([row.effective_robustness for row in rows if row.shift in SHIFTS])) if complete else math.nan
    return RobustnessTable(rows, of_mean, mean_of_each)


def _fit(shift: str, x: X, baseline: Baseline | None) -> Fit:
    return published(shift, x) if baseline is None else baseline.fit(shift, x)


def _imagenet(accuracies: Mapping[str, float], shift: str, x: X, shifts: Sequence[str] = SHIFTS) -> float:
    check_names(shift, x, shifts)
    name = imagenet_name(shift, x)
    if name not in accuracies:
        raise ValueError(f"the effective robustness of {shift} with x={x!r} needs the accuracy {name!r}; there are {', '.join(accuracies)}")
    return accuracies[name]


def _row(shift: str, accuracy: float, imagenet: float, fit: Fit) -> RobustnessRow:
    accuracy, imagenet = float(_percentages(accuracy, shift)), float(_percentages(imagenet, "ImageNet"))
    notes = []
    predicted, low, high = math.nan, math.nan, math.nan
    if imagenet in (0, 100):
        notes.append(f"an accuracy of {imagenet:g} % on ImageNet has no logit, so nothing can be expected from it")
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
        raise ValueError(f"{bad.flat[0]:g} is no accuracy on {what}: accuracies are in per cent, 0 to 100")
    return array


def _warn_of_fractions(*accuracies: NDArray[np.float64]) -> None:
    if 0 < max(np.nanmax(values, initial=0.0) for values in accuracies) <= 1:
        warnings.warn("no accuracy is above 1: these look like fractions; accuracies are in per cent, so multiply by 100", stacklevel=3)
