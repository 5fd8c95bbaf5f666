"""ImageNet and the sets it is compared with, from the folders of their releases.

What belongs to ImageNet – the order of the classes, the subsets of -R and -A – is read from the lists that timm ships, and the names of
the classes are those open_clip ships, with which zero-shot heads are made.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torchprobe.common.distribution import install_hint
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.labelled import LabelledImages, class_folders, count, gather, some

KINDS = ("imagenet", "imagenet_v2", "imagenet_r", "imagenet_sketch", "objectnet", "imagenet_a")

_SUBSETS = {"imagenet_r": "imagenet_r_synsets.txt", "imagenet_a": "imagenet_a_synsets.txt"}
_FOLDERS, _CLASSES = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def imagenet_set(root: str | os.PathLike[str], kind: str, limit: int | None = None, seed: int = 0, border: int = 2) -> LabelledImages:
    """One of the ImageNet sets, with the 1000 classes of ImageNet in their usual order as rows of the head.

    ==================  ====================================================  ==================================================
    kind                folders in ``root``                                   classes to choose from
    ==================  ====================================================  ==================================================
    "imagenet"          ``n01440764`` …, also within ``val``                  1000
    "imagenet_v2"       ``0`` … ``999``, numbers of classes                   1000
    "imagenet_sketch"   ``n01440764`` …                                       1000
    "imagenet_r"        ``n01443537`` …                                       its 200
    "imagenet_a"        ``n01498041`` …                                       its 200
    "objectnet"         ``images/alarm_clock`` … beside ``mappings``          the 125 that its 113 shared classes stand for
    ==================  ====================================================  ==================================================

    A single folder that holds them all, such as archives make, is looked into. The classes to choose from are those of the whole set even
    where a copy lacks some; what is missing and what is left out is in ``remarks``.

    Args:
        root: the folder of the set.
        kind: one of :data:`KINDS`.
        limit: take so many of the images, chosen at random.
        seed: of that choice.
        border: of ObjectNet, the pixels to cut from each side: its images have a red frame, which is to be cut off before use. 2, as in
            the evaluation code of its authors and of WiSE-FT (a choice); the frame is 1 or 2 wide.

    Returns:
        Labels are rows of the 1000-class head. An object class of ObjectNet may stand for several of them (``groups``): by the mapping of
        the release, any of them is right. ``names`` are open_clip's; None if it is not installed.

    Raises:
        DatasetError: a folder that is not one of the set's classes, no folders, no images, no mappings for ObjectNet; timm is missing.
        ValueError: unknown ``kind``, ``limit`` below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "objectnet":
        return _objectnet(Path(root), limit, seed, border)
    wnids = imagenet_wnids()
    root, folders = _inside(Path(root), r"\d{1,3}" if kind == "imagenet_v2" else r"n\d{8}")
    if kind == "imagenet_v2":
        rows = {str(row): row for row in range(len(wnids))}
        expected = f"a number of a class, 0 to {len(wnids) - 1}"
    else:
        rows = {wnid: row for row, wnid in enumerate(wnids)}
        expected = f"a WordNet id of ImageNet such as {wnids[0]}"
    strange = [folder.name for folder in folders if not re.fullmatch(r"\d{1,3}" if kind == "imagenet_v2" else r"n\d{8}", folder.name)]
    if strange:
        raise DatasetError(f"{root / strange[0]} is no class of {kind}: expected every folder to be called by {expected}")
    subset = _listed(_SUBSETS[kind]) if kind in _SUBSETS else list(rows)
    return _of(root, folders, rows, subset, kind, limit, seed)


def imagenet_wnids() -> list[str]:
    """The WordNet ids of the 1000 classes of ImageNet, in the order of the rows of a head.

    Raises:
        DatasetError: timm, which ships them, is not installed.

    >>> imagenet_wnids()[0]
    'n01440764'
    """
    return [str(wnid) for wnid in _info().label_names()]


