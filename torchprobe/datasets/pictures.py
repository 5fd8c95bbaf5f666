"""The one place where pictures are opened: regular files, in named formats, of bounded size.

Pillow decides by the content of a file, not by its name, and for some formats, such as PostScript, it starts another program. Only the
formats in :data:`FORMATS` are opened here. What Pillow reads beside the pixels, texts and color profiles, it bounds itself (1 MiB each,
64 MiB together), as it does with pictures that are far larger than any photo (``PIL.Image.MAX_IMAGE_PIXELS``).
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from torchprobe.common import limits
from torchprobe.common.messages import reason
from torchprobe.common.reading import open_regular
from torchprobe.common.reading import read_bytes as read_within

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""As Pillow calls them. None of them starts another program."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_LARGE = 1 << 24  # pixels; one such picture is decoded at a time, so that memory does not grow with the number of threads
_decoding_large = threading.RLock()


class FileError(ValueError):
    """A file that cannot be used; the message says why. The caller adds its name."""


class FormatError(FileError):
    """It is in none of the formats."""


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | bytes, formats: Sequence[str] = FORMATS, decode: bool = True) -> Iterator[Image]:
    """A picture within a block.

    Args:
        source: a file, or its bytes.
        formats: some of :data:`FORMATS`.
        decode: read the pixels. Otherwise only the header is read, and the pixels when they are used.

    Raises:
        FileError: the file is missing, not a regular file, too large, or in another format; the picture is too large (limits
            ``picture_side``, ``picture_pixels``, ``picture_bytes``), truncated or damaged. Errors of the block are not changed.

    >>> import tempfile
    >>> from PIL import Image
    >>> path = tempfile.mkdtemp() + "/a.png"
    >>> Image.new("RGB", (4, 3)).save(path)
    >>> with opened(path) as image:
    ...     image.size
    (4, 3)
    """
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    with contextlib.ExitStack() as stack:
        file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(_open(source))
        try:
            image = stack.enter_context(pil.open(file, formats=tuple(formats)))
        except UnidentifiedImageError:
            raise FormatError(f"it is not a picture in one of the formats {', '.join(formats)}") from None
        except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
            raise FileError(f"{_first_line(error)} (PIL.Image.MAX_IMAGE_PIXELS): make it smaller") from None
        except Exception as error:  # hostile bytes may raise anything in a decoder
            raise FileError(f"it is damaged and cannot be decoded ({reason(error)})") from None
        if problem := size_problem(image.height, image.width):
            raise FileError(f"it has {problem}")
        if image.height * image.width > _LARGE:
            stack.enter_context(_decoding_large)
        if decode:
            try:
                image.load()
            except Exception as error:
                raise FileError(f"it is damaged and cannot be decoded ({reason(error)})") from None
        yield image


def size_problem(height: int, width: int) -> str | None:
    """The problem with the size of a picture, or None."""
    if height < 1 or width < 1:
        return f"a size of {height} × {width} pixels"
    found = limits.problem("picture_side", max(height, width)) or limits.problem("picture_pixels", height * width)
    return f"a size of {height} × {width} pixels, {found}" if found else None


def read_bytes(path: str | Path) -> bytes:
    """A whole file.

    Raises:
        FileError: it is missing, not a regular file, larger than the limit ``picture_bytes``, or cannot be read.
    """
    try:
        return read_within(path, "picture_bytes")
    except limits.LimitError as error:
        raise FileError(str(error)) from None
    except OSError as error:
        raise _unreadable(error) from None


def check_chunks(data: bytes) -> None:
    """Checks that no chunk of a PNG is missing and that checksums match. The decoder may ignore such errors (LOAD_TRUNCATED_IMAGES).

    Raises:
        FileError: the file is truncated or damaged.
    """
    at = len(PNG_SIGNATURE)
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


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        file = open_regular(path)
    except OSError as error:
        raise _unreadable(error) from None
    if problem := limits.problem("picture_bytes", os.fstat(file.fileno()).st_size):
        file.close()
        raise FileError(f"the file has {problem}")
    return file


def _unreadable(error: OSError) -> FileError:
    if isinstance(error, FileNotFoundError):
        return FileError("the file is missing")
    return FileError(f"the file cannot be read ({error.strerror})")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
