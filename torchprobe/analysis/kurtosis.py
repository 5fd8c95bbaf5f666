"""Vector kurtosis, the measure of outlier features, with the controls to compare it with.

κ(h) = mean((h − mean h)⁴) / mean((h − mean h)²)² over the features of one vector h: Pearson's definition with population moments, 3 for a
Gaussian. It does not change with scale or shift. The number of a model is the mean over its images ("Interpreting CLIP", TMLR 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.analysis.inputs import Vectors, blocks, representations
from torchprobe.analysis.resampling import LEVEL, bootstrap_interval
from torchprobe.common.deprecation import RenamedAttribute, renamed
from torchprobe.dissection import RandomRotation
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling

if TYPE_CHECKING:
    pass

__getattr__ = renamed(__name__, {"summarise": "summarize", "centred_kurtosis": "centered_kurtosis"})

ROTATIONS = 20
"""Rotations of the control. One rotation alone misses the Gaussian value by more than 0.2 in 13–30 % of draws: images share their mean."""


def vector_kurtosis(h: Vectors) -> Tensor:
    """Kurtosis across the features of each vector, as ``scipy.stats.kurtosis(h, axis=1, fisher=False, bias=True)``.

    Works block by block, so a memory-mapped ``h`` is never copied whole.

    Args:
        h: (n, d), of a real number type; or embeddings.

    Returns:
        float64 (n,); nan if all features are equal or one is not finite.

    Raises:
        ValueError: ``h`` is not (n, d) with d ≥ 1.

    >>> vector_kurtosis(torch.tensor([[0.0, 0.0, 0.0, 8.0]])).item()
    2.3333333333333335
    """
    return torch.cat([_kurtosis(block) for block in blocks(representations(h))])


def centered_kurtosis(h: Vectors) -> Tensor:
    """:func:`vector_kurtosis` of h minus its mean over images, so that features that are large in every image do not count.

    The mean is over the vectors without nan or inf.

    >>> h = torch.randn(100, 64)
    >>> h[:, 5] += 100  # large in every image
    >>> bool(vector_kurtosis(h).mean() > 50), bool(centered_kurtosis(h).mean() < 4)
    (True, True)
    """
    h = representations(h)
    shift = total = torch.zeros(h.shape[1], dtype=torch.float64, device=h.device)
    count = 0
    for block in blocks(h):
        finite = block[block.isfinite().all(-1)]
        if not count and len(finite):
            shift = finite[0]  # so that equal vectors give exactly zero
        total = total + (finite - shift).sum(0)
        count += len(finite)
    return torch.cat([_kurtosis(block - shift - total / max(1, count)) for block in blocks(h)])


def peaks(h: Vectors) -> Tensor:
    """max|h_i| / mean|h_i| of each vector: the largest feature in units of the average one.

    h (n, d) → float64 (n,), between 1 and d; nan for a vector of zeros, or with nan or inf.

    >>> peaks(torch.tensor([[1.0, -1.0, 1.0, -5.0]])).item()
    2.5
    """
    parts = []
    for block in blocks(representations(h)):
        size = block.abs()
        largest = size.amax(-1)
        parts.append(1 / (size / largest[:, None]).mean(-1))  # the sum of the largest values of the type would be inf
    return torch.cat(parts)


@dataclass(frozen=True)
class RotationControl:
    """Mean vector kurtosis after random rotations: near 3(d − 1)/(d + 1), unless the vectors themselves are far from Gaussian.

    Attributes:
        mean: over the rotations.
        std: population standard deviation over the rotations.
        values: float64 (rotations,), the mean over vectors after each rotation.
    """

    mean: float
    std: float
    values: Tensor


def rotation_control(h: Vectors, rotations: int = ROTATIONS, seed: int = 0) -> RotationControl:
    """The mean vector kurtosis after random rotations of the features: does the kurtosis depend on the axes?

    A rotation keeps every length and angle and changes only the axes. It is uniform (Haar), see
    :func:`torchprobe.dissection.random_rotation`. Kurtosis from outlier features depends on the axes, so it falls to the Gaussian value.

    Args:
        h: (n, d), or embeddings. Vectors that are constant or not finite are left out.
        rotations: number of rotations.
        seed: rotation i is drawn with seed + i.

    Raises:
        ValueError: ``h`` is not (n, d), or ``rotations`` is below 1.

    >>> h = torch.randn(200, 64)
    >>> h[:, 5] = 50
    >>> control = rotation_control(h)
    >>> bool(vector_kurtosis(h).mean() > 50), abs(control.mean - 3 * 63 / 65) < 0.3
    (True, True)
    """
    if rotations < 1:
        raise ValueError(f"rotations must be at least 1, got {rotations}")
    h = representations(h)
    d = h.shape[1]
    means = []
    for rotation in range(rotations):
        m = Moments(d, h.device)
        turn = RandomRotation(d, seed + rotation, h.device)
        for block in blocks(h):
            # A constant vector would not stay constant. Scale does not change kurtosis, and at scale 1 float32 does not over- or underflow.
            low, high = block.aminmax(dim=-1, keepdim=True)  # nan if one value is
            kept = (low.isfinite() & high.isfinite() & (low != high)).flatten()
            unit = block / torch.maximum(low.abs(), high.abs())
            m.update(turn(unit[kept].float()))
        means.append(m.vector_kurtosis)
    array = np.array(means)
    return RotationControl(float(array.mean()), float(array.std()), torch.from_numpy(array))


@dataclass(frozen=True)
class KurtosisSummary:
    """The vector kurtosis of a representation, with the values to compare it with.

    Attributes:
        mean: over the vectors that have a kurtosis; the number of the model.
        median: over the same vectors. A few extreme vectors raise the mean but not the median.
        std: population standard deviation over these vectors.
        interval: 95 % bootstrap interval of the mean; see :func:`torchprobe.analysis.bootstrap_interval`.
        gaussian: the value of independent Gaussian features, 3(d − 1)/(d + 1).
        gaussian_std: its standard deviation from vector to vector.
        ceiling: the largest value that d features can have, (d² − 3d + 3)/(d − 1).
        rotation: the mean under random rotations.
        centered: the mean of :func:`centered_kurtosis`.
        peak: mean over vectors of max|h_i| / mean|h_i|.
        nonnegative: no feature is ever negative, as after a ReLU. There 5 to 9 is usual without an outlier.
        features: d.
        vectors: number of vectors that have a kurtosis.
        constant_vectors: number left out because all their features are equal.
        invalid_vectors: number left out because of nan or inf.
        per_vector: :func:`vector_kurtosis` of each vector, float64 (n,) on the CPU.
        peaks: :func:`peaks` of each vector, float64 (n,) on the CPU.
    """

    mean: float
    median: float
    std: float
    interval: tuple[float, float]
    gaussian: float
    gaussian_std: float
    ceiling: float
    rotation: RotationControl
    centered: float
    peak: float
    nonnegative: bool
    features: int
    vectors: int
    constant_vectors: int
    invalid_vectors: int
    per_vector: Tensor = field(repr=False, compare=False)
    peaks: Tensor = field(repr=False, compare=False)

    centred = RenamedAttribute("centered")

    def as_dict(self) -> dict[str, Any]:
        """The numbers of the representation as plain values, without those of each vector."""
        rotation = {"mean": self.rotation.mean, "std": self.rotation.std, "values": self.rotation.values.tolist()}
        plain = {**vars(self), "interval": list(self.interval), "interval_level": LEVEL, "rotation": rotation}
        return {"centred" if key == "centered" else key: value for key, value in plain.items() if key not in ("per_vector", "peaks")}


def summarize(h: Vectors, rotations: int = ROTATIONS, seed: int = 0) -> KurtosisSummary:
    """The vector kurtosis of a representation with its controls.

    Args:
        h: (n, d), one vector per image; or embeddings.
        rotations: of the rotation control.
        seed: of the bootstrap and of the rotations.

    Raises:
        ValueError: as :func:`rotation_control`.

    >>> summary = summarize(torch.randn(500, 64))
    >>> summary.interval[0] < summary.mean < summary.interval[1], abs(summary.mean - summary.gaussian) < 0.2
    (True, True)
    """
    h = representations(h)
    per_vector, peak = vector_kurtosis(h).cpu(), peaks(h).cpu()
    kappa = per_vector.numpy()
    known = kappa[np.isfinite(kappa)]
    invalid = sum(int((~block.isfinite().all(-1)).sum()) for block in blocks(h))
    d = h.shape[1]
    return KurtosisSummary(
        mean=float(known.mean()) if known.size else math.nan,
        median=float(np.median(known)) if known.size else math.nan,
        std=float(known.std()) if known.size else math.nan,
        interval=bootstrap_interval(kappa, seed),
        gaussian=gaussian_kurtosis(d),
        gaussian_std=gaussian_kurtosis_std(d),
        ceiling=kurtosis_ceiling(d),
        rotation=rotation_control(h, rotations, seed),
        centered=float(centered_kurtosis(h).nanmean()),
        peak=float(peak.nanmean()),
        nonnegative=bool(len(h)) and all(bool((block >= 0).all()) for block in blocks(h)),
        features=d,
        vectors=known.size,
        constant_vectors=len(kappa) - known.size - invalid,
        invalid_vectors=invalid,
        per_vector=per_vector,
        peaks=peak,
    )


def _kurtosis(block: Tensor) -> Tensor:
    largest = block.abs().amax(-1, keepdim=True)
    block = block / largest.clamp_min(torch.finfo(block.dtype).tiny)  # so that no fourth power over- or underflows
    deviation = block - block.mean(-1, keepdim=True)
    deviation -= deviation.mean(-1, keepdim=True)  # the rest that rounding leaves of a large mean
    square = deviation.square()
    constant = (block == block[:, :1]).all(-1)
    return (square.square().mean(-1) / square.mean(-1).square()).where(~constant, math.nan)
