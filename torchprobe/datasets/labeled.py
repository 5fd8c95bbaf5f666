"""Image files with labels: one folder for each class."""

from __future__ import annotations

import difflib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from torchprobe.common.messages import counted, listing
from torchprobe.datasets.images import SUFFIXES, Batch, DatasetError, Images, image_files

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

MOST_NAMES = 5
"""Names of folders or classes in a message."""


@dataclass(frozen=True)
class LabeledImages(Images):
    """Image files with labels. A label is a row of the head.

    Args:
        paths, root: see :class:`Images`.
        labels: one for each path; −1 if unknown.
        names: the names of the rows of the head, in order; None if unknown.
        classes: the rows that the head may choose, ascending; None: all.
        groups: label → all rows that stand for the same class. The label is the lowest of them, and each of them is correct. For
            example, "Alarm clock" of ObjectNet is both "analog clock" and "digital clock".
        border: pixels to cut from each side before preprocessing.
        remarks: unexpected findings, such as a class without images.

    Raises:
        ValueError: the number of labels differs from the number of paths; two groups share a row; or the label of a group is not its
            lowest row.

    >>> LabeledImages([Path("a.png"), Path("b.png")], labels=[1, 0], names=("cat", "dog")).labels
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

    def take(self, numbers: Sequence[int]) -> Self:
        """The images with these numbers, in this order, with their labels."""
        return replace(self, paths=[self.paths[i] for i in numbers], labels=[self.labels[i] for i in numbers])

    def batches(
        self, preprocess: Callable[[Image], Tensor], size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """As :meth:`Images.batches`, with the border cut off."""

        def cropped(image: Image) -> Tensor:
            left, right, top, bottom = self.border, image.width - self.border, self.border, image.height - self.border
            if left >= right or top >= bottom:
                raise ValueError(f"{image.width} × {image.height} pixels are too small to cut {self.border} pixels from each side")
            return preprocess(image.crop((left, top, right, bottom)))

        return super().batches(cropped if self.border else preprocess, size, workers, only)


def check_groups(groups: Mapping[int, tuple[int, ...]] | None) -> None:
    """Checks the groups of :class:`LabeledImages`.

    Raises:
        ValueError: two groups share a row, a row is below 0, or the label of a group is not its lowest row.
    """
    for label, rows in (groups or {}).items():
        if not rows or label != min(rows):
            raise ValueError(f"the label of a group of rows must be the lowest of them, got {label} for {list(rows)}")
        if label < 0:
            raise ValueError(f"a group has row {label}: rows of the head are counted from 0")
    shared = [row for row, count in Counter(row for rows in (groups or {}).values() for row in set(rows)).items() if count > 1]
    if shared:
        raise ValueError(f"row {shared[0]} is in two groups")


def labeled_folder(
    root: str | os.PathLike[str], limit: int | None = None, seed: int = 0, names: Sequence[str] | None = None
) -> LabeledImages:
    """The images in the folders of ``root``, one folder for each class. Links to folders are followed.

    Without ``names`` the classes are numbered in the order of the names of their folders, as in torchvision's ImageFolder. A folder
    without images keeps its number, and a remark says so.

    Args:
        root: a folder of folders of images.
        limit: take this number of images, chosen at random.
        seed: of the random choice.
        names: the names of the rows of the head. Each folder is matched to the row of the same name, or else to a name that differs only
            in case, "_", "-" and spaces. Rows without a folder are not in :attr:`LabeledImages.classes`.

    Raises:
        DatasetError: the folder does not exist, or has no folders, or these have no images; a folder matches no name or several names;
            or two folders match the same name.
        ValueError: ``limit`` below 1.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a/1.png", "b/1.png", "b/2.png"):
    ...     (folder / name).parent.mkdir(exist_ok=True)
    ...     (folder / name).touch()
    >>> labeled_folder(folder).labels
    [0, 1, 1]
    """
    folders = class_folders(Path(root))
    if names is None:
        rows = {folder.name: row for row, folder in enumerate(folders)}
        return collect(Path(root), folders, rows, tuple(rows), None, limit=limit, seed=seed)
    rows = _matched([folder.name for folder in folders], names)
    classes = None if len(rows) == len(names) else tuple(sorted(rows.values()))
    return collect(Path(root), folders, rows, tuple(names), classes, limit=limit, seed=seed)


def class_folders(root: Path) -> list[Path]:
    """The folders in ``root``, sorted by name, without hidden folders.

    Raises:
        DatasetError: ``root`` is not a folder, or it has no folders.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} {'is a file' if root.exists() else 'does not exist'}; expected a folder with one folder for each class")
    entries = sorted(root.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        images = sum(entry.suffix.lower() in SUFFIXES for entry in entries)
        found = f"it has {counted(images, 'image')} outside class folders" if images else "it has no images" if entries else "it is empty"
        raise DatasetError(f"no class folders in {root}: {found}. Expected one folder for each class, with its images in it")
    return folders


def collect(
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
) -> LabeledImages:
    """The images in ``folders`` with the labels ``rows[folder.name]``; see :class:`LabeledImages` for the other arguments.

    Raises:
        DatasetError: there are no images.
        ValueError: ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    found: list[tuple[Path, int]] = []
    empty: list[str] = []
    others = 0
    for folder in folders:
        images, other_files = image_files(folder)
        found += [(image, rows[folder.name]) for image in images]
        others += other_files
        if not images:
            empty.append(folder.name)
    if not found:
        raise DatasetError(
            f"no images in the {counted(len(folders), 'class folder')} of {root}, but {others} other files. "
            f"Expected files ending in {', '.join(sorted(SUFFIXES))}"
        )
    remarks = list(remarks)
    if empty:
        remarks.append(f"{counted(len(empty), 'class folder')} without images: {listing(empty, MOST_NAMES)}")
    if others:
        remarks.append("left out: " + ("1 file that is not an image" if others == 1 else f"{others} files that are not images"))
    if limit is not None and limit < len(found):
        remarks.append(f"{limit} of {len(found)} images, chosen at random")
        found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]
    return LabeledImages(
        [path for path, _ in found], root, labels=[row for _, row in found], names=names, classes=classes, groups=groups, border=border,
        remarks=remarks,
    )  # fmt: skip


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
                raise DatasetError(f"class folder {folder!r} matches several rows of the head, {rows}: give these rows different names")
            near = difflib.get_close_matches(folder, names, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f" ({listing(names, MOST_NAMES)})"
            raise DatasetError(f"class folder {folder!r} is not one of the {len(names)} classes of the head{hint}")
        matched[folder] = rows[0]
    if twice := [row for row, times in Counter(matched.values()).items() if times > 1]:
        same = [folder for folder, row in matched.items() if row == twice[0]]
        raise DatasetError(f"the class folders {' and '.join(map(repr, same))} match the same class of the head, {names[twice[0]]!r}")
    return matched


def _loose(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
