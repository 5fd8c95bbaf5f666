"""Opens the images and decodes the label maps of an index. Paths stay inside the folder, sizes are bounded, and files are complete."""

from __future__ import annotations

import functools
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torchprobe.common.messages import reason
from torchprobe.datasets.images import rgb
from torchprobe.datasets.pictures import PNG_SIGNATURE, FileError, check_chunks, opened, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_LABEL = (1 << 16) - 1
"""The largest number that red and green can encode."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NO_PARTS = frozenset({"", ".", ".."})


def unsafe(name: str) -> bool:
    """Whether a name is not a plain relative path: an absolute path, a drive, an empty, ``.`` or ``..`` part, a backslash, or control
    characters.

    >>> [unsafe(name) for name in ("ade20k/a b.jpg", "../a.jpg", "/etc/passwd", "a//b.png", "C:a.png", "")]
    [False, True, True, True, True, True]
    """
    control = not name.isprintable() and _CONTROL.search(name) is not None
    return control or "\\" in name or name[1:2] == ":" or not _NO_PARTS.isdisjoint(name.split("/"))


def locate(folder: str, name: str, title: str = "images/") -> str:
    """The path of ``name`` in ``folder``, which messages call ``title``. A link must not leave the folder either.

    Raises:
        FileError: the path leaves the folder.
    """
    path = os.path.join(folder, name)
    if unsafe(name) or not _stays(_real(folder), _real(os.path.dirname(path))):
        raise FileError(f"the path leaves the folder {title}")
    if os.path.islink(path) and not _stays(_real(folder), os.path.realpath(path)):
        raise FileError(f"the file is a link that leaves the folder {title}")
    return path


@functools.lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _stays(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def read_labels(path: str | Path, height: int, width: int) -> Tensor:
    """The label numbers of a PNG, red + 256 · green: shape (height, width), int32, 0 = unlabeled.

    Raises:
        FileError: the file is missing, not a PNG, truncated, damaged, of another size, or its blue channel is not 0.
    """
    data = read_bytes(path)
    if not data.startswith(PNG_SIGNATURE) or len(data) < 33:
        raise FileError("not a PNG file")
    if (found := struct.unpack(">II", data[16:24])) != (width, height):  # before anything is decompressed
        raise FileError(f"the label map is {found[1]} × {found[0]} pixels, its row says sh × sw = {height} × {width}")
    check_chunks(data)
    with opened(data, ("PNG",)) as image:
        if image.mode not in ("RGB", "RGBA", "P", "L", "1"):
            raise FileError(f"pixels of mode {image.mode}; expected 8-bit red, green and blue")
        colors = image if image.mode == "RGB" else image.convert("RGB")
        pixels = np.frombuffer(bytearray(colors.tobytes("raw", "RGBX")), "<u4")
    if int(np.bitwise_or.reduce(pixels)) & 0xFF0000:
        raise FileError("the blue channel is not 0, so these are not label numbers (red + 256 · green)")
    pixels &= 0xFFFF
    return torch.from_numpy(pixels.astype(np.int32, copy=False).reshape(height, width))


def read_image(path: str | Path) -> Image:
    """An image in RGB; gray of 16 bits is scaled to 8.

    Raises:
        FileError: the file is missing, neither JPEG nor PNG, truncated, damaged, or too large.
    """
    with opened(path, ("JPEG", "PNG")) as image:
        try:
            return rgb(image)
        except Exception as error:  # of the range of its values
            raise FileError(f"the image cannot be decoded ({reason(error)})") from None
