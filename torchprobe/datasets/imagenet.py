"""ImageNet and its shifted test sets, from the folders of their releases.

The order of the classes and the subsets of -R and -A come from lists in timm. The names of the classes come from open_clip, which uses
them for zero-shot heads.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torchprobe.common.messages import counted, install_hint, listing
from torchprobe.common.reading import read_json
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.labeled import MOST_NAMES, LabeledImages, class_folders, collect

KINDS = ("imagenet", "imagenet_v2", "imagenet_r", "imagenet_sketch", "objectnet", "imagenet_a")

_SUBSETS = {"imagenet_r": "imagenet_r_synsets.txt", "imagenet_a": "imagenet_a_synsets.txt"}
_FOLDERS, _CLASSES = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def imagenet_set(root: str | os.PathLike[str], kind: str, limit: int | None = None, seed: int = 0, border: int = 2) -> LabeledImages:
    """One of the ImageNet sets. The rows of the head are the 1000 classes of ImageNet in their usual order.

    ==================  ====================================================  ==================================================
    kind                folders in ``root``                                   classes that the head may choose
    ==================  ====================================================  ==================================================
    "imagenet"          ``n01440764`` …, also in ``val``                      1000
    "imagenet_v2"       ``0`` … ``999``, the numbers of the classes           1000
    "imagenet_sketch"   ``n01440764`` …                                       1000
    "imagenet_r"        ``n01443537`` …                                       its 200
    "imagenet_a"        ``n01498041`` …                                       its 200
    "objectnet"         ``images/alarm_clock`` …, and ``mappings``            the 125 rows of its 113 shared classes
    ==================  ====================================================  ==================================================

    If ``root`` has only one folder, as after unpacking an archive, the classes may be in that folder. The head may choose all classes of
    the whole set, even if a copy of the set lacks some. ``remarks`` says what is missing and what is left out.

    Args:
        root: the folder of the set.
        kind: one of :data:`KINDS`.
        limit: take this number of images, chosen at random.
        seed: of the random choice.
        border: for ObjectNet, the pixels to cut from each side. Its images have a red frame of 1 or 2 pixels, which must be removed
            before use. We chose 2, as in the evaluation code of its authors and of WiSE-FT.

    Returns:
        Labels are rows of the 1000-class head. A class of ObjectNet may stand for several rows (``groups``): according to the mapping of
        the release, each of them is correct. ``names`` are those of open_clip; None if it is not installed.

    Raises:
        DatasetError: a folder is not a class of the set; there are no folders or no images, or no mappings for ObjectNet; timm is missing.
        ValueError: unknown ``kind``, or ``limit`` below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "objectnet":
        return _objectnet(Path(root), limit, seed, border)
    wnids = imagenet_wnids()
    root, folders = _inside(Path(root), r"\d{1,3}" if kind == "imagenet_v2" else r"n\d{8}")
    if kind == "imagenet_v2":
        rows = {str(row): row for row in range(len(wnids))}
        expected = f"a class number from 0 to {len(wnids) - 1}"
    else:
        rows = {wnid: row for row, wnid in enumerate(wnids)}
        expected = f"a WordNet id of ImageNet such as {wnids[0]}"
    unknown = [folder.name for folder in folders if not re.fullmatch(r"\d{1,3}" if kind == "imagenet_v2" else r"n\d{8}", folder.name)]
    if unknown:
        raise DatasetError(f"{root / unknown[0]} is not a class of {kind}: the name of every folder must be {expected}")
    subset = _listed(_SUBSETS[kind]) if kind in _SUBSETS else list(rows)
    return _subset(root, folders, rows, subset, kind, limit, seed)


def imagenet_wnids() -> list[str]:
    """The WordNet ids of the 1000 classes of ImageNet, in the order of the rows of a head.

    Raises:
        DatasetError: timm, which ships them, is not installed.

    >>> imagenet_wnids()[0]
    'n01440764'
    """
    return [str(wnid) for wnid in _info().label_names()]


def _subset(
    root: Path, folders: Sequence[Path], rows: Mapping[str, int], subset: Sequence[str], kind: str, limit: int | None, seed: int
) -> LabeledImages:
    """The images of the folders in ``subset``, with remarks about missing folders and other folders."""
    wanted = set(subset)
    used = [folder for folder in folders if folder.name in wanted]
    others = [folder.name for folder in folders if folder.name not in wanted]
    if not used:
        raise DatasetError(f"none of the {len(folders)} folders of {root} is a class of {kind}: {listing(others, MOST_NAMES)}")
    present = {folder.name for folder in used}
    missing = [name for name in subset if name not in present]
    remarks = []
    if missing:
        remarks.append(f"{len(missing)} of the {len(subset)} classes of {kind} have no folder: {listing(missing, MOST_NAMES)}")
    if others:
        remarks.append(f"left out: {counted(len(others), 'folder')} of other classes: {listing(others, MOST_NAMES)}")
    classes = None if len(subset) == len(rows) else tuple(sorted(rows[name] for name in subset))
    used.sort(key=lambda folder: rows[folder.name])
    return collect(root, used, rows, _names(), classes, limit=limit, seed=seed, remarks=remarks)


