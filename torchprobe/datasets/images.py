"""Image files in batches, without losing one silently."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""The files that are taken for images; the case does not matter."""


class DatasetError(RuntimeError):
    """A folder or file that cannot be used; the message says which, and what was expected."""


@dataclass(frozen=True)
class Images:
    """Image files, in order.

    Args:
        paths: the files.
        root: the folder they are named relative to.
    """

    paths: Sequence[Path]
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, path: Path) -> str:
        """How a file is called in messages and tables."""
        return path.relative_to(self.root).as_posix() if self.root and path.is_relative_to(self.root) else str(path)

    def batches(
        self, preprocess: Callable[[Image], Tensor], size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Batches of up to ``size`` files, decoded and preprocessed by threads, two batches ahead.

        Args:
            preprocess: PIL image in RGB → tensor (3, H, W), the same shape for all.
            size: files in a batch.
            workers: threads.
            only: which of the batches, by number, in this order; None: all.

        Raises:
            ValueError: ``size`` or ``workers`` below 1.
            DatasetError: ``preprocess`` gives tensors of different shapes.
        """
        if size < 1 or workers < 1:
            raise ValueError(f"size and workers must be at least 1, got {size} and {workers}")
        starts = [size * i for i in only] if only is not None else range(0, len(self.paths), size)
        groups = [self.paths[start : start + size] for start in starts]
        with ThreadPoolExecutor(workers, thread_name_prefix="torchprobe-images") as threads:
            ahead: deque[list[Future[Tensor | str]]] = deque()
            try:
                for index, (start, group) in enumerate(zip(starts, groups, strict=True)):
                    for later in groups[index + len(ahead) : index + 3]:
                        ahead.append([threads.submit(_load, path, preprocess) for path in later])
                    yield self._collect(start, group, [future.result() for future in ahead.popleft()])
            finally:
                threads.shutdown(wait=False, cancel_futures=True)  # whoever stops early does not wait

    def _collect(self, start: int, group: Sequence[Path], results: list[Tensor | str]) -> Batch:
        batch = Batch(files=len(group))
        for index, (path, result) in enumerate(zip(group, results, strict=True), start):
            if isinstance(result, str):
                batch.unreadable.append((self.name(path), result))
            else:
                batch.names.append(self.name(path))
                batch.indices.append(index)
        batch.pixels = stack([result for result in results if isinstance(result, Tensor)], batch.names)
        return batch


@dataclass
class Batch:
    """A group of files: the pixels of those that could be read, and the others with the reason.

    ``pixels`` has shape (len(names), 3, H, W); ``indices`` are the positions of those in the set;
    ``files`` = len(names) + len(unreadable).
    """

    files: int
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def stack(tensors: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """One tensor of all; ``torch.empty(0)`` of none.

    Raises:
        DatasetError: they differ in shape; names two that do.
    """
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.shape != tensors[0].shape:
            shapes = f"{names[0]} becomes {tuple(tensors[0].shape)}, {name} {tuple(tensor.shape)}"
            raise DatasetError(f"the preprocessing must give all images the same shape: {shapes}; resize and crop")
    return torch.stack(list(tensors)) if tensors else torch.empty(0)


def rgb(image: Image) -> Image:
    """The image in RGB, transparent colours as they are underneath.

    Raises:
        ValueError: pixels of more than 8 bits, whose range is not known.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode} (more than 8 bits), whose range is not known")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def reason(error: BaseException) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def image_folder(root: str | os.PathLike[str], limit: int | None = None, seed: int = 0) -> Images:
    """The image files anywhere beneath ``root``, sorted by path; links to folders are followed, each folder once.

    Args:
        root: a folder.
        limit: take so many of them, chosen at random (the first so many might all be of one class).
        seed: of that choice.

    Raises:
        DatasetError: no such folder, or no image in it.
        ValueError: ``limit`` below 1.

    >>> import tempfile
    >>> image_folder(tempfile.mkdtemp())  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    torchprobe.datasets.images.DatasetError: no image beneath …
    """
    root = Path(root)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not root.is_dir():
        raise DatasetError(f"{root} is {'a file' if root.exists() else 'not there'}; expected a folder with images")
    paths: list[Path] = []
    visited: set[str] = set()
    others = 0
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        images = [Path(folder, file) for file in files if Path(file).suffix.lower() in SUFFIXES]
        paths += images
        others += len(files) - len(images)
    if not paths:
        seen = f"; it holds {others} other files" if others else "; it is empty"
        raise DatasetError(f"no image beneath {root}{seen}. Expected files ending in {', '.join(sorted(SUFFIXES))}")
    paths.sort()
    if limit is not None and limit < len(paths):
        paths = sorted(random.Random(seed).sample(paths, limit))
    return Images(paths, root)


def _load(path: Path, preprocess: Callable[[Image], Tensor]) -> Tensor | str:
    """The tensor, or why there is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return preprocess(rgb(image))
    except Exception as error:  # a decoder meeting hostile bytes may raise anything
        return reason(error)
