"""How well a unit and a concept agree over images: the measures of CLIP-Dissect, and average precision.

The source of the formulas is Oikarinen & Weng, CLIP-Dissect (ICLR 2023, https://arxiv.org/abs/2204.10965), section 3 and appendix A; the
defaults are those of its published code. A unit gives each image one score. A concept gives each image one soft label, the cosine of the
image and the concept in the labeler. All numbers are float64.

Where the published code depends on a random draw or on a constant of its own scale, the measure here does not:

* cosine cubed has no least length of a vector (the code: 0.001), so the scale of units and labels does not matter;
* rank reorder divides by the expected error of a random order, not by that of five random orders;
* images of equal score are in a random order, the same in every run. In the order of their files, the images of one class come together: a
  unit that is 0 for nearly all images, as after a ReLU, would agree with the classes that come first, and significantly so;
* a unit with equal scores for all images agrees with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from torchprobe.dissection.average_precision import average_precision, support
from torchprobe.dissection.nulls import correct, p_values
from torchprobe.dissection.ranking import top_images

BLOCK = 256
"""Units that are compared with all concepts at a time."""

_FACTORS = 32  # probabilities that are multiplied before a logarithm is taken; their product stays above 1e-230
_DRAWS = 256  # random sets of images for the scale of a concept


class Matcher(Protocol):
    """A measure of some scores and soft labels.

    ``statistic`` is what a permutation of the images is judged by. It grows with the measure, and it is on one scale for all pairs, so that
    a maximum over pairs is not that of the pair with the widest null.
    """

    def score(self) -> Tensor:
        """The measure, float64 (units, concepts); nan where it is undefined."""

    def statistic(self, units: slice, order: Tensor) -> Tensor:
        """Float64 (units, concepts) if image i had the soft labels of image ``order[i]``; nan where the measure is undefined."""


class Measure(Protocol):
    """What :data:`MEASURES` holds."""

    name: ClassVar[str]

    def of(self, scores: Tensor, labels: Tensor) -> Matcher:
        """The measure of scores (units, images) and soft labels (images, concepts)."""


class Exact(NamedTuple):
    """A measure with a known null: ``score``, ``p`` of each pair alone, and ``adjusted`` for all pairs; float64 (units, concepts)."""

    score: Tensor
    p: Tensor
    adjusted: Tensor


# -- cosine cubed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CosineCubed:
    """The cosine of centered and cubed vectors over the images. The cube stresses images that stand out. From −1 to 1; nan if the scores or
    the soft labels of all images are equal.

    >>> CosineCubed().of(torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.1], [0.1], [0.3]])).score().round(decimals=3)
    tensor([[0.9830]], dtype=torch.float64)
    """

    name: ClassVar[str] = "cosine_cubed"

    def of(self, scores: Tensor, labels: Tensor) -> Matcher:
        return _Cubes(scores, labels)


class _Cubes:
    def __init__(self, scores: Tensor, labels: Tensor) -> None:
        self.scores, self.labels = scores, _cubes(labels.T)
        images = scores.shape[1]
        self._label_mean, self._label_spread = _moments(self.labels)
        self._images = images

    def score(self) -> Tensor:
        return torch.cat([_cubes(part) @ self.labels.T for part in self.scores.split(BLOCK)])

    def statistic(self, units: slice, order: Tensor) -> Tensor:
        # Mean and variance of Σ x_i y_order(i) over all orders are known exactly.
        cubes = _cubes(self.scores[units])
        mean, spread = _moments(cubes)
        expected = self._images * mean[:, None] * self._label_mean
        deviation = (spread[:, None] * self._label_spread / max(self._images - 1, 1)).sqrt()
        # The scores are permuted in place of the labels: there are fewer in a block.
        permuted = torch.empty_like(cubes)
        permuted[:, order] = cubes
        return _standardized(permuted @ self.labels.T, expected, deviation)


def _cubes(rows: Tensor) -> Tensor:
    """Rows, centered, cubed and of length 1; rows of equal values become nan."""
    rows = rows.double()
    constant = rows.amax(1) == rows.amin(1)
    # First brought near 1 by a power of two, which is exact, so that nothing over- or underflows.
    exponent = rows.abs().amax(1, keepdim=True).frexp().exponent.clamp(-1000, 1000)
    rows = rows.ldexp(-exponent).where(~constant[:, None], torch.nan)
    centered = rows - rows.mean(1, keepdim=True)
    cubes = (centered / centered.abs().amax(1, keepdim=True)) ** 3
    unit: Tensor = cubes / torch.linalg.vector_norm(cubes, dim=1, keepdim=True)
    return unit


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each row, and the sum of squared distances from it."""
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().sum(1)


