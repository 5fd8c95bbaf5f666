"""The Broden data set: images with their concepts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchprobe.common import limits
from torchprobe.common.facts import files_digest
from torchprobe.common.messages import install_hint
from torchprobe.common.runs import CountCallback
from torchprobe.datasets.broden.image_files import locate, read_image, read_labels
from torchprobe.datasets.broden.index import INDEX, SPLITS, Finding, Label, Row, check_index, read_rows, read_tables
from torchprobe.datasets.broden.presence import Presence, image_areas, load_presence
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.pictures import FileError

if TYPE_CHECKING:
    from captum.concept import Concept
    from PIL.Image import Image

ImageLabels = list[tuple[str, Tensor]]
"""The labels of one image: (category, labels). Labels are int32: label maps (planes, sh, sw), 0 = unlabeled, or the numbers (n,) of
whole-image labels. A category can have both."""


class Sample(NamedTuple):
    """``image``: PIL in RGB, or the result of ``transform``; and its ``labels``."""

    image: Any
    labels: ImageLabels


class Broden(Dataset[Sample]):
    """A folder in the format of the Broden data set (Bau et al., Network Dissection, CVPR 2017), any of its sizes, or of
    :class:`BrodenWriter`.

    Args:
        root: the folder that holds index.csv, label.csv, category.csv, c_*.csv and images/.
        split: ``"train"``, ``"val"`` or None for both.
        categories: read only these, in the order of category.csv; None for all.
        transform: applied to each image (PIL, RGB).
        index: another index in the folder, such as the release's index_sm.csv.

    Rows without entries in the chosen categories are left out, as in the original; ``rows[i].line`` is the line of the index. A 0 in the
    index means unlabeled. A label map that holds only 0 is an annotation: nothing of its category is in the image, see :meth:`annotated`.
    Nothing is resized: every label map has the size in its row.

    Attributes:
        rows: list of :class:`Row`.
        categories: names.
        labels: the labels of the categories, :class:`Label` by ascending number.
        label_size: largest number of label.csv + 1.
        primary: int64 (label_size,): number → index into ``categories`` of the category in which the label has the largest coverage. Of
            equal categories, and for 0, it is the last one, as in the original.

    Raises:
        DatasetError: the folder or one of its tables cannot be used; the message says file, line and what to do. :func:`validate` lists
            every problem instead of only the first.
        ValueError: no such split or category.

    >>> import tempfile, numpy as np
    >>> from torchprobe.datasets import Broden, BrodenWriter
    >>> folder = tempfile.mkdtemp()
    >>> with BrodenWriter(folder, {"object": ["sky", "sea"], "scene": ["beach-s"]}, size=32) as writer:
    ...     writer.add("mine/1", np.zeros((32, 32, 3), np.uint8), {"object": np.eye(16, dtype=int), "scene": "beach-s"})
    >>> broden = Broden(folder)
    >>> sample = broden[0]
    >>> sample.image.size, [(category, tuple(labels.shape)) for category, labels in sample.labels]
    ((32, 32), [('scene', (1,)), ('object', (1, 16, 16))])
    >>> broden.concept_images("sky")
    [0]
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        categories: Sequence[str] | None = None,
        transform: Callable[[Image], Any] | None = None,
        index: str = INDEX,
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.transform = transform
        self.index = index
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be 'train', 'val' or None, got {split!r}")
        if isinstance(categories, str):
            raise ValueError(f"categories must be a list of names, got the text {categories!r}")
        _check_root(self.root, index)
        tables = read_tables(self.root, self._refuse, categories)
        if unknown := [name for name in categories or () if name not in tables.categories]:
            there = read_tables(self.root, self._refuse).categories
            raise ValueError(f"no category {', '.join(map(repr, unknown))} in {self.root}; there are {', '.join(there)}")
        self.categories = tables.categories
        self.labels = tuple(label for label in tables.labels if label.categories or categories is None)
        self.label_size = 1 + max((label.number for label in tables.labels), default=0)
        self._by_number = {label.number: label for label in tables.labels}
        self._known = known_labels(tables.labels)
        self.primary = torch.full((self.label_size,), len(self.categories) - 1)
        for label in self.labels:
            self.primary[label.number] = self.categories.index(label.category)
        rows = [*read_rows(self.root, self._refuse, self.categories, self._by_number.__contains__, index)]
        self.rows = [row for row in rows if any(row.entries) and split in (None, row.split)]
        self._read = len(rows), sum(split in (None, row.split) for row in rows)
        self._images = str(self.root / "images")
        self._presence: Presence | None = None

    # -- one row ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        image: Any = self.image(index)
        return Sample(image if self.transform is None else self.transform(image), self.image_labels(index))

    def image(self, index: int) -> Image:
        """The image of a row, RGB, without ``transform``.

        Raises:
            DatasetError: it cannot be decoded, is too large, or lies outside the folder; the message names the row.
        """
        row = self.rows[index]
        try:
            return read_image(locate(self._images, row.image))
        except FileError as error:
            raise self._unusable(row, row.image, error) from None

    def image_labels(self, index: int) -> ImageLabels:
        """The labels of a row, see :data:`ImageLabels`, in the order of ``categories`` and of the index.

        Raises:
            DatasetError: a label map is missing, damaged, of another size than its row says, or contains a number that is not in label.csv.
                Or the maps of the row have more pixels than the limit ``row_pixels``.
        """
        row = self.rows[index]
        found: ImageLabels = []
        maps = sum(isinstance(entry, str) for entries in row.entries for entry in entries)
        if why := limits.problem("row_pixels", maps * row.label_height * row.label_width):
            raise DatasetError(f"{self.root}: {self.index} line {row.line}: {maps} label maps have together {why}")
        for category, entries in zip(self.categories, row.entries, strict=True):
            planes = [self._plane(row, entry) for entry in entries if isinstance(entry, str)]
            if planes:
                found.append((category, torch.stack(planes) if len(planes) > 1 else planes[0].unsqueeze(0)))
            if numbers := [entry for entry in entries if isinstance(entry, int)]:
                found.append((category, torch.tensor(numbers, dtype=torch.int32)))
        return found

    def _plane(self, row: Row, name: str) -> Tensor:
        try:
            plane = read_labels(locate(self._images, name), row.label_height, row.label_width)
            if unknown := unknown_labels(plane, self._known):
                raise FileError(f"label {unknown[0]} is not in label.csv")
            return plane
        except FileError as error:
            raise self._unusable(row, name, error) from None

    def require_images(self) -> None:
        """Raises :class:`DatasetError` that says why there is no image, if there is none."""
        if len(self):
            return
        rows, of_split = self._read
        if not rows:
            why = "the index has no rows"
        elif not of_split:
            why = f"none of the {rows} rows belongs to the split {self.split!r}: use another split, or None for both"
        else:
            why = f"in none of the {of_split} rows a label map or a label other than 0 is given for {', '.join(self.categories)}"
        raise DatasetError(f"no images in {self.root}: {self.index}: {why}")

    # -- labels ----------------------------------------------------------------------------------------------------

    def label(self, name: str | int) -> Label:
        """The label of a name, a :attr:`Label.title` or a number.

        Raises:
            KeyError: no such label, or several with that title; the message suggests labels.
        """
        if isinstance(name, int):
            if name in self._by_number:
                return self._by_number[name]
            raise KeyError(f"no label {name}; numbers go from 1 to {self.label_size - 1}")
        matches = [label for label in self.labels if label.name == name] or [label for label in self.labels if label.title == name]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise KeyError(f"{name!r} may be {' or '.join(f'{label.number} ({label.name})' for label in matches)}: give the number")
        near = difflib.get_close_matches(name, [label.name for label in self.labels])
        raise KeyError(f"no label {name!r}{'; did you mean ' + ', '.join(map(repr, near)) + '?' if near else ''}")

    def concept_images(self, name: str | int, minimum_area: float = 0.0) -> list[int]:
        """Indices of the rows that show a concept, ascending.

        Args:
            name: see :meth:`label`.
            minimum_area: the share of the image that the concept must cover; whole-image labels cover all of it.

        Concepts with label maps need :meth:`presence`, which is computed at the first call.
        """
        label = self.label(name)
        columns = [self.categories.index(category) for category in label.categories]
        if not any(isinstance(entry, str) for row in self.rows for column in columns for entry in row.entries[column]):
            return [i for i, row in enumerate(self.rows) if any(label.number in row.entries[column] for column in columns)]
        return self.presence().images(label.number, minimum_area)

    def presence(
        self,
        cache: str | os.PathLike[str] | None = None,
        workers: int = 2,
        progress: CountCallback | None = None,
        rows: Sequence[int] | None = None,
    ) -> Presence:
        """Which labels each row shows and how much of the image they cover. Every label map is decoded once, which takes one or two minutes
        for all of Broden. The result of all rows is kept; Broden's takes 10 MB.

        Args:
            cache: a file for the result. It is read if it was computed from the same index, categories, rows and label maps; otherwise it
                is written.
            workers: threads that decode.
            progress: called with (rows done, rows in all).
            rows: read only these. The result holds them in this order. Default: all.

        Raises:
            DatasetError: as :meth:`image_labels`.
            IndexError: there is no such row.
        """
        chosen = range(len(self)) if rows is None else [int(row) for row in rows]
        if wrong := [row for row in chosen if not 0 <= row < len(self)]:
            raise IndexError(f"no row {wrong[0]}: {self!r} has the rows 0 to {len(self) - 1}")
        every = list(chosen) == list(range(len(self)))
        if self._presence is not None:
            return self._presence if every else self._presence.take(chosen)
        key = (self.root / self.index).read_bytes() + repr((self.split, self.categories)).encode()
        key += b"" if every else repr(chosen).encode()
        if cache is not None:
            rows_read = [self.rows[row] for row in chosen]
            maps = dict.fromkeys(entry for row in rows_read for entries in row.entries for entry in entries if isinstance(entry, str))
            key += files_digest(maps, [Path(self._images, name) for name in maps]).encode()
        found = load_presence(cache, key) if cache is not None else None
        if found is None:
            found = self._scan(chosen, workers, progress)
            if cache is not None:
                found.save(cache, key)
        found = replace(found, annotated=self.annotated()[list(chosen)])
        if every:
            self._presence = found
        return found

    def annotated(self) -> Tensor:
        """Bool (rows, categories): whether a row has label maps or whole-image labels of a category.

        A label map that holds only 0 is an annotation: nothing of the category is there. An empty cell of the index is none, and neither is
        the label 0: there it is unknown what the image shows.
        """
        rows = [[bool(entries) for entries in row.entries] for row in self.rows]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(self.categories))

    def _scan(self, rows: Sequence[int], workers: int, progress: CountCallback | None) -> Presence:
        """Reads the labels of some rows, in threads, since decoding releases the interpreter lock."""
        found: list[Presence] = []
        with ThreadPoolExecutor(workers, thread_name_prefix="torchprobe-labels") as threads:
            # A block is joined before the next: small results that stay among large buffers would keep those from being given back.
            for start in range(0, len(rows), 256):
                block: list[tuple[Tensor, Tensor]] = []
                for areas in threads.map(lambda row: image_areas(self.image_labels(row), self.label_size), rows[start : start + 256]):
                    block.append(areas)
                    if progress is not None:
                        progress(start + len(block), len(rows))
                found.append(Presence.of(block))
        return Presence.join(found)

    def captum_concept(self, name: str | int, batch_size: int = 32, limit: int | None = None, minimum_area: float = 0.0) -> Concept:
        """The images of a concept as a ``captum.concept.Concept``, for ``captum.concept.TCAV.interpret``.

        Args:
            name: see :meth:`label`. The number of the label becomes the id of the concept.
            batch_size: of the ``data_iter`` of the concept.
            limit: at most so many images, from the start of the index, whose order is random.
            minimum_area: see :meth:`concept_images`.

        Raises:
            ImportError: captum is not installed.
            KeyError: no such label.
            ValueError: no image shows the concept.
            TypeError, ValueError: at a batch, if ``transform`` does not give tensors, or tensors of several shapes.
        """
        try:
            from captum.concept import Concept
        except ImportError as error:
            raise ImportError(f"this needs captum: {install_hint('captum')}") from error
        label = self.label(name)
        rows = self.concept_images(label.number, minimum_area)[:limit]
        if not rows:
            what = f"no image of {self!r} shows {label.name!r} over at least {minimum_area:g} of its area"
            raise ValueError(f"{what}: choose another concept{', or a smaller minimum_area' if minimum_area else ''}")
        return Concept(label.number, label.name, DataLoader(_Transformed(self, rows), batch_size))

    # -- errors and display ----------------------------------------------------------------------------------------

    def _refuse(self, finding: Finding) -> NoReturn:
        end = "" if str(finding).endswith("?") else "."
        raise DatasetError(f"{self.root}: {finding}{end} {self._advice}")

    def _unusable(self, row: Row, name: str, error: FileError) -> DatasetError:
        what = f"{self.root}: {self.index} line {row.line}: images/{name}: {error}"
        return DatasetError(f"{what}; replace the file, or correct the row. {self._advice}")

    @property
    def _advice(self) -> str:
        index = "" if self.index == INDEX else f", index={self.index!r}"
        return f"validate({str(self.root)!r}{index}) lists every problem"

    def __repr__(self) -> str:
        split = f", split {self.split}" if self.split else ""
        return f"Broden({len(self)} images, {len(self.labels)} labels in {', '.join(self.categories)}{split}, {str(self.root)!r})"


