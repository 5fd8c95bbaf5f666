"""What all importers share: the new folder, its options, the names of images, and the account of what happened."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np

from torchprobe.common.files import to_json
from torchprobe.common.messages import listing
from torchprobe.common.runs import CountCallback
from torchprobe.datasets.broden import Broden, BrodenWriter
from torchprobe.datasets.broden.writer import FEWEST_COLUMNS, nearest
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.pictures import Picture
from torchprobe.datasets.importers.planes import Plane
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.pictures import FileError

if TYPE_CHECKING:
    pass

Item = TypeVar("Item")

LABEL_SIZE = 112
"""Side of the label maps, as in Broden."""
REPORT_FILE = "import.json"

_OF_A_SET = re.compile(r"index\.csv|label\.csv|category\.csv|c_\w+\.csv|syns\.txt|README\.txt|import\.json|images")
_LONGEST_NAME = 150
"""Bytes of one part of a path; file systems have room for 255, and the names of label maps are longer."""


class SetOptions(TypedDict, total=False):
    """Options of every importer.

    size: images are resized to this (height, width) or side; default: they keep their size, and files are copied byte by byte.
    segmentation_size: the size of the label maps, (height, width) or a side, default 112, as in Broden; None: half of the image.
    image_format: ``"keep"`` (default), ``"jpg"`` or ``"png"``, see :class:`~torchprobe.datasets.BrodenWriter`.
    min_frequency, min_coverage: labels that are in fewer images, or cover less in total, are left out, and reported.
    limit: take this number of images, chosen at random, always the same ones; of a stream, the first.
    overwrite: replace a data set in this format that is already there.
    progress: called with (images done, images in all).
    """

    size: int | tuple[int, int] | None
    segmentation_size: int | tuple[int, int] | None
    image_format: str
    min_frequency: int
    min_coverage: float
    limit: int | None
    overwrite: bool
    progress: CountCallback | None


class Conversion:
    """One import. A ``with`` block builds the data set in a hidden folder next to ``out``, which becomes ``out`` at its end. After an error
    or an interruption there is nothing; even a kill leaves only the hidden folder.

    Args:
        source: the name of the format, for the report.
        out: the new data set.
        inputs: the files and folders that are read.
        options: see :class:`SetOptions`.

    Raises:
        DatasetError: ``out`` is not free, or one of ``inputs`` is missing, inside of it, or around it.
        ValueError: an option is invalid.
    """

    def __init__(
        self,
        source: str,
        out: str | os.PathLike[str],
        inputs: Iterable[str | os.PathLike[str]] = (),
        *,
        size: int | tuple[int, int] | None = None,
        segmentation_size: int | tuple[int, int] | None = LABEL_SIZE,
        image_format: str = "keep",
        min_frequency: int = 1,
        min_coverage: float = 0.0,
        limit: int | None = None,
        overwrite: bool = False,
        progress: CountCallback | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.out = Path(out)
        self.report = ImportReport(source, self.out)
        self.limit, self.overwrite, self.progress = limit, overwrite, progress
        self._options: dict[str, Any] = {
            "size": size, "segmentation_size": segmentation_size, "image_format": image_format,
            "min_frequency": min_frequency, "min_coverage": min_coverage,
        }  # fmt: skip
        self._check_free(inputs)
        self._building = self.out.resolve().with_name(f".{self.out.resolve().name}.{os.getpid()}.part")
        self._writer: BrodenWriter | None = None
        self._labels: dict[str, Sequence[str]] = {}
        self._seen: set[str] = set()
        self._names: set[str] = set()
        self._taken: set[str] = set()
        self._ends_like_a_map = re.compile("$^")

    def _check_free(self, inputs: Iterable[str | os.PathLike[str]]) -> None:
        target = self.out.resolve()
        for path in map(Path, inputs):
            if not path.exists():
                raise DatasetError(f"{path} does not exist")
            if path.is_dir() and (path.resolve().is_relative_to(target) or target.is_relative_to(path.resolve())):
                raise DatasetError(f"the new data set {self.out} and the input {path} lie in each other; choose a folder outside")
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise DatasetError(f"{self.out} is a file; a data set needs a new folder")
        files = {entry.name for entry in self.out.iterdir()}
        others = sorted(name for name in files if not _OF_A_SET.fullmatch(name))
        if others or (files and not files >= {"index.csv", "label.csv", "images"}):
            found = f"it has {listing(others, 3)}" if others else "it is not a complete data set"
            raise DatasetError(f"{self.out} is not empty: {found}; a data set needs a new folder")
        if files and not self.overwrite:
            raise DatasetError(f"{self.out} holds a data set already; overwrite=True (--overwrite) replaces it")

    # -- the block -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Conversion:
        if self._building.exists():  # of a process of the same number that was killed
            shutil.rmtree(self._building)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._building, ignore_errors=True)

    def _finish(self) -> None:
        if self._writer is None or not self.report.images:
            why = "; ".join(map(str, self.report.dropped[:5])) or "the source has none"
            raise DatasetError(f"no image can be imported to {self.out}: {why}")
        if not self._seen:
            why = "; ".join(map(str, self.report.dropped[:5]))
            raise DatasetError(f"none of the {self.report.images} images has a label{': ' if why else ''}{why}")
        self._writer.finish()
        kept = {label.name for label in Broden(self._building).labels}
        for name in dict.fromkeys(name for names in self._labels.values() for name in names):
            if name not in self._seen:
                self.report.drop("labels", "no pixel in any image", name)
            elif name not in kept:
                self.report.drop("labels", "in too few images, or too small (min_frequency, min_coverage)", name)
        self.report.labels = len(kept)
        (self._building / REPORT_FILE).write_text(to_json(self.report.summary()), encoding="utf-8")
        self._install()

    def _install(self) -> None:
        """The finished folder takes its place at once; an older data set goes only after that."""
        target = self.out.resolve()
        if not target.exists():
            self._building.rename(target)
            return
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        self._building.rename(target)
        shutil.rmtree(old)

    # -- images ------------------------------------------------------------------------------------------------------------

    def begin(self, categories: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        """Names the labels of each category; label n of a category is the value n of its label maps, from 1.

        Raises:
            ValueError: a category or a label has an impossible name.
        """
        self._labels = dict(categories)
        self._writer = BrodenWriter(self._building, categories, unlabeled=(0,), synonyms=synonyms, **self._options)
        self._ends_like_a_map = re.compile(rf"_({'|'.join(map(re.escape, categories))})(_[0-9]+)?$", re.IGNORECASE)

    def each(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items to import, in order: all of them, or ``limit`` at random."""
        chosen: Collection[int] = range(len(items))
        if self.limit is not None and self.limit < len(items):
            chosen = sorted(random.Random(0).sample(range(len(items)), self.limit))
            self.report.drop("images", "beyond the limit", count=len(items) - self.limit)
        for done, index in enumerate(chosen, 1):
            yield items[index]
            self.tell(done, len(chosen))

    @contextlib.contextmanager
    def image(self, name: object) -> Iterator[None]:
        """A block that imports one image. If it turns out to be unusable, it is dropped and reported."""
        try:
            yield
        except Unusable as error:
            self.report.drop("images", error.reason, f"{name}: {error.detail}" if error.detail else str(name))

    def tell(self, done: int, total: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(done, total)

    def add(self, name: str, picture: Picture, labels: Mapping[str, Plane | Sequence[str]]) -> None:
        """Writes one image: category → label maps (H, W) or (planes, H, W), or names of whole-image labels. A category without labels is an
        annotation too; leave out categories for which the image is not annotated.

        Raises:
            Unusable: the image cannot be decoded, or a label map has another shape.
        """
        assert self._writer is not None  # begin() comes first
        if name in self._names:
            raise Unusable("the same file as another image")
        maps = {category: value for category, value in labels.items() if isinstance(value, np.ndarray)}
        resized = any(self._resized(plane, picture) for plane in maps.values())
        stem, clean = self._free(name)
        try:
            self._writer.add(stem, picture.content, labels)
        except FileError as error:
            raise Unusable(f"the image cannot be used: {error}") from None
        self._names.add(name)
        self._taken.add(stem.casefold())
        report = self.report
        if stem != clean:
            report.change("images", "renamed, because the name is taken or impossible", f"{name} → {stem}")
        if resized:
            report.change("images", "the masks have another size than the image, in the same shape", name)
        if picture.rotated:
            what = "EXIF says to turn or mirror the image. It is taken as stored; check that the masks are drawn on it like that"
            report.change("images", what, name)
        report.images += 1
        report.pixels += max((plane.shape[-2] * plane.shape[-1] for plane in maps.values()), default=0)
        report.empty += any(not (value.any() if isinstance(value, np.ndarray) else value) for value in labels.values())
        for category, value in labels.items():
            if isinstance(value, np.ndarray):
                self._look(name, category, value.reshape(-1, *value.shape[-2:]), self._label_size(picture))
            else:
                self._seen.update(value)

    def _look(self, name: str, category: str, planes: Plane, label_size: tuple[int, int]) -> None:
        """Which labels there are, and which of them no pixel of the smaller label map shows."""
        there = {number for plane in planes for number in np.bincount(plane.ravel()).nonzero()[0].tolist()} - {0}
        left = {number for plane in planes for number in np.bincount(nearest(plane, label_size).ravel()).nonzero()[0].tolist()}
        for number in sorted(there):
            label = self._labels[category][number - 1]
            self._seen.add(label)
            if number not in left:
                reason = "smaller than a pixel of the label map, so the image counts as one without the label; see segmentation_size"
                self.report.drop("labels of an image", reason, f"{label} in {name}")

    def _label_size(self, picture: Picture) -> tuple[int, int]:
        """The size of the label maps in the data set."""
        size, half = self._options["segmentation_size"], self._options["size"]
        if size is not None:
            return (size, size) if isinstance(size, int) else size
        height, width = (picture.height, picture.width) if half is None else (half, half) if isinstance(half, int) else half
        return height // 2, width // 2

    @staticmethod
    def _resized(plane: Plane, picture: Picture) -> bool:
        """Whether a label map has another size than the image; an error unless both have one shape, up to rounding."""
        height, width = plane.shape[-2:]
        if (height, width) == (picture.height, picture.width):
            return False
        if abs(height * picture.width - width * picture.height) > max(picture.height, picture.width):
            sizes = f"{height} × {width} and {picture.height} × {picture.width}"
            raise Unusable("the mask and the image have different shapes; perhaps one was turned or cropped", sizes)
        if plane.ndim == 3 and width <= FEWEST_COLUMNS:
            raise Unusable("the mask is far too small for the image", f"{height} × {width} and {picture.height} × {picture.width}")
        return True

    def _free(self, name: str) -> tuple[str, str]:
        """A name in the data set that is valid and not taken, and the name that was wanted."""
        wanted = re.sub(r"\.(jpe?g|png|bmp|gif|tiff?|webp|ppm|pgm)$", "", name, flags=re.IGNORECASE)
        printable = "".join(character if character.isprintable() and character not in ";\\:" else "_" for character in wanted)
        parts = [part.encode()[:_LONGEST_NAME].decode(errors="ignore") for part in printable.split("/") if part not in ("", ".", "..")]
        stem = free = "/".join(parts) or "image"
        count = 1
        while free.casefold() in self._taken or self._ends_like_a_map.search(free):  # "a_object" is the label map of "a"
            count += 1
            free = f"{stem}-{count}"
        return free, wanted
