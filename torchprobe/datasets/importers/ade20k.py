"""ADE20K: the form of the scene parsing challenge with 150 classes, and the full data set with parts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchprobe.common.messages import reason
from torchprobe.common.reading import parse_json
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.conversion import Conversion, SetOptions
from torchprobe.datasets.importers.files import by_stem
from torchprobe.datasets.importers.pictures import IndexMap, Picture, color_map, index_map
from torchprobe.datasets.importers.planes import Plane
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import Values, label_name, read_names
from torchprobe.datasets.pictures import FileError, read_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

CLASSES = "objectInfo150.txt"
SCENES = "sceneCategories.txt"
INDEX = "index_ade20k.mat"


def import_ade20k(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    names: str | os.PathLike[str] | Mapping[Any, Any] | Sequence[str] | None = None,
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes ADE20K in the format of Broden, from either of its forms.

    * **Scene parsing** (ADEChallengeData2016: images/, annotations/, objectInfo150.txt): the category ``object`` has the 150 classes; 0 is
      none of them. If sceneCategories.txt is there, the category ``scene`` has its scenes, with the suffix -s as in Broden.
    * **Full** (``*.jpg`` with ``*_seg.png``, and ``*_parts_1.png``, ``*_parts_2.png`` …): the class of a pixel is
      red / 10 · 256 + green. Parts become the category ``part``, with a label map for each level; an image without a file of parts is not
      annotated for them. The names are those of the ``.json`` file of each image (release of 2021), or of index_ade20k.mat (release of
      2016; this needs scipy).

    A class is called by its first name, unless another class has that too; the others are its synonyms.

    Args:
        root: the folder of the data set, or a part of it, such as its validation images.
        out: the new data set.
        names: for the full form, the names by class number: {number: name}, a list that begins with class 1, index_ade20k.mat, or a file,
            see :func:`~torchprobe.datasets.importers.values.read_names`.
        options: see :class:`~torchprobe.datasets.importers.conversion.SetOptions`.

    Raises:
        DatasetError: the folder has neither form, or the names are missing; ``out`` is not free; no image is left.

    >>> import tempfile
    >>> from PIL import Image
    >>> root, out = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp(), "broden")
    >>> for folder, name, color in (("images", "a.jpg", 0), ("annotations", "a.png", 2)):
    ...     (root / folder).mkdir()
    ...     Image.new("L", (8, 8), color).save(root / folder / name)
    >>> lines = ["Idx Ratio Train Val Name", "1 0.2 9 9 wall", "2 0.1 9 9 building, edifice"]
    >>> _ = (root / "objectInfo150.txt").write_text("\\n".join(lines))
    >>> import_ade20k(root, out).labels
    1
    >>> from torchprobe.datasets import Broden
    >>> Broden(out).label("building").synonyms
    ('edifice',)
    """
    root = Path(root)
    with Conversion("ade20k", out, (root,), **options) as conversion:
        if (root / "annotations").is_dir():
            _scene_parsing(root, conversion)
        else:
            _full(root, names, conversion)
    return conversion.report


# -- the scene parsing challenge -------------------------------------------------------------------------------------------


def _scene_parsing(root: Path, conversion: Conversion) -> None:
    report = conversion.report
    called, synonyms = first_names(_classes(root / CLASSES))
    values = Values(called, unlabeled=(0,), void=())
    values.tell(report)
    scenes = _scenes(root / SCENES)
    categories: dict[str, Sequence[str]] = {"object": values.labels}
    if scenes:
        categories["scene"] = sorted(set(scenes.values()))
    images, masks = by_stem(root / "images", "images", report), by_stem(root / "annotations", "masks", report)
    for stem in sorted(masks.keys() - images.keys()):
        report.drop("masks", "no image of this name", stem)
    conversion.begin(categories, synonyms)
    for stem in conversion.each(sorted(images)):
        with conversion.image(stem):
            if stem not in masks:
                raise Unusable("no mask")
            labels: dict[str, Plane | Sequence[str]] = {"object": values.plane(index_map(masks[stem]), stem, report)}
            if scene := scenes.get(stem.rpartition("/")[2]):
                labels["scene"] = [scene]
            conversion.add(stem, Picture(images[stem]), labels)


def _classes(path: Path) -> dict[int, str]:
    """Number → names of objectInfo150.txt: columns for the number, shares and counts, then the names."""
    lines = _text(path).splitlines()[1:]
    matches = [re.fullmatch(r"(\d{1,5})\s+[\d.]+\s+\d+\s+\d+\s+(?:[01]\s+)?(\S.*)", line.strip()) for line in lines if line.strip()]
    if not matches or not all(matches):
        raise DatasetError(f"{path}: expected the columns Idx, Ratio, Train, Val and Name")
    return {int(match[1]): label_name(match[2], str(path)) for match in matches if match}


