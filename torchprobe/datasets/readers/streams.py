"""Data sets that can only be read from their start: of PyTorch, and of the library ``datasets`` in streaming mode."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchprobe.common.messages import counted, reason
from torchprobe.datasets.images import Batch, DatasetError
from torchprobe.datasets.readers.items import USUAL, Item, Reading, check_sizes, collected, read_ahead
from torchprobe.datasets.readers.loaders import Batches

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

_HASH = 8  # bytes of the hash of each item that are kept


@dataclass
class _Known:
    """What a whole pass over a stream has shown: a digest of all items, and a short hash of each."""

    digest: str = ""
    hashes: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class StreamImages:
    """Images that are read in order; the name of one is its number. Made by :func:`open_stream`.

    Every rank reads the whole stream and takes its own batches, so each image is used once. Images that are not used are not decoded if the
    stream gives encoded bytes.

    Args:
        stream: anything that can be iterated several times, with the same items.
        count: how many items it has.
        paths: the numbers of the items that are used, ascending.
        reading: how items are read.
    """

    stream: Any
    count: int
    paths: Sequence[int]
    reading: Reading = USUAL
    root: Path | None = None
    known: _Known = field(default_factory=_Known, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, path: int) -> str:
        """The number of an item, from 0 on."""
        return str(path)

    def size(self, path: int) -> int | None:
        """Unknown."""
        return None

    def take(self, numbers: Sequence[int]) -> Self:
        """The items with these numbers.

        Raises:
            DatasetError: the numbers do not ascend.
        """
        if any(second <= first for first, second in itertools.pairwise(numbers)):
            raise DatasetError(
                "a stream of images can only be read in its order, and this needs another one: give shards, a folder, or a data set "
                "with [index]"
            )
        return replace(self, paths=[self.paths[i] for i in numbers])

    def picture(self, path: int) -> Image:
        """Not possible.

        Raises:
            DatasetError: always.
        """
        raise DatasetError("a stream of images cannot show single pictures: leave them out (--pictures 0), or give shards or a folder")

    def digest(self) -> str:
        """A digest of the contents and labels of all items, which are read once."""
        if not self.known.digest:
            _survey(self.stream, self.reading, self.known)
        return hashlib.sha256(repr((self.known.digest, [*self.paths] if len(self.paths) < self.count else None)).encode()).hexdigest()

    def batches(
        self, preprocess: Callable[[Image], Tensor] | None, size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """As :meth:`torchprobe.datasets.Images.batches`; ``preprocess`` None for items that are tensors.

        Raises:
            ValueError: ``size`` or ``workers`` below 1, or ``only`` does not ascend.
            DatasetError: the stream fails, has another length than before, or gives other items than before.
        """
        check_sizes(size, workers)
        wanted = [*range(-(-len(self) // size))] if only is None else [*only]
        if any(second <= first for first, second in itertools.pairwise(wanted)):
            raise ValueError("the batches of a stream can only be read in order")
        items = self._items()

        def draw(number: int) -> list[Item]:
            places = range(number * size, min(number * size + size, len(self)))
            found = [(place, self.name(self.paths[place]), self._until(items, self.paths[place])) for place in places]
            if places and places[-1] == self.count - 1:  # the last of all
                self._ended(items)
            return found

        with ThreadPoolExecutor(workers, thread_name_prefix="torchprobe-images") as threads:

            def finish(found: list[Item]) -> Batch:
                return collected(found, self.reading, preprocess, threads)

            # A loader reads ahead itself. Processes that are forked in a thread of a pool wait for it at their end, and fail.
            yield from map(finish, map(draw, wanted)) if _workers(self.stream) else read_ahead(wanted, draw, finish)

    def _items(self) -> Iterator[tuple[int, Any]]:
        try:
            yield from enumerate(self.stream)
        except Exception as error:  # a stream may raise anything, and has then ended
            raise DatasetError(f"the stream of images failed: {reason(error)}") from error

    def _until(self, items: Iterator[tuple[int, Any]], number: int) -> Any:
        """The item with this number."""
        for at, item in items:
            if at == number:
                self._check(item, number)
                return item
        raise DatasetError(f"the stream of images ended before item {number}; it had {counted(self.count, 'item')} before")

    def _check(self, item: Any, number: int) -> None:
        hashes = self.known.hashes
        if hashes and hashes[number * _HASH : number * _HASH + _HASH] != self.reading.hashed_or_reason(item, number)[:_HASH]:
            raise DatasetError(
                f"item {number} of the stream is not what it was when the stream was read before: give it the same order and content "
                "each time"
            )

    def _ended(self, items: Iterator[tuple[int, Any]]) -> None:
        if next(items, None) is not None:
            raise DatasetError(f"the stream of images has more than {counted(self.count, 'item')}, which it had before, or were stated")


def open_stream(stream: Any, *, count: int | None = None, reading: Reading | None = None) -> StreamImages:
    """Images of an iterable.

    Args:
        stream: it can be iterated several times and always gives the same items.
        count: how many; None: it is read once to count and to hash them, and later passes are compared with that.
        reading: how items are read; None: as :class:`Reading` does.

    Raises:
        TypeError: it is an iterator, which can be read only once.
        DatasetError: it fails, or is empty, or every worker of a loader gives all of it.

    >>> import torch
    >>> images = open_stream([torch.zeros(3, 2, 2), torch.ones(3, 2, 2), torch.ones(3, 2, 2)])
    >>> [batch.names for batch in images.batches(None, 2)]
    [['0', '1'], ['2']]
    """
    if isinstance(stream, Iterator):
        raise TypeError(f"{type(stream).__name__} is an iterator, which can be read only once: give what it iterates over")
    reading, known = reading or USUAL, _Known()
    if count is None:
        count = _survey(stream, reading, known)
        workers = _workers(stream)
        if workers > 1 and count and _repeats(known.hashes, workers):
            raise DatasetError(
                f"each of the {workers} workers of the loader gives the whole stream, so every image would count {workers} times: share "
                "the items in the data set, as torch.utils.data.get_worker_info() says, or give the loader num_workers=0"
            )
    if count < 1:
        raise DatasetError("the stream of images is empty")
    return StreamImages(stream, count, range(count), reading, known=known)


def _workers(stream: Any) -> int:
    """The processes that read a stream, if it is a loader."""
    return stream.workers if isinstance(stream, Batches) else 0


def _repeats(hashes: bytearray, times: int) -> bool:
    """Whether every item occurs so many times, or a multiple of that."""
    counts = Counter(bytes(hashes[start : start + _HASH]) for start in range(0, len(hashes), _HASH))
    return all(count % times == 0 for count in counts.values())


def _survey(stream: Any, reading: Reading, known: _Known) -> int:
    """Reads all items once; returns their number."""
    whole, hashes, number = hashlib.sha256(), bytearray(), 0
    try:
        for item in stream:
            found = reading.hashed_or_reason(item, number)
            whole.update(found)
            hashes += found[:_HASH]
            number += 1
    except DatasetError:
        raise
    except Exception as error:  # a stream may raise anything
        raise DatasetError(f"the stream of images failed after {counted(number, 'item')}: {reason(error)}") from error
    known.digest, known.hashes = whole.hexdigest(), hashes
    return number
