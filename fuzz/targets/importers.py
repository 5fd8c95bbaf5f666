"""Data sets of other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.target import Target
from torchprobe.common.reading import parse_json
from torchprobe.datasets import Broden, DatasetError
from torchprobe.datasets.importers import (
    import_ade20k,
    import_binary_masks,
    import_coco,
    import_coco_panoptic,
    import_hugging_face,
    import_label_maps,
    import_voc,
)
from torchprobe.datasets.importers.report import ImportReport

_SIZE: Any = {"segmentation_size": (6, 8)}


def _photo(path: Path, seed: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)).save(path)


def _mask(path: Path, values: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def _written(report: ImportReport, out: Path) -> Any:
    broden = Broden(out)
    found = report.images, report.labels, str(report), [broden.image_labels(i) for i in range(len(broden))]
    shutil.rmtree(out)
    return found


def _coco(folder: Path) -> None:
    _photo(folder / "photos" / "a.png")
    box = [[0, 0, 4, 0, 4, 4, 0, 4]]
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 90, "segmentation": box, "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 91, "segmentation": {"size": [6, 8], "counts": [10, 20, 18]}, "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 91, "segmentation": {"size": [6, 8], "counts": "241Z1"}, "iscrowd": 1},
    ]
    images = [{"id": 5, "file_name": "a.png", "width": 8, "height": 6, "neg_category_ids": [90]}]
    categories = [{"id": 90, "name": "cat", "supercategory": "animal"}, {"id": 91, "name": "car", "supercategory": "thing"}]
    (folder / "set.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _read_coco(folder: Path) -> Any:
    out = folder.with_name("out-coco")
    shutil.rmtree(out, ignore_errors=True)
    return _written(import_coco(folder / "set.json", folder / "photos", out, supercategories=True, **_SIZE), out)


def _panoptic(folder: Path) -> None:
    _photo(folder / "photos" / "a.png")
    ids = np.zeros((6, 8, 3), np.uint8)
    ids[:3] = (44, 1, 0)
    _mask(folder / "png" / "a.png", ids)
    annotations = [{"image_id": 5, "file_name": "a.png", "segments_info": [{"id": 300, "category_id": 90, "iscrowd": 0, "area": 24}]}]
    content = {
        "images": [{"id": 5, "file_name": "a.png"}],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "cat", "isthing": 1}],
    }
    (folder / "set.json").write_text(json.dumps(content))


def _read_panoptic(folder: Path) -> Any:
    out = folder.with_name("out-panoptic")
    shutil.rmtree(out, ignore_errors=True)
    return _written(import_coco_panoptic(folder / "set.json", folder / "png", folder / "photos", out, **_SIZE), out)


def _ade20k(folder: Path) -> None:
    _photo(folder / "a.png")
    seg = np.zeros((6, 8, 3), np.uint8)
    seg[:3, :, 1], seg[3:, :, 0] = 7, 10
    _mask(folder / "a_seg.png", seg)
    objects = [{"name_ndx": 7, "name": "door"}, {"name_ndx": 256, "name": "wall, walls"}]
    (folder / "a.json").write_text(json.dumps({"annotation": {"object": objects}}))


def _read_ade20k(folder: Path) -> Any:
    out = folder.with_name("out-ade20k")
    shutil.rmtree(out, ignore_errors=True)
    return _written(import_ade20k(folder, out, **_SIZE), out)


def _voc(folder: Path) -> None:
    _photo(folder / "JPEGImages" / "a.jpg")
    _mask(folder / "SegmentationClass" / "a.png", np.arange(48).reshape(6, 8) // 16)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("train", "val", "trainval"):
        (lists / f"{name}.txt").write_text("a\n" if name != "val" else "")


def _read_voc(folder: Path) -> Any:
    out = folder.with_name("out-voc")
    shutil.rmtree(out, ignore_errors=True)
    return _written(import_voc(folder, out, split="train", **_SIZE), out)


def _maps(folder: Path) -> None:
    _photo(folder / "photos" / "a.png")
    _mask(folder / "maps" / "a.png", np.arange(48).reshape(6, 8) // 12)
    (folder / "names.json").write_text(json.dumps({"0": "background", "1": "cat", "2": "dog", "3": "car"}))
    (folder / "names.txt").write_text("0 background\n1 cat\n2 dog\n3 car\n")
    _mask(folder / "binary" / "cat" / "a.png", 255 * (np.arange(48).reshape(6, 8) > 12))


def _read_maps(folder: Path) -> Any:
    out, found = folder.with_name("out-maps"), []
    for names in ("names.json", "names.txt"):
        shutil.rmtree(out, ignore_errors=True)
        found.append(_written(import_label_maps(folder / "photos", folder / "maps", folder / names, out, **_SIZE), out))
    shutil.rmtree(out, ignore_errors=True)
    found.append(_written(import_binary_masks(folder / "photos", folder / "binary", out, **_SIZE), out))
    return found


def _rows(folder: Path) -> None:
    _photo(folder / "a.png")
    _mask(folder / "mask.png", np.arange(48).reshape(6, 8) // 12)
    plane = (np.arange(48).reshape(6, 8) // 12).tolist()
    rows = [
        {"image": {"path": "a.png"}, "label": plane, "file_name": "one"},
        {"image": {"bytes": "a.png"}, "label": {"bytes": "mask.png"}, "id": 2},
        {"image": "a.png", "label": "mask.png"},
    ]
    names = {"0": "background", "1": "cat", "2": "dog", "3": "car"}
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "id2label": names, "image_column": None, "reduce_labels": False}))


def _files(value: Any, folder: Path) -> Any:
    """Rows as the library gives them: names of files become paths, and "bytes" their content."""
    if isinstance(value, dict):
        return {
            key: (folder / item).read_bytes() if key == "bytes" and item in ("a.png", "mask.png") else _files(item, folder)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_files(item, folder) for item in value]
    return str(folder / value) if value in ("a.png", "mask.png") else value


def _read_rows(folder: Path) -> Any:
    """The rows are objects of another library: here those that JSON makes, of any kind."""
    try:
        found = _files(parse_json((folder / "rows.json").read_bytes()), folder)
    except ValueError:
        return "no rows"
    if not isinstance(found, dict) or not isinstance(found.get("id2label"), (dict, list, str)):
        return "no arguments"
    out = folder.with_name("out-rows")
    shutil.rmtree(out, ignore_errors=True)
    columns = {"image_column": found.get("image_column") or "image"} if isinstance(found.get("image_column"), str) else {}
    reduce = found.get("reduce_labels") is True
    return _written(import_hugging_face(found.get("rows"), out, id2label=found["id2label"], reduce_labels=reduce, **columns, **_SIZE), out)


_MAPS = {"photos/a.png": "png", "maps/a.png": "png", "names.json": "json", "names.txt": "raw", "binary/cat/a.png": "png"}

TARGETS = [
    Target("coco", {"set.json": "json", "photos/a.png": "png"}, _coco, _read_coco, (DatasetError,), weight=0.1),
    Target("coco-panoptic", {"set.json": "json", "png/a.png": "png"}, _panoptic, _read_panoptic, (DatasetError,), weight=0.1),
    Target("ade20k", {"a.json": "json", "a_seg.png": "png", "a.png": "png"}, _ade20k, _read_ade20k, (DatasetError,), weight=0.1),
    Target(
        "voc",
        {"ImageSets/Segmentation/train.txt": "raw", "SegmentationClass/a.png": "png", "JPEGImages/a.jpg": "raw"},
        _voc,
        _read_voc,
        (DatasetError,),
        weight=0.1,
    ),
    Target(
        "hugging-face",
        {"rows.json": "json", "a.png": "png", "mask.png": "png"},
        _rows,
        _read_rows,
        (DatasetError, ImportError),  # a text is the folder of a data set, which needs the library
        weight=0.1,
    ),
    Target("mask-folders", _MAPS, _maps, _read_maps, (DatasetError,), weight=0.05),
]
