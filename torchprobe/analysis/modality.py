"""The modality gap: how far apart two kinds of inputs, such as images and captions, lie in the space that they share.

All vectors are scaled to length 1. The gap is the difference of the means of the two sets, and its length is the usual measure (Liang et
al., "Mind the Gap", NeurIPS 2022, arXiv 2203.02053). A few features carry most of it (Schrodi et al., "Two Effects, One Trigger", ICLR
2025, arXiv 2404.07983; the relative gap is theirs too).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from torchprobe.analysis.inputs import Vectors, representations
from torchprobe.analysis.resampling import LEVEL

SEPARATED = 20
"""Features of which it is measured how well each of them alone separates the two sets."""

FEWEST = 20
"""Vectors of each set that the interval needs."""

CLEAR = 2.0
"""The interval needs a gap of so many times the length by chance: near 0, a length is not normally distributed."""

_BLOCK = 1 << 20  # numbers at a time


@dataclass(frozen=True)
class ModalityGap:
    """The gap between two sets of vectors of length 1.

    Attributes:
        length: of the difference of the means: 0 if they agree, 2 if each set is one point and they are opposite.
        interval: at the level :data:`torchprobe.analysis.resampling.LEVEL`, of the length over more such vectors. Sampling noise makes the
            length itself a little too large, so the interval lies around the length without it. nan for fewer than :data:`FEWEST` vectors
            or a length below :data:`CLEAR` times ``by_chance``.
        by_chance: root mean square of the length if it made no difference which vector is in which set.
        relative: mean distance of pairs / (mean distance within a set + mean distance of pairs), of cosine distances. 0 if the members of
            each pair agree, ½ if they are as far apart as two of one set. nan without pairs.
        paired_cosine: mean cosine of pairs; nan without pairs.
        unpaired_cosine: mean cosine of a vector of one set and another vector of the other.
        within: mean cosine of two different vectors of the first set, and of the second.
        difference: the gap, float64 (d,): mean of the first set minus mean of the second.
        share: Δ_i² / Σ Δ², the share of each feature, float64 (d,).
        effective_features: 1 / Σ share²: d if all carry the same, 1 if one carries all.
        means: of the two sets, float64 (2, d).
        separation: float64 (d,): the probability that feature i alone tells a vector of one set from one of the other (area under the ROC
            curve, ½ … 1). nan for all but the :data:`SEPARATED` features with the largest share.
        pairs: number of pairs, 0 if the sets are not paired.
        vectors: numbers of vectors counted.
        left_out: numbers of vectors (of both sets together, or pairs) left out because of zeros, nan or inf.
    """

    length: float
    interval: tuple[float, float]
    by_chance: float
    relative: float
    paired_cosine: float
    unpaired_cosine: float
    within: tuple[float, float]
    difference: Tensor
    share: Tensor
    effective_features: float
    means: Tensor
    separation: Tensor
    pairs: int
    vectors: tuple[int, int]
    left_out: int

    def order(self) -> Tensor:
        """The features, int64 (d,), that with the largest share first."""
        return self.share.argsort(descending=True, stable=True)

    def carrying(self, share: float) -> int:
        """The smallest number of features that carry this share of the squared length."""
        total = self.share[self.order()].cumsum(0)
        return int((total < share * (1 - 1e-12)).sum()) + 1


def modality_gap(a: Vectors, b: Vectors, paired: bool = True) -> ModalityGap:
    """The gap between two sets of vectors in one space.

    Args:
        a, b: (n, d) and (m, d), such as images and their captions.
        paired: row i of the one belongs to row i of the other; then n = m.

    Raises:
        ValueError: other shapes, or fewer than two vectors of a set that are finite and not zero.

    >>> images, captions = torch.eye(4)[:2].repeat(10, 1), torch.eye(4)[2:].repeat(10, 1)
    >>> gap = modality_gap(images, captions)
    >>> round(gap.length, 6), gap.carrying(0.5), round(gap.effective_features, 6)
    (1.0, 2, 4.0)
    """
    a, b = representations(a), representations(b)
    if a.shape[1] != b.shape[1] or (paired and len(a) != len(b)):
        raise ValueError(f"the two sets must share a space{', row by row' if paired else ''}; got {tuple(a.shape)} and {tuple(b.shape)}")
    usable = [torch.cat([rows.isfinite().all(1) & (rows != 0).any(1) for rows in _split(h)]) for h in (a, b)]
    if paired:
        usable = [usable[0] & usable[1]] * 2
    n, m = (int(one.sum()) for one in usable)
    if min(n, m) < 2:
        raise ValueError(f"a gap needs two vectors of each set that are finite and not zero, got {n} and {m}")
    sums = torch.stack([_sum(h, kept) for h, kept in zip((a, b), usable, strict=True)])
    means = sums / torch.tensor([[n], [m]])
    difference = means[0] - means[1]
    length = float(difference.norm())
    share = difference.square() / max(length**2, math.ulp(0.0))
    spread = [count * (1 - float(mean.square().sum())) for count, mean in zip((n, m), means, strict=True)]  # Σ ‖x − mean‖²
    within = [(float(total.square().sum()) - count) / (count * (count - 1)) for total, count in zip(sums, (n, m), strict=True)]
    along = difference / max(length, math.ulp(0.0))
    places = [_places(h, kept, along) for h, kept in zip((a, b), usable, strict=True)]
    cross = float(sums[0] @ sums[1])
    if paired:
        dot = sum(float((x * y).sum()) for x, y in zip(_units(a, usable[0]), _units(b, usable[1]), strict=True))
        chance = math.sqrt(max(0.0, 2 * n - 2 * dot)) / n
        noise = max(0.0, 2 * n - 2 * dot - n * length**2) / (n * (n - 1))
        error = float((places[0] - places[1]).var()) / n
        pair, unpaired = dot / n, (cross - dot) / (n * (n - 1))
        relative = (1 - pair) / max(1 - (within[0] + within[1]) / 2 + 1 - pair, math.ulp(0.0))
    else:
        whole = (sum(spread) + n * m / (n + m) * length**2) / (n + m - 1)
        chance = math.sqrt(whole * (1 / n + 1 / m))
        noise = spread[0] / (n * (n - 1)) + spread[1] / (m * (m - 1))
        error = float(places[0].var()) / n + float(places[1].var()) / m
        pair, unpaired, relative = math.nan, cross / (n * m), math.nan
    interval = (math.nan, math.nan)
    if min(n, m) >= FEWEST and length > CLEAR * chance:
        middle, reach = math.sqrt(max(0.0, length**2 - noise)), _quantile(min(n, m) - 1) * math.sqrt(error)
        interval = (middle - reach, middle + reach)
    separation = torch.full_like(share, math.nan)
    for feature in share.argsort(descending=True, stable=True)[:SEPARATED].tolist():
        separation[feature] = _separation(*(_feature(h, kept, feature) for h, kept in zip((a, b), usable, strict=True)))
    left_out = len(a) - n if paired else len(a) - n + len(b) - m
    return ModalityGap(
        length=length,
        interval=interval,
        by_chance=chance,
        relative=relative,
        paired_cosine=pair,
        unpaired_cosine=unpaired,
        within=(within[0], within[1]),
        difference=difference,
        share=share,
        effective_features=1 / max(float(share.square().sum()), math.ulp(0.0)),
        means=means,
        separation=separation,
        pairs=n if paired else 0,
        vectors=(n, m),
        left_out=left_out,
    )


def _split(h: Tensor) -> Sequence[Tensor]:
    return tuple(h.split(max(1, _BLOCK // h.shape[1])))


def _units(h: Tensor, kept: Tensor) -> Iterator[Tensor]:
    """Blocks of the vectors that are kept, float64, of length 1."""
    for rows, chosen in zip(_split(h), kept.split(max(1, _BLOCK // h.shape[1])), strict=True):
        block = rows[chosen].double().cpu()
        block = block / block.abs().amax(1, keepdim=True)  # so that no square over- or underflows
        yield block / torch.linalg.vector_norm(block, dim=1, keepdim=True)


def _sum(h: Tensor, kept: Tensor) -> Tensor:
    total = torch.zeros(h.shape[1], dtype=torch.float64)
    for rows in _units(h, kept):
        total += rows.sum(0)
    return total


def _places(h: Tensor, kept: Tensor, along: Tensor) -> Tensor:
    """Where each vector lies along a direction."""
    return torch.cat([rows @ along for rows in _units(h, kept)])


def _feature(h: Tensor, kept: Tensor, feature: int) -> Tensor:
    return torch.cat([rows[:, feature] for rows in _units(h, kept)])


def _separation(a: Tensor, b: Tensor) -> float:
    """The area under the ROC curve of one number, on the better side; equal numbers count one half."""
    _, place, count = torch.cat([a, b]).unique(return_inverse=True, return_counts=True)
    rank = count.double().cumsum(0) - (count - 1) / 2
    area = (float(rank[place[: len(a)]].sum()) - len(a) * (len(a) + 1) / 2) / (len(a) * len(b))
    return max(area, 1 - area)


def _quantile(freedom: int) -> float:
    """Student's t of the level of an interval, by its expansion around the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
