"""Image files in batches. Files that cannot be read are counted and named."""

from __future__ import annotations

import contextlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.common import limits
from torchprobe.common.facts import files_digest
from torchprobe.common.messages import reason
from torchprobe.datasets.pictures import FileError, opened

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""The endings of image files, in any case."""


class DatasetError(RuntimeError):
    """A folder or a file cannot be used. The message says which one, and what was expected."""


@dataclass(frozen=True)
class Images:
    """Image files, in order: an :class:`~torchprobe.datasets.protocol.ImageSet`.

    Args:
        paths: the files. In sets that are kept otherwise, what stands for each image.
        root: the folder that names of files are relative to.
    """

    paths: Sequence[Any]
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, path: Any) -> str:
        """The name of a file in messages and tables."""
        return path.relative_to(self.root).as_posix() if self.root and path.is_relative_to(self.root) else str(path)

    def digest(self) -> str:
        """A digest of the names and the bytes of all files. Every file is read, once in a process."""
        return files_digest(map(self.name, self.paths), self.paths)

    def size(self, path: Any) -> int | None:
        """The bytes of a file; None if it is missing or its size is unknown."""
        return path.stat().st_size if path.exists() else None

    def take(self, numbers: Sequence[int]) -> Self:
        """The images with these numbers, in this order."""
        return replace(self, paths=[self.paths[i] for i in numbers])

    def content(self, path: Any) -> str | os.PathLike[str] | bytes:
        """What :func:`torchprobe.datasets.pictures.opened` opens: a file, or its bytes.

        Raises:
            FileError: it cannot be read.
        """
        found: str = os.fspath(path)
        return found

    def picture(self, path: Any) -> Image:
        """One image in RGB, as pages show it.

        Raises:
            FileError: it cannot be read; the message does not name it.
        """
        with opened(self.content(path)) as image:
            return rgb(image)

    def batches(
        self, preprocess: Callable[[Image], Tensor], size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Batches of up to ``size`` files. Threads decode and preprocess two batches ahead.

        Args:
            preprocess: PIL image in RGB → tensor (3, H, W), the same shape for all images.
            size: files in a batch.
            workers: number of threads.
            only: the numbers of the batches to return, in this order; None: all.

        Raises:
            ValueError: ``size`` or ``workers`` below 1.
            DatasetError: ``preprocess`` returns tensors of different shapes.
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
                        ahead.append(self.begin(threads, later, preprocess))
                    yield self._collect(start, group, [future.result() for future in ahead.popleft()])
            finally:
                threads.shutdown(wait=False, cancel_futures=True)  # a caller that stops early does not wait

    def begin(self, threads: ThreadPoolExecutor, group: Sequence[Any], preprocess: Callable[[Image], Tensor]) -> list[Future[Tensor | str]]:
        """Begins to read the images of a batch: for each, its tensor, or the reason why there is none."""
        return [threads.submit(load, partial(self.content, path), preprocess) for path in group]

    def _collect(self, start: int, group: Sequence[Any], results: list[Tensor | str]) -> Batch:
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
    """A group of files.

    Attributes:
        files: number of files, ``len(names) + len(unreadable)``.
        pixels: of the files that could be read, shape (len(names), 3, H, W).
        names: of these files.
        indices: positions of these files in the data set.
        unreadable: the other files, each with the reason.
        labels: rows of the head, one for each name, −1 if unknown; None: the data set has them, or there are none.
    """

    files: int
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    labels: list[int] | None = None


def stack(tensors: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Stacks the tensors of a batch; without tensors the result is ``torch.empty(0)``.

    Raises:
        DatasetError: two tensors differ in shape; the message names both.

    >>> stack([torch.zeros(3, 2, 2)], ["a.png"]).shape
    torch.Size([1, 3, 2, 2])
    """
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.shape != tensors[0].shape:
            shapes = f"{names[0]} becomes {tuple(tensors[0].shape)}, {name} {tuple(tensor.shape)}"
            raise DatasetError(f"the preprocessing must return the same shape for all images: {shapes}; resize and crop")
    return torch.stack(list(tensors)) if tensors else torch.empty(0)


