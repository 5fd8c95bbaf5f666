"""Activations at the ends of the range of an activation function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from torchprobe.common.numbers import real
from torchprobe.statistics.saved import count_problem
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import FEATURES, State, column_counts

STUCK_SHARE = 0.95
"""``saturated_features`` counts the features that are saturated in at least this share of the vectors. We chose the value."""


class Saturation(Statistic):
    """The share of values at the ends of a range: of tanh by default, of a sigmoid with ``low=0``, of ReLU6 with ``low=0, high=6``.

    Args:
        features: the width of the layer.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.
        low, high: the ends of the range.
        tolerance: a value is saturated if it is within ``tolerance * (high - low)`` of an end, or beyond it.

    Values are compared in their own precision, but half precision as float32. So a tolerance of 0 finds what ``clamp`` and ``hardtanh``
    have cut off; in half precision only if the ends are exact in it. Inf is beyond an end; nan is a value that is not saturated. The
    states are float64: ``below`` and ``above``, (features,), the values of each feature at the lower and at the upper end, and
    ``vectors`` ().

    Raises:
        ValueError: ``features`` is not positive, the ends are not finite or not in order, or the tolerance is outside [0, 0.5).

    >>> import torch
    >>> from torchprobe.statistics import Saturation
    >>> saturation = Saturation(features=2)
    >>> saturation.update(torch.tensor([[-0.99, 0.5], [-1.0, 0.999]]))
    >>> {name: round(value, 2) for name, value in saturation.summary().items()}
    {'saturated': 0.75, 'saturated_low': 0.5, 'saturated_high': 0.25, 'saturated_features': 0.5}
    """

    below: Tensor
    above: Tensor

    states = MappingProxyType({"below": State((FEATURES,)), "above": State((FEATURES,))})
    fields = MappingProxyType(
        {
            "saturated": "share of the values at either end of the range",
            "saturated_low": "share of the values at the lower end",
            "saturated_high": "share of the values at the upper end",
            "saturated_features": "share of the features that are saturated in at least 95 % of the vectors",
        }
    )
    arguments = ("low", "high", "tolerance")

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        low: float = -1.0,
        high: float = 1.0,
        tolerance: float = 0.01,
    ) -> None:
        low, high, tolerance = real("low", low), real("high", high), real("tolerance", tolerance)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"low and high must be finite, and low < high; got {low} and {high}. For one end, such as ReLU's, use Sparsity"
            )
        if not 0 <= tolerance < 0.5:
            raise ValueError(f"tolerance is a share of the range, at least 0 and below 0.5; got {tolerance}")
        super().__init__(features, device)
        self.low, self.high, self.tolerance = low, high, tolerance

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        margin = self.tolerance * (self.high - self.low)
        self.below = self.below + column_counts(x <= self.low + margin, kept)
        self.above = self.above + column_counts(x >= self.high - margin, kept)

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values, both = states["vectors"] * self.features, states["below"] + states["above"]
        stuck = both >= STUCK_SHARE * states["vectors"][:, None]
        return {
            "saturated": both.sum(-1) / values,
            "saturated_low": states["below"].sum(-1) / values,
            "saturated_high": states["above"].sum(-1) / values,
            "saturated_features": stuck.to(both.dtype).mean(-1),
        }

    def problem(self) -> tuple[str, str] | None:
        vectors = self.tensors()["vectors"]
        return super().problem() or count_problem("below", self.below, vectors) or count_problem("above", self.above, vectors - self.below)
