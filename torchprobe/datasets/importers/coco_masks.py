"""The masks of COCO: polygons and run lengths become pixels, the same pixels as in COCO's own API.

The API is the definition: which pixels a polygon covers is what ``rleFrPoly`` of pycocotools says
(https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c). It is not a dependency, because results must not depend on whether a
package is there. The tests compare every pixel with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchprobe.common import limits
from torchprobe.datasets.importers.report import Unusable

Mask = np.ndarray[Any, np.dtype[np.bool_]]

SCALE = 5
"""The outline of a polygon is followed on a grid that is finer by this factor."""
FARTHEST = 4.0
"""The largest coordinate of a polygon, in the longest side that a picture may have. No annotation of such a picture is farther out."""
LONGEST = 1 << 23
"""Points of an outline, on the fine grid."""


def draw(segmentation: Any, height: int, width: int) -> Mask:
    """The pixels of an annotation, bool (height, width).

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, …], of which the union is drawn, or run lengths ``{"size": [height, width],
            "counts": …}``, where ``counts`` is a list of numbers or COCO's compressed text.

    Raises:
        Unusable: it is neither; the polygon or the runs are invalid, or of another size.

    >>> draw([[1, 1, 3, 1, 3, 3, 1, 3]], 4, 4).astype(int)
    array([[0, 0, 0, 0],
           [0, 1, 1, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    >>> draw({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).astype(int)
    array([[0, 1, 0],
           [1, 0, 0]])
    """
    if isinstance(segmentation, dict):
        return _runs(segmentation, height, width)
    if not isinstance(segmentation, list):
        raise Unusable("no segmentation; a box is not a mask")
    if not segmentation:
        raise Unusable("an empty segmentation")
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        mask |= polygon_mask(polygon, height, width)
    return mask


# -- polygons --------------------------------------------------------------------------------------------------------------


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> Mask:
    """The pixels of one polygon [x1, y1, x2, y2, …]; what lies outside the picture is cut off. Where it crosses itself, pixels that are
    inside an even number of times are out.

    The outline is followed on the fine grid. Every step into another column of pixel centers is a crossing; in each column, run along the
    pixels, a crossing goes from outside to inside or back.

    Raises:
        Unusable: not an even number of at least 6 finite numbers; far outside the picture.
    """
    xs, ys = _vertices(polygon)
    u, v = _outline(np.trunc(SCALE * xs + 0.5).astype(np.int64), np.trunc(SCALE * ys + 0.5).astype(np.int64))
    steps = (u[1:] != u[:-1]).nonzero()[0]
    columns = np.where(u[steps + 1] < u[steps], u[steps + 1], u[steps + 1] - 1)
    x = (columns + 0.5) / SCALE - 0.5
    inside = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    y = np.ceil(np.clip((np.minimum(v[steps + 1], v[steps]) + 0.5) / SCALE - 0.5, 0, height))
    crossings = x[inside].astype(np.int64) * height + y[inside].astype(np.int64)
    flat = np.zeros(width * height, bool)
    if len(crossings):
        first, last = int(crossings.min()), int(crossings.max())
        odd = np.bincount(crossings - first).astype(np.uint8).cumsum(dtype=np.uint8) & 1  # parity survives the overflow
        flat[first : last + 1] = odd[: len(flat) - first]
    return flat.reshape(width, height).T


def _vertices(polygon: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        points = np.array(polygon, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise Unusable("a polygon that is not a list of numbers") from None
    if points.ndim != 1 or len(points) % 2:
        raise Unusable("a polygon that is not a list of x and y")
    if len(points) < 6:
        raise Unusable("a polygon with fewer than 3 points")
    if not np.isfinite(points).all():
        raise Unusable("a polygon with nan or inf")
    if np.abs(points).max() > FARTHEST * limits.value("picture_side"):
        raise Unusable("a polygon far outside the picture")
    return points[::2], points[1::2]


def _outline(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The points of all edges on the fine grid, in the order of the outline: one for each step along the longer side of an edge."""
    x_end, y_end = np.roll(x, -1), np.roll(y, -1)
    dx, dy = np.abs(x_end - x), np.abs(y_end - y)
    flat = dx >= dy  # the edge is followed along x
    flip = np.where(flat, x > x_end, y > y_end)  # always followed from the smaller coordinate, so that shared edges agree
    x, x_end, y, y_end = np.where(flip, x_end, x), np.where(flip, x, x_end), np.where(flip, y_end, y), np.where(flip, y, y_end)
    length = np.maximum(dx, dy)
    slope = np.where(flat, y_end - y, x_end - x) / np.maximum(length, 1)
    if (points := int((length + 1).sum())) > LONGEST:
        raise Unusable("a polygon with a longer outline than any picture has")
    edge = np.repeat(np.arange(len(x)), length + 1)
    along = np.arange(points) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    along = np.where(flip[edge], length[edge] - along, along)
    across = np.trunc(np.where(flat, y, x)[edge] + slope[edge] * along + 0.5).astype(np.int64)
    along += np.where(flat, x, y)[edge]
    return np.where(flat[edge], along, across), np.where(flat[edge], across, along)


# -- run lengths -----------------------------------------------------------------------------------------------------------


def _runs(segmentation: dict[str, Any], height: int, width: int) -> Mask:
    """Runs down the columns, alternately outside and inside, outside first."""
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise Unusable("run lengths for another size than that of the image")
    if isinstance(counts, (str, bytes)):
        counts = decode_counts(counts if isinstance(counts, str) else counts.decode("latin-1"), height * width)
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= height * width for count in counts):
        raise Unusable("run lengths that are not a list of whole numbers or COCO's compressed text")
    if sum(counts) != height * width:
        raise Unusable("run lengths that do not cover the image exactly")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def decode_counts(text: str, pixels: int) -> list[int]:
    """The run lengths of COCO's compressed text: 5 bits a character, lowest first, the sixth says that more follow; from the fourth run on,
    the difference to the run before the previous one.

    Raises:
        Unusable: an invalid character, an unfinished number, or more characters than ``pixels`` pixels can need.

    >>> decode_counts("241", 12)
    [2, 4, 1]
    """
    if len(text) > 8 * pixels + 8:
        raise Unusable("run lengths that do not cover the image exactly")
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise Unusable("run lengths with invalid characters")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise Unusable("run lengths that end in the middle of a number")
    return counts
