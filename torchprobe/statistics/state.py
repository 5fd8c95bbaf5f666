"""One tensor that a statistic keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FEATURES = -1
"""Stands for the width of the layer in the shape of a :class:`State`."""

_EMPTY = {"sum": 0.0, "min": math.inf, "max": -math.inf, None: 0.0}


@dataclass(frozen=True)
class State:
    """One tensor that a statistic keeps.

    Args:
        shape: of the tensor; :data:`FEATURES` stands for the width of the layer.
        reduce: how two of them become one: "sum", "min" or "max". None: the statistic has its own :meth:`Statistic.merge_states`.
        dtype: of the tensor. Sums need float64: float32 stops counting at 2²⁴. A device without float64 gets float32.
    """

    shape: tuple[int, ...] = ()
    reduce: Literal["sum", "min", "max"] | None = "sum"
    dtype: torch.dtype = torch.float64

    @property
    def empty(self) -> float:
        """The value of every element before anything was seen."""
        return _EMPTY[self.reduce]

    def new(self, features: int, device: torch.device) -> Tensor:
        """An empty tensor for a layer of this width."""
        shape = [features if size == FEATURES else size for size in self.shape]
        dtype = torch.float32 if device.type == "mps" and self.dtype == torch.float64 else self.dtype
        with torch.inference_mode(False):  # a state made in inference mode could not be updated outside it
            return torch.full(shape, self.empty, dtype=dtype, device=device)
