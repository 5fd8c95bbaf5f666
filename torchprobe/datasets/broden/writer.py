"""Writes any segmentation data set in the format of Broden."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from torchprobe.common import limits
from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.reading import open_regular
from torchprobe.datasets.broden.image_files import MAX_LABEL, read_image, read_labels, unsafe
from torchprobe.datasets.broden.index import ROW_COLUMNS, LabelCounts, WrittenRow, write_tables
from torchprobe.datasets.broden.presence import pixel_counts
from torchprobe.datasets.images import DatasetError, rgb
from torchprobe.datasets.pictures import FileError, size_problem

if TYPE_CHECKING:
    from PIL.Image import Image

Plane = np.ndarray[Any, np.dtype[Any]]

FEWEST_COLUMNS = 4
"""Planes of another size than the image have more; otherwise the last place may be colors."""


class BrodenWriter:
    """Writes images with label maps or whole-image labels as a folder that :class:`Broden`, and the readers of the original, can read.

    Args:
        root: a folder that is empty or does not exist.
        categories: category → its labels: a list of names, where the first is value 1 of the label maps, or {value: name}. The same name in
            two categories is one label with one number. The release separates scenes and colors by the suffixes -s and -c.
        size: images are resized to this (height, width) or side, without keeping the aspect ratio; None keeps the size of each image.
        segmentation_size: the size of the label maps; None: half of the image, rounded down, as in the release.
        min_frequency, min_coverage: labels that are in fewer images, or cover less in total (in units of whole images), are dropped.
            Default: none, since a small data set would silently lose labels. The release has 10 and 0.5.
        unlabeled: values of label maps that mean "no label"; for VOC (0, 255).
        image_format: ``"jpg"`` as in the release; ``"png"`` without loss; or ``"keep"``, where a JPEG or PNG file that keeps its size is
            copied byte by byte, one that is resized keeps its format, and everything else becomes PNG.
        synonyms: label → other names, for label.csv and syns.txt; no semicolons.

    As in the release:

    * Labels are numbered by descending frequency over all categories, then by coverage, then by name.
    * Categories are in the order of their smallest number.
    * A number n is stored as red n % 256, green n // 256.
    * Rows are in the order of the first 8 bytes of the md5 of the image path. The lower 70 % are the training split.
    * Maps are resized to the nearest pixel, by its center. Frequencies and coverages are those before resizing.

    An image is annotated for the categories that :meth:`add` gets: labels that it does not show there are absent. If it shows none, because
    the map has none, the list is empty, or all of them are dropped, a label map of 0 says so.

    The folder becomes a data set with :meth:`finish`, which writes index.csv last. The end of a ``with`` block calls it, except after an
    error.

    >>> import tempfile, numpy as np
    >>> with BrodenWriter(tempfile.mkdtemp(), {"object": ["cat", "dog"], "scene": ["street-s"]}, size=64) as writer:
    ...     writer.add("pets/1", np.zeros((48, 60, 3), np.uint8), {"object": np.full((48, 60), 2), "scene": "street-s"})
    >>> from torchprobe.datasets import Broden
    >>> [(label.number, label.name) for label in Broden(writer.root).labels]
    [(1, 'dog'), (2, 'street-s')]
    """

    @renamed_arguments(unlabelled="unlabeled")
    def __init__(
        self,
        root: str | os.PathLike[str],
        categories: Mapping[str, Sequence[str] | Mapping[int, str]],
        *,
        size: int | tuple[int, int] | None = 224,
        segmentation_size: int | tuple[int, int] | None = None,
        min_frequency: int = 1,
        min_coverage: float = 0.0,
        unlabeled: Collection[int] = (0,),
        image_format: str = "jpg",
        synonyms: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.root = Path(root)
        self.size, self.segmentation_size = _pair(size, 2), _pair(segmentation_size, 1)
        self.min_frequency, self.min_coverage = min_frequency, min_coverage
        self.unlabeled = frozenset(unlabeled)
        if image_format not in ("jpg", "png", "keep"):
            raise ValueError(f"image_format must be 'keep', 'jpg' or 'png', got {image_format!r}")
        self.image_format = image_format
        self.synonyms = {label: _synonyms(label, others) for label, others in (synonyms or {}).items()}
        self._values = {category: _values(category, names, self.unlabeled) for category, names in categories.items()}
        names = dict.fromkeys(name for values in self._values.values() for name in values.values())
        if len(names) > MAX_LABEL:
            raise ValueError(f"{len(names)} labels; the format has room for {MAX_LABEL}: leave some out")
        if unknown := [label for label in self.synonyms if label not in names]:
            raise ValueError(f"synonyms names {unknown[0]!r}, which is not a label; {_near(unknown[0], names)}")
        self._names = list(names)
        self._provisional = {name: number for number, name in enumerate(names, 1)}  # until the frequencies are known
        self._counts = LabelCounts()
        self._rows: list[WrittenRow] = []
        self._files: set[str] = set()
        self._finished = False
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise DatasetError(f"{self.root} exists and is not an empty folder; a data set needs a new folder")

    def __enter__(self) -> BrodenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and not self._finished:
            self.finish()

    def add(self, name: str, image: Image | Plane | str | os.PathLike[str], labels: Mapping[str, Any]) -> None:
        """Adds one image.

        Args:
            name: its path in images/, without suffix, such as ``"voc/2007_000032"``.
            image: PIL, an array (H, W, 3) or (H, W) of uint8, or the path of a JPEG or PNG. Gray PNG and PIL images of 16 bits are scaled.
            labels: category → a label map or whole-image labels. Leave out a category of which nothing is known. A label map is anything
                that NumPy converts to integers of shape (H, W), or (planes, H, W) if labels overlap. It may have another size than
                the image; planes need its proportions. Whole-image labels are a name, or a list of names, the most important first; an
                empty list says that the image has none of them.

        Raises:
            ValueError: an unknown category, name or value; an invalid shape; a name that is taken or leaves the folder.
        """
        from PIL import Image as pil

        if self._finished:
            raise ValueError(f"{name}: the data set in {self.root} is finished")
        stem = re.sub(r"\.(jpe?g|png)$", "", name, flags=re.IGNORECASE)
        if unsafe(stem) or ";" in name:
            raise ValueError(
                f"{name!r} cannot be a name: give a relative path with /, without .., backslash, semicolon or control character"
            )
        if unknown := [category for category in labels if category not in self._values]:
            raise ValueError(f"{name}: no category {unknown[0]!r}; there are {', '.join(self._values)}")
        picture = _picture(name, image)
        height, width = self.size or (picture.height, picture.width)
        label_size = self.segmentation_size or (height // 2, width // 2)
        if problem := size_problem(height, width) or size_problem(*label_size):
            raise ValueError(f"{name}: {problem}; resize with size= and segmentation_size=")
        grids = ((picture.height, picture.width), (height, width), label_size)
        parsed = {category: self._parse(name, category, value, grids) for category, value in labels.items()}

        row = WrittenRow(f"{stem}.{self._suffix(image)}", (height, width), label_size, {})
        planes: dict[str, Plane] = {}
        reserved = []
        for category, found in parsed.items():
            if isinstance(found, list):
                row.entries[category] = [*found]
                reserved.append(_map_file(row, category))  # for the case that no label is left
                continue
            files = [_map_file(row, category)] if found.ndim == 2 else [f"{stem}_{category}_{k}.png" for k in range(1, len(found) + 1)]
            row.entries[category] = [*files]
            planes.update(zip(files, found[None] if found.ndim == 2 else found, strict=True))
        self._claim(name, [row.image, *planes, *reserved])
        (self.root / "images" / row.image).parent.mkdir(parents=True, exist_ok=True)
        if self.image_format == "keep" and isinstance(image, (str, os.PathLike)) and picture.size == (width, height):
            shutil.copyfile(image, self.root / "images" / row.image)
        else:
            if picture.size != (width, height):
                picture = picture.resize((width, height), pil.Resampling.BILINEAR)
            picture.save(self.root / "images" / row.image, quality=95)
        for file, plane in planes.items():
            _save_labels(self.root / "images" / file, nearest(plane, label_size))
        for category, found in parsed.items():
            self._count(category, found)
        self._rows.append(row)

    def extend(self, samples: Iterable[tuple[str, Any, Mapping[str, Any]]]) -> None:
        """Adds every (name, image, labels) of an iterable; see :meth:`add`."""
        for name, image, labels in samples:
            self.add(name, image, labels)

    def finish(self) -> None:
        """Numbers the labels, rewrites the label maps with these numbers, and writes the tables, index.csv last.

        Raises:
            ValueError: no label was added, or none is frequent enough; or the data set is finished.
        """
        if self._finished:
            raise ValueError(f"the data set in {self.root} is finished")
        numbers = self._counts.numbers(self.min_frequency, self.min_coverage)
        if not numbers:
            found = f"{len(self._counts.by_label)} labels, but none as frequent as min_frequency={self.min_frequency} and "
            found += f"min_coverage={self.min_coverage:g} ask" if self._counts.by_label else ""
            raise ValueError(
                f"no data set in {self.root}: {found if self._counts.by_label else 'no label'} in the {len(self._rows)} images"
            )
        self._finished = True  # the rest cannot be done twice
        final = np.array([0, *(numbers.get(name, 0) for name in self._names)])
        used = {category for label in numbers for category in self._counts.by_label[label]}
        for row in self._rows:
            for category, entries in row.entries.items():
                for file in (self.root / "images" / entry for entry in entries if isinstance(entry, str)):
                    _save_labels(file, final[read_labels(file, *row.label_size).numpy()])
                row.entries[category] = [e if isinstance(e, str) else int(final[e]) for e in entries if isinstance(e, str) or final[e]]
                if not row.entries[category] and category in used:
                    empty = _map_file(row, category)
                    _save_labels(self.root / "images" / empty, np.zeros(row.label_size, np.int64))
                    row.entries[category] = [empty]
        write_tables(self.root, self._rows, self._counts, numbers, self.synonyms)

    # -- parts of add ----------------------------------------------------------------------------------------------

    def _suffix(self, image: Any) -> str:
        """The format of an image in the folder."""
        if self.image_format != "keep":
            return self.image_format
        if not isinstance(image, (str, os.PathLike)):
            return "png"
        with open_regular(image) as file:  # its name may lie
            return "png" if file.read(4) == b"\x89PNG" else "jpg"

    def _parse(self, name: str, category: str, value: Any, grids: Sequence[tuple[int, int]]) -> list[int] | Plane:
        """Whole-image labels as a list of provisional numbers, label maps as an array of them. Planes have the proportions of ``grids``."""
        if isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(part, str) for part in value)):
            names = [value] if isinstance(value, str) else list(value)
            own = set(self._values[category].values())
            if unknown := [label for label in names if label not in own]:
                raise ValueError(f"{name}: {category} has no label {unknown[0]!r}; {_near(unknown[0], own)}")
            return [self._provisional[label] for label in dict.fromkeys(names)]
        array = np.asarray(value)
        if array.dtype.kind not in "iub" or array.ndim not in (2, 3) or array.size == 0:
            what = f"an array of {array.dtype} of shape {array.shape}"
            raise ValueError(f"{name}: {category} got {what}; expected label names, or integers (H, W) or (planes, H, W)")
        if array.ndim == 3 and not _proportional(array.shape[1:], grids):
            fix = "give a number for each pixel, integers (H, W)"
            if array.shape[-1] not in (3, 4):
                fix = f"planes (planes, H, W) have the proportions of the image, {grids[0][0]} × {grids[0][1]}"
            color = ", which may be a picture in color" if array.shape[-1] in (3, 4) else ""
            raise ValueError(f"{name}: {category} got a label map of shape {array.shape}{color}; {fix}")
        known = self._values[category]
        values = _distinct(array)
        if unknown_values := [value for value in values if value not in known and value not in self.unlabeled]:
            what = f"value {unknown_values[0]} of the label map of {category} has no name and is not unlabeled"
            raise ValueError(f"{name}: {what}; name it in categories, or add it to unlabeled=")
        numbers = np.array([self._provisional[known[value]] if value in known else 0 for value in values])
        plane: Plane = numbers[np.searchsorted(values, array)]
        return plane

    def _count(self, category: str, found: list[int] | Plane) -> None:
        if isinstance(found, list):
            shares = dict.fromkeys(found, 1.0)
        else:
            planes = found.reshape(-1, *found.shape[-2:])
            counts = pixel_counts(planes, 1)
            shares = {int(number): float(counts[number]) / planes[0].size for number in counts.nonzero()[0] if number}
        for number, share in shares.items():
            self._counts.add(category, self._names[number - 1], share)

    def _claim(self, name: str, files: Sequence[str]) -> None:
        """Reserves the names of files. Case is ignored, as on some file systems."""
        taken = [file for file in files if file.casefold() in self._files]
        if taken or len({file.casefold() for file in files}) < len(files):
            raise ValueError(f"{name}: the file {(taken or files)[0]} already exists; give every image its own name")
        self._files.update(file.casefold() for file in files)


def _values(category: str, names: Sequence[str] | Mapping[int, str], unlabeled: Collection[int]) -> dict[int, str]:
    """Value of a label map → name, checked."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", category) or category in ROW_COLUMNS:
        raise ValueError(f"{category!r} cannot be the name of a category: letters, digits and _, and none of {', '.join(ROW_COLUMNS)}")
    if isinstance(names, str):
        raise ValueError(f"the labels of {category} must be a list or a mapping, got the text {names!r}")
    values = dict(names) if isinstance(names, Mapping) else dict(enumerate(names, 1))
    for value, name in values.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"{category}: {name!r} cannot be the name of a label")
        if value in unlabeled:
            raise ValueError(f"{category}: value {value} is {name!r} and unlabeled; set the unlabeled values with unlabeled=")
    return values


