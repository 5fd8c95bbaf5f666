"""Summaries of a table of scores: detectors, concepts, and concepts per unit. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("paper", "report")
THRESHOLD = 0.04
"""The smallest IoU of a detector in the original (Bau et al., Network Dissection, CVPR 2017)."""


class Best(NamedTuple):
    """The best label of each unit within each category: ``label`` int64 (units, categories), −1 where every IoU is 0, and its ``iou``."""

    label: Tensor
    iou: Tensor


class Detectors(NamedTuple):
    """``unique``: distinct labels that units detect, as the rule counts them; ``detectors``: units that detect something.

    ``by_category``: name → (distinct labels, units) in that category.
    """

    unique: int
    detectors: int
    by_category: dict[str, tuple[int, int]]


def best_labels(iou: Tensor, category: Tensor, categories: int) -> Best:
    """The label of highest IoU for each unit and category; of equal labels the first.

    Args:
        iou: (units, labels).
        category: int64 (labels,), 0 … categories − 1; negative for a label to leave out, such as 0, the unlabeled.

    >>> best_labels(torch.tensor([[0.0, 0.3, 0.1, 0.0]]), torch.tensor([-1, 0, 0, 1]), 2)
    Best(label=tensor([[ 1, -1]]), iou=tensor([[0.3000, 0.0000]]))
    """
    if iou.dim() != 2 or category.shape != iou.shape[1:]:
        raise ValueError(f"iou must be (units, labels) and category (labels,), got {tuple(iou.shape)} and {tuple(category.shape)}")
    label = torch.full((iou.shape[0], categories), -1, dtype=torch.int64, device=iou.device)
    value = torch.zeros(iou.shape[0], categories, dtype=iou.dtype, device=iou.device)
    for c in range(categories):
        numbers = (category == c).nonzero().squeeze(1)
        if len(numbers):
            value[:, c], first = first_best(iou[:, numbers])
            label[:, c] = numbers[first].where(value[:, c] > 0, -1)
    return Best(label, value)


def first_best(table: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and the index of its first occurrence; argmax may take any of equal values.

    >>> first_best(torch.tensor([[1.0, 3.0, 3.0]]))
    (tensor([3.]), tensor([1]))
    """
    if not table.shape[1]:
        return table.new_zeros(len(table)), torch.zeros(len(table), dtype=torch.int64)
    value = table.amax(1)
    return value, (table == value[:, None]).int().cumsum(1).eq(1).int().argmax(1)


def unique_detectors(
    iou: Tensor, category: Tensor, categories: Sequence[str], rule: str = "paper", threshold: float = THRESHOLD
) -> Detectors:
    """The number of concepts that units of a layer detect. The original counts in two ways.

    "paper": as in the figures of the paper. In each category a unit counts with its best label there if that IoU is above ``threshold``, so
    it may count in several categories. ``unique`` is the number of distinct labels, summed over categories.
    "report": as in the HTML report of the original. A unit counts once, with its best label overall, if that IoU reaches ``threshold``.
    ``unique`` is the number of distinct labels, and ``by_category`` splits it.

    With both rules ``detectors`` is the number of units that count at least once.

    Args:
        iou: (units, labels).
        category: int64 (labels,), see :func:`best_labels`.
        categories: names of the categories.

    >>> iou, category = torch.tensor([[0.0, 0.3, 0.1], [0.0, 0.2, 0.0]]), torch.tensor([-1, 0, 1])
    >>> unique_detectors(iou, category, ["object", "color"])
    Detectors(unique=2, detectors=2, by_category={'object': (1, 2), 'color': (1, 1)})
    >>> unique_detectors(iou, category, ["object", "color"], rule="report").unique
    1
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    best = best_labels(iou, category, len(categories))
    if rule == "paper":
        counted = best.iou > threshold
    else:
        counted = (best.iou >= threshold) & (best.iou == best.iou.amax(1, keepdim=True))
        counted &= counted.cumsum(1) == 1  # of equal values only the first
    by_category = {name: (len(best.label[counted[:, c], c].unique()), int(counted[:, c].sum())) for c, name in enumerate(categories)}
    return Detectors(sum(unique for unique, _ in by_category.values()), int(counted.any(1).sum()), by_category)


def encoded(
    ap: Tensor,
    adjusted_p: Tensor,
    threshold: float = 0.9,
    alpha: float = 0.05,
    prevalence: Tensor | None = None,
    gain_threshold: float | None = None,
) -> Tensor:
    """Which unit encodes which concept: an AP of at least ``threshold``, a p-value of at most ``alpha``, and a gain over the prevalence π,
    (AP − π) / (1 − π), of at least ``gain_threshold``. Bool (units, concepts).

    A threshold of AP alone is not enough: a concept that nearly all images show has a high AP for any unit. Nor is significance: among
    60,000 images, a weak relation to a concept that 70 % of them show is significant and has an AP of 0.9.

    Args:
        ap, adjusted_p: (units, concepts); the p-values are corrected for multiple tests, see :func:`torchprobe.dissection.correct`.
        prevalence: (concepts,), see :func:`torchprobe.dissection.support`. Without it the gain does not count.
        gain_threshold: default: :func:`default_gain`.

    >>> encoded(torch.tensor([[0.98, 0.95, float("nan")]]), torch.tensor([[0.7, 1e-9, float("nan")]]))
    tensor([[False,  True, False]])
    >>> encoded(torch.tensor([[0.92, 0.92]]), torch.tensor([[1e-9, 1e-9]]), prevalence=torch.tensor([0.7, 0.1]))
    tensor([[False,  True]])
    """
    found = (ap >= threshold) & (adjusted_p <= alpha)
    if prevalence is None:
        return found
    least = default_gain(threshold) if gain_threshold is None else gain_threshold
    # Gain ≥ g, without a division: rounding must not drop an AP that is exactly at both thresholds.
    return found & (ap - prevalence >= least * (1 - prevalence) - 1e-12) & (prevalence < 1)


def default_gain(threshold: float) -> float:
    """2 · threshold − 1: the gain that this AP has for a concept that half of the images show.

    So the threshold of AP decides for all rarer concepts, and the threshold of gain for all more frequent ones. The choice is ours.

    >>> round(default_gain(0.9), 12)
    0.8
    """
    return 2 * threshold - 1


def unique_concepts(pairs: Tensor) -> Tensor:
    """The concepts that at least one unit encodes, ascending, from bool (units, concepts).

    >>> unique_concepts(torch.tensor([[True, False, True], [True, False, False]]))
    tensor([0, 2])
    """
    return pairs.any(0).nonzero().squeeze(1)


def polysemanticity(pairs: Tensor) -> Tensor:
    """The number of concepts that each unit encodes, int64 (units,), from bool (units, concepts).

    >>> polysemanticity(torch.tensor([[True, False, True], [False, False, False]]))
    tensor([2, 0])
    """
    return pairs.sum(1)
