"""Opens images and masks of other data sets. The size of a file is known before it is decoded, and values are taken as they are stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchprobe.common.messages import reason
from torchprobe.datasets.images import rgb
from torchprobe.datasets.importers.report import Unusable
from torchprobe.datasets.pictures import PNG_SIGNATURE, FileError, check_chunks, opened, read_bytes, size_problem

if TYPE_CHECKING:
    from PIL.Image import Image

COPIED = frozenset({"JPEG", "MPO", "PNG"})
"""Formats, as Pillow calls them, that a data set may hold. An MPO is a JPEG with more pictures behind it."""
_MASKS = ("PNG", "BMP", "TIFF", "GIF")
"""Formats without loss: a JPEG changes the values of a mask."""
_ORIENTATION = 0x0112

IndexMap = np.ndarray[Any, np.dtype[np.int64]]


class Picture:
    """An image that is not yet decoded.

    ``height``, ``width``: as stored. ``rotated``: EXIF says that it should be shown turned or mirrored. ``content``: what the writer gets:
    the path of a JPEG or PNG, or the decoded image.

    Raises:
        Unusable: the file is missing, not an image, or too large.
    """

    def __init__(self, source: str | os.PathLike[str] | Image) -> None:
        from PIL import Image as pil

        self.rotated = False
        if isinstance(source, pil.Image):
            self.content: Path | Image = _rgb(source)
            self.height, self.width = source.height, source.width
            return
        try:
            with opened(source, decode=False) as image:
                self.height, self.width, kind = image.height, image.width, image.format
                if kind in ("JPEG", "MPO"):
                    self.rotated = image.getexif().get(_ORIENTATION, 1) != 1
                self.content = Path(source) if kind in COPIED else _rgb(image)
        except Unusable:
            raise
        except FileError as error:
            if not os.path.exists(source):
                raise Unusable("the image is missing") from None
            raise Unusable("the image cannot be read", str(error)) from None
        except Exception as error:  # hostile bytes may raise anything in a decoder
            raise Unusable("the image cannot be read", reason(error)) from None


def _rgb(image: Image) -> Image:
    try:
        return rgb(image)
    except Exception as error:
        raise Unusable("the image cannot be read", reason(error)) from None


def decoded(source: Any) -> Path | Image:
    """An image of a row of a data set: PIL, an array (H, W, 3) or (H, W) of uint8, a path, or a dict with "bytes" or "path".

    Raises:
        Unusable: it is none of these, or cannot be decoded.
    """
    from PIL import Image as pil

    if isinstance(source, pil.Image):
        return source
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    if isinstance(source, bytes):
        try:
            with opened(source) as image:
                return image
        except FileError as error:
            raise Unusable("the image cannot be read", str(error)) from None
    pixels = np.asarray(source)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or pixels.size == 0:
        raise Unusable("the image is not an array of uint8 (H, W, 3) or (H, W)", f"{pixels.dtype} of shape {pixels.shape}")
    return pil.fromarray(pixels)


def open_mask(source: str | os.PathLike[str] | bytes | Image, lossy: bool = False) -> Image:
    """A mask, decoded completely.

    Args:
        source: a file, its bytes, or an image.
        lossy: accept JPEG.

    Raises:
        Unusable: the file is missing, truncated or damaged, too large, or of a format that changes values.
    """
    from PIL import Image as pil

    if isinstance(source, pil.Image):
        return source
    try:
        data = source if isinstance(source, bytes) else read_bytes(Path(source))
        if data.startswith(PNG_SIGNATURE):
            check_chunks(data)  # the decoder may be told to ignore what is missing
        if not lossy and data.startswith(b"\xff\xd8"):
            raise Unusable("the mask is a JPEG, which does not keep values")
        with opened(data, (*_MASKS, "JPEG") if lossy else _MASKS) as image:
            return image
    except FileError as error:
        if not isinstance(source, bytes) and not os.path.exists(source):
            raise Unusable("the mask is missing") from None
        raise Unusable("the mask cannot be read", str(error)) from None


def index_map(source: Any) -> IndexMap:
    """The values of a mask, int64 (height, width): the indices of a palette, or gray values of 8, 16 or 32 bits, as they are stored.

    Args:
        source: see :func:`open_mask`, or an array of integers (height, width).

    Raises:
        Unusable: as :func:`open_mask`; or the mask has colors instead of one value for each pixel.

    >>> index_map(np.array([[0, 255]], np.uint8)).tolist()
    [[0, 255]]
    """
    from PIL import Image as pil

    if not isinstance(source, (str, bytes, os.PathLike, pil.Image)):
        return _integers(source)
    image = open_mask(source)
    values = np.asarray(image)
    if image.mode in ("RGB", "RGBA") and (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
        return values[..., 0].astype(np.int64)  # gray, saved with three equal channels
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise Unusable("the mask has colors; it must have one value for each pixel, as gray or as a palette", f"mode {image.mode}")
    return values.astype(np.int64)


def _integers(source: Any) -> IndexMap:
    try:
        values = np.asarray(source)
    except ValueError as error:  # rows of different lengths
        raise Unusable("the mask is not an array of integers (height, width)", reason(error)) from None
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "iub" or values.size == 0:
        raise Unusable("the mask is not an array of integers (height, width)", f"{values.dtype} of shape {values.shape}")
    if problem := size_problem(*values.shape):
        raise Unusable("a mask of an impossible size", problem)
    return values.astype(np.int64)


def color_map(source: str | os.PathLike[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The channels of a PNG in color, int64 (height, width, 3).

    Raises:
        Unusable: as :func:`open_mask`; or it has no 8-bit colors.
    """
    image = open_mask(source)
    if image.mode not in ("RGB", "RGBA"):
        raise Unusable("the mask has no red, green and blue", f"mode {image.mode}")
    return np.asarray(image)[..., :3].astype(np.int64)


def binary_mask(source: str | os.PathLike[str]) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], bool]:
    """The pixels of a binary mask, and whether it had more than two values, of which those of at least half the range belong to the mask.

    Two values are 0 and any other. A JPEG is accepted: it has more.

    Raises:
        Unusable: as :func:`open_mask`; the mask has colors; two values, neither of them 0; or more, none of them in the upper half.
    """
    image = open_mask(source, lossy=True)
    lossy = image.format in ("JPEG", "MPO")
    values = np.asarray(image.convert("L")).astype(np.int64) if lossy else index_map(_one_channel(image))
    found = np.unique(values)
    least, greatest = int(found[0]), int(found[-1])
    if not lossy and len(found) <= 2 and (least == 0 or len(found) == 1):
        return values != 0, False
    half = 128 if greatest < 256 else 32768
    if greatest and (greatest < half or image.mode == "P" or (len(found) == 2 and not lossy)):
        values_found = ", ".join(map(str, found[:4].tolist())) + (" …" if len(found) > 4 else "")
        raise Unusable("a binary mask must have 0 outside and one other value inside", f"values {values_found}")
    return values >= half, len(found) > 1


def _one_channel(image: Image) -> Image:
    return image.getchannel(0) if image.mode == "LA" else image