def _synonyms(label: str, names: Sequence[str]) -> list[str]:
    """Other names of a label, checked: the table joins them with semicolons."""
    if isinstance(names, str):
        raise ValueError(f"the synonyms of {label!r} must be a list, got the text {names!r}")
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or ";" in name:
            raise ValueError(f"{name!r} cannot be a synonym of {label!r}: give texts without semicolons, one for each name")
    return list(names)


def _proportional(size: tuple[int, ...], grids: Sequence[tuple[int, int]]) -> bool:
    """Whether planes of this size fit one of the grids: they have its size, or its proportions to a pixel. Colors in the last place
    do not."""
    rows, columns = size
    near = any(abs(rows * width - columns * height) <= height + width for height, width in grids)
    return size in grids or (columns > FEWEST_COLUMNS and near)


def _near(name: str, names: Collection[str]) -> str:
    """A hint at the names that may be meant."""
    near = difflib.get_close_matches(name, names)
    return (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"there are {', '.join([*names][:10])}{', …' if len(names) > 10 else ''}"
    )


def _distinct(array: Plane) -> list[int]:
    """The values of an array of integers, ascending."""
    low, high = int(array.min()), int(array.max())
    if high - low > MAX_LABEL:
        return [int(value) for value in np.unique(array)]
    return [low + int(at) for at in np.bincount(array.ravel().astype(np.int64) - low).nonzero()[0]]


