"""Exact zeros in an activation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from torchprobe.statistics.saved import count_problem
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import FEATURES, State, column_counts


class Sparsity(Statistic):
    """The share of exact zeros, such as a ReLU makes, and of dead features: those that were zero in every vector.

    Args:
        features: the width of the layer.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.

    −0.0 is a zero; nan and inf are not. Padding counts neither as a zero nor as a value. The states are float64: ``zeros`` (features,), the
    zeros of each feature, and ``vectors`` ().

    Raises:
        ValueError: ``features`` is not positive.

    >>> import torch
    >>> from torchprobe.statistics import Sparsity
    >>> sparsity = Sparsity(features=3)
    >>> sparsity.update(torch.tensor([[0.0, 1.0, 0.0], [-0.0, 0.0, 2.0], [0.0, 5.0, 2.0]]))
    >>> round(sparsity.zero_share, 3), round(sparsity.dead_features, 3), sparsity.zeros.tolist()
    (0.556, 0.333, [3.0, 1.0, 1.0])
    """

    zeros: Tensor

    states = MappingProxyType({"zeros": State((FEATURES,))})
    fields = MappingProxyType(
        {
            "zero_share": "share of the values that are exactly 0",
            "dead_features": "share of the features that are 0 in every vector",
        }
    )

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.zeros = self.zeros + column_counts(x == 0, kept)

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        vectors = states["vectors"][:, None]
        return {
            "zero_share": states["zeros"].sum(-1) / (states["vectors"] * self.features),
            "dead_features": (states["zeros"] == vectors).to(vectors.dtype).mean(-1),
        }

    def problem(self) -> tuple[str, str] | None:
        return super().problem() or count_problem("zeros", self.zeros, self.tensors()["vectors"])
