"""Data sets of other libraries, item by item: what of an item is the image, and what its label."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from torchprobe.common.facts import UNIDENTIFIED
from torchprobe.common.messages import reason
from torchprobe.common.storage import digest
from torchprobe.datasets.images import Batch, DatasetError, rgb, stack
from torchprobe.datasets.pictures import FileError, opened
from torchprobe.datasets.readers.stores import is_address, whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "labels", "cls", "fine_label", "class")
"""The keys, or columns, of an item that is a mapping; the first that is there."""

UNKNOWN = -1


@dataclass(frozen=True)
class Reading:
    """How an item of a data set becomes an image and a label.

    An item is an image, a pair or a longer sequence that begins with image and label, or a mapping. An image is a PIL image, its encoded
    bytes, a mapping with ``bytes`` or ``path`` (also an address) as the library ``datasets`` has, an array of bytes (H, W) or (H, W, 3),
    or a tensor, which is used unchanged. None is an image that cannot be read. A label is a whole number, a row of the head, or None.

    Args:
        image, label: keys of a mapping; None: the usual ones, :data:`IMAGE_KEYS` and :data:`LABEL_KEYS`.
    """

    image: str | None = None
    label: str | None = None

    def parts(self, item: Any, index: int) -> tuple[Any, Any]:
        """The image and the label of an item.

        Raises:
            DatasetError: it is a mapping without an image.
        """
        if isinstance(item, Mapping) and not ("bytes" in item and self.image is None):
            return _chosen(item, self.image, IMAGE_KEYS, "image", index), _chosen(item, self.label, LABEL_KEYS, "label", index)
        if isinstance(item, (tuple, list)) and len(item) > 1:
            return item[0], item[1]
        return (item[0] if isinstance(item, (tuple, list)) and item else item), None

    def tensor(self, image: Any, preprocess: Callable[[Any], Tensor] | None, index: int) -> Tensor:
        """The tensor of an image.

        Raises:
            FileError: there is none, or it cannot be read.
            DatasetError: it is something else, or there is no preprocessing for it.
        """
        if isinstance(image, Tensor):
            return image
        picture = self.picture(image, index)
        if preprocess is None:
            raise DatasetError(
                f"item {index} of the data set is a PIL image, and the encoder has no .preprocess: let the data set return tensors"
            )
        return preprocess(picture)

    def picture(self, image: Any, index: int) -> Image:
        """An image in RGB.

        Raises:
            FileError: there is none, or it cannot be read.
            DatasetError: it is something else, such as a tensor.
        """
        if image is None or (isinstance(image, Mapping) and "bytes" in image and image["bytes"] is None and image.get("path") is None):
            raise FileError("the item has no image (None)")
        if (source := encoded(image)) is not None:
            with opened(_bytes_of(source)) as found:
                return rgb(found)
        image = _as_picture(image)
        if not (hasattr(image, "mode") and hasattr(image, "convert")):  # a PIL image; PIL may not be installed
            raise DatasetError(
                f"item {index} of the data set is {type(image).__name__}; expected a PIL image or a tensor, alone or as (image, label)"
            )
        return rgb(image)

    def hashed(self, item: Any, index: int) -> bytes:
        """A digest of the image and the label of an item."""
        image, label = self.parts(item, index)
        found = hashlib.sha256(f"{label_of(label, index)}:".encode())
        source = encoded(image)
        if isinstance(image, Tensor):
            found.update(digest([image]).encode())
        elif isinstance(source, bytes):
            found.update(source)
        else:
            picture = self.picture(image, index)
            found.update(f"{picture.size}:".encode() + picture.tobytes())
        return found.digest()

    def hashed_or_reason(self, item: Any, index: int) -> bytes:
        """The same; of an item or a picture that cannot be read, a digest of the reason, which is the same each time."""
        try:
            if isinstance(item, Exception):
                raise item
            return self.hashed(item, index)
        except DatasetError:
            raise
        except Exception as error:  # a decoder may raise anything
            return hashlib.sha256(reason(error).encode()).digest()


USUAL = Reading()
"""Items with the usual keys."""


def _chosen(item: Mapping[Any, Any], key: str | None, usual: Sequence[str], what: str, index: int) -> Any:
    keys = (key,) if key is not None else usual
    found = next((one for one in keys if one in item), None)
    if found is not None:
        return item[found]
    if key is None and what == "label":
        return None
    raise DatasetError(
        f"item {index} of the data set has no {what} under {' or '.join(keys)}; it has {', '.join(map(str, item))}. Name the column"
    )


def _as_picture(image: Any) -> Any:
    """A PIL image of an array of bytes; anything else as it is."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        from PIL import Image as pil

        return pil.fromarray(image)
    return image


