"""How far one layer of a recording is from the same layer of another, feature by feature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.messages import listing
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import OUTLIER_SHARE

_MOST_NAMED = 8  # features in the text of a row


@dataclass(frozen=True)
class LayerDistance:
    """Distances of the features of one layer, over everything that was recorded. A feature that is constant in both has no spread: it is in
    ``constant_moved`` if its value changed, and in nothing else.

    Attributes:
        wasserstein: √ mean over features of W₂²/s², where W₂² = Δμ² + (σ_b − σ_a)² is the squared 2-Wasserstein distance of two Gaussians
            of these moments (Dowson and Landau, 1982), and s² the mean of both variances. 0: equal; 1: about one standard deviation.
        mean_shift: √ mean of (Δμ/s)² over features: the part of it that moved the means.
        mean_shift_max, mean_shift_feature: the largest abs(Δμ/s), and its feature.
        std_ratio: square root of the mean variance after / before.
        kurtosis_ratio: vector kurtosis after / before.
        outlier_shift, outlier_shift_feature: the largest difference of a feature's outlier frequency, after − before, and the feature.
        outliers_gained, outliers_lost: the features that are outliers in at least half of the vectors only after, or only before.
        constant_moved: features that are constant in both, at different values.
    """

    wasserstein: float
    mean_shift: float
    mean_shift_max: float
    mean_shift_feature: int | None
    std_ratio: float
    kurtosis_ratio: float
    outlier_shift: float
    outlier_shift_feature: int | None
    outliers_gained: tuple[int, ...]
    outliers_lost: tuple[int, ...]
    constant_moved: int

    def row(self) -> dict[str, Any]:
        """For a table: features as text."""
        texts = {name: listing([*map(str, getattr(self, name))], _MOST_NAMED) for name in ("outliers_gained", "outliers_lost")}
        return {**asdict(self), **texts}


def moments_of(statistic: Any) -> Moments | None:
    """The moments in a statistic, or in several; None without them."""
    if isinstance(statistic, Moments):
        return statistic
    if isinstance(statistic, Mapping) or hasattr(statistic, "labels"):
        return next((part for name in statistic.labels if isinstance(part := statistic[name], Moments)), None)
    return None


def distance(before: Moments, after: Moments) -> LayerDistance:
    """The distances of one layer; nan where nothing was seen.

    Raises:
        ValueError: the layers are not of the same width.

    >>> a, b = Moments(1, "cpu"), Moments(1, "cpu")
    >>> a.update(torch.tensor([[-1.0], [1.0]]))
    >>> b.update(torch.tensor([[2.0], [4.0]]))
    >>> found = distance(a, b)
    >>> found.wasserstein, found.mean_shift_max, found.std_ratio
    (3.0, 3.0, 1.0)
    """
    if before.features != after.features:
        raise ValueError(f"the layer is {before.features} features wide in one recording and {after.features} in the other")
    a, b = _numbers(before), _numbers(after)
    shift = b["mean"] - a["mean"]
    spread = ((a["variance"] + b["variance"]) / 2).sqrt()
    varies = spread > 0
    standard = (shift / spread).where(varies, math.nan)
    squares = standard.square() + ((b["std"] - a["std"]) / spread).where(varies, math.nan).square()
    frequency = b["outliers"] - a["outliers"]
    if before.outlier_sigma != after.outlier_sigma:
        frequency = torch.full_like(frequency, math.nan)
    feature, largest = _largest(standard)
    outlier, change = _largest(frequency)
    gained, lost = (torch.zeros(0, dtype=torch.bool, device="cpu"),) * 2
    if math.isfinite(change):
        was, now = a["outliers"] >= OUTLIER_SHARE, b["outliers"] >= OUTLIER_SHARE
        gained, lost = now & ~was, was & ~now
    return LayerDistance(
        _root_mean(squares),
        _root_mean(standard.square()),
        abs(largest),
        feature,
        _ratio(b["variance"].nanmean().sqrt(), a["variance"].nanmean().sqrt()),
        _ratio(after.vector_kurtosis, before.vector_kurtosis),
        change,
        outlier,
        tuple(gained.nonzero()[:, 0].tolist()),
        tuple(lost.nonzero()[:, 0].tolist()),
        int(((spread == 0) & (shift != 0)).sum()),
    )


def _numbers(moments: Moments) -> dict[str, Tensor]:
    found = {"mean": moments.mean, "variance": moments.variance, "std": moments.std, "outliers": moments.outlier_frequency}
    return {name: value.double().cpu() for name, value in found.items()}


def _largest(values: Tensor) -> tuple[int | None, float]:
    """The index and value of the largest absolute value; None and nan without one."""
    finite = values.abs().where(values.isfinite(), -1)
    index = int(finite.argmax())
    return (index, float(values[index])) if finite[index] >= 0 else (None, math.nan)


def _root_mean(squares: Tensor) -> float:
    return float(squares.nanmean().sqrt())


def _ratio(after: Any, before: Any) -> float:
    return float(after) / float(before) if float(before) > 0 else math.nan