def _pair(size: int | tuple[int, int] | None, least: int) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < least or size_problem(*pair):
        most = limits.value("picture_side")
        raise ValueError(f"a size of {pair[0]} × {pair[1]} pixels is not possible: give at least {least} × {least} and at most {most}")
    return pair


def _picture(name: str, image: Any) -> Image:
    """PIL, RGB."""
    from PIL import Image as pil

    try:
        if isinstance(image, (str, os.PathLike)):
            return read_image(os.fspath(image))
        if isinstance(image, pil.Image):
            return rgb(image)
    except ValueError as error:
        source = "" if isinstance(image, pil.Image) else f"{os.fspath(image)}: "
        raise FileError(f"{name}: {source}{error}") from None
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or array.size == 0:
        raise ValueError(f"{name}: the image is an array of {array.dtype} of shape {array.shape}; expected uint8 (H, W, 3) or (H, W)")
    return pil.fromarray(array).convert("RGB")


def nearest(plane: Plane, size: tuple[int, int]) -> Plane:
    """The value at the center of each new pixel; size: (height, width).

    >>> nearest(np.arange(12).reshape(2, 6), (1, 2)).tolist()
    [[7, 10]]
    """
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, plane.shape, strict=True))
    resized: Plane = plane[rows[:, None], columns]
    return resized


def _map_file(row: WrittenRow, category: str) -> str:
    """The label map of a category, if it has one plane."""
    return f"{row.image.rpartition('.')[0]}_{category}.png"


def _save_labels(path: Path, numbers: Plane) -> None:
    from PIL import Image as pil

    pixels = np.zeros((*numbers.shape, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = numbers % 256, numbers // 256
    pil.fromarray(pixels).save(path)
