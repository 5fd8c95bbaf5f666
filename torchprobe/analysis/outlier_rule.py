"""The rule behind outlier features: which values lie outside the bulk of their vector, and which features do so beyond chance.

The standard deviation of a vector includes its outliers. So k equal outliers are never more than √((d − k)/k) of it from the mean, and hide
each other. Here the standard deviation is that of the bulk: the features that are not outliers. Why not the median absolute deviation: it
says little about the tails, and is 0 if half of the features are equal, as after a ReLU. ``benchmarks/outliers.py`` compares the rules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CORE = 0.9
"""Share of the features of a vector, those closest to its median, that are in its bulk from the start. So an outlier is one of few."""

ALPHA = 0.05
"""The probability of one false outlier feature or more among exchangeable features, at most."""


def outside_bulk(h: Tensor, sigma: float, core: float = CORE) -> Tensor:
    """Which values lie more than ``sigma`` standard deviations of the bulk of their vector from the mean of the bulk.

    The bulk is at first the ``core`` of the features that is closest to the median. Then it takes in every feature within ``sigma``
    standard deviations of its mean, until there is none left: the forward search of Hadi (J. R. Statist. Soc. B 54, 1992) in one
    dimension. Without outliers, the bulk is the whole vector, and the rule is the classical one. If all features of the core are equal,
    nothing is known of the spread of the others, and the bulk is the whole vector too.

    Args:
        h: float64 (n, d), finite.
        sigma: standard deviations from the mean; population.
        core: share of the features, rounded up to a number.

    Returns:
        bool (n, d). All False for a vector of equal values.

    >>> h = torch.linspace(-1, 1, 40, dtype=torch.float64).repeat(1, 1)
    >>> h[0, :3] = 50  # three of 40 are at most 3.5 of the usual standard deviations from the mean
    >>> outside_bulk(h, 6.0).nonzero()[:, 1]
    tensor([0, 1, 2])
    """
    if not len(h):
        return torch.zeros_like(h, dtype=torch.bool)
    x = h / h.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)  # so that no square over- or underflows
    x = x - x.median(-1, keepdim=True).values  # so that equal values are exactly 0
    distance = x.abs()
    bulk = distance <= distance.kthvalue(math.ceil(core * h.shape[1]), -1, keepdim=True).values
    bulk = bulk | ~(bulk & (distance > 0)).any(-1, keepdim=True)
    outside = torch.zeros_like(bulk)
    rows = torch.arange(len(x), device=x.device)
    while len(rows):  # ends, because a bulk only grows
        mean, std = _moments(x, bulk)
        outside[rows] = beyond = (x - mean).abs() > sigma * std
        grows = (~beyond & ~bulk).any(-1)
        rows, x, bulk = rows[grows], x[grows], (bulk | ~beyond)[grows]
    return outside


def beyond_chance(counts: Tensor, vectors: int, alpha: float = ALPHA) -> Tensor:
    """Which features are outliers in more vectors than chance gives if all features are exchangeable in every vector.

    A vector with m outliers among d features then has feature i among them with probability m/d. For independent vectors, the probability
    that a feature has a share s of outliers or more is at most exp(−n · KL(s ‖ p)), where p is the mean of m/d (Hoeffding, J. Amer.
    Statist. Assoc. 58, 1963, theorem 1). A feature passes if this is at most α/d, so that α holds for all features together.

    Args:
        counts: (d,), for each feature the number of vectors in which it is an outlier.
        vectors: the number n of vectors.
        alpha: the probability of one false feature or more; 1 or more: no test.

    Returns:
        bool (d,).

    >>> beyond_chance(torch.tensor([3, 0, 0, 0, 1, 0, 0, 0, 0, 0]), vectors=3), beyond_chance(torch.tensor([1, 0]), vectors=1)
    (tensor([ True, False, False, False, False, False, False, False, False, False]), tensor([False, False]))
    """
    d = len(counts)
    share = counts.double() / max(1, vectors)
    if alpha >= 1:
        return share > 0
    chance = share.mean()
    distance = torch.xlogy(share, share / chance) + torch.xlogy(1 - share, (1 - share) / (1 - chance))
    return (share > chance) & (vectors * distance >= math.log(d / alpha))


def _moments(x: Tensor, bulk: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of the bulk of each vector, (n, 1)."""
    count = bulk.sum(-1, keepdim=True)
    mean = torch.where(bulk, x, 0.0).sum(-1, keepdim=True) / count
    square = torch.where(bulk, x - mean, 0.0).square().sum(-1, keepdim=True) / count
    return mean, square.sqrt()