# -- pointwise mutual information --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftWPMI:
    """Weighted pointwise mutual information of a concept and the top images of a unit, of which the first are the most certain.

    log p(d | e) − λ log p(d). Here p(d | e) = ∏ (1 + w_r (P_r − 1) + ε) over the top images r. P_r is the softmax over concepts of
    ``scale`` times the soft labels of image r. w_r falls linearly, from ``first`` by (``first`` − ``last``) / ``top`` for each image.
    p(d) is the mean of p(d | e) over all units.

    The measure of a unit depends on the other units through p(d), and on the other concepts through the softmax. Its p-value does not
    depend on the other units: for one concept, the measure grows with p(d | e). A unit whose scores are equal for all images has no top
    images: its measure is nan, and p(d) leaves it out.

    Args:
        top: number of images; all images if there are fewer.
        scale: of the soft labels in the softmax.
        weight: λ.
        first, last: see above.
        floor: ε.

    Raises:
        ValueError: there is only one concept, with which none is compared.
    """

    name: ClassVar[str] = "soft_wpmi"
    top: int = 100
    scale: float = 10.0
    weight: float = 1.0
    first: float = 0.998
    last: float = 0.97
    floor: float = 1e-7

    def of(self, scores: Tensor, labels: Tensor) -> Matcher:
        count = min(self.top, scores.shape[1])
        weights = self.first - torch.arange(count, dtype=torch.float64) / count * (self.first - self.last)
        return _Information(scores, labels, weights, self.scale, self.weight, self.floor)


@dataclass(frozen=True)
class WPMI:
    """Weighted pointwise mutual information of a concept and the top images of a unit: :class:`SoftWPMI` in which all of them are certain,
    p(d | e) = ∏ (P_r + ε).

    Args:
        top, scale, weight, floor: see :class:`SoftWPMI`.

    Raises:
        ValueError: there is only one concept, with which none is compared.
    """

    name: ClassVar[str] = "wpmi"
    top: int = 28
    scale: float = 2.0
    weight: float = 0.6
    floor: float = 1e-7

    def of(self, scores: Tensor, labels: Tensor) -> Matcher:
        weights = torch.ones(min(self.top, scores.shape[1]), dtype=torch.float64)
        return _Information(scores, labels, weights, self.scale, self.weight, self.floor)


class _Information:
    def __init__(self, scores: Tensor, labels: Tensor, weights: Tensor, scale: float, weight: float, floor: float) -> None:
        images, concepts = labels.shape
        if concepts < 2:
            raise ValueError("mutual information compares concepts, and there is only one: choose another measure")
        self.weights, self.weight, self.floor = weights, weight, floor
        self.probability = torch.softmax(scale * labels.double(), 1)
        self.top, self._varies = _top(scores, len(weights)), scores.amax(1) != scores.amin(1)
        # All units have the same null, that of random images. Its mean and spread only put the concepts on one scale.
        generator = torch.Generator().manual_seed(0)
        draws = torch.stack([torch.randperm(images, generator=generator)[: len(weights)] for _ in range(_DRAWS)])
        self._deviation, self._expected = torch.std_mean(self._log_given(draws), 0)

    def score(self) -> Tensor:
        given = torch.cat([self._log_given(part) for part in self.top.split(BLOCK)])
        varying = given[self._varies]
        measure = given - self.weight * (varying.logsumexp(0) - float(np.log(max(1, len(varying)))))
        return measure.where(self._varies[:, None], torch.nan)

    def statistic(self, units: slice, order: Tensor) -> Tensor:
        value = _standardized(self._log_given(order[self.top[units]]), self._expected, self._deviation)
        return value.where(self._varies[units][:, None], torch.nan)

    def _log_given(self, images: Tensor) -> Tensor:
        """log p(d | e) of sets of images (sets, top)."""
        result = torch.zeros(len(images), self.probability.shape[1], dtype=torch.float64)
        for start in range(0, len(self.weights), _FACTORS):
            product = torch.ones_like(result)
            for r in range(start, min(start + _FACTORS, len(self.weights))):
                w = float(self.weights[r])
                product *= self.probability[images[:, r]] * w + (1 - w + self.floor)
            result += product.log()
        return result


