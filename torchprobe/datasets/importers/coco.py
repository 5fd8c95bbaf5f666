"""COCO instances: one JSON file with polygons and run lengths, and a folder of images."""

from __future__ import annotations

import os
from array import array
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from torchprobe.common.reading import open_regular
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.coco_masks import Mask, draw
from torchprobe.datasets.importers.coco_tables import Categories, CocoImage, read_categories, read_image, report_names
from torchprobe.datasets.importers.conversion import Conversion, SetOptions
from torchprobe.datasets.importers.files import inside
from torchprobe.datasets.importers.json_arrays import elements, read_element
from torchprobe.datasets.importers.pictures import Picture
from torchprobe.datasets.importers.planes import Plane, stack
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import identifier

if TYPE_CHECKING:
    from typing_extensions import Unpack

CROWD = "a crowd region: one mask around many, often coarse"
MOST_MEMORY = 1 << 30
"""Bytes of all masks of an image."""
PARTIAL = (
    "annotated for some of the labels only (neg_category_ids, not_exhaustive_category_ids, as in LVIS). The format cannot say that of "
    "single labels, so the others count as absent"
)


def import_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    category: str = "object",
    supercategories: bool = False,
    crowd: str = "keep",
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes a COCO instances set in the format of Broden.

    * All images of the file are annotated for ``category``, also those without any object.
    * The masks of one label are united. Different labels may overlap: each keeps all its pixels, in as many label maps as needed.
    * Ids may have gaps. Labels of the same name stay apart: the later ones get their id in parentheses.
    * An annotation without a mask is dropped, and so is one of an unknown image or category. All is reported.
    * Polygons cover the same pixels as in COCO's own API. The file is read twice, and never held in memory.

    Args:
        annotations: the JSON file, such as instances_val2017.json, or of any tool that writes COCO.
        images: the folder that ``file_name`` is relative to.
        out: the new data set.
        category: the category of all labels.
        supercategories: add a category ``"supercategory"``, with the union of the labels of each.
        crowd: regions with ``iscrowd``: ``"keep"`` as their label, or ``"drop"``. Dropped regions count as pixels without the label, since
            the format has no void.
        options: see :class:`~torchprobe.datasets.importers.conversion.SetOptions`.

    Raises:
        DatasetError: the file is damaged or not of this format; ``out`` is not free; no image or no label is left.

    >>> import json, tempfile
    >>> from PIL import Image
    >>> from torchprobe.datasets import Broden
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "photos").mkdir()
    >>> Image.new("RGB", (8, 4)).save(folder / "photos" / "a.png")
    >>> square = {"id": 1, "image_id": 5, "category_id": 90, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]], "iscrowd": 0}
    >>> _ = (folder / "set.json").write_text(json.dumps({
    ...     "images": [{"id": 5, "file_name": "a.png", "width": 8, "height": 4}],
    ...     "annotations": [square],
    ...     "categories": [{"id": 90, "name": "cat"}],
    ... }))
    >>> report = import_coco(folder / "set.json", folder / "photos", folder / "broden", segmentation_size=(4, 8))
    >>> report.images, report.labels, report.dropped
    (1, 1, [])
    >>> Broden(folder / "broden").image_labels(0)[0][1][0, :, :4].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    if crowd not in ("keep", "drop"):
        raise ValueError(f"crowd must be 'keep' or 'drop', got {crowd!r}")
    folder = Path(images)
    with Conversion("coco", out, (annotations, images), **options) as conversion:
        index = _Index(annotations, conversion.report)
        categories = index.categories
        names = {category: categories.labels}
        if supercategories:
            names["supercategory"] = categories.supercategories(conversion.report)
        conversion.begin(names)
        with open_regular(annotations) as file:
            for image in conversion.each(index.images):
                with conversion.image(image.file_name):
                    name, path = inside(folder, image.file_name, "image")
                    picture = Picture(path)
                    height, width = image.size or (picture.height, picture.width)
                    masks = _masks(index.annotations(file, image), categories, height, width, crowd == "drop", conversion.report)
                    labels: dict[str, Plane] = {category: stack(masks, height, width)}
                    if supercategories:
                        labels["supercategory"] = stack(categories.united(masks), height, width)
                    conversion.add(name, picture, labels)
    return conversion.report


def _masks(
    annotations: list[dict[str, Any]], categories: Categories, height: int, width: int, drop_crowd: bool, report: ImportReport
) -> dict[int, Mask]:
    """The united mask of each label in an image.

    Raises:
        Unusable: more masks than memory should hold.
    """
    masks: dict[int, Mask] = {}
    for annotation in annotations:
        name = f"annotation {annotation.get('id', '?')}"
        try:
            number = categories.number(annotation.get("category_id"))
            mask = draw(annotation.get("segmentation"), height, width)
        except Unusable as error:
            report.drop("annotations", error.reason, f"{name}: {error.detail}" if error.detail else name)
            continue
        if annotation.get("iscrowd"):
            if drop_crowd:
                report.drop("annotations", f"{CROWD}. Its pixels count as pixels without the label", name)
                continue
            report.change("annotations", f"{CROWD}. Kept as its label", name)
        if not mask.any():
            report.drop("annotations", "no pixel inside the image", name)
        elif number in masks:
            masks[number] |= mask
        elif (len(masks) + 1) * height * width > MOST_MEMORY:
            raise Unusable("more labels than memory should hold for an image of this size", f"{height} × {width}")
        else:
            masks[number] = mask
    return masks


class _Index:
    """What a file says about images and categories, and where the annotations of each image are."""

    def __init__(self, path: str | os.PathLike[str], report: ImportReport) -> None:
        self.report = report
        self.images: list[CocoImage] = []
        self._places: dict[Hashable, array[int]] = {}  # image id → start, size, start, size …
        known: set[Hashable] = set()
        names: list[Any] = []
        found: set[str] = set()
        for element in elements(path, ("images", "annotations", "categories")):
            found.add(element.key)
            if element.key == "categories":
                names.append(element.value)
                continue
            try:
                if not isinstance(element.value, Mapping):
                    raise Unusable("not an object")
                if element.key == "images":
                    image = read_image(element.value)
                    if image.id in known:
                        raise Unusable("the id of another image", f"id {image.id}")
                    known.add(image.id)
                    self.images.append(image)
                else:
                    place = self._places.setdefault(identifier(element.value.get("image_id"), "image_id"), array("q"))
                    place.extend((element.start, element.size))
            except Unusable as error:
                report.drop(element.key, error.reason, error.detail)
        if missing := [key for key in ("images", "categories") if key not in found]:
            raise DatasetError(f"{path} is no COCO file: its list of {missing[0]} is missing or empty")
        self.categories = read_categories(names, str(path))
        for stray in self._places.keys() - known:
            report.drop("annotations", "of an image that the file does not list", f"image_id {stray}", len(self._places[stray]) // 2)
        report_names(self.categories, report)
        if partial := sum(image.partial for image in self.images):
            report.change("images", PARTIAL, count=partial)

    def annotations(self, file: BinaryIO, image: CocoImage) -> list[dict[str, Any]]:
        """The annotations of an image, read from the file."""
        places = np.array(self._places.get(image.id, ()), np.int64).reshape(-1, 2)
        return [read_element(file, int(start), int(size)) for start, size in places]
