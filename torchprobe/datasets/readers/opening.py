"""One function for all sources of images."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from torchprobe.common.messages import counted
from torchprobe.common.ranks import Ranks
from torchprobe.datasets.images import SUFFIXES, DatasetError, image_folder
from torchprobe.datasets.protocol import ImageSet
from torchprobe.datasets.readers.hugging_face import PREFIX, is_hugging_face, load_named, open_hugging_face
from torchprobe.datasets.readers.items import ItemImages, Reading
from torchprobe.datasets.readers.loaders import Batches, open_loader
from torchprobe.datasets.readers.shards import open_shards
from torchprobe.datasets.readers.stored import Member, StoredImages
from torchprobe.datasets.readers.stores import is_address, listing_of, localized, matching
from torchprobe.datasets.readers.streams import open_stream

_TAR = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_images(
    source: Any,
    limit: int | None = None,
    seed: int = 0,
    *,
    image: str | None = None,
    label: str | None = None,
    labels: bool = True,
    count: int | None = None,
    identity: str | None = None,
    ranks: Ranks | None = None,
) -> ImageSet:
    """Images from wherever they are, as an :class:`~torchprobe.datasets.ImageSet`.

    ==============================================  ==========================================================================
    ``"photos/"``                                   the image files in a folder and its subfolders
    ``"shards/{000..009}.tar"``, ``"a/*.tar"``      tar shards, with labels in ``.cls`` or ``.json``; also a list of them
    ``"shards/"``                                   a folder of tar shards, if it has no images
    ``"s3://bucket/photos"``, ``"gs://…"``          the same of a store, by fsspec; also ``http://…/000.tar``, ``memory://…``
    ``"hf-datasets:NAME@SPLIT"``                    a data set of the library ``datasets``, or a folder of its ``save_to_disk``
    a data set of ``datasets``                      with ``[index]``, or streamed
    a PyTorch data set                              with ``len()`` and ``[index]``, or an ``IterableDataset``
    a ``DataLoader``                                without shuffling
    an :class:`~torchprobe.datasets.ImageSet`       itself
    ==============================================  ==========================================================================

    Args:
        source: one of these.
        limit: take this number of images, chosen at random.
        seed: of the random choice.
        image, label: columns of a data set whose items are mappings; None: the usual names.
        labels: of shards, read the labels; see :func:`open_shards`.
        count: of a stream, its length if it is known. Otherwise the stream is read once to count it, and later passes are compared with
            that one.
        identity: of shards and stores, a text of yours that changes whenever their content does. Without it, a run that is saved reads the
            files of a store once more, for their digest; that of shards is known from their index.
        ranks: processes that share the index of shards; all of them must call this.

    Raises:
        DatasetError: there are no images, or they cannot be used; the message says why.
        TypeError: another kind of object.
        ValueError: ``limit`` below 1.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> images = open_images(TensorDataset(torch.zeros(5, 3, 2, 2), torch.arange(5)), limit=2)
    >>> [batch.labels for batch in images.batches(None, size=8)]
    [[3, 4]]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if isinstance(source, (str, os.PathLike)) and not is_elsewhere(source) and not (Path(source).is_dir() and shards_in(Path(source))):
        return image_folder(source, limit, seed)
    found = _opened(source, Reading(image, label), count, {"labels": labels, "identity": identity, "ranks": ranks})
    if not len(found):
        raise DatasetError("the data set is empty")
    if limit is None or limit >= len(found):
        return found
    return found.take(sorted(random.Random(seed).sample(range(len(found)), limit)))


def _opened(source: Any, reading: Reading, count: int | None, stored: dict[str, Any]) -> ImageSet:
    if isinstance(source, str) and source.startswith(PREFIX):
        return open_hugging_face(load_named(source.removeprefix(PREFIX)), reading.image, reading.label, count)
    if isinstance(source, (str, os.PathLike)):
        return _of_pattern(os.fspath(source), stored)
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, (str, os.PathLike)) for one in source):
        shards = [one for pattern in source for one in matching(os.fspath(pattern))]
        return open_shards(shards, **stored)
    if is_hugging_face(source):
        return open_hugging_face(source, reading.image, reading.label, count)
    if isinstance(source, DataLoader):
        opened = open_loader(source, reading)
        return open_stream(opened, count=count, reading=reading) if isinstance(opened, Batches) else opened
    if isinstance(source, IterableDataset):
        return open_stream(source, count=count, reading=reading)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, dict):
        return ItemImages(source, range(len(source)), reading)
    if isinstance(source, Iterable) and not isinstance(source, (dict, str, Iterator)):
        return open_stream(source, count=count, reading=reading)
    raise TypeError(
        f"expected Images, as open_images and image_folder return them, or a PyTorch data set with len() and [index], got "
        f"{type(source).__name__}"
    )


def is_elsewhere(where: str | os.PathLike[str]) -> bool:
    """Whether a name stands for shards, an address or a data set of Hugging Face, and not for a folder or a file of texts.

    >>> is_elsewhere("photos"), is_elsewhere("a/{0..9}.tar"), is_elsewhere("s3://a/b"), is_elsewhere("hf-datasets:mnist")
    (False, True, True, True)
    """
    text = os.fspath(where)
    if os.path.isdir(text):
        return False
    return text.startswith(PREFIX) or is_address(text) or text.lower().endswith(_TAR)


def shards_in(folder: Path) -> list[str]:
    """The tar shards directly in a folder, sorted; empty if there are images too."""
    found, images = list[str](), False
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = Path(entry.name).suffix.lower()
            images = images or suffix in SUFFIXES
            if suffix == ".tar":
                found.append(entry.path)
    return [] if images else sorted(found)


def _of_pattern(pattern: str, stored: dict[str, Any]) -> ImageSet:
    local = localized(pattern)
    if not is_address(local) and os.path.isdir(local):
        inside = shards_in(Path(local))
        return open_shards(inside, **stored) if inside else image_folder(local)
    if local.lower().endswith(_TAR):
        return open_shards(matching(local), **stored)
    if not is_address(local):
        return image_folder(local)
    return _of_store(local, stored["identity"])


def _of_store(folder: str, identity: str | None) -> StoredImages:
    """The images below a folder of a store, without labels."""
    found = [*listing_of(folder)]
    images = [one for one in found if os.path.splitext(one[1])[1].lower() in SUFFIXES]
    if not images:
        others = f"; it has {counted(len(found), 'other file')}" if found else "; it is empty, or does not exist"
        raise DatasetError(f"no images in {folder}{others}. Expected files ending in {', '.join(sorted(SUFFIXES))}")
    paths = [Member(address, name, 0, size) for address, name, size in images]
    remarks = [f"left out: {counted(len(found) - len(images), 'other file')}"] if len(found) > len(images) else []
    return StoredImages(paths, labels=[-1] * len(paths), remarks=remarks, identity_of=identity)
