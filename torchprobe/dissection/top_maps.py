"""The maps of units on their top images, kept from the pass through the network, so that a page can draw where units are active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 64 << 20
"""Bytes of the maps of a layer. With more, none are kept, and a page lets its pictures pass the network again."""


class TopMaps:
    """The map of each unit on each of its top images, and where the map lies on the picture.

    ``maps`` float32 (units, k, h, w): nan where no value exceeds the threshold, so the unit is not active. ``boxes`` float64 (units, k, 4),
    see :class:`torchprobe.datasets.geometry.Box`. Nan too for images that were not seen.

    Args:
        ids: int64 (units, k), rows of the data set; −1: no image.
        thresholds: float32 (units,), on the CPU.
        size: rows and columns of a map.

    >>> top = TopMaps(torch.tensor([[7, 3]]), torch.tensor([0.5]), (1, 2))
    >>> top.update([3, 4], torch.tensor([[[[1.0, 0.0]]], [[[9.0, 9.0]]]]), torch.tensor([[0.0, 0, 1, 1]] * 2).double())
    >>> top.maps.tolist()
    [[[[nan, nan]], [[1.0, 0.0]]]]
    """

    def __init__(self, ids: Tensor, thresholds: Tensor, size: tuple[int, int]) -> None:
        self.ids, self.thresholds = ids, thresholds
        self.maps = torch.full((*ids.shape, *size), torch.nan)
        self.boxes = torch.full((*ids.shape, 4), torch.nan, dtype=torch.float64)
        self._sorted, self._order = ids.flatten().sort()

    def update(self, rows: Sequence[int], maps: Tensor, boxes: Tensor) -> None:
        """Adds images: maps (images, units, h, w) of some rows, with their boxes (images, 4)."""
        wanted = torch.tensor(rows)
        first, last = torch.searchsorted(self._sorted, wanted), torch.searchsorted(self._sorted, wanted, right=True)
        flat, flat_boxes = self.maps.flatten(0, 1), self.boxes.flatten(0, 1)
        for image, (start, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            places = self._order[start:end]
            unit = places // max(self.ids.shape[1], 1)
            own = maps[image, unit.to(maps.device)].float().cpu()
            active = (own > self.thresholds[unit, None, None]).flatten(1).any(1)
            flat[places] = own.where(active[:, None, None], torch.nan)
            flat_boxes[places] = boxes[image]

    def merge(self, other: TopMaps) -> TopMaps:
        """Takes what the other one has seen."""
        seen = ~other.boxes[..., 0].isnan()
        self.maps[seen], self.boxes[seen] = other.maps[seen], other.boxes[seen]
        return self

    def state_dict(self) -> dict[str, Any]:
        """``maps`` and ``boxes``, cloned."""
        return {"maps": self.maps.clone(), "boxes": self.boxes.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`.

        Raises:
            ValueError: of another shape.
        """
        for name in ("maps", "boxes"):
            own, saved = getattr(self, name), state[name]
            if saved.shape != own.shape or saved.dtype != own.dtype:
                raise ValueError(f"{name} of the saved top images has shape {tuple(saved.shape)}, expected {tuple(own.shape)}")
        self.maps.copy_(state["maps"])
        self.boxes.copy_(state["boxes"])
