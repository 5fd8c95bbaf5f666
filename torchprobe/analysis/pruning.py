"""A head that reads only some of its directions, and how accurate it still is.

W_p = Σ_{i kept} σ_i u_i v_iᵀ, which is the same as projecting the representation on the kept directions ("Interpreting CLIP", TMLR 2024).
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
from torchprobe.analysis.heads import HeadLike, as_head, normalizes, weight_and_bias
from torchprobe.analysis.intervals import band
from torchprobe.analysis.pruning_pass import accuracies, check_directions, pruned_weight
from torchprobe.encoders import Head

FRACTIONS = tuple(i / 20 for i in range(1, 21))
"""Of the rank: 5 %, 10 % … all (a choice of ours)."""


@dataclass(frozen=True)
class PruningCurve:
    """Accuracy against the share of the directions that is kept.

    Attributes:
        keep: the fractions, as asked for, float64 (k,).
        kept: how many directions that is, int64 (k,).
        accuracy: of the pruned head, a share of the images, float64 (k,).
        order: what decided which directions are kept.
        seed: of the random order; without meaning for the others.
        rank: of the head; ``keep`` is a fraction of it.
        n: images evaluated.
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
    """As :class:`PruningCurve`, with the directions in random order, several times.

    Attributes:
        keep, kept, rank, n: as there.
        accuracy: of each draw, float64 (draws, k).
        seeds: of the draws.
        mean: over the draws, float64 (k,).
        low, high: the 95 % band of the draws, float64 (k,); of few draws about the smallest and the largest.
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
    """How many directions a fraction of the rank is: rounded to the nearest, half of one up, at least one (a choice of ours).

    ``keep`` = 1 keeps those beyond the rank too, so that the head stays what it is.

    Raises:
        ValueError: ``keep`` outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a fraction of the rank, above 0 and at most 1, got {keep}")
    return len(directions) if keep == 1 else max(1, math.floor(keep * directions.rank + 0.5))


def prune(head: HeadLike, directions: Directions, keep: float, order: str = "importance", seed: int = 0) -> Head:
    """The head without some of its directions; bias, normalisation and names stay.

    Args:
        head: a linear layer, or its weight (C, d).
        directions: its :func:`~torchprobe.analysis.directions.privileged_directions`, with the importance on other images than those it
            will be evaluated on.
        keep: which fraction of the rank stays; see :func:`kept_directions`.
        order: which directions come first: "importance", "sigma" or "random".
        seed: of "random".

    Returns:
        The weight is computed in float64 and rounded once, to float32 (float64 if the head is); ``keep`` = 1 gives that of the head.

    Raises:
        ValueError: directions of another head, or ``keep`` or ``order`` that mean nothing.

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
        embeddings: labelled; may be memory-mapped.
        fractions: of the rank, in any order.
        classes: the rows of the head to choose from, as in :func:`torchprobe.analysis.evaluate`.

    Returns:
        Accuracies equal to ``evaluate(prune(head, directions, keep, order, seed), embeddings, classes).accuracy`` for every ``keep``.

    Raises:
        ValueError: no fraction, and whatever :func:`prune` and ``evaluate`` refuse.

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
    """The curve with the directions in random order, what the other two are held against; the embeddings are read and projected once.

    Args:
        seeds: of the draws, or how many (then 0, 1, …).
        head, directions, embeddings, fractions, classes: as in :func:`pruning_curve`.

    Raises:
        ValueError: no draw, and whatever :func:`pruning_curve` refuses.
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
