"""The labels of an image where the network looked: on the part of the picture that its input shows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchprobe.datasets.broden import ImageLabels
from torchprobe.datasets.broden.presence import pixel_counts
from torchprobe.datasets.geometry import Box, GeometryError

_FARTHEST = float(1 << 20)
"""The size of a picture is the unit of a box; nothing lies so far from one."""


class Framed(NamedTuple):
    """Labels on the pixels of the label grid whose centers the input shows.

    ``labels``: as they were, with the planes cut. ``rows``, ``columns``: of the cut grid. ``box``: where the input lies on it: top, left,
    bottom and right, in pixels. ``outside``: int64 (k, 2), each label that was cut off and its pixels there; a pixel counts once.
    """

    labels: ImageLabels
    rows: int
    columns: int
    box: tuple[float, float, float, float]
    outside: Tensor


def frame(labels: ImageLabels, rows: int, columns: int, box: Box) -> Framed:
    """The labels of an image, with a label grid of ``rows`` × ``columns``, in the part of the picture that the network was shown.

    Labels of the whole image stay: they hold everywhere. At least one pixel stays, the one next to the middle of the box.

    Raises:
        GeometryError: the box has no extent, or an edge that is not a number.

    >>> plane = torch.tensor([[[1, 1, 2, 2], [1, 1, 2, 2]]])
    >>> framed = frame([("object", plane)], 2, 4, Box(0.0, 0.25, 1.0, 0.75))
    >>> framed.labels[0][1].tolist(), framed.box, framed.outside.tolist()
    ([[[1, 2], [1, 2]]], (0.0, 0.0, 2.0, 2.0), [[1, 2], [2, 2]])
    """
    nothing = torch.empty(0, 2, dtype=torch.int64)
    if not (-_FARTHEST < box.top < box.bottom < _FARTHEST and -_FARTHEST < box.left < box.right < _FARTHEST):
        raise GeometryError(f"no part of a picture has the edges {tuple(box)}: expected top < bottom and left < right, as shares of it")
    if box.whole:
        return Framed(labels, rows, columns, (0.0, 0.0, float(rows), float(columns)), nothing)
    top, left, bottom, right = box.on(rows, columns)
    (first, last), (start, end) = _inside(top, bottom, rows), _inside(left, right, columns)
    placed = (top - first, left - start, bottom - first, right - start)
    if (first, start, last, end) == (0, 0, rows, columns):
        return Framed(labels, rows, columns, placed, nothing)
    cut = [(name, part[..., first:last, start:end] if part.dim() > 1 else part) for name, part in labels]
    planes = [part.reshape(-1, rows, columns) for _, part in labels if part.dim() > 1]
    if not planes:
        return Framed(cut, last - first, end - start, placed, nothing)
    every = np.concatenate([part.numpy() for part in planes])
    size = int(every.max()) + 1
    lost = pixel_counts(every, size) - pixel_counts(every[:, first:last, start:end], size)
    lost[0] = 0
    numbers = lost.nonzero()[0]
    return Framed(cut, last - first, end - start, placed, torch.from_numpy(np.stack([numbers, lost[numbers]], 1)))


def _inside(first: float, last: float, size: int) -> tuple[int, int]:
    """The pixels whose centers lie between two edges."""
    low, high = max(0, math.ceil(first - 0.5)), min(size, math.ceil(last - 0.5))
    if low < high:
        return low, high
    middle = min(max(math.floor((first + last) / 2), 0), size - 1)
    return middle, middle + 1