def _of(
    root: Path, folders: Sequence[Path], rows: Mapping[str, int], subset: Sequence[str], kind: str, limit: int | None, seed: int
) -> LabelledImages:
    """The set of the folders in ``subset``, with remarks on those that are missing and those that are left out."""
    wanted = set(subset)
    used = [folder for folder in folders if folder.name in wanted]
    beside = [folder.name for folder in folders if folder.name not in wanted]
    if not used:
        raise DatasetError(f"none of the {len(folders)} folders of {root} is a class of {kind}: {some(beside)}")
    present = {folder.name for folder in used}
    missing = [name for name in subset if name not in present]
    remarks = []
    if missing:
        remarks.append(f"{len(missing)} of the {len(subset)} classes of {kind} have no folder: {some(missing)}")
    if beside:
        remarks.append(f"{count(len(beside), 'folder')} of classes that are not in {kind} left out: {some(beside)}")
    classes = None if len(subset) == len(rows) else tuple(sorted(rows[name] for name in subset))
    used.sort(key=lambda folder: rows[folder.name])
    return gather(root, used, rows, _names(), classes, limit=limit, seed=seed, remarks=remarks)


def _inside(root: Path, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that holds the class folders, and these: ``root``, its ``val``, or its only folder."""
    folders = class_folders(root)
    if not any(re.fullmatch(pattern, folder.name) for folder in folders):
        named = [folder for folder in folders if folder.name == "val"] or folders
        if len(named) == 1 and any(re.fullmatch(pattern, entry.name) for entry in named[0].iterdir() if entry.is_dir()):
            return named[0], class_folders(named[0])
    return root, folders


# -- ObjectNet -----------------------------------------------------------------------------------------------------------


def _objectnet(root: Path, limit: int | None, seed: int, border: int) -> LabelledImages:
    if border < 0:
        raise ValueError(f"border must be at least 0, got {border}")
    class_folders(root)
    place = next((folder for folder in (root, *sorted(root.iterdir())) if (folder / "mappings").is_dir()), None)
    if place is None or not (place / "images").is_dir():
        raise DatasetError(f"{root} is no ObjectNet: expected the folders images and mappings of its release in it")
    labels = _mapping(place / "mappings" / _FOLDERS)  # folder → object class
    shared = _mapping(place / "mappings" / _CLASSES)  # object class → names of ImageNet classes, separated by "; "
    folders = class_folders(place / "images")
    if strange := [folder.name for folder in folders if folder.name not in labels]:
        raise DatasetError(f"{place / 'images' / strange[0]} is no class of ObjectNet: expected the folders named in mappings/{_FOLDERS}")
    found = _rows_of({name: shared[label] for name, label in labels.items() if label in shared}, place / "mappings" / _CLASSES)
    used = [folder for folder in folders if folder.name in found]
    if not used:
        raise DatasetError(f"none of the {len(folders)} folders of {place / 'images'} is a class that ObjectNet shares with ImageNet")
    missing = [name for name in found if name not in {folder.name for folder in folders}]
    remarks = [f"{border} pixels are cut from each side, where ObjectNet has a red frame"] if border else []
    if missing:
        remarks.append(f"{len(missing)} of the {len(found)} classes that ObjectNet shares with ImageNet have no folder: {some(missing)}")
    if beside := len(folders) - len(used):
        remarks.append(f"{count(beside, 'folder')} of classes that are not in ImageNet left out")
    return gather(
        place / "images", used, {name: rows[0] for name, rows in found.items()}, _names(),
        tuple(sorted(row for rows in found.values() for row in rows)), {rows[0]: rows for rows in found.values() if len(rows) > 1},
        border, limit, seed, remarks,
    )  # fmt: skip


def _rows_of(classes: Mapping[str, str], path: Path) -> dict[str, tuple[int, ...]]:
    """Folder → rows of the head, ascending. The mapping names ImageNet's classes by all their synonyms, as timm does."""
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} of ObjectNet's release cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise DatasetError(f"{path} is not as in ObjectNet's release: expected a JSON object from names to names")
    return content


# -- the lists of others -------------------------------------------------------------------------------------------------


def _info() -> Any:
    try:
        return importlib.import_module("timm.data").ImageNetInfo()
    except (ModuleNotFoundError, AttributeError) as error:
        raise _missing("ImageNetInfo", error) from error


def _listed(file: str) -> list[str]:
    """A list of wnids that timm ships without a function for it."""
    try:
        return (resources.files("timm.data") / "_info" / file).read_text(encoding="utf-8").split()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise _missing(file, error) from error


def _missing(what: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"the classes of ImageNet are read from timm ({what}), which is not there: {error}. pip install timm, or {install_hint('vision')}"
    )


def _names() -> tuple[str, ...] | None:
    try:
        return tuple(importlib.import_module("open_clip.zero_shot_metadata").IMAGENET_CLASSNAMES)
    except ModuleNotFoundError:
        return None