# -- rank reorder ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankReorder:
    """How far the scores of the top images of a unit change when they are put into the order of the concept.

    The measure is −E / m^q. E is the mean of |t_i − t'_i|^p over the top images, divided by its expectation in a random order; t are the
    scores of the unit, t' the same scores in the order of the concept. m is the mean soft label of these images. It is −∞ where m ≤ 0, and
    nan where the top images have equal scores.

    Args:
        share: of the images, rounded down; at least two images are taken.
        power: p.
        label_power: q.
    """

    name: ClassVar[str] = "rank_reorder"
    share: float = 0.05
    power: float = 3.0
    label_power: float = 0.5

    def of(self, scores: Tensor, labels: Tensor) -> Matcher:
        count = min(scores.shape[1], max(2, int(self.share * scores.shape[1])))
        return _Reordered(scores, labels, count, self.power, self.label_power)


class _Reordered:
    def __init__(self, scores: Tensor, labels: Tensor, count: int, power: float, label_power: float) -> None:
        images = labels.shape[0]
        self.power, self.label_power = power, label_power
        self.labels = labels.double().contiguous()
        # Rank times count, plus a position, must fit into the type.
        kind = torch.int32 if images * count < 2**31 else torch.int64
        self.rank = torch.empty(labels.shape, dtype=kind)
        index = torch.arange(images, dtype=kind)[:, None].expand_as(self.rank)
        order = mixed(images)
        self.rank.scatter_(0, order[self.labels[order].argsort(dim=0, stable=True)], index)
        self._typical = self.labels.abs().mean(0)
        self.top = _top(scores, count)
        values = scores.double().gather(1, self.top)
        values = values - values[:, -1:]
        self.values = values / values[:, :1].where(values[:, :1] > 0, torch.nan)  # from 1 down to 0
        self._baseline, self._deviation = self._null()

    def _null(self) -> tuple[Tensor, Tensor]:
        """The expected error of a random order, and the standard deviation of the error divided by it (Hoeffding 1951), (units,)."""
        count = self.values.shape[1]
        found = []
        for values in self.values:
            distance = (values[:, None] - values).abs() ** self.power
            baseline = distance.mean()
            centered = distance - distance.mean(0) - distance.mean(1, keepdim=True) + baseline
            found.append(torch.stack([baseline, centered.square().sum().div(max(count - 1, 1)).sqrt() / (count * baseline)]))
        baseline, deviation = torch.stack(found).unbind(1)
        return baseline, deviation

    def score(self) -> Tensor:
        parts = []
        for unit in range(len(self.top)):
            error, mean = self._error(unit, self.top[unit])
            parts.append((-error / mean.clamp(min=0) ** self.label_power).where((mean > 0) | error.isnan(), -torch.inf))
        return torch.stack(parts)

    def statistic(self, units: slice, order: Tensor) -> Tensor:
        parts = []
        for unit in range(len(self.top))[units]:
            error, mean = self._error(unit, order[self.top[unit]])
            relative = error * (self._typical / mean.clamp(min=0)) ** self.label_power
            value = _standardized(1 - relative, torch.zeros(()), self._deviation[unit])
            parts.append(value.where((mean > 0) | error.isnan(), -torch.inf))
        return torch.stack(parts)

    def _error(self, unit: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """E of a unit for each concept, with these images in place of its top images; and their mean soft label."""
        values, count = self.values[unit], len(images)
        # Rank and position in one integer: sorting these alone is several times as fast as sorting with indices.
        positions = torch.arange(count, dtype=self.rank.dtype)[:, None]
        keys = self.rank[images].mul_(count).add_(positions).T.contiguous().numpy()
        keys.sort(axis=1)
        position = torch.from_numpy(keys).remainder_(count)
        moved = values.index_select(0, position.flatten()).view(position.shape)
        error = (moved - values.flip(0)).abs_().pow_(self.power).mean(1)
        return error / self._baseline[unit], self.labels[images].mean(0)


# -- average precision -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopPrecision:
    """Average precision of the unit, if the images with the highest soft labels are those that show the concept. From 0 to 1.

    Its null is that of :func:`torchprobe.dissection.p_values`, corrected by Holm's method: no permutations are needed. Ties among scores
    make these p-values conservative.

    Args:
        share: of the images that count as showing a concept, rounded; at least one.
    """

    name: ClassVar[str] = "average_precision"
    share: float = 0.05

    def exact(self, scores: Tensor, labels: Tensor) -> Exact:
        """The measure and its p-values."""
        images, concepts = labels.shape
        count = max(1, round(self.share * images))
        shown = torch.zeros(concepts, images, dtype=torch.bool)
        shown.scatter_(1, _top(labels.T, count), True)
        shown = shown.T.contiguous()
        ap = torch.cat([average_precision(part.contiguous(), shown) for part in scores.split(BLOCK)])
        p = p_values(ap, support(shown))
        return Exact(ap, p, correct(p))


AnyMeasure = CosineCubed | SoftWPMI | WPMI | RankReorder | TopPrecision

MEASURES: dict[str, AnyMeasure] = {kind.name: kind() for kind in (SoftWPMI, WPMI, CosineCubed, RankReorder, TopPrecision)}
"""Name → measure with its defaults."""


def _top(rows: Tensor, count: int) -> Tensor:
    """The images with the highest values of each row, int64 (rows, count), highest first; of equal ones as :func:`mixed` orders them."""
    order = mixed(rows.shape[1])
    place = torch.arange(len(order))
    return torch.cat([order[top_images(part[:, order], place, count)[0]] for part in rows.split(BLOCK)])


def mixed(images: int) -> Tensor:
    """A random order of the images, the same in every run: so what is equal is in no relation to the folders of the images."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(0x71E5))


def _standardized(value: Tensor, expected: Tensor, deviation: Tensor) -> Tensor:
    """0 where the value cannot vary, nan where it is undefined."""
    varies = (deviation > 1e-10 * (1 + expected.abs())) | deviation.isnan()
    return torch.where(varies, (value - expected) / deviation, value * 0)


def check_inputs(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (units, images) and soft labels (images, concepts) on the CPU, checked.

    Raises:
        ValueError: the shapes do not fit together, or a value is not finite; the message says where.

    >>> check_inputs(torch.tensor([[1.0, float("nan")]]), torch.zeros(2, 3))
    Traceback (most recent call last):
    ValueError: the score of unit 0 for image 1 is nan
    """
    if scores.dim() != 2 or labels.dim() != 2 or scores.shape[1] != labels.shape[0] or 0 in scores.shape or 0 in labels.shape:
        raise ValueError(
            f"expected scores (units, images) and soft labels (images, concepts), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not scores.is_floating_point() or not labels.is_floating_point():
        raise ValueError(f"expected floating point numbers, got {scores.dtype} and {labels.dtype}")
    scores, labels = scores.detach().cpu(), labels.detach().cpu()
    for what, part in ((("score of unit", "for image"), scores), (("soft label of image", "for concept"), labels)):
        if not bool((sound := part.isfinite()).all()):
            row, column = divmod(int(sound.flatten().int().argmin()), part.shape[1])
            raise ValueError(f"the {what[0]} {row} {what[1]} {column} is {float(part[row, column])}")
    return scores, labels