def _scenes(path: Path) -> dict[str, str]:
    """Image → scene, of sceneCategories.txt, if there is one."""
    if not path.is_file():
        return {}
    pairs = [line.split() for line in _text(path).splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise DatasetError(f"{path}: expected the name of an image and its scene in each line")
    return {image: f"{label_name(scene, str(path))}-s" for image, scene in pairs}


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except (FileError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}") from None


def first_names(names: Mapping[int, str]) -> tuple[dict[int, str], dict[str, list[str]]]:
    """What each class is called, and its other names.

    >>> first_names({1: "door", 2: "screen door, screen", 3: "screen, silver screen", 4: "screen, crt"})
    ({1: 'door', 2: 'screen door', 3: 'screen, silver screen', 4: 'screen, crt'}, {'screen door': ['screen']})
    """
    parts = {number: [part.strip() for part in re.split("[,;]", name) if part.strip()] for number, name in names.items()}
    firsts = [own[0] for own in parts.values()]
    called = {number: own[0] if firsts.count(own[0]) == 1 else names[number] for number, own in parts.items()}
    return called, {called[number]: own[1:] for number, own in parts.items() if own[1:] and called[number] == own[0]}


# -- the full data set -----------------------------------------------------------------------------------------------------


def _full(root: Path, names: str | os.PathLike[str] | Mapping[Any, Any] | Sequence[str] | None, conversion: Conversion) -> None:
    report = conversion.report
    masks = by_stem(root, "masks", report, "_seg")
    if not masks:
        raise DatasetError(f"{root} is no ADE20K folder: it has neither annotations/ nor files *_seg.png")
    parts: dict[str, list[Path]] = {}
    others = by_stem(root, "images", report)
    for stem, path in others.items():
        if (match := re.fullmatch(r"(.+)_parts_(\d{1,2})", stem)) and match[1] in masks:
            parts.setdefault(match[1], []).append(path)
    if names is None:
        given = _names_of_images(root, masks, report) or _names_of_index(root / INDEX)
    else:
        index = isinstance(names, (str, os.PathLike)) and str(names).endswith(".mat")
        given = _names_of_index(Path(str(names))) if index else read_names(names, first_value=1)
    if not given:
        what = f"neither the .json files of the images nor {INDEX} give the names of the classes"
        raise DatasetError(f"{root}: {what}; give the names (names=, --names)")
    called, synonyms = first_names(given)
    values = Values(called, unlabeled=(0,), void=())
    values.tell(report)
    conversion.begin({"object": values.labels} | ({"part": values.labels} if parts else {}), synonyms)
    for stem in conversion.each(sorted(masks)):
        with conversion.image(stem):
            if stem not in others:
                raise Unusable("a mask without an image")
            labels: dict[str, Plane | Sequence[str]] = {"object": values.plane(class_codes(masks[stem]), stem, report)}
            if levels := sorted(parts.get(stem, ())):
                planes = [values.plane(class_codes(level), level.name, report) for level in levels]
                if any(plane.shape != planes[0].shape for plane in planes):
                    raise Unusable("parts of different sizes")
                labels["part"] = np.stack(planes)
            conversion.add(stem, Picture(others[stem]), labels)


def class_codes(path: Path) -> IndexMap:
    """The class of each pixel, int64 (height, width): red / 10 · 256 + green, 0 = unlabeled.

    Raises:
        Unusable: the file cannot be read, or red is not a multiple of 10.
    """
    colors = color_map(path)
    if (colors[..., 0] % 10).any():
        raise Unusable("red is not a multiple of 10, so this is no mask of ADE20K", path.name)
    codes: IndexMap = colors[..., 0] // 10 * 256 + colors[..., 1]
    return codes


def _names_of_images(root: Path, masks: Mapping[str, Path], report: ImportReport) -> dict[int, str]:
    """Class number → names, of the .json files next to the masks."""
    names: dict[int, str] = {}
    for stem in masks:
        path = root / f"{stem}.json"
        if not path.is_file():
            continue
        try:
            for number, name in _objects(path):
                if names.setdefault(number, name) != name:
                    report.change("labels", "two names for one class; the first is used", f"{number}: {names[number]} and {name}")
        except Unusable as error:
            report.drop("files of names", error.reason, path.name)
    return names


def _names_of_index(path: Path) -> dict[int, str]:
    """Class number → names, of the file of MATLAB that the release of 2016 has; empty if it is not there."""
    if not path.is_file():
        return {}
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{path} needs scipy: pip install scipy; or give the names of the classes (names=, --names)") from error
    try:
        names = loadmat(path, variable_names=["index"], simplify_cells=True)["index"]["objectnames"]
        return {number: label_name(str(name), str(path)) for number, name in enumerate(names, 1)}
    except Exception as error:  # hostile bytes may raise anything in a decoder
        raise DatasetError(f"{path} cannot be read as the index of ADE20K ({reason(error)})") from None


def _objects(path: Path) -> Iterator[tuple[int, str]]:
    """Number and name of each object that the .json file of an image lists."""
    try:
        data = read_bytes(path)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("latin-1")  # as some files of the release are
        objects = parse_json(text)["annotation"]["object"]
        for entry in objects:
            number, name = entry["name_ndx"], entry["name"]
            if type(number) is int and 0 < number < 1 << 16:
                yield number, label_name(name, str(path))
    except (FileError, ValueError, KeyError, TypeError, RecursionError, DatasetError):
        raise Unusable("it cannot be read as the description of an image") from None
