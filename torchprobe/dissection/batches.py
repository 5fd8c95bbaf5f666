"""The images of a data set in batches that are the same whoever takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchprobe.datasets.broden import Broden
from torchprobe.dissection.labels import LabelBatch


class Batch(NamedTuple):
    """``ids``: rows of the data set; ``images``: (n, 3, H, W); ``labels`` of these images, if they were asked for."""

    number: int
    ids: list[int]
    images: Tensor
    labels: LabelBatch | None


class Batches:
    """Batch i holds the images ``ids[i · size : (i + 1) · size]``: however the batches are dealt out, every image has the same neighbours,
    and a network gives the same numbers for it, to the last bit.

    Args:
        broden: the data set.
        ids: rows of it.
        preprocess: PIL image → tensor (3, H, W), the same shape for all.
        size: images in a batch.
        workers: threads that decode, two batches ahead.
        labels_of: the row whose labels go with a row; default: its own.
    """

    def __init__(
        self,
        broden: Broden,
        ids: Sequence[int],
        preprocess: Callable[[Any], Tensor],
        size: int = 32,
        workers: int = 2,
        labels_of: Callable[[int], int] | None = None,
    ) -> None:
        if size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {size} and {workers}")
        self.broden, self.ids, self.preprocess, self.size, self.workers = broden, list(ids), preprocess, size, workers
        self.labels_of = labels_of or (lambda row: row)

    def __len__(self) -> int:
        return -(-len(self.ids) // self.size)

    def rows(self, batch: int) -> list[int]:
        """The rows of the data set that a batch holds."""
        return self.ids[batch * self.size : (batch + 1) * self.size]

    def image(self, row: int) -> Tensor:
        """One image, as the network takes it.

        Raises:
            DatasetError: it cannot be read.
            TypeError: ``preprocess`` makes no tensor of it.
        """
        image = self.preprocess(self.broden.image(row))
        if not isinstance(image, Tensor):
            raise TypeError(f"preprocess must give a tensor (3, H, W), it gave {type(image).__name__}")
        return image

    def read(self, numbers: Sequence[int], labels: bool = False) -> Iterator[Batch]:
        """Some batches, in the order given, with labels or without."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="torchprobe-images") as threads:
            ahead: deque[list[tuple[Future[Tensor], Future[Any] | None]]] = deque()
            try:
                for at, number in enumerate(numbers):
                    for later in numbers[at + len(ahead) : at + 3]:
                        ahead.append([(threads.submit(self.image, row), self._labels(threads, row, labels)) for row in self.rows(later)])
                    yield self._collect(number, ahead.popleft())
            finally:
                threads.shutdown(wait=False, cancel_futures=True)  # whoever stops early does not wait

    def _labels(self, threads: ThreadPoolExecutor, row: int, wanted: bool) -> Future[Any] | None:
        return threads.submit(self.broden.image_labels, self.labels_of(row)) if wanted else None

    def _collect(self, number: int, parts: list[tuple[Future[Tensor], Future[Any] | None]]) -> Batch:
        rows = self.rows(number)
        images = [image.result() for image, _ in parts]
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                name = self.broden.rows[row].image
                raise ValueError(
                    f"{name} came out as {tuple(image.shape)}, another image as {tuple(images[0].shape)}: preprocess must resize"
                )
        found = [labels.result() for _, labels in parts if labels is not None]
        if not found:
            return Batch(number, rows, torch.stack(images), None)
        described = [self.broden.rows[self.labels_of(row)] for row in rows]
        return Batch(number, rows, torch.stack(images), LabelBatch.pack(found, [(row.label_height, row.label_width) for row in described]))
