"""What a table of scores comes to: detectors, concepts, and how many of them a unit shares. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("paper", "report")
THRESHOLD = 0.04
"""IoU from which a unit is called a detector in the original (Bau et al., Network Dissection, CVPR 2017)."""


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
    """The label of highest IoU for each unit and category; of equals the lowest number.

    Args:
        iou: (units, labels).
        category: int64 (labels,), 0 … categories − 1, negative for a label that takes no part, such as 0, the unlabelled.

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
            scores = iou[:, numbers]
            # No argmax: which of equals it takes is not said.
            first = (scores == scores.amax(1, keepdim=True)).int().cumsum(1).eq(1).int().argmax(1)
            value[:, c] = scores.gather(1, first[:, None])[:, 0]
            label[:, c] = numbers[first].where(value[:, c] > 0, -1)
    return Best(label, value)


def unique_detectors(
    iou: Tensor, category: Tensor, categories: Sequence[str], rule: str = "paper", threshold: float = THRESHOLD
) -> Detectors:
    """How many concepts a layer has detectors for. The original counts in two ways.

    "paper": the figures of the paper. In each category a unit counts by its best label there if that IoU is above ``threshold``, so it may
    count in several; ``unique`` is the sum over categories of the distinct labels.
    "report": the original's HTML report. A unit counts once, by its best label overall, if that IoU reaches ``threshold``; ``unique`` are
    the distinct ones of these labels, and ``by_category`` splits them up.

    In either case ``detectors`` are the units with at least one.

    Args:
        iou: (units, labels).
        category: int64 (labels,), see :func:`best_labels`.
        categories: their names.

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
        counted &= counted.cumsum(1) == 1  # of equals one
    by_category = {name: (len(best.label[counted[:, c], c].unique()), int(counted[:, c].sum())) for c, name in enumerate(categories)}
    return Detectors(sum(unique for unique, _ in by_category.values()), int(counted.any(1).sum()), by_category)


def encoded(ap: Tensor, adjusted_p: Tensor, threshold: float = 0.9, alpha: float = 0.05) -> Tensor:
    """Which unit encodes which concept: AP of at least ``threshold``, and beyond chance. Bool (units, concepts).

    A threshold alone says little: a concept that nearly all images show has a high AP for any unit.

    Args:
        ap, adjusted_p: (units, concepts); the p-values corrected for being many, see :func:`torchprobe.dissection.correct`.

    >>> encoded(torch.tensor([[0.98, 0.95, float("nan")]]), torch.tensor([[0.7, 1e-9, float("nan")]]))
    tensor([[False,  True, False]])
    """
    return (ap >= threshold) & (adjusted_p <= alpha)


def unique_concepts(pairs: Tensor) -> Tensor:
    """The concepts that some unit encodes, ascending, from bool (units, concepts).

    >>> unique_concepts(torch.tensor([[True, False, True], [True, False, False]]))
    tensor([0, 2])
    """
    return pairs.any(0).nonzero().squeeze(1)


def polysemanticity(pairs: Tensor) -> Tensor:
    """How many concepts each unit encodes, int64 (units,), from bool (units, concepts).

    >>> polysemanticity(torch.tensor([[True, False, True], [False, False, False]]))
    tensor([2, 0])
    """
    return pairs.sum(1)
