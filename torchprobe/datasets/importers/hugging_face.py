"""Segmentation data sets of the Hugging Face ``datasets`` library: rows with an image and a label map."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.conversion import Conversion, SetOptions
from torchprobe.datasets.importers.pictures import IndexMap, Picture, decoded, index_map
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import VOID_VALUE, Values, read_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMAGE_COLUMNS = ("image", "pixel_values", "img", "jpg")
LABEL_COLUMNS = ("label", "annotation", "labels", "mask", "segmentation", "segmentation_mask", "semantic_segmentation", "label_map")
"""Names of columns that are looked for."""
NAME_COLUMNS = ("file_name", "filename", "image_id", "id", "name")


def import_hugging_face(
    dataset: Any,
    out: str | os.PathLike[str],
    *,
    id2label: str | os.PathLike[str] | Mapping[Any, Any] | Sequence[str],
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    reduce_labels: bool = False,
    unlabeled: Collection[int] | None = None,
    void: Collection[int] | None = None,
    category: str = "object",
    **options: Unpack[SetOptions],
) -> ImportReport:
    """Writes a segmentation data set of the Hugging Face ``datasets`` library in the format of Broden.

    Args:
        dataset: a Dataset, a DatasetDict, a stream, the folder of ``save_to_disk`` (this needs the package ``datasets``), or any iterable
            of dicts. Images and masks are PIL images, arrays, paths, or dicts with "bytes" or "path". Files that a path names are copied;
            other images become PNG, without loss.
        out: the new data set.
        id2label: id → name: the mapping, its JSON file, or a list that begins with id 0.
        image_column, label_column: columns; default: the only one with a usual name.
        split: of a DatasetDict, such as ``"validation"``.
        reduce_labels: the masks hold id + 1, and 0 for what has no id, as in ADE20K (``do_reduce_labels`` of the processors): a mask value
            v is the id v − 1, and 0 is void.
        unlabeled, void: values of the masks, see :func:`~torchprobe.datasets.import_label_maps`.
        category: the category of the labels.
        options: see :class:`~torchprobe.datasets.importers.conversion.SetOptions`.

    Raises:
        DatasetError: no such split or column; the names cannot be used; ``out`` is not free; no image is left.
        ImportError: a folder is given, and the package ``datasets`` is not installed.

    >>> import tempfile, numpy as np
    >>> rows = [{"image": np.zeros((8, 8, 3), np.uint8), "label": np.full((8, 8), 7)}]
    >>> import_hugging_face(rows, Path(tempfile.mkdtemp(), "broden"), id2label={7: "cat"}).images
    1
    """
    inputs = (dataset,) if isinstance(dataset, (str, os.PathLike)) else ()
    with Conversion("hugging-face", out, inputs, **options) as conversion:
        report = conversion.report
        names = read_names(id2label, first_value=0)
        if reduce_labels:
            names = {value + 1: name for value, name in names.items()}
            unlabeled, void = unlabeled if unlabeled is not None else (), void if void is not None else (0, VOID_VALUE)
            if lost := names.pop(VOID_VALUE, None):
                report.drop("labels", "reduce_labels makes its value void", lost)
        values = Values(names, unlabeled, void)
        values.tell(report)
        rows = _rows(dataset, split)
        conversion.begin({category: values.labels})
        taken: set[str] = set()
        for index, row in _limited(rows, conversion):
            name = _name(row, index)
            if name in taken:
                name = f"{name}-{index}"
            taken.add(name)
            try:
                image = row[image_column or _column(row, IMAGE_COLUMNS, "image")]
                labels = row[label_column or _column(row, LABEL_COLUMNS, "label")]
                plane = values.plane(_map(labels), name, report)
                conversion.add(name, Picture(decoded(image)), {category: plane})
            except KeyError as error:
                raise DatasetError(f"no column {error}; there are {', '.join(map(str, row))}") from None
            except Unusable as error:
                report.drop("images", error.reason, f"{name}: {error.detail}" if error.detail else name)
    return conversion.report


def _rows(dataset: Any, split: str | None) -> Iterable[Mapping[str, Any]]:
    """The rows, of a split if there are several."""
    if isinstance(dataset, (str, os.PathLike)):
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise ImportError("this needs the package datasets of Hugging Face: pip install datasets") from error
        try:
            dataset = load_from_disk(os.fspath(dataset))
        except (FileNotFoundError, ValueError) as error:
            raise DatasetError(f"{dataset} is not a folder of save_to_disk: {error}") from None
    if isinstance(dataset, Mapping):
        if split not in dataset:
            given = "give a split" if split is None else f"no split {split!r}"
            raise DatasetError(f"{given}; there are {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    elif split is not None:
        raise DatasetError(f"the data set has no splits, so it has no split {split!r}")
    if not isinstance(dataset, Iterable) and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DatasetError(f"expected a data set or another list of rows, got {type(dataset).__name__}")
    rows: Iterable[Mapping[str, Any]] = dataset
    return rows


def _limited(rows: Any, conversion: Conversion) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows to import with their indices: chosen at random if they can be indexed, else the first."""
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        for index in conversion.each(range(len(rows))):
            yield index, rows[index]
        return
    for index, row in enumerate(itertools.islice(rows, conversion.limit)):
        yield index, row
        conversion.tell(index + 1, conversion.limit or 0)


def _column(row: Mapping[str, Any], known: Sequence[str], what: str) -> str:
    """The column of a usual name."""
    if not isinstance(row, Mapping):
        raise DatasetError(f"a row is a {type(row).__name__}; expected a dict with an image and a label map")
    found = [name for name in known if name in row]
    if len(found) != 1:
        several = f"{' and '.join(found)} may be it" if found else f"there are {', '.join(map(str, row))}"
        raise DatasetError(f"which column is the {what}? {several}; give {what}_column (--{what}-column)")
    return found[0]


def _name(row: Mapping[str, Any], index: int) -> str:
    """What a row calls itself, or its number."""
    for column in NAME_COLUMNS:
        value = row.get(column) if isinstance(row, Mapping) else None
        if type(value) is int or (isinstance(value, str) and value):
            return str(value)
    return f"{index:08}"


def _map(labels: Any) -> IndexMap:
    if isinstance(labels, Mapping):
        labels = labels["bytes"] if labels.get("bytes") is not None else labels.get("path")
    if isinstance(labels, (str, os.PathLike)):
        labels = Path(labels)
    return index_map(labels)
