"""A head that keeps only some of its directions, and its accuracy.

W_p = Σ_{i kept} σ_i u_i v_iᵀ. This is the same as projecting the representation onto the kept directions ("Interpreting CLIP", TMLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.directions import Directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.inputs import HeadLike, as_head, normalizes, weight_and_bias
from torchprobe.analysis.pruning_pass import accuracies, check_directions, pruned_weight
from torchprobe.analysis.resampling import band
from torchprobe.encoders import Head

FRACTIONS = tuple(i / 20 for i in range(1, 21))
"""Fractions of the rank: 5 %, 10 % … 100 % (we chose the steps)."""


@dataclass(frozen=True)
class PruningCurve:
    """Accuracy against the share of the directions that is kept.

    Attributes:
        keep: the given fractions, float64 (k,).
        kept: the number of directions for each fraction, int64 (k,).
        accuracy: of the pruned head, a share of the images, float64 (k,).
        order: the order in which directions are kept.
        seed: of the random order; without meaning for the other orders.
        rank: of the head; ``keep`` is a fraction of it.
        n: number of images evaluated.
    """

    keep: Tensor
    kept: Tensor
    accuracy: Tensor
    order: str
    seed: int
    rank: int
    n: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per point."""
        parts = zip(self.keep.tolist(), self.kept.tolist(), self.accuracy.tolist(), strict=True)
        return [{"order": self.order, "keep": keep, "kept": kept, "accuracy": accuracy} for keep, kept, accuracy in parts]


@dataclass(frozen=True)
class PruningBands:
    """As :class:`PruningCurve`, for several draws of a random order.

    Attributes:
        keep, kept, rank, n: as in :class:`PruningCurve`.
        accuracy: of each draw, float64 (draws, k).
        seeds: of the draws.
        mean: over the draws, float64 (k,).
        low, high: the 95 % band of the draws, float64 (k,). For few draws this is approximately the smallest and the largest.
    """

    keep: Tensor
    kept: Tensor
    accuracy: Tensor
    seeds: tuple[int, ...]
    mean: Tensor
    low: Tensor
    high: Tensor
    rank: int
    n: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per point."""
        keys = ("keep", "kept", "mean", "low", "high")
        columns = [getattr(self, key).tolist() for key in keys]
        return [{"order": "random", **dict(zip(keys, row, strict=True))} for row in zip(*columns, strict=True)]


def kept_directions(directions: Directions, keep: float) -> int:
    """The number of directions for a fraction of the rank: rounded to the nearest number, half up, at least one (we chose this rule).

    ``keep`` = 1 also keeps the directions beyond the rank, so that the head does not change.

    Raises:
        ValueError: ``keep`` is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a fraction of the rank, above 0 and at most 1, got {keep}")
    return len(directions) if keep == 1 else max(1, math.floor(keep * directions.rank + 0.5))


def prune(head: HeadLike, directions: Directions, keep: float, order: str = "importance", seed: int = 0) -> Head:
    """The head with only some of its directions. Bias, normalization and names stay the same.

    Args:
        head: a linear layer, or its weight (C, d).
        directions: its :func:`~torchprobe.analysis.privileged_directions`. Measure their importance on other images than those on which
            the pruned head will be evaluated.
        keep: the fraction of the rank that is kept; see :func:`kept_directions`.
        order: the directions to keep first: "importance", "sigma" or "random".
        seed: of "random".

    Returns:
        The pruned head. Its weight is computed in float64 and rounded once, to float32 (float64 if the head is). With ``keep`` = 1 it is
        the weight of the head.

    Raises:
        ValueError: directions of another head, or an unknown ``order``, or ``keep`` outside (0, 1].

    >>> from torchprobe.analysis.directions import privileged_directions
    >>> weight = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    >>> found = privileged_directions(weight, torch.tensor([[0.0, 0.1, 3.0]]))
    >>> [prune(weight, found, keep=0.5, order=order).weight.norm(dim=1).tolist() for order in ("importance", "sigma")]
    [[0.0, 1.0], [2.0, 0.0]]
    """
    weight, bias = weight_and_bias(head)
    check_directions(directions, weight)
    kept = directions.order(order, seed)[: kept_directions(directions, keep)]
    return Head(pruned_weight(weight, directions, kept), bias, normalize=normalizes(head), names=as_head(head).names)


def pruning_curve(
    head: HeadLike,
    directions: Directions,
    embeddings: Embeddings,
    fractions: Sequence[float] = FRACTIONS,
    order: str = "importance",
    seed: int = 0,
    classes: Iterable[int] | None = None,
) -> PruningCurve:
    """The accuracy of the pruned head at several fractions, from one pass over the embeddings.

    Args:
        head, directions, order, seed: as in :func:`prune`.
        embeddings: with labels; may be memory-mapped.
        fractions: of the rank, in any order.
        classes: the rows of the head to choose from, as in :func:`torchprobe.analysis.evaluate`.

    Returns:
        The curve. The accuracy for ``keep`` is that of ``evaluate(prune(head, directions, keep, order, seed), embeddings, classes)``.

    Raises:
        ValueError: no fraction, or as :func:`prune` and ``evaluate``.

    >>> from torchprobe.analysis.directions import privileged_directions
    >>> weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    >>> e = Embeddings(torch.eye(4), torch.tensor([0, 1, 2, 3]), list("abcd"))
    >>> pruning_curve(weight, privileged_directions(weight, e), e, [0.5, 1.0]).accuracy
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    kept = _points(directions, fractions)
    accuracy, n = accuracies(head, directions, embeddings, [directions.order(order, seed)], kept, classes)
    return PruningCurve(torch.tensor(list(fractions), dtype=torch.float64), kept, accuracy[0], order, seed, directions.rank, n)


def pruning_bands(
    head: HeadLike,
    directions: Directions,
    embeddings: Embeddings,
    seeds: int | Sequence[int] = 5,
    fractions: Sequence[float] = FRACTIONS,
    classes: Iterable[int] | None = None,
) -> PruningBands:
    """The curve with the directions in random order, the control for the other two orders. The embeddings are read and projected once.

    Args:
        seeds: of the draws, or the number of draws (then the seeds are 0, 1, …).
        head, directions, embeddings, fractions, classes: as in :func:`pruning_curve`.

    Raises:
        ValueError: no draw, or as :func:`pruning_curve`.
    """
    drawn = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not drawn:
        raise ValueError("at least one seed is needed to draw an order")
    kept = _points(directions, fractions)
    accuracy, n = accuracies(head, directions, embeddings, [directions.order("random", seed) for seed in drawn], kept, classes)
    low, high = map(torch.from_numpy, band(accuracy.numpy()))
    keep = torch.tensor(list(fractions), dtype=torch.float64)
    return PruningBands(keep, kept, accuracy, drawn, accuracy.mean(0), low, high, directions.rank, n)


def _points(directions: Directions, fractions: Sequence[float]) -> Tensor:
    if not len(fractions):
        raise ValueError("at least one fraction is needed for a curve")
    return torch.tensor([kept_directions(directions, keep) for keep in fractions])
