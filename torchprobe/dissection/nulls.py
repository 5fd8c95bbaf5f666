"""Nulls: p-values of average precision, and their correction for many units and concepts.

The null is a unit that is unrelated to a concept: it ranks the images at random. Without ties its average precision depends on two numbers
only, the images N and the positives P. So one table serves every unit and every concept with the same P, and is kept.

A p-value is the smaller of two p-values that are both valid:

* The Monte Carlo p-value, (1 + draws at least as good) / (1 + draws), from the table. It is never below 1 / (1 + draws). Where there are
  few rankings, the table lists all of them, and this p-value alone is used: it is exact.
* An upper bound without simulation, for the far tail, which a correction over millions of pairs needs. Among the first m images of a random
  ranking there are j or more positives with probability at most exp(−m · KL(j/m ‖ P/N)) (Hoeffding 1963, theorems 1 and 4). The bound is
  applied to K values of j, such that all K hold with probability 1 − δ. This limits the precision at each positive, and so the AP.

Both p-values fall as AP grows. So {p ≤ α} is a set {AP ≥ a} that one of the two allows, and the smaller of the two is valid as well.
An AP of 1 has the p-value 1 / C(N, P), which is exact: all positives come before all other images. Values that differ by less than 1e-12
are the same AP in different roundings.

With ties, for example a ReLU that is zero on half of the images, the AP of a random unit is closer to the prevalence than in the table.
Then the table is conservative in the tail; :func:`permutation_test` is exact.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchprobe.dissection.average_precision import Support, average_precision, concept_matrix, rows_of, support
from torchprobe.ops import average_precision as _operator

_DRAWS = (10_000, 100_000)  # smallest and largest number of draws
_EFFORT = 2 * 10**9  # images and positives to rank in total; decides the number of draws
_BATCH = 1 << 24  # scores drawn at a time
_LEVELS = 1024  # of a table: so many of the best draws, and as many evenly among all
_EVERY = 1 << 16, 1 << 20  # rankings, and positives in all of them, up to which every ranking is listed
_EQUAL = 1e-12  # AP that differ by no more are equal; rounding errors are below, also for 60,000 positives
_LOG_DELTA = -np.concatenate([np.linspace(0, 40, 81), np.geomspace(41, 700, 60)])  # for the bound

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class NullTable:
    """The average precision of random rankings of ``images``, of which ``positives`` show the concept.

    ``value``: AP, ascending; ``count``: how many of ``draws`` reach it. ``critical``: AP, ascending, that is reached with probability at
    most exp(``log_p``). ``exact``: the draws are all C(N, P) rankings, each once, and all their values are kept.
    """

    images: int
    positives: int
    draws: int
    value: Array
    count: Array
    critical: Array
    log_p: Array
    exact: bool = False

    def p_value(self, ap: Array) -> Array:
        """Probability that a random ranking has at least this AP; an upper bound in the far tail; nan for nan."""
        at = np.searchsorted(self.value, ap - _EQUAL).clip(max=len(self.value) - 1)
        if self.exact:
            return np.where(np.isnan(ap), np.nan, self.count[at] / self.draws)
        known = np.where(np.abs(self.value[at] - ap) <= _EQUAL, self.value[at], ap)
        simulated = (1 + np.interp(known, self.value, self.count, left=self.draws, right=0)) / (1 + self.draws)
        reached = np.searchsorted(self.critical, ap, side="right")  # the rarest level that AP reaches
        p = np.minimum(simulated, np.exp(self.log_p)[reached - 1])
        p = np.where(ap >= 1 - _EQUAL, self._first_of_all(), p)
        return np.where(np.isnan(ap), np.nan, p)

    def _first_of_all(self) -> float:
        """Probability of AP = 1, 1 / C(N, P); the least positive number where it is smaller."""
        if _log_rankings(self.images, self.positives) > 700:
            return float(np.finfo(np.float64).tiny)
        return 1 / math.comb(self.images, self.positives)


def null_tables(pairs: Iterable[tuple[int, int]], draws: int | None = None, seed: int = 0) -> dict[tuple[int, int], NullTable]:
    """One table for each (images, positives). Tables are kept in this process, so further layers cost nothing.

    Args:
        pairs: (N, P), 1 ≤ P ≤ N.
        draws: random rankings for each pair. Default: 10,000 to 100,000, fewer when they are more work. All of Broden takes 10,000, in
            about 15 seconds. A pair with up to 65,536 rankings is not drawn: its table is exact.
        seed: of the rankings.

    Raises:
        ValueError: P outside 1 … N.

    >>> table = null_tables([(1000, 10)], draws=1000)[1000, 10]
    >>> table.p_value(np.array([0.01, 0.9])).round(3)
    array([0.751, 0.   ])
    """
    wanted = tuple(sorted(set(pairs)))
    if wrong := [pair for pair in wanted if not 1 <= pair[1] <= pair[0]]:
        raise ValueError(f"{wrong[0][1]} positives among {wrong[0][0]} images: expected 1 to {wrong[0][0]}")
    if not wanted:
        return {}
    work = max(n for n, _ in wanted) + sum(p for _, p in wanted)
    with _making:
        # Kept as a whole: tables of one call share their rankings, and no table may depend on earlier calls.
        return dict(_make_tables(wanted, draws or int(np.clip(_EFFORT // work, *_DRAWS)), seed))


_making = threading.Lock()


@functools.lru_cache(maxsize=4)
def _make_tables(pairs: tuple[tuple[int, int], ...], draws: int, seed: int) -> dict[tuple[int, int], NullTable]:
    drawn = tuple(pair for pair in pairs if not _few(*pair))
    tables = {pair: _table(*pair, values) for pair, values in zip(drawn, _simulate(drawn, draws, seed), strict=True)} if drawn else {}
    return {pair: tables[pair] if pair in tables else _every_ranking(*pair) for pair in pairs}


def _log_rankings(images: int, positives: int) -> float:
    """log C(N, P), to about 1e-15 of its size."""
    return math.lgamma(images + 1) - math.lgamma(positives + 1) - math.lgamma(images - positives + 1)


def _few(images: int, positives: int) -> bool:
    """Whether every ranking is listed."""
    rankings, entries = _EVERY
    most = min(rankings, entries // positives)
    return _log_rankings(images, positives) < math.log(2 * rankings) and math.comb(images, positives) <= most


def _every_ranking(images: int, positives: int) -> NullTable:
    """The exact table: the ranks of the positives are each set of P of the N ranks, once."""
    ranks = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(1, images + 1), positives)), np.float64)
    rising = np.sort((np.arange(1, positives + 1) / ranks.reshape(-1, positives)).mean(1))
    value = _distinct(rising)
    count = len(rising) - np.searchsorted(rising, value).astype(np.float64)
    return NullTable(images, positives, len(rising), value, count, np.array([-np.inf]), np.zeros(1), exact=True)


def _simulate(pairs: tuple[tuple[int, int], ...], draws: int, seed: int) -> Array:
    """AP of random rankings, (len(pairs), draws): the operator on random scores and fixed positives.

    The largest N is ranked. A smaller N takes the first N of these images, whose ranking is random as well.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = sorted({n for n, _ in pairs})
    image = torch.cat([torch.randperm(n, generator=generator)[:p] for n, p in pairs])
    concept = torch.arange(len(pairs)).repeat_interleave(torch.tensor([p for _, p in pairs]))
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(image, minlength=sizes[-1]).cumsum(0)])
    col = concept[image.argsort(stable=True)]
    eligible = None if len(sizes) == 1 else torch.arange(sizes[-1])[:, None] < torch.tensor(sizes)
    group = None if len(sizes) == 1 else torch.tensor([sizes.index(n) for n, _ in pairs])
    result = torch.empty(len(pairs), draws, dtype=torch.float64)
    step = max(1, _BATCH // sizes[-1])
    for start in range(0, draws, step):
        units = min(step, draws - start)
        # Random bits of positive floats: as many different scores as possible, because ties would change the ranking.
        scores = torch.randint(0, 0x7F800000, (units, sizes[-1]), dtype=torch.int32, generator=generator).view(torch.float32)
        result[:, start : start + units] = _operator(scores, crow, col, len(pairs), eligible, group).T
    return result.numpy()


def _table(images: int, positives: int, values: Array) -> NullTable:
    draws = len(values)
    rising = np.sort(values)
    kept = np.unique(np.concatenate([np.linspace(0, draws - 1, _LEVELS).astype(int), np.arange(max(0, draws - _LEVELS), draws)]))
    first = _distinct(rising)
    value = first[np.unique(np.searchsorted(first, rising[kept], side="right") - 1)]
    count = draws - np.searchsorted(rising, value, side="left").astype(np.float64)
    critical = np.append(-np.inf, critical_values(images, positives, _LOG_DELTA))  # p ≤ 1 for every AP
    reachable = critical <= 1
    return NullTable(images, positives, draws, value, count, critical[reachable], np.append(0, _LOG_DELTA)[reachable])


def _distinct(rising: Array) -> Array:
    """Of equal values the least."""
    return rising[np.diff(rising, prepend=-1) > _EQUAL]


def critical_values(images: int, positives: int, log_p: Array) -> Array:
    """AP that a random ranking reaches with probability at most exp(log_p), by Hoeffding's bound; inf where the bound gives no limit.

    >>> critical_values(63_305, 100, np.log([1e-8])).round(3)
    array([0.052])
    """
    share = positives / images
    if positives == images:
        return np.full(len(log_p), np.inf)
    # The positives whose rank is bounded: each of the first 32, then at growing distances up to the last.
    j = np.unique(np.concatenate([np.arange(1, 33), np.geomspace(32, max(positives, 32), 256).astype(int)]))
    j = j[j <= positives].astype(np.float64)
    # Precision y at the j-th positive means j / y images up to it. The exponent is j · KL(y ‖ share) / y, which grows with y.
    y = share + (1 - share) * np.linspace(0, 1, 4097)[1:] ** 2
    y[-1] = 1
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = y * np.log(y / share) + np.where(y < 1, (1 - y) * np.log((1 - y) / (1 - share)), 0)
    rate = divergence / y
    at = np.searchsorted(rate, (np.log(len(j)) - log_p[:, None]) / j)
    precision = y[np.minimum(at, len(y) - 1)]
    # Between two of these positives each comes at least one rank after the one before, so precision is greatest at the last of them.
    last = np.append(j[1:], positives + 1) - 1
    greatest = last / (j / precision + last - j)
    ap = (greatest * (last - j + 1)).sum(1) / positives
    return np.where(ap < 1 - 1e-12, ap, np.inf)


def p_values(ap: Tensor, concepts: Support, draws: int | None = None, seed: int = 0) -> Tensor:
    """Probability that an unrelated unit has at least this AP, one-sided, for each pair of unit and concept.

    Args:
        ap: (…, concepts), from :func:`torchprobe.dissection.average_precision`. For ``sign="both"`` the p-value is that of one sign. The
            second sign is a second test; correct for it with ``signs=2`` of :func:`correct`.
        concepts: from :func:`torchprobe.dissection.support` with the same arguments.
        draws, seed: see :func:`null_tables`.

    Returns:
        float64, the shape of ``ap``; nan where AP is nan. 1 for a concept that all images show.

    >>> ap, concepts = torch.tensor([[0.011, 0.95]]), Support(torch.tensor([1000, 1000]), torch.tensor([10, 10]))
    >>> p = p_values(ap, concepts, draws=1000)
    >>> bool(p[0, 0] > 0.1), bool(p[0, 1] < 1e-12)
    (True, True)
    """
    values = ap.detach().cpu().double().numpy()
    result = np.full(values.shape, np.nan)
    images, positives = concepts.images.tolist(), concepts.positives.tolist()
    if values.shape[-1:] != (len(positives),):
        raise ValueError(f"AP of shape {tuple(ap.shape)} does not fit {len(positives)} concepts")
    some = [c for c in range(len(images)) if 0 < positives[c] < images[c]]
    tables = null_tables([(images[c], positives[c]) for c in some], draws, seed)
    for c in some:
        result[..., c] = tables[images[c], positives[c]].p_value(values[..., c])
    always = [c for c in range(len(images)) if 0 < positives[c] == images[c]]
    result[..., always] = np.where(np.isnan(values[..., always]), np.nan, 1.0)
    return torch.from_numpy(result).to(ap.device)


def correct(p: Tensor, method: str = "holm", signs: int = 1) -> Tensor:
    """p-values corrected for multiple tests: all units, signs and concepts that were tested.

    Args:
        p: any shape; nan entries are not tests and stay nan.
        method: "holm" (Holm 1979): the probability of one or more false pairs is at most α, for any dependence among the tests. "bh"
            (Benjamini & Hochberg 1995): the expected share of false pairs among the reported pairs is at most α.
        signs: 2 where each p-value is that of the better of two signs.

    >>> correct(torch.tensor([0.01, 0.04, float("nan"), 0.03]))
    tensor([0.0300, 0.0600,    nan, 0.0600])
    >>> correct(torch.tensor([0.01, 0.04, float("nan"), 0.03]), "bh")
    tensor([0.0300, 0.0400,    nan, 0.0400])
    """
    if method not in ("holm", "bh"):
        raise ValueError(f'method must be "holm" or "bh", got {method!r}')
    flat = p.flatten()
    tested = (~flat.isnan()).nonzero().squeeze(1)
    rising, order = flat[tested].sort()
    n, tests = len(rising), signs * len(rising)
    if n == 0:
        return p.clone()
    rank = torch.arange(n, device=p.device, dtype=rising.dtype)
    if method == "holm":
        adjusted = ((tests - rank) * rising).cummax(0).values
    else:
        adjusted = (tests / (rank + 1) * rising).flip(0).cummin(0).values.flip(0)
    result = torch.full_like(flat, torch.nan)
    result[tested[order]] = adjusted.clamp(max=1)
    return result.view_as(p)


class Permutation(NamedTuple):
    """``p``: of each pair alone; ``adjusted``: for all pairs together; ``ap``: as observed. All (units, concepts), float64."""

    p: Tensor
    adjusted: Tensor
    ap: Tensor


def permutation_test(
    scores: Tensor,
    labels: Tensor,
    *,
    permutations: int = 99,
    seed: int = 0,
    sign: str = "positive",
    negatives: str = "all",
    category: Tensor | None = None,
    annotated: Tensor | None = None,
) -> Permutation:
    """A null without assumptions: the rows of labels, with their annotations, are permuted over the images, all concepts together.

    Ties of the scores and the dependence among concepts stay as they are. For all pairs together the smallest p-value of each permutation
    is compared (single-step minP; Westfall & Young 1993). The tables of :func:`null_tables` are only the common scale for this. Every
    permutation costs as much as :func:`torchprobe.dissection.average_precision`, and no p-value is below 1 / (1 + permutations).

    Args:
        scores, labels, sign, negatives, category, annotated: see :func:`torchprobe.dissection.average_precision`.
        permutations: the number of permutations.
        seed: of the permutations.

    >>> scores, labels = torch.arange(40.0)[None], (torch.arange(40) > 30)[:, None]
    >>> permutation_test(scores, labels, permutations=19).adjusted
    tensor([[0.0500]], dtype=torch.float64)
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    concepts = support(labels, negatives=negatives, category=category, annotated=annotated)
    if negatives == "category" and annotated is None and category is not None:
        annotated = _annotated(labels, category)
    generator = torch.Generator().manual_seed(seed)
    ap = average_precision(scores, labels, sign=sign, negatives=negatives, category=category, annotated=annotated)
    common = p_values(ap, concepts)
    reached, smaller = torch.ones_like(ap), torch.ones_like(ap)
    crow, col, columns = rows_of(labels)
    for _ in range(permutations):
        order = torch.randperm(len(crow) - 1, generator=generator).to(col.device)
        shuffled = None if annotated is None else annotated[order.to(annotated.device)]
        drawn = average_precision(
            scores, _rows(crow, col, columns, order), sign=sign, negatives=negatives, category=category, annotated=shuffled
        )
        reached += drawn >= ap - _EQUAL
        least = p_values(drawn + _EQUAL / 2, concepts).nan_to_num(nan=1).amin()  # what is equal in exact arithmetic counts as reached
        smaller += common >= least
    p, adjusted = ((count / (1 + permutations)).where(~ap.isnan(), torch.nan) for count in (reached, smaller))
    return Permutation(p, adjusted, ap)


def _annotated(labels: Tensor, category: Tensor) -> Tensor:
    """bool (images, categories): the image shows some concept of the category."""
    crow, col, _ = rows_of(labels)
    annotated = torch.zeros(labels.shape[0], max(int(category.amax()) + 1, 1), dtype=torch.bool, device=labels.device)
    of = category.to(labels.device)[col]
    image = torch.arange(labels.shape[0], device=labels.device).repeat_interleave(crow.diff())
    annotated[image[of >= 0], of[of >= 0]] = True
    return annotated


def _rows(crow: Tensor, col: Tensor, concepts: int, order: Tensor) -> Tensor:
    """The label matrix with its rows in another order."""
    lengths = crow.diff()[order]
    begin = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    entry = torch.arange(len(col), device=col.device) + (crow[:-1][order] - begin[:-1]).repeat_interleave(lengths)
    return concept_matrix(begin, col[entry], concepts)
