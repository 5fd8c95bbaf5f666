"""What helps a layer in eight bits: smoothing scales, and where to clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.analysis.quantization.formats import ELEMENTS, decibels, rounding_error
from torchprobe.analysis.quantization.spread import spread
from torchprobe.common.numbers import real
from torchprobe.statistics.exponents import Exponents


def smoothing_scales(activations: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    """The scales of SmoothQuant: s_j = max abs(x_j)^α / max abs(w_j)^(1−α) (Xiao et al. 2023, equation 4). Divide feature j of the
    activation by s_j, and multiply column j of the weight by it: the layer computes the same.

    Args:
        activations: the largest abs(x) of each input feature, (features,), such as ``Exponents.largest``.
        weights: the largest abs(w) of each input feature, (features,).
        alpha: from 0 to 1.

    Returns:
        float64 (features,). 1 for a feature that is always 0, or has no weights.

    Raises:
        ValueError: the shapes differ, or ``alpha`` is outside [0, 1].

    >>> smoothing_scales(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0])).tolist()
    [4.0, 0.5, 1.0]
    """
    if activations.shape != weights.shape or activations.dim() != 1:
        raise ValueError(f"one number for each feature is needed: got shapes {tuple(activations.shape)} and {tuple(weights.shape)}")
    if not 0 <= real("alpha", alpha) <= 1:
        raise ValueError(f"alpha is from 0 to 1, got {alpha}")
    x, w = activations.double().cpu(), weights.double().cpu()
    known = (x > 0) & (w > 0) & x.isfinite() & w.isfinite()
    return (x.where(known, 1) ** alpha / w.where(known, 1) ** (1 - alpha)).where(known, 1)


@dataclass(frozen=True)
class Clipping:
    """Where to clip a layer before INT8 with one scale.

    Attributes:
        limit: values beyond ± limit are cut off.
        sqnr_db: the forecast with the limit.
        gain_db: what it gains over the largest value as the limit; 0 if clipping does not help.
        share: the share of the nonzero values that are cut off.
    """

    limit: float
    sqnr_db: float
    gain_db: float
    share: float


def clipping(exponents: Exponents) -> Clipping:
    """The limit with the smallest forecast error, rounding and clipping together, for INT8 with one scale for the layer.

    It looks at every quarter of an octave, so the limit is right to about a tenth. That the error is smallest does not say that the outputs
    of the network are best: outlier features may matter more than their share of the energy.

    >>> exponents = Exponents(features=64)
    >>> x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    >>> x[0, 0] = 100.0
    >>> exponents.update(x)
    >>> found = clipping(exponents)
    >>> 3 < found.limit < 6, found.gain_db > 1
    (True, True)
    """
    found, element = spread(exponents), ELEMENTS["int8"]
    largest = max(float(exponents.largest.max()), 0.0)
    seen = found.counts > 0
    low, high, counts = found.low[seen], found.high[seen], found.counts[seen]
    if not len(counts):
        return Clipping(math.nan, math.nan, math.nan, math.nan)
    best, at_largest = (math.inf, largest, 0.0), math.inf
    for limit in [largest, *(float(edge) for edge in high.flip(0)[:64] if edge < largest)]:
        scale = limit / element.largest
        error = rounding_error(element, low / scale, high / scale, points=61) * scale * scale
        noise = float((counts * error).sum())
        if limit == largest:
            at_largest = noise
        if noise < best[0]:
            width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
            best = noise, limit, float((counts * ((high - limit) / width).clamp(0, 1)).sum() / counts.sum())
    noise, limit, share = best
    gain = 10 * math.log10(at_largest / noise) if noise > 0 else 0.0
    return Clipping(limit, decibels(found.signal, noise), gain, share)
