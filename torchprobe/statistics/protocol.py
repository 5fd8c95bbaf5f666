"""What every statistic can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Statistic")


@runtime_checkable
class Statistic(Protocol):
    """Six verbs. ``merge`` takes what another instance of the same class and width saw; none but a read may synchronise with the device."""

    features: int
    state: Tensor

    def __init__(self, features: int, device: torch.device | str | None = None, outlier_sigma: float = 6.0) -> None: ...

    def update(self, x: Tensor, feature_dim: int = -1) -> None:
        """Adds the vectors of one tensor."""

    def merge(self: Self, other: Self) -> Self:
        """Adds, in place, everything ``other`` saw; returns self."""

    def reset(self) -> None:
        """Forgets everything."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, detached from this object."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave."""