def rgb(image: Image) -> Image:
    """The image in RGB. Transparent pixels keep their color without the transparency. Gray of 16 bits is scaled: 65535 becomes 255.

    Raises:
        ValueError: the range of the pixels is unknown: floating point, or integers of 32 bits that do not tell which range they use.

    >>> from PIL import Image
    >>> rgb(Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))).getchannel("R").tobytes().hex(" ")
    '00 01 80 ff'
    """
    if image.mode.startswith(("I", "F")):
        image = _from_16_bits(image)
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _from_16_bits(image: Image) -> Image:
    """A gray image of 16 bits with 8. Older versions of Pillow give it as 32 bits, mode I."""
    from PIL import Image as pil

    advice = "convert them to 8 or 16 bits"
    if image.mode == "F":
        raise ValueError(f"pixels of mode F are floating point, so their range is unknown: {advice}")
    values = np.asarray(image)
    least, most = int(values.min(initial=0)), int(values.max(initial=0))
    if least < 0 or most > 65535:
        raise ValueError(f"pixels of mode {image.mode} from {least} to {most} are not gray of 16 bits: {advice}")
    if image.mode == "I" and 0 < most < 256 and image.format is None:  # Pillow converts 8 bits to this mode without scaling
        raise ValueError(f"pixels of mode I up to {most} may be meant as 8 or as 16 bits: convert them to mode L or I;16")
    scaled = np.empty(values.shape, np.uint8)
    for wide, narrow in zip(values, scaled, strict=True):  # row by row, since 64 bits of a large picture are much memory
        narrow[:] = (wide.astype(np.int64) + 128) // 257
    return pil.fromarray(scaled)


def image_folder(root: str | os.PathLike[str], limit: int | None = None, seed: int = 0) -> Images:
    """The image files in ``root`` and its subfolders, sorted by path. Links to folders are followed; each folder is read once.

    Args:
        root: a folder.
        limit: take this number of images, chosen at random; the first images might all be of one class.
        seed: of the random choice.

    Raises:
        DatasetError: the folder does not exist, or it has no images.
        ValueError: ``limit`` below 1.

    >>> import tempfile
    >>> image_folder(tempfile.mkdtemp())  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    torchprobe.datasets.images.DatasetError: no images in …
    """
    root = Path(root)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not root.is_dir():
        raise DatasetError(f"{root} {'is a file' if root.exists() else 'does not exist'}; expected a folder with images")
    paths, others = image_files(root)
    if not paths:
        found = f"it has {others} other files" if others else "it is empty"
        raise DatasetError(f"no images in {root}; {found}. Expected files ending in {', '.join(sorted(SUFFIXES))}")
    if limit is not None and limit < len(paths):
        paths = sorted(random.Random(seed).sample(paths, limit))
    return Images(paths, root)


def image_files(root: Path) -> tuple[list[Path], int]:
    """The image files in a folder and its subfolders, sorted by path, and the number of other files.

    Links to folders are followed; each folder is read once. Pipes, sockets, devices and links that lead nowhere count as other files. A
    folder that cannot be read is left out, as by :func:`os.walk`.

    Raises:
        DatasetError: more files than the limit ``files``.
    """
    paths: list[Path] = []
    visited: set[str] = set()
    waiting = [os.fspath(root)]
    found = 0
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in visited:
            continue
        visited.add(real)
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if _is(entry.is_dir):
                    waiting.append(entry.path)
                    continue
                found += 1
                if Path(entry.name).suffix.lower() in SUFFIXES and _is(entry.is_file):
                    paths.append(Path(entry.path))
        if why := limits.problem("files", found):
            raise DatasetError(f"{root} has {why}")
    return sorted(paths), found - len(paths)


def _is(kind: Callable[[], bool]) -> bool:
    """A kind of an entry of a folder; False for a link that cannot be followed."""
    try:
        return kind()
    except OSError:
        return False


def load(content: Callable[[], str | os.PathLike[str] | bytes], preprocess: Callable[[Image], Tensor]) -> Tensor | str:
    """The tensor of an image, or the reason why it could not be read.

    Args:
        content: gives what :func:`torchprobe.datasets.pictures.opened` opens.
        preprocess: image in RGB → tensor.
    """
    try:
        with opened(content()) as image:
            return preprocess(rgb(image))
    except FileError as error:
        return str(error)
    except Exception as error:  # of the preprocessing
        return reason(error)
