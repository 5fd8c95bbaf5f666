"""How certain an effective robustness is: the sampled images, the line through the standard models, and their scatter about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.analysis.baseline import Fit
from torchprobe.analysis.resampling import FEWEST, LEVEL
from torchprobe.analysis.shares import paired_difference, share_interval

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
    the ImageNet accuracy, by the slope times the interval of its logit. Both accuracies have the interval of
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
    if not _usable([*shifted, imagenet]):
        return math.nan, math.nan
    accuracy = math.fsum(one.accuracy for one in shifted) / len(shifted)
    predicted = float(fit.predict(imagenet.accuracy))
    low, high = fit.interval(imagenet.accuracy, level, scatter=scatter, error=_logit_error(imagenet, level))
    ends = [_ends(one, level) for one in shifted]
    below = math.hypot(*(one.accuracy - end[0] for one, end in zip(shifted, ends, strict=True))) / len(shifted)
    above = math.hypot(*(end[1] - one.accuracy for one, end in zip(shifted, ends, strict=True))) / len(shifted)
    difference = accuracy - predicted
    return difference - math.hypot(below, float(high) - predicted), difference + math.hypot(above, predicted - float(low))


def mean_robustness_interval(
    fits: Sequence[Fit],
    shifted: Sequence[Measured],
    imagenet: Sequence[Measured],
    correlation: ArrayLike | None = None,
    scatter: bool = True,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Interval of the mean effective robustness over several shifts, in percentage points.

    The parts are those of :func:`robustness_interval`, and are added in squares as there, with their correlations (Zou and Donner,
    Statistics in Medicine 27, 2008). The images of the shifts are different, so their errors are independent. The ImageNet accuracy is the
    same for all shifts, so its error goes in one direction. The lines are fitted to the same models, and a model above one line is often
    above another: their errors and the scatter have the correlation of the residuals.

    Args:
        fits: the line of each shift.
        shifted, imagenet: the accuracy under each shift, and the ImageNet accuracy that it is compared with; the latter are of the same
            images, or of subsets of the same.
        correlation: (shifts, shifts), of the residuals, see :meth:`torchprobe.analysis.Baseline.residual_correlation`. None: 1, the longest
            interval.
        scatter, level: as for :func:`robustness_interval`.

    Returns:
        The two ends; nan as for :func:`robustness_interval`, and without a shift.

    >>> from torchprobe.analysis import FITS
    >>> fits, unshifted = [FITS["imagenet_v2", "full"], FITS["objectnet", "full"]], [Measured(70.0, 50_000)] * 2
    >>> [round(end, 1) for end in mean_robustness_interval(fits, [Measured(60.0, 500), Measured(40.0, 500)], unshifted, scatter=False)]
    [5.0, 11.2]
    """
    if not fits or not all(_usable([one, other]) for one, other in zip(shifted, imagenet, strict=True)):
        return math.nan, math.nan
    pairs = list(zip(fits, imagenet, strict=True))
    line = np.array([fit.half(one.accuracy, level, scatter=scatter) for fit, one in pairs])
    predicted = np.array([float(fit.predict(one.accuracy)) for fit, one in pairs])
    errors = [_logit_error(one, level) for one in imagenet]
    ends = [fit.interval(one.accuracy, level, scatter=scatter, error=error) for (fit, one), error in zip(pairs, errors, strict=True)]
    squares = []  # of the sum of what the predictions may be lower, and higher
    for side in (0, 1):
        half = abs(np.array([float(end[side]) for end in ends]) - predicted)
        images = np.array([fit.slope * error[side] for fit, error in zip(fits, errors, strict=True)])
        covariance = np.outer(line, line) * (1.0 if correlation is None else np.asarray(correlation)) + np.outer(images, images)
        scale = half / np.maximum(np.hypot(line, images), np.finfo(np.float64).tiny)  # points per logit
        squares.append(max(0.0, float(scale @ covariance @ scale)))
    own = [_ends(one, level) for one in shifted]
    below = math.hypot(*(one.accuracy - end[0] for one, end in zip(shifted, own, strict=True)), math.sqrt(squares[1]))
    above = math.hypot(*(end[1] - one.accuracy for one, end in zip(shifted, own, strict=True)), math.sqrt(squares[0]))
    mean = float(np.mean([one.accuracy for one in shifted] - predicted))
    return mean - below / len(fits), mean + above / len(fits)


