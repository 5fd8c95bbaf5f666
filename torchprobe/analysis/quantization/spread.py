"""How large the values of a layer are, and what follows for the scales of features and of blocks, from its exponents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.quantization.formats import ELEMENTS
from torchprobe.ops.exponents import BINS, EIGHTHS, LEVEL_HIGH, LEVEL_LOW, LOWEST, QUARTERS
from torchprobe.statistics.exponents import Exponents

HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
"""Where forecasts are computed, whatever PyTorch's default device."""

OFF = 0.02
"""A share of values that may be wrong by more than this is nan. We chose the value."""

APART = 2.0
"""Where the steps of features differ by more than so many octaves (standard deviation), what is known of all features says too little
about one. We chose the value."""


@dataclass(frozen=True)
class Spread:
    """The nonzero values of a layer: how many lie between ``low`` and ``high``, float64 (bins,) each.

    Attributes:
        signal: Σ x².
        values: the number of finite values, zeros included.
    """

    low: Tensor
    high: Tensor
    counts: Tensor
    values: float

    @property
    def squares(self) -> Tensor:
        """The mean of x² in each bin."""
        return (self.low**2 + self.low * self.high + self.high**2) / 3

    @property
    def signal(self) -> float:
        return float((self.counts * self.squares).sum())


def spread(exponents: Exponents) -> Spread:
    """The exact counts of octaves, divided among their quarters as in the vectors that were read closely.

    >>> exponents = Exponents(features=2)
    >>> exponents.update(torch.tensor([[1.1, 1.9], [0.0, 3.0]]))
    >>> found = spread(exponents)
    >>> [(float(low), float(count)) for low, count in zip(found.low, found.counts) if count]
    [(1.0, 1.0), (1.75, 1.0), (3.0, 1.0)]
    """
    counts = exponents.counts.cpu()[:BINS]
    parts = exponents.quarters.cpu().view(BINS, QUARTERS)
    largest = max(float(exponents.largest.max()), 0.0)
    start = torch.ldexp(torch.ones(BINS, **HOST), torch.arange(BINS, device="cpu") - 1 + LOWEST)
    edges = start[:, None] * (1 + torch.arange(QUARTERS + 1, **HOST) / QUARTERS)
    edges[0] = torch.linspace(0, float(start[1]), QUARTERS + 1, **HOST)  # what only float64 has
    edges[-1] = torch.linspace(float(start[-1]), max(largest, float(start[-1])), QUARTERS + 1, **HOST)
    low, high = edges[:, :-1], edges[:, 1:]
    room = (high.clamp(max=largest) - low).clamp(min=0) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    parts = parts.where(parts.sum(1, keepdim=True) > 0, room)
    share = parts / parts.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    values = float(counts.sum() + exponents.zeros)
    top = torch.maximum(high.clamp(max=largest), low)
    return Spread(low.flatten(), top.flatten(), (counts[:, None] * share).flatten(), values)


def level_edges() -> tuple[Tensor, Tensor]:
    octaves = torch.ldexp(torch.ones(LEVEL_HIGH - LEVEL_LOW, **HOST), torch.arange(LEVEL_LOW, LEVEL_HIGH, device="cpu"))
    low = (octaves[:, None] * (1 + torch.arange(EIGHTHS, **HOST) / EIGHTHS)).flatten()
    high = torch.cat([low[1:], torch.tensor([2.0**LEVEL_HIGH], **HOST)])
    zero = torch.zeros(1, **HOST)
    return torch.cat([zero, low]), torch.cat([low[:1], high])


def channel_underflow(found: Spread, units: Tensor, scale: Tensor, count: Tensor) -> float:
    """The share of the nonzero values below half of the step of their feature.

    The distributions that a forecast assumes may be far off near 0, as after GELU. How many values of all features are below a size is
    known, so what they say of one feature is corrected by what they say of all.

    Args:
        found: of all features.
        units: abs(x) of each feature in steps, as assumed.
        scale: the step of each feature.
        count: how many values each feature has.
    """
    below = (units < 0.5).double().mean(1)
    edge = scale / 2
    width = (found.high - found.low).clamp(min=torch.finfo(torch.float64).tiny)
    known = torch.stack([(found.counts * ((one - found.low) / width).clamp(0, 1)).sum() for one in edge]) / found.counts.sum()
    sizes = (units * scale[:, None]).flatten()
    sizes, order = sizes.sort()
    weight = (count[:, None] / units.shape[1]).expand_as(units).flatten()[order].cumsum(0)
    place = torch.searchsorted(sizes, edge)
    assumed = torch.where(place > 0, weight[(place - 1).clamp(min=0)], 0) / weight[-1]
    corrected = (below * known / assumed.clamp(min=torch.finfo(torch.float64).tiny)).where(assumed > 0, known).clamp(max=1)
    both = [float((count * share).sum() / count.sum()) for share in (corrected, below)]
    return math.nan if len(edge) > 1 and max(both) > OFF and float(edge.log2().std()) > APART else both[0]


def block_scales(exponents: Exponents, found: Spread, counts: Tensor, squares: Tensor) -> tuple[float, float, float]:
    """Of the E4M3 scales of blocks: a bound for the share of values whose scale is so small that it loses digits; by how much the share
    beyond the format is wrong if all scales are rounded to one side; and the share of the energy of the largest values of blocks that is
    about as large as the largest of all, whose scale is exact.

    A block has a small scale only if all of its values are small, so the share of small values is a bound.
    """
    element, largest = ELEMENTS["e4m3"], float(exponents.largest.max())
    width = (found.high - found.low).clamp(min=torch.finfo(torch.float64).tiny)
    shares = found.counts / found.counts.sum()
    tiny = float((shares * ((largest / element.largest * 2.0**element.lowest - found.low) / width).clamp(0, 1)).sum())
    near = shares * ((found.high - 7 / 8 * largest) / width).clamp(0, 1)
    top = level_edges()[0] >= ELEMENTS["e2m1"].largest
    at_top = float(counts[top].sum() / counts.sum())
    one_side = min(float(near.sum()), at_top) / 2
    blocks = math.ceil(exponents.features / 16) * float(exponents.vectors) / float(found.counts.sum())
    of_top = 36 * float(squares[top].sum()) / float(exponents.sizes[2].sum())  # of the energy
    exact = float((near * found.squares).sum() * found.counts.sum()) / found.signal
    return tiny, one_side if at_top < blocks + OFF else at_top / 2, min(exact / of_top, 1.0) if of_top > 0 else 0.0