class _Transformed(Dataset[Tensor]):
    """The transformed images of some rows."""

    def __init__(self, broden: Broden, rows: list[int]) -> None:
        self.broden, self.rows = broden, rows
        self._shape: tuple[int, ...] | None = None  # of the first image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        image: Any = self.broden.image(self.rows[index])
        image = image if self.broden.transform is None else self.broden.transform(image)
        if not isinstance(image, Tensor):
            raise TypeError(f"a concept needs tensors, got {type(image).__name__}: give Broden a transform that makes them")
        self._shape = self._shape or tuple(image.shape)
        if tuple(image.shape) != self._shape:
            name, shapes = self.broden.rows[self.rows[index]].image, f"{tuple(image.shape)}, another image {self._shape}"
            raise ValueError(f"{name} has shape {shapes}: the transform of Broden must resize")
        return image


def known_labels(labels: Sequence[Label]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """By number, whether the label exists; 0, the unlabeled, does."""
    known = np.zeros(1 + max((label.number for label in labels), default=0), bool)
    known[[0, *(label.number for label in labels)]] = True
    return known


def unknown_labels(plane: Tensor, known: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    """The numbers of a label map that are not in ``known``, ascending."""
    numbers = plane.numpy()
    if numbers.max(initial=0) < len(known) and known[numbers].all():
        return []
    found = np.unique(numbers)
    return [int(number) for number in found if number >= len(known) or not known[number]]


def _check_root(root: Path, index: str) -> None:
    """Raises an error unless the folder has an index; the message suggests where one may be."""
    if not root.is_dir():
        raise DatasetError(f"{root} is {'a file' if root.exists() else 'not there'}; expected a Broden folder with {index}")
    if not check_index(root, index).is_file():
        inside = sorted(child.name for child in root.iterdir() if (child / index).is_file())
        others = sorted(child.name for child in root.glob("index*.csv"))
        hint = f"; did you mean {root / inside[0]}?" if inside else ", label.csv, category.csv, c_*.csv and images/"
        hint = f"; there are {', '.join(others)}" if others else hint
        raise DatasetError(f"{root} has no {index}; expected a Broden folder with {index}{hint}")
