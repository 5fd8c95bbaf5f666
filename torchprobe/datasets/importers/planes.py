"""Masks that may overlap become label maps: as few as possible, and none loses a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchprobe.datasets.importers.report import Unusable

Plane = np.ndarray[Any, np.dtype[Any]]

MOST_VALUES = 1 << 28
"""Pixels of all planes of an image."""


def stack(masks: Mapping[int, np.ndarray[Any, np.dtype[np.bool_]]], height: int, width: int) -> Plane:
    """Label maps (planes, height, width), uint16, in which every label has all the pixels of its mask; one plane of 0 without masks.

    Labels that do not overlap share a plane: each label, the largest first, goes to the first plane that has room. So nothing is lost, and
    there is no need to choose which of two overlapping labels is on top.

    Args:
        masks: label (1 … 65,535) → its pixels, bool (height, width).

    Raises:
        Unusable: more planes than memory should hold.

    >>> import numpy as np
    >>> left, all_, right = np.array([[1, 0]], bool), np.array([[1, 1]], bool), np.array([[0, 1]], bool)
    >>> stack({1: left, 2: all_, 3: right}, 1, 2).tolist()
    [[[2, 2]], [[1, 3]]]
    """
    planes: list[Plane] = []
    areas = {label: int(mask.sum()) for label, mask in masks.items()}
    for label in sorted(masks, key=lambda label: (-areas[label], label)):
        mask = masks[label]
        plane = next((plane for plane in planes if not plane[mask].any()), None)
        if plane is None:
            if (len(planes) + 1) * height * width > MOST_VALUES:
                raise Unusable("more labels on top of each other than memory should hold", f"{len(planes)} planes of {height} × {width}")
            plane = np.zeros((height, width), np.uint16)
            planes.append(plane)
        plane[mask] = label
    return np.stack(planes) if planes else np.zeros((1, height, width), np.uint16)
