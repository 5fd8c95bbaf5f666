"""Any transform: where its output comes from is seen from what it makes of pictures whose gray level is a coordinate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SNAP = 0.25
"""Pixels of the input. An edge that is closer than this to the edge of the picture is taken for it."""

RANGES = ((0, 255), (20, 201), (98, 255))
"""Gray levels of the ramps: several slopes, so that rounding between the steps of a transform does not always fall in one direction."""

STRETCHED = 0.08
"""The most, as a share of the picture, by which coordinates from ramps of several slopes may differ. Gray levels alone give 0.02."""

TOLERANCE = 1.0
"""Pixels of the input, or of the picture if that is coarser, by which a coordinate may differ from a straight line, apart from rounding."""


class GeometryError(ValueError):
    """It cannot be told where the pixels of the input come from. The message says why, and what to do."""


def measured(transform: Callable[[Image], Tensor], width: int, height: int) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of what is shown of a picture of this size, in fractions.

    A black and a white picture tell for each value of the input how it depends on the gray level; where it does not, it shows a border.
    Then ramps, from left to right and from top to bottom, give the coordinates of each pixel of the input. A straight line through them has
    the edges. Gray levels are rounded differently in every row (or column), so their average is exact.

    Raises:
        GeometryError: the transform is random, or turns, mirrors or bends pictures, or mixes pixel values.
    """
    black, white = (_send(transform, np.full((height, width), level, np.uint8)) for level in (0, 255))
    if not torch.equal(*(_send(transform, _ramp(width, height, *RANGES[0])) for _ in range(2))):
        raise _error(width, height, "two runs on one picture differ: it is random")
    span = white - black
    seen = span.abs() > 0.25 * span.abs().amax()
    if not bool(seen.any()):
        raise _error(width, height, "black and white pictures give the same input, so the position of pixels cannot be read from it")
    varied = seen.flatten(1).any(1)  # other channels are constant, such as the opacity
    black, span, seen = black[varied], span[varied], seen[varied]
    shown, x, y = seen.all(0), torch.zeros_like(span[0]), torch.zeros_like(span[0])
    for number, (low, high) in enumerate(RANGES):
        for places, ramp in ((x, _ramp(width, height, low, high)), (y, _ramp(height, width, low, high).T)):
            level = ((_send(transform, ramp)[varied] - black) / span.where(seen, 1.0)).mean(0) * 255
            found = (level - low) / (high - low)
            if number and bool(((found - places / number).abs() > STRETCHED)[shown].any()):
                raise _error(width, height, "values are not in proportion to those of the picture, or depend on its contrast")
            places += found
    x, y = x / len(RANGES), y / len(RANGES)
    left, right = _edges(x, shown, width, "horizontal", (width, height))
    top, bottom = _edges(y.T, shown.T, height, "vertical", (width, height))
    return top, left, bottom, right


def _edges(places: Tensor, shown: Tensor, size: int, name: str, picture: tuple[int, int]) -> tuple[float, float]:
    """Both edges along the last dimension of ``places`` (h, w): the coordinates of pixels, in fractions, where ``shown``."""
    count = places.shape[1]
    # Next to the edge of the picture, interpolation has nothing beyond it to average with.
    margin = 2.0 / size + 2.0 / count
    inner = shown & (places > margin) & (places < 1 - margin)
    if int(inner.any(0).sum()) < 2:
        inner = shown
        if int(shown.any(0).sum()) > size:  # enlarged: between the outermost pixels of the picture and its edges, nothing changes
            inner = shown & (places > (0.5 + SNAP) / size) & (places < 1 - (0.5 + SNAP) / size)
    columns = inner.any(0)
    if int(columns.sum()) < 2:
        if not bool(columns.any()) or count > 1:
            raise _error(*picture, f"fewer than two {name} positions of the input show the picture, or it is too small")
        return 0.0, 1.0  # one pixel: everything
    line = (places * inner).sum(0)[columns] / inner.sum(0)[columns]
    at = torch.arange(count, dtype=torch.float64)[columns] + 0.5
    slope = ((at - at.mean()) * (line - line.mean())).sum() / ((at - at.mean()) ** 2).sum()
    first = line.mean() - slope * at.mean()
    fit = first + slope * (torch.arange(count, dtype=torch.float64) + 0.5)
    far = ((places - fit).abs() * inner).amax()
    if float(slope) <= 0 or float(far) > TOLERANCE * max(float(slope.abs()), 1 / size) + 2 / 255:
        raise _error(*picture, f"its {name} positions do not lie on a rising line: it turns, mirrors or bends pictures")
    low, high = float(first), float(first + slope * count)
    near = SNAP * float(slope)
    return (0.0 if abs(low) < near else low), (1.0 if abs(high - 1) < near else high)


def _ramp(width: int, height: int, low: int, high: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Gray levels that rise from left to right, from low to high. Each row rounds them at another place."""
    levels = low + (np.arange(width) + 0.5) / width * (high - low)
    dither = (np.arange(height) * 0.6180339887498949) % 1  # the golden ratio: the places spread evenly
    return np.minimum(np.floor(levels + dither[:, None]), 255).astype(np.uint8)


def _send(transform: Callable[[Image], Tensor], gray: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """The input that a gray picture becomes, float64 (channels, h, w)."""
    from PIL import Image

    try:
        found = transform(Image.fromarray(np.ascontiguousarray(gray)).convert("RGB"))
    except Exception as error:
        raise _error(gray.shape[1], gray.shape[0], f"it fails on a test picture ({type(error).__name__}: {error})") from error
    if not isinstance(found, Tensor) or found.dim() != 3:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"preprocess must return a tensor (3, H, W), got {got}")
    return found.detach().double().cpu()


def _error(width: int, height: int, why: str) -> GeometryError:
    return GeometryError(
        f"it cannot be told which part of a {width} × {height} picture the preprocessing shows: {why}. Give another preprocess=, or say it "
        'with geometry="whole", or geometry=function of (width, height) that returns a Box'
    )