def _inside(root: Path, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that has the class folders, and the class folders. It is ``root``, its ``val``, or its only folder."""
    folders = class_folders(root)
    if not any(re.fullmatch(pattern, folder.name) for folder in folders):
        inner = [folder for folder in folders if folder.name == "val"] or folders
        if len(inner) == 1 and any(re.fullmatch(pattern, entry.name) for entry in inner[0].iterdir() if entry.is_dir()):
            return inner[0], class_folders(inner[0])
    return root, folders


# -- ObjectNet -----------------------------------------------------------------------------------------------------------


def _objectnet(root: Path, limit: int | None, seed: int, border: int) -> LabeledImages:
    if border < 0:
        raise ValueError(f"border must be at least 0, got {border}")
    class_folders(root)
    place = next((folder for folder in (root, *sorted(root.iterdir())) if (folder / "mappings").is_dir()), None)
    if place is None or not (place / "images").is_dir():
        raise DatasetError(f"{root} is not ObjectNet: expected the folders images and mappings of its release")
    labels = _mapping(place / "mappings" / _FOLDERS)  # folder → object class
    shared = _mapping(place / "mappings" / _CLASSES)  # object class → names of ImageNet classes, separated by "; "
    folders = class_folders(place / "images")
    if unknown := [folder.name for folder in folders if folder.name not in labels]:
        raise DatasetError(f"{place / 'images' / unknown[0]} is not a class of ObjectNet: expected the folders in mappings/{_FOLDERS}")
    found = _rows_of({name: shared[label] for name, label in labels.items() if label in shared}, place / "mappings" / _CLASSES)
    used = [folder for folder in folders if folder.name in found]
    if not used:
        raise DatasetError(f"none of the {len(folders)} folders of {place / 'images'} is a class that ObjectNet shares with ImageNet")
    missing = [name for name in found if name not in {folder.name for folder in folders}]
    remarks = [f"{border} pixels are cut from each side, where ObjectNet has a red frame"] if border else []
    if missing:
        names = listing(missing, MOST_NAMES)
        remarks.append(f"{len(missing)} of the {len(found)} classes that ObjectNet shares with ImageNet have no folder: {names}")
    if others := len(folders) - len(used):
        remarks.append(f"left out: {counted(others, 'folder')} of classes that are not in ImageNet")
    return collect(
        place / "images", used, {name: rows[0] for name, rows in found.items()}, _names(),
        tuple(sorted(row for rows in found.values() for row in rows)), {rows[0]: rows for rows in found.values() if len(rows) > 1},
        border, limit, seed, remarks,
    )  # fmt: skip


def _rows_of(classes: Mapping[str, str], path: Path) -> dict[str, tuple[int, ...]]:
    """Folder → rows of the head, ascending. The mapping of the release names each ImageNet class by all its synonyms, as timm does."""
    synonyms = [str(text) for text in _info().label_descriptions()]
    times = Counter(synonyms)
    rows = {text: row for row, text in enumerate(synonyms)}
    found: dict[str, tuple[int, ...]] = {}
    for folder, text in classes.items():
        names = [name.strip() for name in text.split(";")]
        if unknown := [name for name in names if times[name] != 1]:
            raise DatasetError(f"{path} maps the folder {folder} to {unknown[0]!r}, which is not the name of one class of ImageNet")
        found[folder] = tuple(sorted(rows[name] for name in names))
    return found


def _mapping(path: Path) -> dict[str, str]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} from the release of ObjectNet cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise DatasetError(f"{path} differs from the release of ObjectNet: expected a JSON object from names to names")
    return content


# -- lists in timm and open_clip -------------------------------------------------------------------------------------------------


def _info() -> Any:
    try:
        return importlib.import_module("timm.data").ImageNetInfo()
    except (ModuleNotFoundError, AttributeError) as error:
        raise _missing("ImageNetInfo", error) from error


def _listed(file: str) -> list[str]:
    """A list of WordNet ids that timm ships without a function for it."""
    try:
        return (resources.files("timm.data") / "_info" / file).read_text(encoding="utf-8").split()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise _missing(file, error) from error


def _missing(what: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"the classes of ImageNet are read from timm ({what}), which is missing: {error}. pip install timm, or {install_hint('vision')}"
    )


def _names() -> tuple[str, ...] | None:
    try:
        return tuple(importlib.import_module("open_clip.zero_shot_metadata").IMAGENET_CLASSNAMES)
    except ModuleNotFoundError:
        return None