def encoded(image: Any) -> bytes | str | None:
    """What :func:`torchprobe.datasets.pictures.opened` opens, of encoded bytes or a mapping with ``bytes`` or ``path``; None for others."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, Mapping) and "bytes" in image:
        return bytes(image["bytes"]) if image["bytes"] is not None else str(image.get("path"))
    return None


def _bytes_of(source: bytes | str) -> bytes | str:
    """What an address holds; bytes and paths as they are."""
    if isinstance(source, bytes) or not is_address(source):
        return source
    try:
        return whole(source)
    except FileError:
        raise
    except Exception as error:  # each store has errors of its own
        raise FileError(f"{source} cannot be read ({reason(error)})") from None


def label_of(label: Any, index: int) -> int:
    """The label of an item, −1 if there is none.

    Raises:
        DatasetError: it is not a row of a head.
    """
    if label is None:
        return UNKNOWN
    try:
        if isinstance(label, Tensor) and (label.numel() != 1 or label.is_floating_point()):
            raise TypeError
        value = int(label.item() if isinstance(label, Tensor) else label.__index__())
    except (TypeError, AttributeError) as error:
        raise DatasetError(
            f"the label of item {index} of the data set is {label!r}; expected a whole number (a row of the head), or None"
        ) from error
    if value < UNKNOWN:
        raise DatasetError(f"the label of item {index} of the data set is {value}; expected a row of the head, or -1 if unknown")
    return value


Item = tuple[int, str, Any]
"""The position of an item in its set, its name, and the item, or the error that reading it raised."""


def collected(
    items: Sequence[Item], reading: Reading, preprocess: Callable[[Any], Tensor] | None, threads: ThreadPoolExecutor | None = None
) -> Batch:
    """The batch of some items.

    Args:
        items: in order.
        reading: how they are read.
        preprocess: PIL image → tensor.
        threads: decode images that are encoded bytes; others are read here, because their library may not allow more threads.

    Raises:
        DatasetError: an item is neither an image nor a tensor, or its label no row of a head.
    """
    batch, tensors, labels = Batch(files=len(items)), list[Tensor](), list[int]()
    parts = [item if isinstance(item, Exception) else reading.parts(item, place) for place, _, item in items]
    images = [
        threads.submit(reading.tensor, part[0], preprocess, place)
        if threads is not None and isinstance(part, tuple) and isinstance(encoded(part[0]), bytes)
        else None
        for part, (place, _, _) in zip(parts, items, strict=True)
    ]
    for part, image, (place, name, _) in zip(parts, images, items, strict=True):
        if isinstance(part, Exception):
            batch.unreadable.append((name, reason(part)))
            continue
        try:
            tensor = reading.tensor(part[0], preprocess, place) if image is None else image.result()
        except DatasetError:
            raise
        except FileError as error:
            batch.unreadable.append((name, str(error)))
            continue
        except Exception as error:  # PIL may decode the image only now, and the preprocessing may raise anything
            batch.unreadable.append((name, reason(error)))
            continue
        tensors.append(tensor)
        labels.append(label_of(part[1], place))
        batch.names.append(name)
        batch.indices.append(place)
    batch.pixels, batch.labels = stack(tensors, batch.names), labels
    return batch


def check_sizes(size: int, workers: int) -> None:
    """Raises ValueError if one is below 1."""
    if size < 1 or workers < 1:
        raise ValueError(f"size and workers must be at least 1, got {size} and {workers}")


def read_ahead(numbers: Sequence[int], draw: Callable[[int], list[Item]], finish: Callable[[list[Item]], Batch]) -> Iterator[Batch]:
    """Batches by number: one thread draws the items, in order and two batches ahead.

    Args:
        numbers: of the batches.
        draw: number → items.
        finish: items → batch.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="torchprobe-dataset") as thread:
        ahead: deque[Future[Batch]] = deque()
        try:
            for position in range(len(numbers)):
                for number in numbers[position + len(ahead) : position + 3]:
                    ahead.append(thread.submit(_drawn, draw, finish, number))
                yield ahead.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def _drawn(draw: Callable[[int], list[Item]], finish: Callable[[list[Item]], Batch], number: int) -> Batch:
    return finish(draw(number))


@dataclass(frozen=True)
class ItemImages:
    """A data set with ``len()`` and ``[index]``: of PyTorch, or of the library ``datasets``. The name of an image is its index.

    It is read by one thread, in order, because it may not allow more.

    Args:
        dataset: the data set.
        paths: the indices of the items.
        reading: how items are read.

    >>> images = ItemImages(["a", "b", "c"], range(3)).take([2, 0])
    >>> [images.name(path) for path in images.paths]
    ['2', '0']
    """

    dataset: Any
    paths: Sequence[int]
    reading: Reading = USUAL
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, path: int) -> str:
        """The index of an item."""
        return str(path)

    def size(self, path: int) -> int | None:
        """Unknown."""
        return None

    def take(self, numbers: Sequence[int]) -> Self:
        """The items with these numbers, in this order."""
        return replace(self, paths=[self.paths[i] for i in numbers])

    def picture(self, path: int) -> Image:
        """One image in RGB."""
        return self.reading.picture(self.reading.parts(self.dataset[path], path)[0], path)

    def digest(self) -> str:
        """Unidentified: nothing tells what a data set of another library holds, unless it says so itself."""
        return UNIDENTIFIED

    def batches(
        self, preprocess: Callable[[Image], Tensor] | None, size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """As :meth:`torchprobe.datasets.Images.batches`; ``preprocess`` None for items that are tensors.

        Raises:
            ValueError: ``size`` or ``workers`` below 1.
            DatasetError: an item is neither an image nor a tensor, or its label no row of a head.
        """
        check_sizes(size, workers)

        def draw(number: int) -> list[Item]:
            return [
                (place, self.name(self.paths[place]), self.item(self.paths[place]))
                for place in range(number * size, min(number * size + size, len(self)))
            ]

        wanted = range(-(-len(self) // size)) if only is None else only
        with ThreadPoolExecutor(workers, thread_name_prefix="torchprobe-images") as threads:
            yield from read_ahead(wanted, draw, lambda items: collected(items, self.reading, preprocess, threads))

    def item(self, path: int) -> Any:
        """An item, or the error that reading it raised."""
        try:
            return self.dataset[path]
        except Exception as error:  # a data set may raise anything when it reads a file
            return error
