"""COCO panoptic: one JSON file, a folder of PNG files whose colors are the ids of segments, and a folder of images."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchprobe.common.reading import open_regular
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.coco import CROWD
from torchprobe.datasets.importers.coco_tables import Categories, CocoImage, read_categories, read_image, report_names
from torchprobe.datasets.importers.conversion import Conversion, SetOptions
from torchprobe.datasets.importers.files import inside
from torchprobe.datasets.importers.json_arrays import elements, read_element
from torchprobe.datasets.importers.pictures import Picture, color_map
from torchprobe.datasets.importers.planes import Plane, stack
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import VOID_REASON, identifier

if TYPE_CHECKING:
    from typing_extensions import Unpack


def import_coco_panoptic(
    annotations: str | os.PathLike[str],
    segments: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    category: str = "object",
    supercategories: bool = False,
    crowd: str = "keep",
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes a COCO panoptic set in the format of Broden.

    The color of a pixel is the id of its segment, red + 256 · green + 65,536 · blue, and the JSON file says which category the segment has.
    Things and stuff become labels of one category. Pixels of id 0 are void. Pixels of an id that the file does not list are dropped.
    The rest is as in :func:`~torchprobe.datasets.import_coco`.

    Args:
        annotations: the JSON file, such as panoptic_val2017.json.
        segments: the folder of its PNG files.
        images: the folder of the images.
        out, category, supercategories, crowd, options: see :func:`~torchprobe.datasets.import_coco`.

    Raises:
        DatasetError: see :func:`~torchprobe.datasets.import_coco`.

    >>> import json, tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, color in (("photos", (9, 9, 9)), ("png", (44, 1, 0))):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (8, 4), color).save(folder / name / "a.png")
    >>> _ = (folder / "set.json").write_text(json.dumps({
    ...     "images": [{"id": 5, "file_name": "a.png"}],
    ...     "annotations": [{"image_id": 5, "file_name": "a.png", "segments_info": [{"id": 300, "category_id": 90}]}],
    ...     "categories": [{"id": 90, "name": "cat", "isthing": 1}],
    ... }))
    >>> report = import_coco_panoptic(folder / "set.json", folder / "png", folder / "photos", folder / "broden")
    >>> report.images, report.labels
    (1, 1)
    """
    if crowd not in ("keep", "drop"):
        raise ValueError(f"crowd must be 'keep' or 'drop', got {crowd!r}")
    with Conversion("coco-panoptic", out, (annotations, segments, images), **options) as conversion:
        listed, places, categories = _read(annotations, conversion.report)
        names = {category: categories.labels}
        if supercategories:
            names["supercategory"] = categories.supercategories(conversion.report)
        conversion.begin(names)
        with open_regular(annotations) as file:
            for image in conversion.each(listed):
                with conversion.image(image.file_name):
                    if image.id not in places:
                        raise Unusable("no annotation of the image")
                    annotation = read_element(file, *places[image.id])
                    name, path = inside(Path(images), image.file_name, "image")
                    _, mask = inside(Path(segments), annotation.get("file_name"), "PNG")
                    picture = Picture(path)
                    plane = _plane(color_map(mask), annotation, categories, crowd == "drop", name, conversion.report)
                    labels: dict[str, Plane] = {category: plane}
                    if supercategories:
                        found = {int(number): plane == number for number in np.bincount(plane.ravel()).nonzero()[0] if number}
                        labels["supercategory"] = stack(categories.united(found), *plane.shape)
                    conversion.add(name, picture, labels)
    return conversion.report


def _read(path: str | os.PathLike[str], report: ImportReport) -> tuple[list[CocoImage], dict[Hashable, tuple[int, int]], Categories]:
    """The images, the place of the annotation of each, and the categories."""
    images: dict[Hashable, CocoImage] = {}
    places: dict[Hashable, tuple[int, int]] = {}
    names: list[Any] = []
    for key, value, start, size in elements(path, ("images", "annotations", "categories")):
        if key == "categories":
            names.append(value)
            continue
        try:
            if not isinstance(value, Mapping):
                raise Unusable("not an object")
            if key == "images":
                image = read_image(value)
                if images.setdefault(image.id, image) is not image:
                    raise Unusable("the id of another image", f"id {image.id}")
                continue
            if not isinstance(value.get("segments_info"), list):
                raise Unusable("no segments_info; this is not a panoptic annotation")
            if places.setdefault(identifier(value.get("image_id"), "image_id"), (start, size)) != (start, size):
                raise Unusable("a second annotation of an image", f"image_id {value.get('image_id')}")
        except Unusable as error:
            report.drop(key, error.reason, error.detail)
    if not (images and names):
        raise DatasetError(f"{path} is no COCO file: its list of {'categories' if images else 'images'} is missing or empty")
    for stray in places.keys() - images.keys():
        report.drop("annotations", "of an image that the file does not list", f"image_id {stray}")
    categories = read_categories(names, str(path))
    report_names(categories, report)
    return list(images.values()), places, categories


def _plane(
    colors: np.ndarray[Any, Any], annotation: dict[str, Any], categories: Categories, drop_crowd: bool, name: str, report: ImportReport
) -> Plane:
    """The label of each pixel."""
    ids, where, counts = np.unique(colors @ [1, 256, 65536], return_inverse=True, return_counts=True)
    labels = {0: 0}
    for segment in annotation["segments_info"]:
        if not isinstance(segment, Mapping) or type(segment.get("id")) is not int:
            report.drop("segments", "no valid id", name)
            continue
        key, text = segment["id"], f"segment {segment['id']} of {name}"
        if key in labels:
            report.drop("segments", "the id 0, which is void, or the id of another segment", text)
            continue
        labels[key] = 0
        try:
            number = categories.number(segment.get("category_id"))
        except Unusable as error:
            report.drop("segments", error.reason, f"{text}: {error.detail}")
            continue
        if segment.get("iscrowd"):
            if drop_crowd:
                report.drop("segments", f"{CROWD}. Its pixels count as pixels without the label", text)
                continue
            report.change("segments", f"{CROWD}. Kept as its label", text)
        if key not in ids:
            report.drop("segments", "no pixel in the PNG file", text)
        labels[key] = number
    for key, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if key == 0:
            report.change("pixels", VOID_REASON, "id 0", count)
        elif key not in labels:
            report.drop("pixels", "a segment that the file does not list; they count as unlabeled", f"id {key} in {name}", count)
    table = np.array([labels.get(key, 0) for key in ids.tolist()], np.uint16)
    plane: Plane = table[where].reshape(colors.shape[:2])
    return plane
