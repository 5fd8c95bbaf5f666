"""The length of each activation vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from torchprobe.statistics.saved import count_problem
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import State


class Norms(Statistic):
    """The L2 norm and the root mean square of each vector: their mean and their largest value over vectors.

    Args:
        features: the width of the layer.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.

    The root mean square of a vector is its norm / √features, so layers of different widths can be compared. No square under- or overflows,
    at any scale. Vectors with a nonfinite element are left out and counted: ``invalid_vectors``. The states are float64 (): ``norm_sum``,
    ``largest`` and the two counts, ``vectors`` (all that were seen) and ``invalid_vectors``.

    Raises:
        ValueError: ``features`` is not positive.

    >>> import math, torch
    >>> from torchprobe.statistics import Norms
    >>> norms = Norms(features=4)
    >>> norms.update(torch.tensor([[1.0, 1.0, 1.0, 1.0], [3e30, 0.0, 0.0, 4e30], [math.inf, 0.0, 0.0, 0.0]]))
    >>> [f"{norms.summary()[name]:.3g}" for name in ("norm_max", "rms_max", "invalid_vectors")]
    ['5e+30', '2.5e+30', '1']
    """

    norm_sum: Tensor
    largest: Tensor
    invalid_vectors: Tensor

    states = MappingProxyType({"norm_sum": State(), "largest": State((), "max"), "invalid_vectors": State()})
    fields = MappingProxyType(
        {
            "norm_mean": "L2 norm of a vector, mean over vectors",
            "norm_max": "the largest L2 norm of a vector",
            "rms_mean": "root mean square of a vector, mean over vectors",
            "rms_max": "the largest root mean square of a vector",
            "invalid_vectors": "vectors left out because an element is nonfinite",
        }
    )

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        kept = kept[:, 0]
        norms, finite = _norms(x, self.norm_sum.dtype)
        valid = finite & kept
        self.norm_sum = self.norm_sum + norms.where(valid, 0).sum()
        self.largest = torch.maximum(self.largest, norms.where(valid, -math.inf).amax())
        self.invalid_vectors = self.invalid_vectors + (kept & ~finite).sum()

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        valid = states["vectors"] - states["invalid_vectors"]
        mean, largest = states["norm_sum"] / valid, states["largest"].where(valid > 0, math.nan)
        root = math.sqrt(self.features)
        return {
            "norm_mean": mean,
            "norm_max": largest,
            "rms_mean": mean / root,
            "rms_max": largest / root,
            "invalid_vectors": states["invalid_vectors"],
        }

    def problem(self) -> tuple[str, str] | None:
        if wrong := super().problem() or count_problem("invalid_vectors", self.invalid_vectors, self.tensors()["vectors"]):
            return wrong
        seen = self.tensors()["vectors"] > self.invalid_vectors
        if not bool(self.norm_sum >= 0):
            return "norm_sum", f"is {float(self.norm_sum):g}, and no norms add up to that"
        if not bool((self.largest >= 0) if seen else (self.largest == -math.inf)):
            return "largest", f"is {float(self.largest):g}, and no norm is"
        return None


def _norms(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of each vector, and whether all its elements are finite: (vectors, features) → (vectors,), (vectors,)."""
    if x.dtype == torch.float32 and dtype == torch.float64:  # no square under- or overflows
        norms = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
        return norms, norms.isfinite()
    largest = torch.linalg.vector_norm(x, math.inf, dim=1)  # nan if an element is
    finite = largest.isfinite()
    unit = largest.where(finite & (largest > 0), 1)
    return unit.to(dtype) * torch.linalg.vector_norm(x / unit[:, None], dim=1, dtype=dtype), finite
