"""Boxes, and the box of every size of picture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torchprobe.datasets.geometry.carried import carried
from torchprobe.datasets.geometry.measured import GeometryError, measured
from torchprobe.datasets.geometry.whole import WholePicture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Box", "Geometry", "GeometryError"]


class Box(NamedTuple):
    """The part of a picture that an input shows: where its edges lie, in fractions of the picture's height and width.

    (0, 0, 1, 1) is the whole picture. A box that reaches beyond it is that of an input with a border around the picture.
    """

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether this is exactly the whole picture."""
        return self == (0, 0, 1, 1)

    def on(self, rows: int, columns: int) -> tuple[float, float, float, float]:
        """The same box in the pixels of a grid over the picture.

        >>> Box(0.25, 0.0, 0.75, 1.0).on(100, 60)
        (25.0, 0.0, 75.0, 60.0)
        """
        return self.top * rows, self.left * columns, self.bottom * rows, self.right * columns


class Geometry:
    """What part of a picture a transform shows, for pictures of every size.

    Steps of torchvision (v1 and v2), timm and open_clip are followed exactly. For everything else – the processors of transformers,
    functions of your own – test pictures of that size, whose gray levels are coordinates, are sent through the transform. Each size is
    looked at once.

    Args:
        transform: PIL image → tensor (3, H, W).
        given: use this instead: "whole", or a function (width, height) → :class:`Box`.

    >>> from torchvision.transforms import v2
    >>> crop = v2.Compose([v2.Resize(64), v2.CenterCrop(64), v2.PILToTensor()])
    >>> Geometry(crop).box(128, 64)
    Box(top=0.0, left=0.25, bottom=1.0, right=0.75)
    """

    def __init__(self, transform: Callable[..., Tensor], given: str | Callable[[int, int], Box] | None = None) -> None:
        if isinstance(given, str) and given != "whole":
            raise ValueError(f'geometry must be "whole" or a function (width, height) → Box, got {given!r}')
        self.transform, self.given = transform, given
        self._boxes: dict[tuple[int, int], Box] = {}
        self._looking = threading.Lock()  # images are read in threads; one of them looks at a size, and the others wait

    def box(self, width: int, height: int) -> Box:
        """The part that is shown of a picture of this size.

        Raises:
            GeometryError: it cannot be told, since the transform is random, or turns, mirrors or bends pictures, or mixes pixel values.
        """
        with self._looking:
            if (width, height) not in self._boxes:
                self._boxes[width, height] = self._look(width, height)
            return self._boxes[width, height]

    def _look(self, width: int, height: int) -> Box:
        if self.given == "whole" or (self.given is None and isinstance(self.transform, WholePicture)):
            return Box()
        if callable(self.given):
            return Box(*self.given(width, height))
        found = carried(self.transform, width, height)
        return Box(*(measured(self.transform, width, height) if found is None else found))
