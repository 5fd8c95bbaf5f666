"""Statistics whose state has no fixed shape, among them classes with the verbs of the earlier protocol."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchprobe.statistics.statistic import Statistic

Self = TypeVar("Self", bound="DynamicStatistic")
_VERBS = ("update", "merge", "reset", "state_dict", "load_state_dict")


class DynamicStatistic(Statistic):
    """A statistic whose state has no fixed shape, such as a list that grows. Layers are handled one after the other.

    A subclass sets ``features`` in its constructor, and defines everything below that raises NotImplementedError. ``state_dict`` returns
    tensors, numbers and text. Such a statistic may wait for the device at the end of a window. A CUDA graph cannot contain it.
    """

    capturable = False

    def _undefined(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} is a DynamicStatistic and must define {what}")

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        raise self._undefined("update(x, feature_dim=-1, *, mask=None)")

    def merge(self: Self, other: Self) -> Self:
        raise self._undefined("merge(other)")

    def reset(self) -> None:
        raise self._undefined("reset()")

    def state_dict(self) -> dict[str, Any]:
        raise self._undefined("state_dict()")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise self._undefined("load_state_dict(state)")

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        raise NotImplementedError(f"{cls.__name__} is a DynamicStatistic and must define from_state(state, device)")

    def summary(self) -> dict[str, float]:
        raise self._undefined("summary()")

    def problem(self) -> tuple[str, str] | None:
        """None: ``load_state_dict`` checks what it takes."""
        return None

    @property
    def empty(self) -> bool:
        """Whether it has seen nothing."""
        raise self._undefined("empty")

    def saw_anything(self) -> Tensor:
        return torch.tensor(not self.empty, device="cpu")

    def add_window(self: Self, window: Self) -> Self:
        return self.merge(window)

    @classmethod
    def summaries(cls: type[Self], statistics: Sequence[Self], histograms: bool = False) -> Tensor:
        rows = [statistic.summary() for statistic in statistics]
        numbers = [[row[field] for field in statistics[0].fields] for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    @classmethod
    def take_windows(cls: type[Self], windows: Sequence[Self], into: list[Self]) -> None:
        into += [window.clone() for window in windows]
        cls.reset_all(windows)

    def restore_window(self: Self, taken: Self) -> None:
        self.__dict__.update(taken.clone().__dict__)

    @classmethod
    def join_windows(cls: type[Self], taken: Sequence[Self], closed: Sequence[Self | None]) -> list[Self]:
        """What is closed grows in place: it may be large."""
        return [window if one is None else one.merge(window) for window, one in zip(taken, closed, strict=True)]

    @classmethod
    def reset_all(cls: type[Self], statistics: Sequence[Self]) -> None:
        for statistic in statistics:
            statistic.reset()


class EarlierProtocol(DynamicStatistic):
    """What a class with the verbs of the earlier protocol lacks. It has no fields, and cannot be saved to a file."""

    state: Tensor
    capturable = True

    def tensors(self) -> dict[str, Tensor]:
        return {"state": self.state}

    def setup(self) -> dict[str, Any]:
        return {"features": self.features}

    def saw_anything(self) -> Tensor:
        return self.state.count_nonzero() > 0

    def summary(self) -> dict[str, float]:
        return {}


def adopted(kind: type) -> type[EarlierProtocol]:
    """A class that is not a :class:`Statistic`, as a subclass of it.

    Raises:
        TypeError: it lacks a verb.
    """
    if missing := [verb for verb in _VERBS if not callable(getattr(kind, verb, None))]:
        raise TypeError(
            f"statistic=: {kind.__name__} is not a torchprobe.statistics.Statistic and has no {missing[0]}(): derive it from "
            f"Statistic; docs/statistics.md has an example"
        )
    warnings.warn(
        f"torchprobe: {kind.__name__} is not a subclass of torchprobe.statistics.Statistic. It is recorded, but has no fields to show. "
        f"Derive it from Statistic; docs/statistics.md has an example",
        DeprecationWarning,
        stacklevel=5,
    )
    return type(kind.__name__, (kind, EarlierProtocol), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
