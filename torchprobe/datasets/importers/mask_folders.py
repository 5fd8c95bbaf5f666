"""Folders of masks: one label map for each image, or one folder of binary masks for each concept."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.coco_masks import Mask
from torchprobe.datasets.importers.conversion import Conversion, SetOptions
from torchprobe.datasets.importers.files import by_stem, subfolders
from torchprobe.datasets.importers.pictures import Picture, binary_mask, index_map
from torchprobe.datasets.importers.planes import stack
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import Values, label_name, read_names

if TYPE_CHECKING:
    from typing_extensions import Unpack


def import_label_maps(
    images: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    names: str | os.PathLike[str] | Mapping[Any, Any] | Sequence[str],
    out: str | os.PathLike[str],
    *,
    first_value: int | None = None,
    unlabeled: Collection[int] | None = None,
    void: Collection[int] | None = None,
    image_suffix: str = "",
    mask_suffix: str = "",
    category: str = "object",
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes images with one mask of class indices each in the format of Broden.

    The mask of ``photos/a/1.jpg`` is ``masks/a/1.png``. Its values are taken as stored: indices of a palette, or gray of 8 or 16 bits.
    Masks in color are refused.

    Args:
        images, masks: two folders; files are matched by their path without ending.
        names: the names of the values: see :func:`~torchprobe.datasets.importers.values.read_names`.
        out: the new data set.
        first_value: the value of the first name, if ``names`` is a list without values.
        unlabeled: values that mean: none of the labels. Default: 0 if it has no name, and what is called "background".
        void: values that mean: unknown. The format has no void, so these pixels count as pixels without any label, and are reported.
            Default: 255 if it has no name, and what is called "void" or "ignore".
        image_suffix, mask_suffix: ends of the names that differ, such as ``"_leftImg8bit"`` and ``"_gtFine_labelIds"`` in Cityscapes.
        category: the category of the labels.
        options: see :class:`~torchprobe.datasets.importers.conversion.SetOptions`.

    Raises:
        DatasetError: a folder or the names cannot be used; ``out`` is not free; no image is left.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, value in (("photos", 0), ("masks", 3)):
    ...     (folder / name).mkdir()
    ...     Image.new("L", (8, 8), value).save(folder / name / "a.png")
    >>> import_label_maps(folder / "photos", folder / "masks", {3: "cat"}, folder / "broden").labels
    1
    """
    with Conversion("label-maps", out, (images, masks), **options) as conversion:
        report = conversion.report
        values = Values(read_names(names, first_value), unlabeled, void)
        values.tell(report)
        pictures = by_stem(Path(images), "images", report, image_suffix)
        maps = by_stem(Path(masks), "masks", report, mask_suffix)
        for stem in sorted(maps.keys() - pictures.keys()):
            report.drop("masks", "no image of this name", stem)
        conversion.begin({category: values.labels})
        for stem in conversion.each(sorted(pictures)):
            with conversion.image(stem):
                if stem not in maps:
                    raise Unusable("no mask, so it is not annotated")
                plane = values.plane(index_map(maps[stem]), stem, report)
                conversion.add(stem, Picture(pictures[stem]), {category: plane})
    return conversion.report


def import_binary_masks(
    images: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_suffix: str = "",
    mask_suffix: str = "",
    category: str = "object",
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes images with a folder of binary masks for each concept in the format of Broden.

    The mask of ``photos/a/1.jpg`` for the concept "dog" is ``masks/dog/a/1.png``; the name of the folder is the name of the concept.
    Concepts may overlap. An image with a mask of any concept, be it empty, is annotated for all of them: where a file is missing, the
    concept is absent. An image without any mask is left out. In JPEG masks, and in others with more than two values, the upper half of the
    range belongs to the concept.

    Args:
        images: the images.
        masks: the folder of the folders.
        out: the new data set.
        image_suffix, mask_suffix: see :func:`~torchprobe.datasets.import_label_maps`.
        category: the category of the concepts.
        options: see :class:`~torchprobe.datasets.importers.conversion.SetOptions`.

    Raises:
        DatasetError: a folder is missing or empty; ``out`` is not free; no image is left.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, value in (("photos", 0), ("masks/dog", 255)):
    ...     (folder / name).mkdir(parents=True)
    ...     Image.new("L", (8, 8), value).save(folder / name / "a.png")
    >>> import_binary_masks(folder / "photos", folder / "masks", folder / "broden").labels
    1
    """
    with Conversion("binary-masks", out, (images, masks), **options) as conversion:
        report = conversion.report
        concepts = subfolders(Path(masks))
        if not concepts:
            raise DatasetError(f"no folders in {masks}; expected one folder of masks for each concept")
        names = [label_name(folder.name, str(masks)) for folder in concepts]
        pictures = by_stem(Path(images), "images", report, image_suffix)
        files = [by_stem(folder, "masks", report, mask_suffix) for folder in concepts]
        for stem in sorted({stem for own in files for stem in own} - pictures.keys()):
            report.drop("masks", "no image of this name", stem)
        conversion.begin({category: names})
        for stem in conversion.each(sorted(pictures)):
            with conversion.image(stem):
                own = {number: found[stem] for number, found in enumerate(files, 1) if stem in found}
                if not own:
                    raise Unusable("no mask of any concept, so it is not annotated")
                picture = Picture(pictures[stem])
                found = _masks(own, names, stem, report)
                height, width = next(iter(found.values())).shape
                conversion.add(stem, picture, {category: stack({n: mask for n, mask in found.items() if mask.any()}, height, width)})
                missing = len(names) - len(own)
                report.change("masks of a concept", "no file; the concept counts as absent", stem, missing)
    return conversion.report


def _masks(files: Mapping[int, Path], names: Sequence[str], stem: str, report: ImportReport) -> dict[int, Mask]:
    """The masks of one image. If one cannot be used, the image cannot either: nobody knows whether it shows the concept."""
    masks: dict[int, Mask] = {}
    for number, path in files.items():
        where = f"{names[number - 1]}/{stem}"
        try:
            masks[number], soft = binary_mask(path)
        except Unusable as error:
            raise Unusable(error.reason, f"{where} {error.detail}".strip()) from None
        if soft:
            report.change("masks of a concept", "more than two values; the upper half of the range belongs to the concept", where)
    if len({mask.shape for mask in masks.values()}) > 1:
        raise Unusable("masks of different sizes", stem)
    return masks
