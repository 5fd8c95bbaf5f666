"""Data sets of the library ``datasets`` of Hugging Face, with ``[index]`` or streamed."""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import dataclass
from typing import Any

from torchprobe.common.messages import did_you_mean, install_hint, reason
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.readers.items import IMAGE_KEYS, LABEL_KEYS, ItemImages, Reading
from torchprobe.datasets.readers.streams import StreamImages, open_stream

PREFIX = "hf-datasets:"
"""Begins a name: ``hf-datasets:NAME``, ``hf-datasets:NAME@SPLIT``, or a folder of ``save_to_disk`` instead of NAME."""

FOLDER_FILES = ("state.json", "dataset_dict.json")
"""One of them is in every folder of ``save_to_disk``."""


@dataclass(frozen=True)
class HuggingFaceImages(ItemImages):
    """A data set of the library ``datasets``. Its digest is of the encoded images and their labels, which are read once.

    Args:
        names: of the rows of the head, if the data set names its classes.
    """

    names: tuple[str, ...] | None = None

    def digest(self) -> str:
        """A digest of the images and labels."""
        found = hashlib.sha256()
        for path in self.paths:
            found.update(self.reading.hashed_or_reason(self.item(path), path))
        return found.hexdigest()


def is_hugging_face(dataset: Any) -> bool:
    """Whether an object is a data set of that library."""
    return type(dataset).__module__.partition(".")[0] == "datasets" and hasattr(dataset, "features")


def open_hugging_face(dataset: Any, image: str | None, label: str | None, count: int | None) -> HuggingFaceImages | StreamImages:
    """Images of a data set of the library ``datasets``.

    Args:
        dataset: a ``Dataset`` or an ``IterableDataset``, of one split.
        image, label: columns; None: the only column of images, or else a usual name; and a usual name.
        count: of an ``IterableDataset``, if known; see :func:`~torchprobe.datasets.readers.streams.open_stream`.

    Raises:
        DatasetError: there is no such column.
    """
    features = dataset.features
    if features is not None:
        image = image or _image_column(features)
        label = label if label is not None else next((key for key in LABEL_KEYS if key in features), None)
        for column in filter(None, (image, label)):
            if column not in features:
                raise DatasetError(f"the data set has no column {column!r}{did_you_mean(column, features)}; it has {', '.join(features)}")
        dataset = _encoded(dataset, image, [column for column in (image, label) if column is not None])
    reading, names = Reading(image, label), getattr((features or {}).get(label), "names", None)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return HuggingFaceImages(dataset, range(len(dataset)), reading, names=tuple(names) if names else None)
    return open_stream(dataset, count=count, reading=reading)


def _image_column(features: Any) -> str:
    kinds = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    usual = [name for name in IMAGE_KEYS if name in features and (not kinds or name in kinds)]
    if len(kinds) == 1 or (kinds and not usual):
        return str(kinds[0])
    if usual:
        return usual[0]
    raise DatasetError(f"no column of the data set holds images; it has {', '.join(features)}: name the column of the images")


def _encoded(dataset: Any, image: str, columns: list[str]) -> Any:
    """The data set with the bytes of its images, which are then decoded as pictures of files are: in known formats, of bounded size.

    One that formats its items itself is left as it is.
    """
    kind = dataset.features[image]
    plain = getattr(dataset, "format", {"type": None})["type"] is None if hasattr(dataset, "format") else True
    if type(kind).__name__ != "Image" or not plain or getattr(dataset, "_formatting", None) is not None:
        return dataset
    module = importlib.import_module("datasets")
    return dataset.select_columns(columns).cast_column(image, module.Image(decode=False))


def load_named(name: str) -> Any:
    """The data set that a name after :data:`PREFIX` stands for.

    Raises:
        DatasetError: the library is missing, there is no such data set or split, or it has several splits and none is named.
    """
    place, _, split = name.partition("@")
    try:
        module = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise DatasetError(f"{PREFIX}{name} needs the package datasets of Hugging Face: {install_hint('data')}") from None
    try:
        if any(os.path.isfile(os.path.join(place, file)) for file in FOLDER_FILES):
            found = module.load_from_disk(place)
        else:
            found = module.load_dataset(place)
    except Exception as error:  # the library has many errors
        raise DatasetError(f"{PREFIX}{name} cannot be loaded: {reason(error)}") from error
    if not isinstance(found, dict):
        if split:
            raise DatasetError(f"{PREFIX}{place} has no splits, so it has no split {split!r}")
        return found
    if split not in found and not (not split and len(found) == 1):
        raise DatasetError(f"{PREFIX}{place} has the splits {', '.join(map(str, found))}: add @SPLIT to its name")
    return found[split] if split else next(iter(found.values()))
