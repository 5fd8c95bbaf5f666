"""Pascal VOC: JPEGImages/, SegmentationClass/ with palette PNG files, and lists of images in ImageSets/."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.datasets.broden.image_files import unsafe
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.conversion import Conversion, SetOptions
from torchprobe.datasets.importers.files import by_stem
from torchprobe.datasets.importers.pictures import Picture, index_map
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import Values, read_names
from torchprobe.datasets.pictures import FileError, read_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of the challenge, by the values of its masks."""


def import_voc(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    names: str | os.PathLike[str] | Mapping[Any, Any] | Sequence[str] = VOC_NAMES,
    category: str = "object",
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes a folder in the style of Pascal VOC in the format of Broden.

    The value of a pixel is its index in the palette. 0 is the background: none of the labels. 255, the border of objects, is void. The
    format has no void, so it counts as pixels without any label; the report says how many there are.

    Args:
        root: the folder with JPEGImages/ and SegmentationClass/, such as VOCdevkit/VOC2012.
        out: the new data set.
        split: only the images that ImageSets/Segmentation/SPLIT.txt lists, such as ``"val"``; None: every image with a mask.
        names: the names of the values, if they are not those of the challenge: {value: name}, a list that begins with value 0, or a file,
            see :func:`~torchprobe.datasets.importers.values.read_names`.
        category: the category of the labels.
        options: see :class:`~torchprobe.datasets.importers.conversion.SetOptions`.

    Raises:
        DatasetError: a folder or the list is missing; ``out`` is not free; no image is left.

    >>> import tempfile
    >>> from PIL import Image
    >>> root, out = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp(), "broden")
    >>> for folder, name, value in (("JPEGImages", "a.jpg", 0), ("SegmentationClass", "a.png", 15)):
    ...     (root / folder).mkdir()
    ...     Image.new("L", (8, 8), value).save(root / folder / name)
    >>> import_voc(root, out).images
    1
    >>> from torchprobe.datasets import Broden
    >>> [label.name for label in Broden(out).labels]
    ['person']
    """
    root = Path(root)
    with Conversion("voc", out, (root,), **options) as conversion:
        report = conversion.report
        values = Values(read_names(names, first_value=0))
        values.tell(report)
        images, masks = by_stem(root / "JPEGImages", "images", report), by_stem(root / "SegmentationClass", "masks", report)
        if split is None:
            report.drop("images", "no mask, so they are not annotated", count=len(images.keys() - masks.keys()))
        listed = sorted(masks) if split is None else _listed(root / "ImageSets" / "Segmentation", split)
        conversion.begin({category: values.labels})
        for stem in conversion.each(listed):
            with conversion.image(stem):
                if stem not in images or stem not in masks:
                    raise Unusable("no mask" if stem in images else "no image of this name in JPEGImages")
                plane = values.plane(index_map(masks[stem]), stem, report)
                conversion.add(stem, Picture(images[stem]), {category: plane})
    return conversion.report


def _listed(folder: Path, split: str) -> list[str]:
    """The names in the list of a split, each once."""
    if unsafe(split) or "/" in split:
        raise DatasetError(f"{split!r} is not the name of a split, such as train, val or trainval")
    path = folder / f"{split}.txt"
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except (FileError, UnicodeDecodeError) as error:
        there = sorted(file.stem for file in folder.glob("*.txt")) if folder.is_dir() else []
        raise DatasetError(f"{path}: {error}; there {'are ' + ', '.join(there) if there else 'is no list of images'}") from None
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
