"""How many numbers the columns of a Parquet file hold, from its footer.

pyarrow ends the process when it is asked for the statistics of a column whose sizes contradict its schema, so the counts are read here. The
footer is a struct in Thrift's compact protocol: github.com/apache/thrift, doc/specs/thrift-compact-protocol.md; apache/parquet-format.
"""

from __future__ import annotations

import os
from typing import Any

from torchprobe.common import limits
from torchprobe.common.reading import open_regular

_MAGIC, _DEEPEST = b"PAR1", 32
_ROW_GROUPS, _COLUMNS, _META_DATA, _PATH, _VALUES = 4, 1, 3, 3, 5
"""The numbers of the fields: of the file, of a row group, of a column chunk, and of its metadata."""


def values_of(path: str | os.PathLike[str]) -> dict[str, int]:
    """The number of values of each column at the top of the schema, over all row groups, as the footer says.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no footer, or one that is damaged or larger than the limit of JSON files.
    """
    footer = _footer(path)
    found: dict[str, int] = {}
    try:
        for group in _Reader(footer).struct(0).get(_ROW_GROUPS, []):
            for column in group[_COLUMNS]:
                about = column[_META_DATA]
                name = about[_PATH][0].decode("utf-8", "surrogateescape")
                found[name] = found.get(name, 0) + max(0, about[_VALUES])
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)}: its footer is damaged ({type(error).__name__})") from None
    return found


def _footer(path: str | os.PathLike[str]) -> bytes:
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if len(end) < 8 or end[4:] != _MAGIC or length > size - 8:
            raise ValueError(f"{os.fspath(path)} is no Parquet file: it has no footer")
        limits.check("json_bytes", length, f"the footer of {os.fspath(path)}")
        file.seek(size - 8 - length)
        return file.read(length)


class _Reader:
    """Structs become mappings from the number of a field to its value, lists and sets lists."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while shift < 70:
            part = self.byte()
            value |= (part & 127) << shift
            if part < 128:
                return value
            shift += 7
        raise IndexError("a number without an end")

    def whole(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise IndexError("beyond the end")
        self.at += count
        return self.data[self.at - count : self.at]

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise IndexError("too deep")
        found: dict[int, Any] = {}
        number = 0
        while (head := self.byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self.whole()
            kind = head & 15
            found[number] = kind == 1 if kind in (1, 2) else self.value(kind, depth + 1)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # a truth value in a list, or a byte
            return self.byte()
        if kind in (4, 5, 6):
            return self.whole()
        if kind == 7:
            return self.take(8)
        if kind == 8:
            return self.take(self.varint())
        if kind in (9, 10):
            head = self.byte()
            return self.several(head >> 4 if head >> 4 < 15 else self.varint(), (head & 15,), depth)
        if kind == 11:
            size = self.varint()
            kinds = self.byte() if size else 0
            return self.several(size, (kinds >> 4, kinds & 15), depth)
        if kind == 12:
            return self.struct(depth)
        raise IndexError(f"no type {kind}")

    def several(self, size: int, kinds: tuple[int, ...], depth: int) -> list[Any]:
        if size > len(self.data) - self.at or depth > _DEEPEST:  # an element takes a byte at least
            raise IndexError("beyond the end")
        return [self.value(kind, depth + 1) for _ in range(size) for kind in kinds]
