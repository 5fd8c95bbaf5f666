"""A PyTorch ``DataLoader`` as a set of images: its data set, processes and ``collate_fn``, with the batches of torchprobe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from torchprobe.common.messages import reason
from torchprobe.datasets.images import Batch, DatasetError
from torchprobe.datasets.readers.items import Item, ItemImages, Reading, check_sizes, collected

if TYPE_CHECKING:
    from PIL.Image import Image


class _Caught:
    """A data set whose errors are items: so one that cannot be read does not end the batch, and is named."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, Any]:
        try:
            return place[0], self.dataset[place[1]]
        except Exception as error:  # a data set may raise anything when it reads a file
            return place[0], _Failed(reason(error))


@dataclass(frozen=True)
class _Failed:
    why: str


class _Collated:
    """The ``collate_fn`` of a loader over the items that could be read, with their positions."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[list[int], Any, list[tuple[int, str]]]:
        sound = [(place, item) for place, item in items if not isinstance(item, _Failed)]
        failed = [(place, item.why) for place, item in items if isinstance(item, _Failed)]
        return [place for place, _ in sound], self.collate([item for _, item in sound]) if sound else None, failed


@dataclass(frozen=True)
class LoaderImages(ItemImages):
    """The images of a ``DataLoader`` over a data set with ``[index]``; made by :func:`open_loader`.

    The processes and the ``collate_fn`` of the loader do the work; the batches are those that are asked for, so ranks share them and no
    image is read twice or left out. ``batch_size``, ``drop_last`` and ``prefetch_factor`` of the loader are not used.
    """

    loader: Any = None

    def batches(
        self, preprocess: Callable[[Image], Tensor] | None, size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """As :meth:`ItemImages.batches`. Tensors are used unchanged."""
        check_sizes(size, workers)
        wanted = range(-(-len(self) // size)) if only is None else only
        groups = [[(place, self.paths[place]) for place in range(number * size, min(number * size + size, len(self)))] for number in wanted]
        given = self.loader
        loader: DataLoader[Any] = DataLoader(
            _Caught(self.dataset),  # type: ignore[arg-type]
            batch_sampler=groups,
            num_workers=given.num_workers,
            collate_fn=_Collated(list if given.batch_size is None else given.collate_fn),
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            generator=given.generator,
        )
        for group, (places, whole, failed) in zip(groups, _told(loader), strict=True):
            items = [] if whole is None else flattened(whole)
            if len(items) != len(places):
                raise DatasetError(f"the collate_fn of the loader made {len(items)} items of {len(places)}")
            found: list[Item] = [(place, self.name(self.paths[place]), item) for place, item in zip(places, items, strict=True)]
            batch = collected(found, self.reading, preprocess)
            batch.files = len(group)
            batch.unreadable = [*batch.unreadable, *((self.name(self.paths[place]), why) for place, why in failed)]
            yield batch


def _told(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader. Its ``collate_fn`` and its processes may raise anything."""
    try:
        yield from loader
    except Exception as error:
        raise DatasetError(f"the loader failed: {reason(error)}") from error


def open_loader(loader: DataLoader[Any], reading: Reading) -> LoaderImages | Batches:
    """The images of a loader.

    Args:
        loader: in the order of its data set. Its batches are tensors, sequences that begin with images and labels, or mappings.
        reading: how items are read.

    Returns:
        Of a loader over an ``IterableDataset``, something to iterate over, for :func:`~torchprobe.datasets.readers.streams.open_stream`.

    Raises:
        DatasetError: it has a sampler of its own, such as that of ``shuffle=True``; or over an ``IterableDataset`` it leaves items out.
    """
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            raise DatasetError("the loader leaves out the last items of the stream: give it without drop_last=True")
        return Batches(loader)
    plain = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if not plain or type(loader.sampler) is not SequentialSampler:
        sampler = loader.sampler if plain else loader.batch_sampler
        raise DatasetError(
            f"the loader has a {type(sampler).__name__}: images need a fixed order, and ranks share them without a sampler. Give a loader "
            "without shuffle and sampler, or a Subset of the data set"
        )
    return LoaderImages(loader.dataset, range(len(loader.dataset)), reading, loader=loader)  # type: ignore[arg-type]


class Batches:
    """The items of a loader over an ``IterableDataset``, one by one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.workers = loader, loader.num_workers

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield from [batch] if self.loader.batch_size is None else flattened(batch)


def flattened(batch: Any) -> list[Any]:
    """The items of a collated batch.

    Raises:
        DatasetError: its parts have different lengths.

    >>> import torch
    >>> [(tuple(image.shape), int(label)) for image, label in flattened([torch.zeros(2, 3, 4, 4), torch.tensor([5, 6])])]
    [((3, 4, 4), 5), ((3, 4, 4), 6)]
    """
    if isinstance(batch, Tensor):
        return [*batch]
    if isinstance(batch, Mapping):
        _same_length([*batch.values()])
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, list, tuple)) and not _is_item(batch[0]):
        _same_length(batch)
        return [*zip(*batch, strict=True)] if len(batch) > 1 else [*batch[0]]
    if isinstance(batch, (tuple, list)):
        return [*batch]
    raise DatasetError(f"a batch of the loader is {type(batch).__name__}; expected tensors, (images, labels), or a mapping of them")


def _is_item(first: Any) -> bool:
    """Whether the first element of a list is an item, (image, label), or one image: then the ``collate_fn`` left the items as they are."""
    if isinstance(first, Tensor):
        return first.dim() < 4
    if len(first) > 1 and isinstance(first[0], Tensor) and isinstance(first[1], Tensor):
        return first[0].dim() != first[1].dim()
    return len(first) > 1 and not isinstance(first[1], type(first[0]))


def _same_length(parts: Sequence[Any]) -> None:
    lengths = {len(part) if hasattr(part, "__len__") else None for part in parts}
    if len(lengths) != 1 or None in lengths:
        raise DatasetError("the parts of a batch of the loader have different lengths: expected one label for each image")
