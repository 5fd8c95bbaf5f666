"""What a set of inputs holds and what a transform does, as facts: see :mod:`torchprobe.common.facts`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from torchprobe.common.facts import UNIDENTIFIED, digest_of, file_digests, told
from torchprobe.common.storage import digest
from torchprobe.datasets.geometry import UNKNOWN, fingerprint
from torchprobe.datasets.labeled import LabeledImages
from torchprobe.datasets.protocol import ImageSet
from torchprobe.datasets.readers.items import ItemImages
from torchprobe.datasets.readers.loaders import LoaderImages
from torchprobe.datasets.readers.streams import StreamImages

_TEXTS = ("a", "A photo of two small cats, and 3 dogs.", "Größe: 12 µm · 漢字 😀", "word " * 40)


def content_fact(dataset: Any) -> str:
    """A digest of the names, contents, labels and classes of a set of inputs.

    It is known for images and texts of :mod:`torchprobe.datasets`, also in shards and stores, for data sets of Hugging Face, streams,
    ``TensorDataset`` and lists of tensors, for data sets of torchvision with a list of files (``samples``), for a ``Subset`` of these, and
    for what says itself what it is, see :func:`torchprobe.common.facts.told`. For others it is
    :data:`torchprobe.common.facts.UNIDENTIFIED`.

    >>> import torch
    >>> content_fact(TensorDataset(torch.ones(2))) == content_fact(TensorDataset(torch.zeros(2)))
    False
    >>> content_fact([1, "two"])
    'unidentified'
    """
    if (own := told(dataset)) is not None:
        return digest_of(["told", own])
    if isinstance(dataset, LabeledImages):
        labels = [[int(label) for label in dataset.labels], dataset.border, dataset.classes, sorted((dataset.groups or {}).items())]
        return digest_of([dataset.digest(), *labels])
    if isinstance(dataset, ItemImages):
        return _of_items(dataset)
    if isinstance(dataset, StreamImages) and (own := told(dataset.stream)) is not None:
        return digest_of(["told", own, [*dataset.paths] if len(dataset) < dataset.count else None])
    if isinstance(dataset, ImageSet):
        own_labels: Any = getattr(dataset, "labels", None)
        return dataset.digest() if own_labels is None else _with_labels(dataset.digest(), own_labels)
    if (tensors := tensors_of(dataset)) is not None:
        return digest(tensors)
    if type(dataset) is Subset:
        inner = content_fact(dataset.dataset)
        return inner if inner == UNIDENTIFIED else digest_of([inner, [int(i) for i in dataset.indices]])
    return _of_files(dataset)


def _of_items(images: ItemImages) -> str:
    """The fact of a data set with ``[index]``, or of some of its items."""
    own = told(images.loader) if isinstance(images, LoaderImages) else None
    if own is not None:
        inner = digest_of(["told", own])
    elif isinstance(images, LoaderImages) and images.loader.collate_fn is not default_collate:
        return UNIDENTIFIED  # what its collate_fn does is not known
    else:
        inner = content_fact(images.dataset)
    if inner == UNIDENTIFIED:
        return images.digest()
    whole = [*images.paths] == [*range(len(images.dataset))]
    return inner if whole else digest_of([inner, [int(i) for i in images.paths]])


def _with_labels(digest: str, labels: Sequence[int]) -> str:
    return digest if digest == UNIDENTIFIED else digest_of([digest, [int(label) for label in labels]])


def tensors_of(dataset: Any) -> list[Tensor] | None:
    """Everything that a data set of tensors holds; None for other data sets.

    >>> import torch
    >>> len(tensors_of([(torch.ones(2), 3), (torch.ones(2), 1)]) or [])
    4
    """
    if type(dataset) is TensorDataset:
        return [*dataset.tensors]
    if type(dataset) not in (list, tuple):
        return None
    found: list[Tensor] = []
    for item in dataset:
        for part in item if isinstance(item, tuple) else (item,):
            if not isinstance(part, (Tensor, int)):
                return None
            found.append(part if isinstance(part, Tensor) else torch.tensor(part))
    return found


def transform_fact(transform: Callable[[Any], Tensor] | None, texts: bool = False) -> str | None:
    """A digest of what a transform does; None if there is none.

    Args:
        transform: PIL image → tensor, or text → tensor.
        texts: whether it takes texts.

    Raises:
        RandomTransformError: two runs differ.
    """
    if transform is None:
        return None
    if (own := told(transform)) is not None:
        return digest_of(["told", own])
    if texts:
        return _of_texts(transform)
    try:
        found = fingerprint(transform)
    except TypeError:  # it does not return a tensor
        return UNIDENTIFIED
    return UNIDENTIFIED if found == UNKNOWN else found


def _of_texts(transform: Callable[[Any], Tensor]) -> str:
    found = hashlib.sha256()
    try:
        for text in _TEXTS:
            found.update(digest([transform(text)]).encode())
    except Exception:  # a tokenizer may raise anything
        return UNIDENTIFIED
    return found.hexdigest()[:16]


def _of_files(dataset: Any) -> str:
    """The fact of a data set like torchvision's ``ImageFolder``: a list of files with labels, and transforms."""
    samples, transforms = getattr(dataset, "samples", None), [getattr(dataset, name, None) for name in ("transform", "target_transform")]
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    if not (isinstance(samples, list) and kind.startswith("torchvision.datasets.") and transforms[1] is None):
        return UNIDENTIFIED
    try:
        paths, labels = [Path(path) for path, _ in samples], [int(label) for _, label in samples]
        transform = transform_fact(transforms[0])
    except (TypeError, ValueError):
        return UNIDENTIFIED
    if transform == UNIDENTIFIED:
        return UNIDENTIFIED
    return digest_of([kind, [path.name for path in paths], file_digests(paths), labels, transform])
