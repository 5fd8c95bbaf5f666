"""The binary exponents of an activation, and what forecasts of 8-bit formats need besides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from torchprobe.ops.exponents import BINS, COUNTS, LEVELS, LOWEST, NONFINITE, QUARTERS, SCALES, TAKEN, ZEROS, before, exponents_
from torchprobe.statistics.saved import count_problem
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import FEATURES, State, check_input

FLOAT_SUBNORMAL, HALF_SUBNORMAL = -126, -14
"""The exponents of the smallest normal numbers of float32 and bfloat16, and of float16."""


class Exponents(Statistic):
    """How many values have each binary exponent, and the largest absolute value of each feature. From it
    :func:`torchprobe.analysis.quantization.forecast` says what the layer would lose in 8-bit formats.

    Args:
        features: the width of the layer.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.

    The counts are exact, and so are the largest values: one native kernel reads every value once, on a CPU; elsewhere it is plain PyTorch.
    Three finer tables are about at least 16 vectors of each call, chosen by a fixed rule and weighted
    (:mod:`torchprobe.ops.exponents`): all vectors of a small call. Vectors of a rare scale are among them, such as the first token of a
    text.

    States, float64, besides ``vectors`` (): ``counts``, read through :attr:`exponents`, :attr:`zeros`, :attr:`nonfinite` and
    :attr:`taken`; ``largest`` (features,); ``sizes`` (3, features), the number, the sum and the sum of squares of the nonzero abs(x) of
    each feature; ``quarters``, counts of each quarter of an octave; ``levels`` (3, 2, 169), counts of values divided by the scale of their
    token or block, and the sums of squares of these scales. About 20 KB, and 32 bytes for each feature.

    Nan and inf are counted, and otherwise left out. Padding counts nowhere.

    Raises:
        ValueError: ``features`` is not positive.

    >>> import torch
    >>> from torchprobe.statistics import Exponents
    >>> exponents = Exponents(features=2)
    >>> exponents.update(torch.tensor([[1.0, -6.0], [0.0, 1.5], [0.25, 7.0]]))
    >>> exponents.exponents, int(exponents.zeros), exponents.largest.tolist()
    ({-2: 1, 0: 2, 2: 2}, 1, [1.0, 7.0])
    >>> exponents.median_exponent, round(exponents.peak_octaves, 2)
    (0.0, 2.81)
    """

    counts: Tensor
    largest: Tensor
    sizes: Tensor
    quarters: Tensor
    levels: Tensor
    vectors: Tensor

    states = MappingProxyType(
        {
            "counts": State((COUNTS,)),
            "largest": State((FEATURES,), "max"),
            "sizes": State((3, FEATURES)),
            "quarters": State((QUARTERS * BINS,)),
            "levels": State((len(SCALES), 2, LEVELS)),
        }
    )
    fields = MappingProxyType(
        {
            "peak_octaves": "octaves from the median of the nonzero abs(x) to the largest: log2(max) minus the exponent of the median",
            "abs_max": "the largest abs(x)",
            "feature_ratio": "the largest abs(x) of a feature, divided by the median over features",
            "zero_share": "share of the values that are exactly 0",
            "half_subnormal": "share of the nonzero values below 2**-14, which are subnormal in float16",
            "subnormal": "share of the nonzero values below 2**-126, which are subnormal in float32 and bfloat16",
            "median_exponent": "floor(log2 abs(x)) of the median of the nonzero abs(x)",
            "nonfinite": "number of nan and inf",
        }
    )

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        """Adds every vector of ``x``; see :meth:`torchprobe.statistics.Statistic.update`."""
        check_input("Exponents", self.features, x, feature_dim, mask)
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = x.float()
        with torch.no_grad():
            exponents_(self.counts, self.largest, self.sizes, self.quarters, self.levels, x.detach(), feature_dim, mask)
            self.vectors += x.numel() // self.features if mask is None else mask.sum()

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bins = states["counts"][:, :BINS]
        nonzero = bins.sum(-1)
        half = (nonzero / 2).ceil()[:, None]
        median = ((before(bins) + bins < half).sum(-1) - 1 + LOWEST).to(bins.dtype).where(nonzero > 0, math.nan)
        largest = states["largest"].clamp(min=0)
        peak = largest.amax(-1)
        finite = nonzero + states["counts"][:, ZEROS]
        return {
            "peak_octaves": peak.log2() - median,
            "abs_max": peak.where(finite > 0, math.nan),
            "feature_ratio": peak / largest.sort(dim=-1, stable=True).values[..., (largest.shape[-1] - 1) // 2],
            "zero_share": states["counts"][:, ZEROS] / finite,
            "half_subnormal": bins[:, : HALF_SUBNORMAL - LOWEST + 1].sum(-1) / nonzero,
            "subnormal": bins[:, : FLOAT_SUBNORMAL - LOWEST + 1].sum(-1) / nonzero,
            "median_exponent": median,
            "nonfinite": states["counts"][:, NONFINITE],
        }

    @property
    def exponents(self) -> dict[int, int]:
        """How many values have each exponent, floor(log2 abs(x)), exactly. −150 stands for all below 2**-149, and 128 for all from 2**128,
        which only float64 has."""
        counts = self.counts[:BINS].tolist()
        return {place - 1 + LOWEST: int(count) for place, count in enumerate(counts) if count}

    @property
    def zeros(self) -> Tensor:
        """The number of values that are exactly 0."""
        return self.counts[ZEROS]

    @property
    def taken(self) -> Tensor:
        """The number of vectors that the finer tables are about."""
        return self.counts[TAKEN]

    def problem(self) -> tuple[str, str] | None:
        found = super().problem() or count_problem("counts", self.counts)
        for name in ("sizes", "quarters", "levels"):
            if found is None and not bool((getattr(self, name) >= 0).all()):
                found = name, "holds nan or a negative number"
        if found is None and bool((self.largest.isnan() | ((self.largest < 0) & (self.largest > -math.inf))).any()):
            found = "largest", "holds nan, or a number that is no absolute value"
        return found
