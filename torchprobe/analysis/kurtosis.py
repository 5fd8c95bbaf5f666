"""Vector kurtosis, the measure of outlier features, and the controls it is read against.

κ(h) = mean((h − mean h)⁴) / mean((h − mean h)²)² across the features of one vector h: Pearson's, population moments, 3 for a Gaussian.
It is invariant to scale and shift; the number of a model is the mean over its images ("Interpreting CLIP", TMLR 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.analysis.blocks import blocks, representations
from torchprobe.analysis.intervals import LEVEL, bootstrap_interval
from torchprobe.dissection.bases import random_rotation
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling

if TYPE_CHECKING:
    from torchprobe.analysis.embeddings import Embeddings

ROTATIONS = 20
"""Of the control. One alone misses the Gaussian value by more than 0.2 in 13 to 30 % of draws, because images share their mean."""


def vector_kurtosis(h: Tensor | Embeddings) -> Tensor:
    """Kurtosis across the features of each vector, as ``scipy.stats.kurtosis(h, axis=1, fisher=False, bias=True)``.

    Works block by block, so a memory-mapped ``h`` is never copied whole.

    Args:
        h: (n, d), a real number type; or embeddings.

    Returns:
        float64 (n,); nan where all features are equal or one is not finite.

    Raises:
        ValueError: ``h`` is not (n, d) with d ≥ 1.

    >>> vector_kurtosis(torch.tensor([[0.0, 0.0, 0.0, 8.0]])).item()
    2.3333333333333335
    """
    return torch.cat([_kurtosis(block) for block in blocks(representations(h))])


def centred_kurtosis(h: Tensor | Embeddings) -> Tensor:
    """:func:`vector_kurtosis` of h without its mean over images: what is left when the features that are always large are taken out.

    The mean is over the vectors without nan or inf.

    >>> h = torch.randn(100, 64)
    >>> h[:, 5] += 100  # large in every image alike
    >>> bool(vector_kurtosis(h).mean() > 50), bool(centred_kurtosis(h).mean() < 4)
    (True, True)
    """
    h = representations(h)
    shift = total = torch.zeros(h.shape[1], dtype=torch.float64, device=h.device)
    count = 0
    for block in blocks(h):
        finite = block[block.isfinite().all(-1)]
        if not count and len(finite):
            shift = finite[0]  # so that vectors that are all the same leave exactly nothing
        total = total + (finite - shift).sum(0)
        count += len(finite)
    return torch.cat([_kurtosis(block - shift - total / max(1, count)) for block in blocks(h)])


def peaks(h: Tensor | Embeddings) -> Tensor:
    """max|h_i| / mean|h_i| of each vector: how far the largest feature is above the average one.

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
    """Mean vector kurtosis after random rotations: near 3(d − 1)/(d + 1) unless the vectors themselves are far from Gaussian.

    Attributes:
        mean: over the rotations.
        std: population standard deviation over the rotations.
        values: float64 (rotations,), the mean over vectors after each.
    """

    mean: float
    std: float
    values: Tensor


def rotation_control(h: Tensor | Embeddings, rotations: int = ROTATIONS, seed: int = 0) -> RotationControl:
    """Is it the axes? The mean vector kurtosis when the features are mixed by a random rotation, several times over.

    A rotation keeps every length and angle and forgets only which directions were the axes; it is uniform (Haar), see
    :func:`torchprobe.dissection.random_rotation`. Outlier features owe their kurtosis to the axes, so it falls to the Gaussian value.

    Args:
        h: (n, d), or embeddings; vectors that are constant or not finite are left out.
        rotations: how many.
        seed: rotation i is drawn with seed + i.

    Raises:
        ValueError: ``h`` is not (n, d), or ``rotations`` below 1.

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
    values = []
    for rotation in range(rotations):
        m = Moments(d, h.device)
        turned = random_rotation(d, seed + rotation).to(h.device)
        for block in blocks(h):
            # Constant vectors would not stay constant; scale means nothing to kurtosis, and at 1 nothing over- or underflows in float32.
            block = block[block.isfinite().all(-1) & (block != block[:, :1]).any(-1)]
            unit = block / block.abs().amax(-1, keepdim=True)
            m.update(unit.float() @ turned)
        values.append(m.vector_kurtosis)
    array = np.array(values)
    return RotationControl(float(array.mean()), float(array.std()), torch.from_numpy(array))


@dataclass(frozen=True)
class KurtosisSummary:
    """The vector kurtosis of a representation and everything it is read against.

    Attributes:
        mean: over the vectors that have one, the number of the model.
        median: a few extreme vectors lift the mean and leave this.
        std: population standard deviation over vectors.
        interval: 95 % bootstrap interval of the mean; see :func:`torchprobe.analysis.intervals.bootstrap_interval`.
        gaussian: what independent Gaussian features give, 3(d − 1)/(d + 1).
        gaussian_std: its standard deviation from vector to vector.
        ceiling: the most d features can have, (d² − 3d + 3)/(d − 1).
        rotation: the mean under random rotations.
        centred: the mean of :func:`centred_kurtosis`.
        peak: mean over vectors of max|h_i| / mean|h_i|.
        nonnegative: no feature is ever negative, as after a ReLU, where 5 to 9 needs no outlier.
        features: d.
        vectors: how many have a kurtosis.
        constant_vectors: left out because all their features are equal.
        invalid_vectors: left out because of nan or inf.
    """

    mean: float
    median: float
    std: float
    interval: tuple[float, float]
    gaussian: float
    gaussian_std: float
    ceiling: float
    rotation: RotationControl
    centred: float
    peak: float
    nonnegative: bool
    features: int
    vectors: int
    constant_vectors: int
    invalid_vectors: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        rotation = {"mean": self.rotation.mean, "std": self.rotation.std, "values": self.rotation.values.tolist()}
        return {**vars(self), "interval": list(self.interval), "interval_level": LEVEL, "rotation": rotation}


def summarise(h: Tensor | Embeddings, rotations: int = ROTATIONS, seed: int = 0) -> KurtosisSummary:
    """The vector kurtosis of a representation with its controls.

    Args:
        h: (n, d), one vector per image; or embeddings.
        rotations: of the rotation control.
        seed: of the bootstrap, and of the rotations.

    Raises:
        ValueError: as :func:`rotation_control`.

    >>> summary = summarise(torch.randn(500, 64))
    >>> summary.interval[0] < summary.mean < summary.interval[1], abs(summary.mean - summary.gaussian) < 0.2
    (True, True)
    """
    h = representations(h)
    kappa = vector_kurtosis(h).cpu().numpy()
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
        centred=float(centred_kurtosis(h).nanmean()),
        peak=float(peaks(h).nanmean()),
        nonnegative=bool(len(h)) and all(bool((block >= 0).all()) for block in blocks(h)),
        features=d,
        vectors=known.size,
        constant_vectors=len(kappa) - known.size - invalid,
        invalid_vectors=invalid,
    )


def _kurtosis(block: Tensor) -> Tensor:
    largest = block.abs().amax(-1, keepdim=True)
    block = block / largest.clamp_min(torch.finfo(block.dtype).tiny)  # so that no fourth power over- or underflows
    deviation = block - block.mean(-1, keepdim=True)
    deviation -= deviation.mean(-1, keepdim=True)  # what rounding left of a large mean
    square = deviation.square()
    constant = (block == block[:, :1]).all(-1)
    return (square.square().mean(-1) / square.mean(-1).square()).where(~constant, math.nan)
