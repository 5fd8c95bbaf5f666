"""The largest values of each feature, of all positions or of a random sample of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprobe.ops.memory import MOST_CALLS
from torchprobe.ops.quantile import BLOCK, keep_largest_, new_buffers
from torchprobe.statistics.saved import holds_numbers
from torchprobe.statistics.tensors import describe


class Tail:
    """Keeps at least the ``capacity`` largest values of each feature among the positions that it takes.

    It takes every position, or each with probability 2^-``thinning``, independent of the values. So the k-th largest value here is about
    the k · 2^thinning-th largest of all. Memory grows with the values kept, up to 4 · features · :func:`slots` bytes.
    """

    def __init__(self, features: int, capacity: int, thinning: int, device: torch.device | str | None) -> None:
        self.capacity = capacity
        self.thinning = thinning
        self.offered = 0  # positions taken, as far as they were not thinned out again: an upper limit for the values kept of a feature
        self.values, self.counts, self.bound = new_buffers(features, 0, device)

    def add(self, x: Tensor, feature_dim: int, draw: Tensor) -> None:
        """Offers it a tensor. ``counts[1]`` counts nan values if every position is taken; a sample leaves them out.

        Args:
            draw: uniform in [0, 1), on the CPU, the shape of ``x`` without ``feature_dim``.
        """
        if self.thinning:
            chosen = tuple(index.to(x.device) for index in (draw < 2.0**-self.thinning).nonzero(as_tuple=True))
            x, feature_dim = x.movedim(feature_dim, -1)[chosen], -1
            x = x.masked_fill(x.isnan(), -torch.inf)
        positions = x.numel() // x.shape[feature_dim]
        if positions:
            self._reserve(positions)
            keep_largest_(self.values, self.counts, self.bound, x, feature_dim, self.capacity)
            self.offered += positions

    def halve(self, generator: torch.Generator) -> None:
        """Doubles the thinning: every other value of the sorted ones stays, starting at random from the first or the second."""
        start = int(torch.randint(2, (), generator=generator, device="cpu"))
        kept = self.values.sort(1, descending=True).values[:, start::2]
        self.values[:, : kept.shape[1]] = kept
        self.values[:, kept.shape[1] :] = -torch.inf
        self.counts[0] = (kept > -torch.inf).sum(1)
        self.counts[2] //= 2
        self.offered -= self.offered // 2
        self.thinning += 1

    def merge(self, other: Tail, generator: torch.Generator) -> None:
        """Adds what ``other``, of the same capacity, has taken."""
        if other.thinning < self.thinning:
            other = copy.deepcopy(other)
        while self.thinning < other.thinning:
            self.halve(generator)
        while other.thinning < self.thinning:
            other.halve(generator)
        # Both are complete only above the larger bound. Values equal to it may stay, so the bound is one step lower while they are joined.
        theirs = other.bound.to(self.bound)
        bound = torch.maximum(self.bound, theirs)
        other_counts = other.counts.to(self.counts)
        ties = self.counts[2].where(self.bound == bound, 0) + other_counts[2].where(theirs == bound, 0)
        nans, offered = self.counts[1] + other_counts[1], self.offered + other.offered
        parts = [self.values, other.values.to(self.values)]
        self.values, self.counts, self.bound = new_buffers(len(bound), 0, bound.device)
        self.bound.copy_(bound.nextafter(bound.new_tensor(-torch.inf)))
        self.offered = 0
        for part in parts:
            if part.shape[1]:
                self._reserve(part.shape[1])
                keep_largest_(self.values, self.counts, self.bound, part, 0, self.capacity)
                self.offered += part.shape[1]
        self.counts[1], self.offered = nans, offered
        self.counts[2] = self.counts[2].where(self.bound >= bound, 0) + ties.where(self.bound <= bound, 0)
        self.bound.clamp_(min=bound)

    def largest(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """The value with ``rank`` values before it, per feature, and whether that is known; int64 (features,) → float32, bool."""
        known = (rank < self.counts[0] + self.counts[2]) | (self.bound == -torch.inf)  # −inf is never kept
        value = self.bound.clone()
        for r in rank[rank < self.counts[0]].unique().tolist():
            rows = ((rank == r) & (rank < self.counts[0])).nonzero().flatten()
            for part in rows.split(256):  # each part is copied
                value[part] = self.values[part].topk(r + 1, sorted=False).values.amin(1)  # kthvalue is not deterministic on a GPU
        return value, known

    def tally(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many of the positions taken are above ``value`` and how many are equal to it, and whether that is known, per feature;
        float32 (features,) → int64, int64, bool."""
        above, equal = torch.zeros_like(self.counts[0]), self.counts[2].where(self.bound == value, 0)
        for rows in torch.arange(len(value), device=value.device).split(256):
            kept, level = self.values[rows], value[rows, None]
            above[rows] = (kept > level).sum(1)
            equal[rows] += ((kept == level) & (level > -torch.inf)).sum(1)
        return above, equal, value >= self.bound

    def _reserve(self, positions: int) -> None:
        """Makes room for so many more values, up to :func:`slots`."""
        full = slots(self.capacity)
        need = min(self.offered + positions + BLOCK, full)
        if (have := self.values.shape[1]) < need:
            values, _, _ = new_buffers(len(self.bound), min(max(need, 2 * have), full), self.bound.device)
            values[:, :have] = self.values
            self.values = values


def slots(capacity: int) -> int:
    """How many values of a feature there is room for. Room beyond the capacity makes selections rarer."""
    return capacity + capacity // 4 + BLOCK


def loaded(index: int, tail: Tail, state: Mapping[str, Any]) -> Tail:
    """Buffer number ``index`` of a saved state, checked; ``tail`` is one of its width and capacity.

    Raises:
        ValueError: something in it does not fit, or no run leaves it.
    """
    values, counts, bound = (state[f"{index}/{name}"] for name in ("values", "counts", "bound"))
    thinning, offered = state[f"{index}/thinning"], state[f"{index}/offered"]
    kept = values.shape[-1] if isinstance(values, Tensor) and values.dim() else 0
    for name, part, dtype, shape in (
        ("values", values, torch.float32, (len(tail.bound), kept)),
        ("counts", counts, torch.int64, (3, len(tail.bound))),
        ("bound", bound, torch.float32, (len(tail.bound),)),
    ):
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape or not holds_numbers(part):
            raise ValueError(f"{index}/{name} of the saved Quantile is {describe(part)}, expected {dtype} of shape {shape}")
    plausible = (
        type(thinning) is int
        and type(offered) is int
        and 0 <= thinning < 63
        and offered <= MOST_CALLS
        and values.shape[1] <= min(offered, slots(tail.capacity))
    )
    filled = torch.arange(values.shape[1], device=values.device) < counts[0, :, None]
    if (
        not plausible
        or bool((counts < 0).any() | (counts > MOST_CALLS).any())
        or bool((counts[0] > values.shape[1]).any())
        or not torch.equal(values > -torch.inf, filled)
        or bool(bound.isnan().any())
    ):
        raise ValueError(f"the buffer {index} of the saved Quantile is damaged")
    new = Tail(len(tail.bound), tail.capacity, thinning, tail.bound.device)
    new.values, new.counts, new.bound = (part.to(tail.bound.device).clone() for part in (values, counts, bound))
    new.offered = offered
    return new
