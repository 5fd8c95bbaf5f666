"""Single photos, as cameras and people leave them: any usual format, turned upright, of bounded size."""

from __future__ import annotations

import io
import os
import warnings
from typing import TYPE_CHECKING

from torchprobe.common.messages import reason
from torchprobe.datasets.broden.image_files import FileError, read_bytes, size_problem
from torchprobe.datasets.images import DatasetError, rgb

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""As Pillow calls them."""

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
    from PIL import UnidentifiedImageError

    name = os.fspath(path)
    try:
        data = read_bytes(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)  # the size is checked here
            image = pil.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if problem := size_problem(image.height, image.width):
                raise FileError(f"it has {problem}; make it smaller")
            image.load()
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))  # after loading: some formats turn themselves, and then say 1
            found = rgb(image)
    except FileError as error:
        raise DatasetError(f"{name} cannot be used: {error}") from None
    except UnidentifiedImageError:
        raise DatasetError(f"{name} is not a picture in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # hostile bytes may raise anything in a decoder
        raise DatasetError(f"{name} cannot be decoded ({reason(error)})") from None
    return found if turn is None else found.transpose(getattr(pil.Transpose, turn))
