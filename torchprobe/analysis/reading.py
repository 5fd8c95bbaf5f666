"""Batches of pixels and labels from anything that holds images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from torchprobe.analysis.identity import content_fact, tensors_of, transform_fact
from torchprobe.common.facts import UNIDENTIFIED
from torchprobe.common.messages import reason, stable_repr
from torchprobe.common.networks import modules_fact
from torchprobe.common.ranks import Ranks
from torchprobe.common.storage import digest
from torchprobe.common.version import VERSION
from torchprobe.datasets.geometry import RandomTransformError
from torchprobe.datasets.images import Batch, DatasetError, Images
from torchprobe.datasets.labeled import LabeledImages
from torchprobe.datasets.readers import open_images
from torchprobe.datasets.readers.items import ItemImages
from torchprobe.datasets.texts import Texts

_UNKNOWN = -1


class Source:
    """A set of images in batches, which are the same for every reader.

    Args:
        dataset: what :func:`torchprobe.datasets.open_images` takes: images, a folder, shards, a PyTorch data set …
        preprocess: PIL image → tensor (3, H, W); None if the encoder has none.
        size: images in a batch.
        workers: threads that decode files. A PyTorch data set is read by one thread, in order, because it may not allow more.

    Raises:
        TypeError: the data set is something else.
        DatasetError: it is empty.
        ValueError: ``size`` or ``workers`` is below 1.
    """

    def __init__(self, dataset: Any, preprocess: Callable[[Any], Tensor] | None, size: int, workers: int) -> None:
        if size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {size} and {workers}")
        if hasattr(dataset, "__len__") and not len(dataset):
            raise DatasetError("the data set is empty: there is nothing to embed")
        images = open_images(dataset)
        if isinstance(images, Images) and preprocess is None:
            raise ValueError("the encoder has no .preprocess, which turns images into tensors: give a data set of tensors")
        self.images, self.preprocess, self.size, self.workers = images, preprocess, size, workers
        self.dataset = images.dataset if isinstance(images, ItemImages) else images
        self.classes = images.classes if isinstance(images, LabeledImages) else None
        self.groups = dict(images.groups) if isinstance(images, LabeledImages) and images.groups else None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def batches(self) -> int:
        """The number of batches."""
        return -(-len(self) // self.size)

    def read(self, only: Sequence[int]) -> Generator[tuple[Batch, list[int]], None, None]:
        """The batches with these numbers, in this order, each with the labels of the images that could be read."""
        labels, preprocess = getattr(self.images, "labels", None), cast(Any, self.preprocess)
        batches = self.images.batches(preprocess, self.size, self.workers, only)
        with contextlib.closing(batches) if isinstance(batches, Generator) else contextlib.nullcontext():
            for batch in batches:
                if batch.labels is not None:
                    yield batch, batch.labels
                else:
                    yield batch, [_UNKNOWN if labels is None else int(labels[i]) for i in batch.indices]

    def example(self) -> Tensor | None:
        """The first inputs that can be read, to find out how a network is laid out; None if the first batch has none."""
        for batch, _ in self.read([0]):
            return batch.pixels if batch.names else None
        return None

    def facts(self, encoder: nn.Module, saved: bool) -> dict[str, Any]:
        """What representations of these inputs depend on; see :mod:`torchprobe.common.facts`. Of several ranks, one reads the files.

        Args:
            encoder: that computes them.
            saved: whether the result is kept in a file, which a later run may continue.
        """
        with Ranks() as ranks:
            data = ranks.on_first(lambda: self.identity(saved))
        return {
            "encoder": str(getattr(encoder, "name", type(encoder).__name__)),
            "weights": digest([*encoder.parameters(), *encoder.buffers()]),
            "modules": modules_fact(encoder),
            **self.preprocessing(saved),
            "data": data,
            "batch_size": self.size,
            "torchprobe": VERSION,
        }

    def preprocessing(self, saved: bool) -> dict[str, Any]:
        """Facts that tell this preprocessing from others: its repr, and a digest of what it does.

        A repr is not enough, because two closures may share it and differ in a number.

        Args:
            saved: whether the result is kept in a file, which a later run may continue.

        Raises:
            RandomTransformError: it is random and the result is saved, so a later run could not tell whether it is the same.
        """
        found: str | None
        try:
            found = transform_fact(self.preprocess, isinstance(self.dataset, Texts))
        except RandomTransformError:
            if saved:
                raise
            found = None
        if found == UNIDENTIFIED and tensors_of(self.dataset) is not None:
            found = None  # it is not used
        return {"preprocessing": stable_repr(self.preprocess), "transform": found}

    def identity(self, saved: bool) -> dict[str, Any]:
        """Facts that tell this set from others, see :mod:`torchprobe.analysis.identity`.

        Args:
            saved: whether the result is kept in a file, which a later run may continue. Then every file is read once for its digest.
        """
        name = self.images.root.name if self.images.root else type(self.dataset).__name__
        found: dict[str, Any] = {"name": name, "images": len(self)}
        return {**found, "digest": content_fact(self.images)} if saved else found


def portable(error: Exception, rank: int) -> Exception:
    """An error that can be sent to other processes."""
    kind = type(error) if type(error) in (DatasetError, ValueError, TypeError) else RuntimeError
    return kind(f"rank {rank}: {error if kind is type(error) else reason(error)}")
