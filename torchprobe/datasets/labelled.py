"""Image files with labels: one folder a class."""

from __future__ import annotations

import difflib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from torchprobe.datasets.images import SUFFIXES, Batch, DatasetError, Images

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LabelledImages(Images):
    """Image files with a label each, which is a row of the head.

    Args:
        paths, root: see :class:`Images`.
        labels: one for each path, −1 where it is not known.
        names: what the rows of the head are called, in order; None where nobody knows.
        classes: the rows that a head is to choose from, ascending; None: all.
        groups: rows that stand for the same class, by the label that stands for them, which is the lowest: ObjectNet's "Alarm clock" is
            both "analog clock" and "digital clock". Any of them is right.
        border: pixels to cut from each side before preprocessing.
        remarks: what is not as expected, such as a class without images.

    Raises:
        ValueError: not one label for each path; groups that share a row or whose label is not their lowest row.

    >>> LabelledImages([Path("a.png"), Path("b.png")], labels=[1, 0], names=("cat", "dog")).labels
    [1, 0]
    """

    labels: Sequence[int] = ()
    names: tuple[str, ...] | None = None
    classes: tuple[int, ...] | None = None
    groups: Mapping[int, tuple[int, ...]] | None = None
    border: int = 0
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.paths):
            raise ValueError(f"expected a label for each path, got {len(self.labels)} labels and {len(self.paths)} paths")
        check_groups(self.groups)

    def batches(
        self, preprocess: Callable[[Image], Tensor], size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """As :meth:`Images.batches`, without the border."""

        def cropped(image: Image) -> Tensor:
            left, right, top, bottom = self.border, image.width - self.border, self.border, image.height - self.border
            if left >= right or top >= bottom:
                raise ValueError(f"nothing is left of {image.width} × {image.height} pixels without the border of {self.border}")
            return preprocess(image.crop((left, top, right, bottom)))

        return super().batches(cropped if self.border else preprocess, size, workers, only)


def check_groups(groups: Mapping[int, tuple[int, ...]] | None) -> None:
    """Refuses groups of rows that share one, or whose label is not their lowest.

    Raises:
        ValueError: they do.
    """
    for label, rows in (groups or {}).items():
        if not rows or label != min(rows):
            raise ValueError(f"the label of a group of rows is the lowest of them, got {label} for {list(rows)}")
    shared = [row for row, count in Counter(row for rows in (groups or {}).values() for row in set(rows)).items() if count > 1]
    if shared:
        raise ValueError(f"row {shared[0]} is in two groups")


def labelled_folder(
    root: str | os.PathLike[str], limit: int | None = None, seed: int = 0, names: Sequence[str] | None = None
) -> LabelledImages:
    """The images beneath the folders of ``root``, one folder a class; links to folders are followed.

    Without ``names`` the classes are numbered in the order of their folders' names, as torchvision's ImageFolder does; a folder without
    images keeps its number and is remarked on.

    Args:
        root: a folder of folders of images.
        limit: take so many of the images, chosen at random.
        seed: of that choice.
        names: what the rows of the head are called: folders are matched to them, by name as it is or regardless of case and of "_", "-"
            and spaces. Rows without a folder are left out of :attr:`LabelledImages.classes`.

    Raises:
        DatasetError: no such folder, no folders in it or no images in those; folders that match none of ``names`` or more than one,
            or two folders that match the same.
        ValueError: ``limit`` below 1.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a/1.png", "b/1.png", "b/2.png"):
    ...     (folder / name).parent.mkdir(exist_ok=True)
    ...     (folder / name).touch()
    >>> labelled_folder(folder).labels
    [0, 1, 1]
    """
    folders = class_folders(Path(root))
    if names is None:
        rows = {folder.name: row for row, folder in enumerate(folders)}
        return gather(Path(root), folders, rows, tuple(rows), None, limit=limit, seed=seed)
    rows = _matched([folder.name for folder in folders], names)
    classes = None if len(rows) == len(names) else tuple(sorted(rows.values()))
    return gather(Path(root), folders, rows, tuple(names), classes, limit=limit, seed=seed)


def class_folders(root: Path) -> list[Path]:
    """The folders of ``root`` by name, hidden ones left out.

    Raises:
        DatasetError: there is no such folder, or none in it.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} is {'a file' if root.exists() else 'not there'}; expected a folder with one folder for each class")
    entries = sorted(root.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        images = sum(entry.suffix.lower() in SUFFIXES for entry in entries)
        seen = f"{count(images, 'image')} right in it" if images else "it holds no image" if entries else "it is empty"
        raise DatasetError(f"no class folders in {root}: {seen}. Expected one folder for each class, with its images in it")
    return folders


def gather(
    root: Path,
    folders: Sequence[Path],
    rows: Mapping[str, int],
    names: tuple[str, ...] | None,
    classes: tuple[int, ...] | None,
    groups: Mapping[int, tuple[int, ...]] | None = None,
    border: int = 0,
    limit: int | None = None,
    seed: int = 0,
    remarks: Sequence[str] = (),
) -> LabelledImages:
    """The images of ``folders``, labelled by ``rows[folder.name]``.

    Raises:
        DatasetError: there is none.
        ValueError: ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    found: list[tuple[Path, int]] = []
    empty: list[str] = []
    others = 0
    for folder in folders:
        files = [Path(where, file) for where, _, inside in _walk(folder) for file in inside]
        images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
        found += [(image, rows[folder.name]) for image in images]
        others += len(files) - len(images)
        if not images:
            empty.append(folder.name)
    if not found:
        raise DatasetError(
            f"no image in the {len(folders)} class folders of {root}, but {others} other files. "
            f"Expected files ending in {', '.join(sorted(SUFFIXES))}"
        )
    said = list(remarks)
    if empty:
        said.append(f"{count(len(empty), 'class folder')} without an image: {some(empty)}")
    if others:
        said.append(f"{count(others, 'file')} that {'is' if others == 1 else 'are'} no image left out")
    if limit is not None and limit < len(found):
        said.append(f"{limit} of {len(found)} images, chosen at random")
        found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]
    return LabelledImages(
        [path for path, _ in found], root, labels=[row for _, row in found], names=names, classes=classes, groups=groups, border=border,
        remarks=said,
    )  # fmt: skip


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (f" … and {len(names) - most} more" if len(names) > most else "")


def count(n: int, what: str) -> str:
    """``n`` of something, in the singular or the plural."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, through links, each folder once."""
    visited: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in visited:
            folders.clear()
            continue
        visited.add(real)
        yield where, folders, files


def _matched(folders: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Folder name → row."""
    exact: dict[str, list[int]] = {}
    loose: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        exact.setdefault(name, []).append(row)
        loose.setdefault(_loose(name), []).append(row)
    matched: dict[str, int] = {}
    for folder in folders:
        rows = exact.get(folder) or loose.get(_loose(folder)) or []
        if len(rows) != 1:
            if rows:
                raise DatasetError(f"class folder {folder!r} matches the rows {rows} of the head alike: rename what is called the same")
            near = difflib.get_close_matches(folder, names, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f" ({some(list(names))})"
            raise DatasetError(f"class folder {folder!r} is none of the {len(names)} classes of the head{hint}")
        matched[folder] = rows[0]
    if twice := [row for row, times in Counter(matched.values()).items() if times > 1]:
        same = [folder for folder, row in matched.items() if row == twice[0]]
        raise DatasetError(f"the class folders {' and '.join(map(repr, same))} match the same class of the head, {names[twice[0]]!r}")
    return matched


def _loose(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
