"""Which concepts each image shows: a sparse matrix of images × labels, with areas."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.common.storage import digest, save_tensors


@dataclass(frozen=True)
class Presence:
    """Labels of each image in compressed sparse rows.

    ``crow`` int64 (images + 1,): image i has the entries crow[i] … crow[i + 1]. ``number`` int32 (entries,): labels, ascending within an
    image. ``area`` float32 (entries,): the share of the image where at least one label map has the label; 1 for whole-image labels.
    ``annotated`` bool (images, categories): the index gives label maps or whole-image labels of the category, so that every label it does
    not show is absent. It follows from the index, so no file holds it; None: images are annotated for the categories of their labels.
    """

    crow: Tensor
    number: Tensor
    area: Tensor
    annotated: Tensor | None = None

    @classmethod
    def of(cls, images: Sequence[tuple[Tensor, Tensor]]) -> Presence:
        """From the numbers and areas of each image, see :func:`image_areas`."""
        counts = torch.tensor([0, *(len(number) for number, _ in images)])
        empty = torch.empty(0)
        numbers, areas = [number for number, _ in images], [area for _, area in images]
        return cls(counts.cumsum(0), torch.cat([empty.int(), *numbers]), torch.cat([empty, *areas]))

    @classmethod
    def join(cls, parts: Sequence[Presence]) -> Presence:
        """The images of all parts, one after the other."""
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), *(part.crow.diff() for part in parts)])
        empty = torch.empty(0)
        return cls(
            counts.cumsum(0), torch.cat([empty.int(), *(part.number for part in parts)]), torch.cat([empty, *(part.area for part in parts)])
        )

    def take(self, images: Sequence[int]) -> Presence:
        """Some images, in the order given.

        >>> presence = Presence(torch.tensor([0, 2, 3]), torch.tensor([3, 7, 7], dtype=torch.int32), torch.ones(3))
        >>> presence.take([1, 0, 1]).number.tolist()
        [7, 3, 7, 7]
        """
        chosen = torch.tensor(images, dtype=torch.int64)
        lengths = self.crow.diff()[chosen]
        crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        entry = torch.arange(int(crow[-1])) + (self.crow[chosen] - crow[:-1]).repeat_interleave(lengths)
        annotated = None if self.annotated is None else self.annotated[chosen]
        return Presence(crow, self.number[entry], self.area[entry], annotated)

    def __len__(self) -> int:
        return len(self.crow) - 1

    def images(self, number: int, minimum_area: float = 0.0) -> list[int]:
        """The images that show a label over at least ``minimum_area``, ascending."""
        entries = ((self.number == number) & (self.area >= minimum_area)).nonzero().flatten()
        return (torch.searchsorted(self.crow, entries, right=True) - 1).tolist()

    def save(self, path: str | os.PathLike[str], key: bytes = b"") -> None:
        """Writes a safetensors file; ``key``: identifies the data that it was computed from."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {"crow": self.crow, "number": self.number, "area": self.area}
        save_tensors(path, tensors, {"made_from": _digest(key), "content": digest(tensors.values())})


def load_presence(path: str | os.PathLike[str], key: bytes = b"") -> Presence | None:
    """Reads a file of :meth:`Presence.save`. None if the file is missing, damaged, or has another key."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        return None
    try:
        with safe_open(str(path), "pt") as file:
            if (file.metadata() or {}).get("made_from") != _digest(key):
                return None
            found = [file.get_tensor(name) for name in ("crow", "number", "area")]
            return Presence(*found) if (file.metadata() or {}).get("content") == digest(found) else None
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return None


def image_areas(labels: list[tuple[str, Tensor]], label_size: int) -> tuple[Tensor, Tensor]:
    """The label numbers of one image, ascending, and the share of the image that each covers. A pixel counts once if several maps have the
    label there."""
    share = np.zeros(label_size, np.float32)
    maps = [planes.numpy() for _, planes in labels if planes.dim() == 3]
    if maps:
        planes = np.concatenate(maps)
        share += pixel_counts(planes, label_size) / planes[0].size
    for _, numbers in labels:
        if numbers.dim() == 1:
            share[numbers.numpy()] = 1
    share[0] = 0
    found = share.nonzero()[0]
    return torch.from_numpy(found.astype(np.int32)), torch.from_numpy(share[found])


def pixel_counts(planes: np.ndarray[Any, Any], label_size: int) -> np.ndarray[Any, Any]:
    """Pixels that have each number in at least one of the planes (k, h, w). The count of number 0 has no meaning."""
    planes = planes.copy()
    for k in range(1, len(planes)):
        for earlier in planes[:k]:
            planes[k][planes[k] == earlier] = 0  # already counted
    return np.bincount(planes.ravel(), minlength=label_size)


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