def _usable(measured: Sequence[Measured]) -> bool:
    """Whether there is an interval: the last, the ImageNet accuracy, has a logit, and no known number of images is too small."""
    counts = [one.images for one in measured if one.images is not None]
    return 0 < measured[-1].accuracy < 100 and (not counts or min(counts) >= FEWEST)  # nan is neither


def _logit_error(measured: Measured, level: float) -> tuple[float, float]:
    """How far the interval of the logit of an accuracy goes down and up."""
    if measured.images is None:
        return 0.0, 0.0
    count = min(max(round(measured.accuracy / 100 * measured.images), 1), measured.images - 1)  # an accuracy of 0 or 100 has no logit
    low, high = share_interval(count, measured.images, level)
    middle, ends = measured.accuracy / (100 - measured.accuracy), (low / (1 - low), high / (1 - high))
    return max(0.0, math.log(middle / ends[0])), max(0.0, math.log(ends[1] / middle))


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
    correlation: ArrayLike | None = None,
) -> tuple[float, float, float]:
    """The difference of the mean effective robustness of two models on the same images, with its interval, in percentage points.

    The two are right on much the same images, and are compared with the same line, so the difference is more certain than either number.
    Three parts are added in squares: the difference under each shift (:func:`torchprobe.analysis.paired_difference`), that of the two
    predictions, each with its interval and with their correlation over the ImageNet images (Zou and Donner, Statistics in Medicine 27,
    2008), and the lines, with the covariance of their coefficients. The scatter of standard models is left out: these models are given.

    Args:
        fits: the line of each shift.
        shifted: for each shift, whether the first and the second model is right on each image, (n,), in the same order.
        imagenet: the same on the unshifted images.
        level: of the interval.
        correlation: as for :func:`mean_robustness_interval`.

    Returns:
        First minus second, and the two ends; nan for fewer than 20 images, or an ImageNet accuracy of 0 or 100.

    >>> from torchprobe.analysis import FITS
    >>> better, worse, both = np.arange(400) < 240, np.arange(400) < 200, np.arange(400) < 280
    >>> [round(end, 1) for end in paired_robustness([FITS["imagenet_v2", "full"]], [(better, worse)], (both, both))]
    [10.0, 6.9, 13.1]
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
    lines = []
    for fit, (p, q) in zip(fits, predicted, strict=True):
        rise = np.array([p * (100 - p), -q * (100 - q)]) / 100  # points per logit
        centered = np.log([one / (1 - one) for one in accuracy]) - fit.x_mean
        of_line = rise.sum() / math.sqrt(fit.n), float(rise @ centered) / math.sqrt(fit.x_squares)  # level and slope of the line
        lines.append(fit.student(level) * fit.residual_std / shifts * np.array(of_line))
    line = max(0.0, float((np.stack(lines) @ np.stack(lines).T * (1.0 if correlation is None else np.asarray(correlation))).sum()))
    down, up = _prediction_ends(fits, right, level)
    below = math.hypot(*(100 * (part[0] - part[1]) / shifts for part in parts), math.sqrt(line), up)
    above = math.hypot(*(100 * (part[2] - part[0]) / shifts for part in parts), math.sqrt(line), down)
    return difference, difference - below, difference + above


def _prediction_ends(fits: Sequence[Fit], right: Sequence[NDArray[np.bool_]], level: float) -> tuple[float, float]:
    """How far the interval of the difference of two mean predictions goes down and up, for the sampling of the unshifted images.

    Both predictions are that of the ends of :func:`torchprobe.analysis.share_interval`. Their correlation is that of being right, on the
    table of the images that both, one or none is right on, with one more image in each cell.
    """
    n = len(right[0])
    moves = []
    for one in right:
        share = float(one.mean())
        low, high = share_interval(int(one.sum()), n, level)
        ends = [float(np.mean([fit.predict(100 * p) for fit in fits])) for p in (low, share, high)]
        moves.append((ends[1] - ends[0], ends[2] - ends[1]))
    table = np.array([[(right[0] == i) & (right[1] == j) for j in (True, False)] for i in (True, False)]).sum(-1) + 1
    phi = float(np.linalg.det(table) / math.sqrt(np.prod([*table.sum(0), *table.sum(1)], dtype=np.float64)))
    (first_down, first_up), (second_down, second_up) = moves
    down = math.sqrt(max(0.0, first_down**2 + second_up**2 - 2 * phi * first_down * second_up))
    return down, math.sqrt(max(0.0, first_up**2 + second_down**2 - 2 * phi * first_up * second_down))
