"""Reading files that others wrote: only regular ones, of bounded size, and values of bounded depth.

A name may belong to a pipe, on which opening alone would wait forever, or to a device without an end. Such files are refused.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterable
from typing import Any, BinaryIO

from torchprobe.common import limits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PART = r'(?:[\w-]+|"[^"\n]*"|\'[^\'\n]*\')'
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*{_PART}(?:[ \t]*\.[ \t]*{_PART}){{16,}}[ \t]*[=\]]", re.MULTILINE)
"""A key of TOML of more than 16 parts: the time of the parser grows with the square of their number."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, opened to read bytes. Links are followed.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it is a folder, a pipe, a socket or a device; or it cannot be opened.

    >>> open_regular(os.devnull)
    Traceback (most recent call last):
    OSError: [Errno 22] not a regular file: '/dev/null'
    """
    try:
        return _Bounded(io.FileIO(path, "rb", opener=_regular))
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None


class _Bounded(io.BufferedReader):
    """Python takes memory for as many bytes as a decoder asks for, and a damaged file may have it ask for 4 GB."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def _regular(path: str, flags: int) -> int:
    """A descriptor of a regular file. Once returned, the file object alone owns it: closed twice, it could be that of another file."""
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder, not a regular file" if stat.S_ISDIR(mode) else "not a regular file"
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, what, path)
    except BaseException:
        os.close(file)
        raise
    return file


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether this is a regular file. No file has a name that is too long, or one with a null character.

    >>> is_file("a" * 10_000)
    False
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | os.PathLike[str], limit: str) -> bytes:
    """A whole file, whose size has the limit of that name.

    Raises:
        OSError: as for :func:`open_regular`.
        LimitError: it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        limits.check(limit, size, os.fspath(path))
        return file.read(size)


def read_text(path: str | os.PathLike[str], limit: str, encoding: str = "utf-8") -> str:
    """A whole file of text.

    Raises:
        OSError: as for :func:`open_regular`.
        ValueError: it is larger than the limit, or not text in this encoding.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not text in UTF-8: {error.reason} at byte {error.start:,}") from None


def parse_json(text: str | bytes) -> Any:
    """A value of JSON, not nested too deeply.

    Raises:
        ValueError: it is not JSON, or nested too deeply.

    >>> parse_json("[" * 100_000)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchprobe.common.limits.LimitError: the JSON has more than 64 levels (100,000): make it smaller, ...
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    limits.check("json_depth", _levels(data), "the JSON")
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8: {error.reason} at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("it is nested more deeply than Python can read") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: as for :func:`open_regular`.
        ValueError: it is not JSON, too large or nested too deeply; the message names the file.
    """
    data = read_bytes(path, "json_bytes")
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        OSError: as for :func:`open_regular`.
        ValueError: it is not TOML, too large, nested too deeply, or has a key of more than 16 parts.
    """
    text = read_text(path, "toml_bytes")
    if (long := _LONG_KEY.search(text)) is not None:
        raise ValueError(f"line {text.count(chr(10), 0, long.end()) + 1}: a key of more than 16 parts")
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    limits.check("json_depth", depth(found), "it")
    return found


def depth(value: object) -> int:
    """How many lists and mappings are inside one another. It does not recurse.

    >>> depth({"a": [1, {"b": 2}]}), depth(1)
    (3, 0)
    """
    level, inside = 0, [value]
    while inside := [one for one in inside if isinstance(one, (list, dict))]:
        level += 1
        inside = [item for one in inside for item in _items(one)]
    return level


def _items(one: list[Any] | dict[Any, Any]) -> Iterable[Any]:
    return one.values() if isinstance(one, dict) else one


_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = bytes.maketrans(_BRACKETS, bytes([2, 0, 2, 0]))


def _levels(data: bytes) -> int:
    """The depth of JSON, before it is parsed."""
    if data.count(b"[") + data.count(b"{") <= limits.value("json_depth"):
        return 0
    level = most = 0
    for step in _TEXTS.sub(b"", data).translate(_STEPS, _OTHERS):
        level += step - 1
        if level > most:
            most = level
    return most
