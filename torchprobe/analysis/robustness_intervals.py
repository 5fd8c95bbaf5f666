"""How certain an effective robustness is: the sampled images, the line through the standard models, and their scatter about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from torchprobe.analysis.baseline import Fit
from torchprobe.analysis.resampling import FEWEST, LEVEL
from torchprobe.analysis.shares import logit_variance, normal_quantile, paired_difference, share_interval

SIZES = {
    "imagenet": 50_000,
    "imagenet_v2": 10_000,
    "imagenet_r": 30_000,
    "imagenet_sketch": 50_889,
    "objectnet": 18_574,
    "imagenet_a": 7_500,
    "imagenet_on_r_classes": 10_000,
    "imagenet_on_objectnet_classes": 5_650,
    "imagenet_on_a_classes": 10_000,
}
"""Set → number of its images as released; those of ObjectNet that ImageNet has a class for. For published accuracies, measured on all."""


class Measured(NamedTuple):
    """An accuracy in percent, and the number of images that it was measured on; None if unknown, which counts as no sampling."""

    accuracy: float
    images: int | None = None


def robustness_interval(
    fit: Fit, shifted: Sequence[Measured], imagenet: Measured, scatter: bool = True, level: float = LEVEL
) -> tuple[float, float]:
    """Interval of the effective robustness, accuracy − prediction, in percentage points.

    The prediction is uncertain in logits: the line, by t with n − 2 degrees of freedom as in :meth:`torchprobe.analysis.Fit.interval`, and
    the ImageNet accuracy, by the slope times the standard error of its logit. The accuracy is uncertain by
    :func:`torchprobe.analysis.share_interval`. The images are different, so the two are independent, and their intervals give that of the
    difference: lower end d − √((a − a_low)² + (p_high − p)²), and so on (Zou and Donner, Statistics in Medicine 27, 2008).

    Args:
        fit: the line.
        shifted: the accuracy under the shift; several for the mean over several shifts.
        imagenet: the unshifted accuracy.
        scatter: whether the scatter of standard models about their line counts. With it, the interval has 0 for 95 % of all standard
            models. Without it, it is the interval of the distance from the line.
        level: of the interval.

    Returns:
        The two ends; (nan, nan) if the ImageNet accuracy is 0 or 100, which have no logit, or a number of images is below 20.

    >>> from torchprobe.analysis import FITS
    >>> fit = FITS["imagenet_v2", "full"]
    >>> [round(end, 1) for end in robustness_interval(fit, [Measured(60.0, 500)], Measured(70.0, 50_000))]
    [-1.5, 7.3]
    """
    counts = [one.images for one in (*shifted, imagenet) if one.images is not None]
    if imagenet.accuracy in (0, 100) or math.isnan(imagenet.accuracy) or (counts and min(counts) < FEWEST):
        return math.nan, math.nan
    accuracy = math.fsum(one.accuracy for one in shifted) / len(shifted)
    predicted = float(fit.predict(imagenet.accuracy))
    low, high = fit.interval(imagenet.accuracy, level, scatter=scatter, x_half=_logit_error(imagenet, level))
    ends = [_ends(one, level) for one in shifted]
    below = math.hypot(*(one.accuracy - end[0] for one, end in zip(shifted, ends, strict=True))) / len(shifted)
    above = math.hypot(*(end[1] - one.accuracy for one, end in zip(shifted, ends, strict=True))) / len(shifted)
    difference = accuracy - predicted
    return difference - math.hypot(below, float(high) - predicted), difference + math.hypot(above, predicted - float(low))


def _logit_error(measured: Measured, level: float) -> float:
    """The half width of the interval of the logit of an accuracy."""
    if measured.images is None:
        return 0.0
    return normal_quantile(level) * math.sqrt(logit_variance(measured.accuracy / 100, measured.images))


def _ends(measured: Measured, level: float) -> tuple[float, float]:
    if measured.images is None:
        return measured.accuracy, measured.accuracy
    low, high = share_interval(round(measured.accuracy / 100 * measured.images), measured.images, level)
    return 100 * low, 100 * high


def paired_robustness(
    fits: Sequence[Fit],
    shifted: Sequence[tuple[ArrayLike, ArrayLike]],
    imagenet: tuple[ArrayLike, ArrayLike],
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """The difference of the mean effective robustness of two models on the same images, with its interval, in percentage points.

    The two are right on much the same images, and are compared with the same line, so the difference is more certain than either number.
    Three parts are added in squares: the difference under each shift (:func:`torchprobe.analysis.paired_difference`), that of the two
    predictions by the delta method on the table of the ImageNet images that both, one or none is right on, with one more image in each
    cell, and the line, with the covariance of its two coefficients. The scatter of standard models is no part: these two models are given.

    Args:
        fits: the line of each shift.
        shifted: for each shift, whether the first and the second model is right on each image, (n,), in the same order.
        imagenet: the same on the unshifted images.
        level: of the interval.

    Returns:
        First minus second, and the two ends; nan for fewer than 20 images, or an ImageNet accuracy of 0 or 100.

    >>> from torchprobe.analysis import FITS
    >>> better, worse, both = np.arange(400) < 240, np.arange(400) < 200, np.arange(400) < 280
    >>> [round(end, 1) for end in paired_robustness([FITS["imagenet_v2", "full"]], [(better, worse)], (both, both))]
    [10.0, 6.9, 13.0]
    """
    right = [np.asarray(one, dtype=bool) for one in imagenet]
    if right[0].shape != right[1].shape or right[0].ndim != 1:
        raise ValueError(f"expected two values for each image, got shapes {right[0].shape} and {right[1].shape}")
    n, shifts = len(right[0]), len(shifted)
    parts = [paired_difference(*pair, level) for pair in shifted]
    accuracy = [float(one.mean()) if n else math.nan for one in right]
    if not shifts or not all(0 < one < 1 for one in accuracy):
        return math.nan, math.nan, math.nan
    predicted = [[float(fit.predict(100 * one)) for one in accuracy] for fit in fits]
    difference = math.fsum(100 * part[0] - (p - q) for part, (p, q) in zip(parts, predicted, strict=True)) / shifts
    if n < FEWEST:
        return difference, math.nan, math.nan
    cells = [(int((right[0] & right[1]).sum()) + 1), int((right[0] & ~right[1]).sum()) + 1, int((~right[0] & right[1]).sum()) + 1]
    both, first, second = (cell / (n + 4) for cell in cells)
    smoothed = both + first, both + second
    slopes, line = np.zeros(2), 0.0
    for fit, ends in zip(fits, predicted, strict=True):
        rise = np.array([p * (100 - p) / 100 for p in ends])  # points per logit
        slopes += fit.slope * rise / [p * (1 - p) for p in smoothed] / shifts  # points per share
        centered = np.log([p / (1 - p) for p in accuracy]) - fit.x_mean
        coefficients = (rise[0] - rise[1]) ** 2 / fit.n + float(rise[0] * centered[0] - rise[1] * centered[1]) ** 2 / fit.x_squares
        line += (fit.student(level) * fit.residual_std / shifts) ** 2 * coefficients
    covariance = both - smoothed[0] * smoothed[1]
    spread = [[smoothed[0] * (1 - smoothed[0]), -covariance], [-covariance, smoothed[1] * (1 - smoothed[1])]]
    images = normal_quantile(level) ** 2 * float(slopes @ np.array(spread) @ slopes) / (n + 4)
    rest = math.sqrt(images + line)
    below = math.hypot(*(100 * (part[0] - part[1]) / shifts for part in parts), rest)
    above = math.hypot(*(100 * (part[2] - part[0]) / shifts for part in parts), rest)
    return difference, difference - below, difference + above
