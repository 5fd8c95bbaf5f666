"""Single photos, as cameras and people leave them: any usual format, turned upright, of bounded size."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torchprobe.common.messages import reason
from torchprobe.datasets.images import DatasetError, rgb
from torchprobe.datasets.pictures import FileError, FormatError, opened

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
"""What turns a picture upright, by the orientation that its camera noted (EXIF 2.3, section 4.6.4)."""


def read_photo(path: str | os.PathLike[str]) -> Image:
    """A photo in RGB, upright as its camera held it. Gray of 16 bits is scaled to 8; of an animation, this is the first picture.

    Raises:
        DatasetError: the file is missing, in another format, truncated, damaged or too large; the message names it.

    >>> import tempfile
    >>> from PIL import Image
    >>> path, exif = tempfile.mkdtemp() + "/a.jpg", Image.Exif()
    >>> exif[0x0112] = 6  # held upright: the columns of the file are the rows of the scene
    >>> Image.new("RGB", (40, 30)).save(path, exif=exif)
    >>> read_photo(path).size
    (30, 40)
    """
    from PIL import Image as pil

    name = os.fspath(path)
    try:
        with opened(name) as image:
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))  # after loading: some formats turn themselves, and then say 1
            found = rgb(image)
    except FormatError as error:
        raise DatasetError(f"{name}: {error}") from None
    except FileError as error:
        raise DatasetError(f"{name} cannot be used: {error}") from None
    except Exception as error:  # hostile metadata may raise anything
        raise DatasetError(f"{name} cannot be decoded ({reason(error)})") from None
    return found if turn is None else found.transpose(getattr(pil.Transpose, turn))
