"""Opens the images and decodes the label maps of an index. Paths stay inside the folder, sizes are bounded, and files are complete."""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torchprobe.datasets.images import rgb

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 1 << 14
MAX_PIXELS = 1 << 26
"""The largest image that is opened: its longer side, and its number of pixels."""
MAX_BYTES = 1 << 28
"""The largest file that is read."""
MAX_LABEL = (1 << 16) - 1
"""The largest number that red and green can encode."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NO_PARTS = frozenset({"", ".", ".."})


class FileError(ValueError):
    """A file that cannot be used; the message says why. The caller adds the row."""


def unsafe(name: str) -> bool:
    """Whether a name is not a plain relative path: an absolute path, a drive, an empty, ``.`` or ``..`` part, a backslash, or control
    characters.

    >>> [unsafe(name) for name in ("ade20k/a b.jpg", "../a.jpg", "/etc/passwd", "a//b.png", "C:a.png", "")]
    [False, True, True, True, True, True]
    """
    control = not name.isprintable() and _CONTROL.search(name) is not None
    return control or "\\" in name or name[1:2] == ":" or not _NO_PARTS.isdisjoint(name.split("/"))


def size_problem(height: int, width: int) -> str | None:
    """The problem with the size of an image, or None."""
    if height < 1 or width < 1:
        return f"a size of {height} × {width} pixels"
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        return f"a size of {height} × {width} pixels, more than {MAX_SIDE} on a side or {MAX_PIXELS} in all"
    return None


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
    from PIL import Image

    data = read_bytes(path)
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 33:
        raise FileError("not a PNG file")
    if (found := struct.unpack(">II", data[16:24])) != (width, height):  # before anything is decompressed
        raise FileError(f"the label map is {found[1]} × {found[0]} pixels, its row says sh × sw = {height} × {width}")
    check_chunks(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("RGB", "RGBA", "P", "L", "1"):
                raise FileError(f"pixels of mode {image.mode}; expected 8-bit red, green and blue")
            pixels = np.frombuffer(image.convert("RGB").tobytes("raw", "RGBX"), "<u4")
    except FileError:
        raise
    except Exception as error:  # hostile bytes may raise anything in a decoder
        raise FileError(f"the PNG file is damaged ({_reason(error)})") from None
    if (pixels & 0xFF0000).any():
        raise FileError("the blue channel is not 0, so these are not label numbers (red + 256 · green)")
    return torch.from_numpy((pixels & 0xFFFF).astype(np.int32).reshape(height, width))


def check_chunks(data: bytes) -> None:
    """Checks that no chunk of a PNG is missing and that checksums match. The decoder may ignore such errors (LOAD_TRUNCATED_IMAGES)."""
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise FileError("the PNG file is damaged (a checksum does not match)")
        if kind == b"IEND":
            return
        at = end + 4
    raise FileError("the PNG file is truncated")


def read_image(path: str | Path) -> Image:
    """An image in RGB; gray of 16 bits is scaled to 8.

    Raises:
        FileError: the file is missing, neither JPEG nor PNG, truncated, damaged, or too large.
    """
    from PIL import Image

    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if problem := size_problem(image.height, image.width):
                raise FileError(problem)
            return rgb(image)
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"the image cannot be decoded ({_reason(error)})") from None


def read_bytes(path: str | Path) -> bytes:
    """A whole file.

    Raises:
        FileError: it is missing, too large, or cannot be read.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise FileError("it is not a regular file")
        if info.st_size > MAX_BYTES:
            raise FileError(f"the file is larger than {MAX_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            return file.read(info.st_size)
    except FileNotFoundError:
        raise FileError("the file is missing") from None
    except OSError as error:
        raise FileError(f"the file cannot be read ({error.strerror})") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
