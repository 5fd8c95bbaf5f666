"""Batches of pixels and labels from anything that holds images."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from torchprobe.common.messages import reason, stable_repr
from torchprobe.datasets.geometry import RandomTransformError, fingerprint
from torchprobe.datasets.images import Batch, DatasetError, Images, rgb, stack
from torchprobe.datasets.labeled import LabeledImages

_UNKNOWN = -1


class Source:
    """A set of images in batches, which are the same for every reader.

    Args:
        dataset: :class:`torchprobe.datasets.Images`, or a map-style PyTorch data set.
        preprocess: PIL image → tensor (3, H, W); None if the encoder has none.
        size: images in a batch.
        workers: threads that decode files. A PyTorch data set is read by one thread, in order, because it may not allow more.

    Raises:
        TypeError: the data set is neither.
        DatasetError: it is empty.
        ValueError: ``size`` or ``workers`` is below 1.
    """

    def __init__(self, dataset: Any, preprocess: Callable[[Any], Tensor] | None, size: int, workers: int) -> None:
        if size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {size} and {workers}")
        if not (hasattr(dataset, "__len__") and (isinstance(dataset, Images) or hasattr(dataset, "__getitem__"))):
            raise TypeError(
                f"expected Images, as image_folder returns them, or a PyTorch data set with len() and [index], got {type(dataset).__name__}"
            )
        if not len(dataset):
            raise DatasetError("the data set is empty: there is nothing to embed")
        if isinstance(dataset, Images) and preprocess is None:
            raise ValueError("the encoder has no .preprocess, which turns images into tensors: give a data set of tensors")
        self.dataset, self.preprocess, self.size, self.workers = dataset, preprocess, size, workers
        self.classes = dataset.classes if isinstance(dataset, LabeledImages) else None
        self.groups = dict(dataset.groups) if isinstance(dataset, LabeledImages) and dataset.groups else None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def batches(self) -> int:
        """The number of batches."""
        return -(-len(self) // self.size)

    def read(self, only: Sequence[int]) -> Generator[tuple[Batch, list[int]], None, None]:
        """The batches with these numbers, in this order, each with the labels of the images that could be read."""
        if isinstance(self.dataset, Images):
            assert self.preprocess is not None
            labels = self.dataset.labels if isinstance(self.dataset, LabeledImages) else None
            for batch in self.dataset.batches(self.preprocess, self.size, self.workers, only):
                yield batch, [_UNKNOWN if labels is None else int(labels[i]) for i in batch.indices]
            return
        with ThreadPoolExecutor(1, thread_name_prefix="torchprobe-dataset") as thread:
            ahead: deque[Future[tuple[Batch, list[int]]]] = deque()
            try:
                for position in range(len(only)):
                    for number in only[position + len(ahead) : position + 3]:
                        ahead.append(thread.submit(self._items, number))
                    yield ahead.popleft().result()
            finally:
                thread.shutdown(wait=False, cancel_futures=True)

    def example(self) -> Tensor | None:
        """The first inputs that can be read, to find out how a network is laid out; None if the first batch has none."""
        for batch, _ in self.read([0]):
            return batch.pixels if batch.names else None
        return None

    def preprocessing(self, saved: bool) -> dict[str, Any]:
        """Facts that tell this preprocessing from others: its repr, and its fingerprint if it turns pictures into tensors.

        A repr is not enough, because two closures may share it and differ in a number.

        Args:
            saved: whether the result is kept in a file, which a later run may continue.

        Raises:
            RandomTransformError: it is random and the result is saved, so a later run could not tell whether it is the same.
        """
        found = None
        if self.preprocess is not None:
            try:
                found = fingerprint(self.preprocess)
            except RandomTransformError:
                if saved:
                    raise
            except Exception:  # it does not take every picture, or none: a data set may hold tensors
                found = None
        return {"preprocessing": stable_repr(self.preprocess), "transform": found}

    def identity(self) -> dict[str, Any]:
        """Facts that tell this set from others: names, sizes and labels of files; type, length and repr of a PyTorch data set."""
        described: list[Any]
        if isinstance(self.dataset, Images):
            described = [[self.dataset.name(path), _bytes(path)] for path in self.dataset.paths]
            if isinstance(self.dataset, LabeledImages):
                described += [[int(label) for label in self.dataset.labels], self.dataset.border]
                described += [self.classes, sorted((self.groups or {}).items())]
        else:
            described = [stable_repr(self.dataset)]
        name = self.dataset.root.name if isinstance(self.dataset, Images) and self.dataset.root else type(self.dataset).__name__
        return {"name": name, "images": len(self), "digest": hashlib.sha256(json.dumps(described).encode()).hexdigest()}

    def _items(self, number: int) -> tuple[Batch, list[int]]:
        first = number * self.size
        indices = range(first, min(first + self.size, len(self)))
        batch, labels, tensors = Batch(files=len(indices)), list[int](), list[Tensor]()
        for index in indices:
            try:
                item = self.dataset[index]
            except Exception as error:  # a data set may raise anything when it reads a file
                batch.unreadable.append((str(index), reason(error)))
                continue
            image, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, None)
            try:
                tensor = image if isinstance(image, Tensor) else self._tensor(image, index)
            except DatasetError:
                raise
            except Exception as error:  # PIL may decode the image only now
                batch.unreadable.append((str(index), reason(error)))
                continue
            tensors.append(tensor)
            labels.append(_label(label, index))
            batch.names.append(str(index))
            batch.indices.append(index)
        batch.pixels = stack(tensors, batch.names)
        return batch, labels

    def _tensor(self, image: Any, index: int) -> Tensor:
        if not (hasattr(image, "mode") and hasattr(image, "convert")):  # a PIL image; PIL may not be installed
            raise DatasetError(
                f"item {index} of the data set is {type(image).__name__}; expected a PIL image or a tensor, alone or as (image, label)"
            )
        if self.preprocess is None:
            raise DatasetError(
                f"item {index} of the data set is a PIL image, and the encoder has no .preprocess: let the data set return tensors"
            )
        return self.preprocess(rgb(image))


def _label(label: Any, index: int) -> int:
    if label is None:
        return _UNKNOWN
    try:
        if isinstance(label, Tensor) and (label.numel() != 1 or label.is_floating_point()):
            raise TypeError
        value = int(label.item() if isinstance(label, Tensor) else label.__index__())
    except (TypeError, AttributeError) as error:
        raise DatasetError(
            f"the label of item {index} of the data set is {label!r}; expected a whole number (a row of the head), or None"
        ) from error
    if value < _UNKNOWN:
        raise DatasetError(f"the label of item {index} of the data set is {value}; expected a row of the head, or -1 if unknown")
    return value


def _bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
