"""From the values of a source to the values of the writer: which are labels, which mean nothing, and which nobody knows."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from torchprobe.common.reading import parse_json
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.pictures import IndexMap
from torchprobe.datasets.importers.planes import Plane
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.pictures import FileError, read_bytes

BACKGROUND = frozenset({"background", "unlabeled", "unlabelled", "none"})
VOID = frozenset({"ignore", "ignored", "void", "dontcare", "don't care"})
"""Names that are no concepts, without the underscores around them."""
VOID_VALUE = 255
VOID_REASON = "void in the source. The format has no void: they count as pixels without any label"

_WIDEST = 1 << 20
"""Values that a table of all values between the least and the greatest may have."""


class Values:
    """The labels of one category, by the values of the source.

    Args:
        names: value → name. The labels are numbered 1, 2, … in ascending order of the values.
        unlabeled: values that mean: none of the labels is here. Default: 0 if it has no name, and what is called "background".
        void: values that mean: nobody knows what is here. Default: 255 if it has no name, and what is called "void" or "ignore".

    The names of values that are unlabeled or void are left out. Different values of the same name become different labels, the later ones
    with the value in parentheses.

    Raises:
        DatasetError: no label is left, or a value is both unlabeled and void.

    >>> values = Values({0: "background", 7: "cat", 9: "dog"})
    >>> values.labels, values.numbers
    (['cat', 'dog'], {7: 1, 9: 2})
    """

    def __init__(self, names: Mapping[int, str], unlabeled: Collection[int] | None = None, void: Collection[int] | None = None) -> None:
        called = {value: name.strip().strip("_").casefold() for value, name in names.items()}
        if void is None:
            void = {value for value, name in called.items() if name in VOID} | ({VOID_VALUE} - {*names})
            void -= set(unlabeled or ())
        if unlabeled is None:
            unlabeled = ({value for value, name in called.items() if name in BACKGROUND} | ({0} - {*names})) - set(void)
        self.unlabeled, self.void = frozenset(unlabeled), frozenset(void)
        if both := sorted(self.unlabeled & self.void):
            raise DatasetError(f"value {both[0]} cannot be unlabeled and void at once")
        self.names = dict(names)
        kept = {value: names[value] for value in sorted(names) if value not in self.unlabeled | self.void}
        if not kept:
            raise DatasetError("no label has a name: every value is unlabeled or void")
        self.renamed = different(kept)
        self.labels = list(self.renamed.values())
        self.numbers = {value: number for number, value in enumerate(kept, 1)}

    def tell(self, report: ImportReport) -> None:
        """Says which names became no labels, and which labels got another name."""
        for value, name in self.names.items():
            if value in self.unlabeled | self.void:
                meaning = "unlabeled" if value in self.unlabeled else "void"
                report.drop("labels", f"the name of a value that is {meaning}", f"{name} ({value})")
        report_renamed(report, self.names, self.renamed)

    def plane(self, source: IndexMap, image: str, report: ImportReport) -> Plane:
        """A label map with the numbers of the labels, uint16, 0 elsewhere. Void and unknown values are counted in ``report``."""
        low, high = int(source.min()), int(source.max())
        if high - low < _WIDEST:
            flat = (source - low).ravel()
            counts = np.bincount(flat)
            found = counts.nonzero()[0]
            table = np.zeros(high - low + 1, np.uint16)
            table[found] = self._numbers((found + low).tolist(), counts[found].tolist(), image, report)
            plane: Plane = table[flat].reshape(source.shape)
            return plane
        values, where, each = np.unique(source, return_inverse=True, return_counts=True)
        plane = np.array(self._numbers(values.tolist(), each.tolist(), image, report), np.uint16)[where].reshape(source.shape)
        return plane

    def _numbers(self, values: list[int], counts: list[int], image: str, report: ImportReport) -> list[int]:
        for value, count in zip(values, counts, strict=True):
            if value in self.void:
                report.change("pixels", VOID_REASON, f"value {value}", count)
            elif value not in self.numbers and value not in self.unlabeled:
                report.drop("pixels", "a value without a name; they count as unlabeled", f"value {value} in {image}", count)
        return [self.numbers.get(value, 0) for value in values]


def different(names: Mapping[Any, str]) -> dict[Any, str]:
    """The same names, where a name that was used before gets its key in parentheses, so that different things stay apart.

    >>> different({3: "mouse", 74: "mouse"})
    {3: 'mouse', 74: 'mouse (74)'}
    """
    result: dict[Any, str] = {}
    for key, name in names.items():
        key_shown = "".join(character if character.isprintable() else "_" for character in str(key))
        free, count = name, 1
        while free in result.values():
            free, count = (f"{name} ({key_shown})" if count == 1 else f"{name} ({key_shown}, {count})"), count + 1
        result[key] = free
    return result


def report_renamed(report: ImportReport, names: Mapping[Any, str], renamed: Mapping[Any, str]) -> None:
    """Says which labels got another name by :func:`different`."""
    for key, name in renamed.items():
        if names[key] != name:
            report.change("labels", "the same name as another label; kept apart", name)


def read_names(source: str | os.PathLike[str] | Mapping[Any, Any] | Sequence[str], first_value: int | None = None) -> dict[int, str]:
    """Names by value.

    Args:
        source: {value: name}; a list of names; or a file: JSON with an object or a list, such as id2label.json, or text with a value and a
            name in each line, or with a name in each line.
        first_value: the value of the first name of a list, which nothing else says: 0 if the background is in the list, as a rule.

    Raises:
        DatasetError: the file is missing or damaged; a value is not a whole number, or is there twice; a list without ``first_value``, or
            with an empty line between its names.

    >>> read_names({"1": "cat", "4": "dog"}), read_names(["background", "cat"], first_value=0)
    ({1: 'cat', 4: 'dog'}, {0: 'background', 1: 'cat'})
    """
    where = "names"
    if isinstance(source, (str, os.PathLike)):
        where = str(source)
        source = _parse(where)
    assert not isinstance(source, os.PathLike)
    if isinstance(source, Mapping):
        pairs = list(source.items())
    else:
        if first_value is None:
            what = "does not say which values its names have; give the value of the first one"
            raise DatasetError(f"{where}: a list of names {what} (first_value, on the command line --first-value): 0 or 1")
        pairs = list(enumerate(source, first_value))
    names: dict[int, str] = {}
    for value, name in pairs:
        if not re.fullmatch(r"-?[0-9]{1,9}", str(value)):
            raise DatasetError(f"{where}: {value!r} is not a value of a mask; expected a whole number")
        if int(value) in names:
            raise DatasetError(f"{where}: value {value} is there twice")
        names[int(value)] = label_name(name, where)
    return names


def label_name(name: Any, where: str) -> str:
    """The name of a label, without spaces around it.

    Raises:
        DatasetError: it is not text, empty, or has characters that cannot be printed.
    """
    if not isinstance(name, str) or not name.strip() or not name.strip().isprintable():
        raise DatasetError(f"{where}: {name!r:.100} cannot be the name of a label")
    return name.strip()


def _parse(path: str) -> Any:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (FileError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}; expected a file with the names of the labels") from None
    if text.lstrip().startswith(("{", "[")):
        try:
            return parse_json(text)
        except ValueError as error:
            raise DatasetError(f"{path} is not valid JSON: {error}") from None
    every = [line.strip() for line in text.rstrip().splitlines()]
    lines = [line for line in every if line]
    matches = [re.fullmatch(r"(-?[0-9]{1,9})(?:\s*[,:;=\t]\s*|\s+)(.+)", line) for line in lines]
    if lines and all(matches):
        pairs = [(match[1], match[2]) for match in matches if match]
        if len({value for value, _ in pairs}) < len(pairs):
            raise DatasetError(f"{path}: a value is there twice")
        return dict(pairs)
    if any(matches):
        at = next(number for number, match in enumerate(matches) if not match)
        raise DatasetError(f"{path}: {lines[at]!r:.100} has no value in front, other lines do")
    if "" in every:  # leaving it out would move all later names to other values
        raise DatasetError(f"{path}: line {every.index('') + 1} is empty, and the line of a name is its value: write values in front")
    return lines


def identifier(value: Any, what: str) -> Hashable:
    """An id of a JSON file.

    Raises:
        Unusable: it is neither a number nor a text.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is int or isinstance(value, str):
        return value
    raise Unusable(f"no valid {what}", f"{value!r:.50}")
