"""A head that keeps only some of its directions, and its accuracy.

W_p = Σ_{i kept} σ_i u_i v_iᵀ. This is the same as projecting the representation onto the kept directions ("Interpreting CLIP", TMLR 2024).

The accuracies at all fractions come from one pass. The embeddings are projected onto all directions once, in float64. The logits of a block
are then sums to which one direction after the other is added. Their rounding differs from that of the logits of the pruned head. So they
decide only if the logit of the correct class and the others are further apart than rounding can move them.
:func:`torchprobe.analysis.decisions.predict` decides the rest by the exact logits of the pruned head. So every accuracy is exactly that of
:func:`torchprobe.analysis.evaluate` for the pruned head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.decisions import predict, rows_of
from torchprobe.analysis.directions import Directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import is_correct
from torchprobe.analysis.inputs import HeadLike, as_head, normalizes, weight_and_bias
from torchprobe.analysis.resampling import band
from torchprobe.common.precision import full_products
from torchprobe.encoders import Head

FRACTIONS = tuple(i / 20 for i in range(1, 21))
"""Fractions of the rank: 5 %, 10 % … 100 % (we chose the steps)."""

_LOGITS = 1 << 19  # at a time; 2 MB in float32, so that they stay in the cache while directions are added
_EPS = 1e-12  # the smallest number that torch.nn.functional.normalize divides by
_HUGE = 1e37  # larger sums may overflow in float32


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
        low, high: the range of the draws that holds one more draw with the probability ``level`` at each point, float64 (k,); see
            :func:`torchprobe.analysis.resampling.band`.
        level: 95 % for 39 draws or more, less for fewer; 67 % for 5.
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
    level: float

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
    _check_directions(directions, weight)
    kept = directions.order(order, seed)[: kept_directions(directions, keep)]
    return Head(_pruned_weight(weight, directions, kept), bias, normalize=normalizes(head), names=as_head(head).names)


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
    low, high, level = band(accuracy.numpy())
    keep = torch.tensor(list(fractions), dtype=torch.float64)
    return PruningBands(
        keep, kept, accuracy, drawn, accuracy.mean(0), torch.from_numpy(low), torch.from_numpy(high), directions.rank, n, level
    )


def _points(directions: Directions, fractions: Sequence[float]) -> Tensor:
    if not len(fractions):
        raise ValueError("at least one fraction is needed for a curve")
    return torch.tensor([kept_directions(directions, keep) for keep in fractions])


# -- one pass -------------------------------------------------------------------------------------------------------------


def _check_directions(directions: Directions, weight: Tensor) -> None:
    """Checks that the directions are those of a head of this shape.

    Raises:
        ValueError: the head has another shape.
    """
    of = (len(directions.left), directions.directions.shape[1])
    if of != tuple(weight.shape):
        raise ValueError(f"the directions are those of a head (classes, features) of {of}, but this head is {tuple(weight.shape)}")


def _pruned_weight(weight: Tensor, directions: Directions, kept: Tensor) -> Tensor:
    """Σ_{i kept} σ_i u_i v_iᵀ in float64, rounded to the type of ``weight``, (C, d)."""
    kept = kept.sort().values  # so that the same directions give the same bits, independent of their order
    return ((directions.left[:, kept] * directions.singular_values[kept]) @ directions.directions[kept]).to(weight)


def accuracies(
    head: HeadLike,
    directions: Directions,
    embeddings: Embeddings,
    orders: Sequence[Tensor],
    kept: Tensor,
    classes: Iterable[int] | None = None,
) -> tuple[Tensor, int]:
    """The accuracy for each order and each number of kept directions, float64 (orders, k), and the number of images evaluated."""
    weight, bias = weight_and_bias(head, embeddings.features)
    _check_directions(directions, weight)
    targets = _Targets(embeddings, rows_of(embeddings.classes if classes is None else classes, len(weight)), len(weight))
    counts, point = kept.unique(return_inverse=True)
    place = embeddings.h.device if embeddings.h.device.type in ("cpu", "cuda") else torch.device("cpu")  # other devices may lack float64
    sums = _Sums(directions, bias, normalizes(head), targets.columns, orders, counts, weight.dtype, place)
    n = len(targets.rows)
    correct, certain = (torch.zeros(len(orders), n, len(counts), dtype=torch.bool) for _ in range(2))
    step = max(1, _LOGITS // len(targets.columns))

    def decide(start: int) -> None:
        at = slice(start, start + step)
        rows = targets.rows[at]
        whole = int(rows[-1]) - int(rows[0]) == len(rows) - 1
        h = embeddings.h[int(rows[0]) : int(rows[-1]) + 1] if whole else embeddings.h[rows.to(embeddings.h.device)]
        with torch.inference_mode(), torch.autocast(place.type, enabled=False):
            for o, (margin, bound) in enumerate(sums.margins(h.to(place), targets.of(rows).to(place))):
                correct[o, at], certain[o, at] = (margin > 0).cpu(), (margin.abs() > bound).cpu()

    threads = torch.get_num_threads() if place.type == "cpu" else 1
    _in_threads(decide, range(0, n, step), threads)
    y = embeddings.y.cpu()
    for o, order in enumerate(orders):
        points = (~certain[o]).any(0).nonzero().flatten().tolist()
        weights = {k: _pruned_weight(weight, directions, order[: int(counts[k])]) for k in points}  # as prune does, with all threads

        def settle(k: int, o: int = o, weights: dict[int, Tensor] = weights) -> None:
            at = (~certain[o, :, k]).nonzero().flatten()
            rows = targets.rows[at]
            predicted = predict(weights[k], bias, embeddings.h[rows.to(embeddings.h.device)], targets.classes, normalizes(head)).cpu()
            correct[o, at, k] = is_correct(predicted, y[rows], embeddings.groups)

        _in_threads(settle, points, threads)
    return correct.sum(1)[:, point].double() / n, n


def _in_threads(work: Callable[[int], None], items: Sequence[int], threads: int) -> None:
    """Calls ``work`` with each item, several at a time, with one thread each.

    Each block needs many short operators. If several threads shared an operator, they would wait for each other at its end. On a machine
    with other work they would mostly wait.
    """
    if threads == 1 or len(items) <= 1:
        for item in items:
            work(item)
        return
    pool = ThreadPoolExecutor(min(threads, len(items)), "torchprobe-pruning", torch.set_num_threads, (1,))
    try:
        for _ in pool.map(work, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the initializer also changes the number for threads that start later


class _Targets:
    """The embeddings to evaluate, and the correct logits of each.

    Attributes:
        rows: of the embeddings, ascending, int64 (n,).
        classes: rows of the head to choose from, ascending; None: all.
        columns: the same rows as a tensor, int64 (C,); the order of the logits.
    """

    def __init__(self, embeddings: Embeddings, classes: list[int] | None, size: int) -> None:
        self.classes = classes
        self.columns = torch.arange(size) if classes is None else torch.tensor(classes)
        self._y = embeddings.y.cpu()
        if len(self._y) and int(self._y.max()) >= size:
            raise ValueError(f"label {int(self._y.max())} is not a row of the head, which has {size} rows (0 to {size - 1})")
        labels = torch.arange(size)
        fitting = is_correct(self.columns[None], labels[:, None], embeddings.groups)
        known = self._y >= 0
        self.rows = (known & fitting.any(1)[self._y.clamp_min(0)]).nonzero().flatten()
        if not len(self.rows):
            raise ValueError(
                f"nothing to evaluate: of {len(known)} rows {int((~known).sum())} have no label, and the classes of the others are not "
                "among the classes to choose from"
            )
        # Several columns are correct if rows of the head stand for the same class. Labels with fewer columns repeat the first one.
        most = int(fitting.sum(1).max())
        first = fitting.int().argmax(1, keepdim=True)
        found = fitting.int().topk(most, dim=1)
        self._table = found.indices.where(found.values > 0, first)

    def of(self, rows: Tensor) -> Tensor:
        """The columns that are correct for some of ``rows``, int64 (n, most)."""
        return self._table[self._y[rows]]


class _Sums:
    """Logits (w · h + b · s) / ‖h‖ as sums over one direction after the other, with s = 1, or s = ‖h‖ to normalize.

    Dividing by ‖h‖ and by the length of the longest w does not change the decisions, and nothing over- or underflows.
    """

    def __init__(
        self,
        directions: Directions,
        bias: Tensor | None,
        normalize: bool,
        columns: Tensor,
        orders: Sequence[Tensor],
        counts: Tensor,
        stored: torch.dtype,
        place: torch.device,
    ) -> None:
        self.dtype = torch.float32 if full_products(place.type) else torch.float64
        self.normalize, self.counts = normalize, [0, *counts.tolist()]
        coefficients = (directions.left[columns] * directions.singular_values).T  # (r, C)
        self.unit = float(torch.linalg.vector_norm(coefficients, dim=0).max())
        coefficients = coefficients / self.unit
        self.right = directions.directions.T.contiguous().to(place)
        self.orders = [order.to(place) for order in orders]
        self.coefficients = [coefficients[order].to(place, self.dtype) for order in orders]
        self.bias = None if bias is None else bias.detach().cpu()[columns].double().to(place) / self.unit
        # The bound: see torchprobe.analysis.decisions. Every logit is a sum, in some order, of m products and the bias; each operand is
        # rounded once. The pruned head is rounded too. Norms of coefficients and projections are over the kept directions.
        m = counts.double().to(place)
        self.longest = torch.stack([c.double().square().cumsum(0).sqrt().amax(1).cpu()[counts - 1] for c in self.coefficients]).to(place)
        self.farthest = 0.0 if self.bias is None else float(self.bias.abs().max())
        unit_roundoff = torch.finfo(self.dtype).eps / 2
        self.summed = 1.01 * (m + 8) * unit_roundoff
        projected = 1.01 * (self.right.shape[0] + 8) * m.sqrt() * torch.finfo(torch.float64).eps / 2
        self.fixed = (1.01 * torch.finfo(stored).eps / 2 + projected) * self.longest + 2 * (m + 8) * torch.finfo(self.dtype).tiny
        self.reached = (torch.arange(len(self.right.T), device=place)[:, None] < counts.to(place)).to(self.dtype)

    def margins(self, h: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each order: how far the correct logit is above all others, and the bound of the error of that; both (n, k).

        The bound is inf for representations without a direction: zero, nan and inf.
        """
        length = torch.linalg.vector_norm(h, dim=1, dtype=torch.float64)  # of float32, so it does not overflow
        usable = (length > 0) & length.isfinite()
        h = h.double()
        if not bool(usable.all()):
            h[~usable] = 0.0
        h /= length.where(usable, 1.0)[:, None]
        projections = (h @ self.right).to(self.dtype)
        scale = (length.clamp_min(_EPS) if self.normalize else torch.ones_like(length)) / length
        usable &= self.farthest * scale < _HUGE
        logits = torch.empty(len(h), self.coefficients[0].shape[1], dtype=self.dtype, device=h.device)
        for o, order in enumerate(self.orders):
            p = projections.index_select(1, order)
            margin = torch.empty(len(h), len(self.counts) - 1, dtype=self.dtype, device=h.device)
            if self.bias is None:
                logits.zero_()
            else:
                torch.mul(self.bias, scale[:, None], out=logits)
            for k, (start, end) in enumerate(pairwise(self.counts)):
                logits.addmm_(p[:, start:end], self.coefficients[o][start:end])
                own = logits.gather(1, targets)
                logits.scatter_(1, targets, -math.inf)
                margin[:, k] = own.amax(1) - logits.amax(1)
                logits.scatter_(1, targets, own)
            reach = (p.square() @ self.reached).sqrt().double()
            error = self.summed * (self.longest[o] * reach + self.farthest * scale[:, None]) + self.fixed[o]
            yield margin, (2 * error).where(usable[:, None], math.inf)
