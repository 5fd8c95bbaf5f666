"""The lists of a large JSON file, element by element: memory holds one element and not the file."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torchprobe.common import limits
from torchprobe.common.reading import depth, open_regular, parse_json
from torchprobe.datasets.images import DatasetError

CHUNK = 1 << 20
_SPACE = " \t\n\r"


class Element(NamedTuple):
    """``key``: of the list. ``value``: the element. ``start``, ``size``: its bytes in the file, for :func:`read_element`."""

    key: str
    value: Any
    start: int
    size: int


def elements(path: str | os.PathLike[str], keys: Collection[str]) -> Iterator[Element]:
    """The elements of the lists ``keys`` of the object that a JSON file holds, in the order of the file; other keys are skipped.

    Raises:
        DatasetError: the file is missing, damaged or no JSON object; a list is none; one element is larger than 256 MiB.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.json")
    >>> _ = path.write_text('{"info": {}, "images": [{"id": 1}, {"id": 2}]}')
    >>> [element.value["id"] for element in elements(path, ["images"])]
    [1, 2]
    """
    try:
        with open_regular(path) as file:
            yield from _Parser(path, file).lists(keys)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror})") from error


def read_element(file: Any, start: int, size: int) -> Any:
    """The element at ``start``, from the file opened as bytes; see :class:`Element`."""
    file.seek(start)
    return parse_json(file.read(size))


class _Parser:
    """A window of text that moves through the file.

    ``at``: the next character of the window. ``offset``: the place in the file, in bytes, of the character ``counted``.
    """

    def __init__(self, path: str | os.PathLike[str], file: Any) -> None:
        self.path, self.file = path, file
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.counted, self.offset, self.ended = "", 0, 0, 0, False
        self.parse = json.JSONDecoder().raw_decode
        if self.file.read(3) == codecs.BOM_UTF8:
            self.offset = 3
        else:
            self.file.seek(0)

    def lists(self, keys: Collection[str]) -> Iterator[Element]:
        self.expect("{", "no JSON object")
        if self.peek() == "}":
            return
        while True:
            key = self.value()[0]
            if not isinstance(key, str):
                raise self.damaged("expected a key")
            self.expect(":", "expected : after a key")
            if key in keys:
                yield from self.elements(key)
            else:
                self.value()
            if not self.more("}"):
                return

    def elements(self, key: str) -> Iterator[Element]:
        self.expect("[", f"{key!r} is not a list")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield Element(key, *self.value())
            if not self.more("]"):
                return

    def more(self, end: str) -> bool:
        """Whether a comma follows, not the end of the list or object."""
        found = self.peek()
        if found not in (",", end):
            raise self.damaged(f"expected , or {end}")
        self.at += 1
        return found == ","

    def expect(self, character: str, otherwise: str) -> None:
        if self.peek() != character:
            raise self.damaged(otherwise)
        self.at += 1

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.at += 1
            if not self.read():
                return ""

    def value(self) -> tuple[Any, int, int]:
        """The next value, and its place in the file."""
        self.peek()
        start, want = self.place(), CHUNK
        while True:
            try:
                value, end = self.parse(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.damaged(error.msg) from None
            except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
                raise self.damaged(str(error)) from None
            else:
                if why := limits.problem("json_depth", depth(value)):
                    raise self.damaged(f"an element has {why}")
                if end < len(self.text) or self.ended:  # otherwise a number may go on
                    self.at = end
                    return value, start, self.place() - start
            if why := limits.problem("json_bytes", len(self.text) - self.at):
                raise self.damaged(f"an element has {why}")
            self.read(want)
            want *= 2  # so that a large element is not parsed too often

    def place(self) -> int:
        """The place in the file, in bytes, of the next character."""
        self.offset += len(self.text[self.counted : self.at].encode())
        self.counted = self.at
        return self.offset

    def read(self, size: int = CHUNK) -> bool:
        """Moves the window on; False at the end of the file."""
        if self.ended:
            return False
        if self.at:
            self.place()
            self.text, self.at, self.counted = self.text[self.at :], 0, 0
        data = self.file.read(size)
        self.ended = not data
        try:
            self.text += self.decode.decode(data, self.ended)
        except UnicodeDecodeError as error:
            raise self.damaged(f"not UTF-8: {error.reason}") from None
        return not self.ended

    def damaged(self, what: str) -> DatasetError:
        return DatasetError(f"{Path(self.path)} is damaged or not of this format: {what}, at byte {self.place():,}")
