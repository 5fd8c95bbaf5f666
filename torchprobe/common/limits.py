"""How much is read: one table of limits, checked before memory is taken.

Files are not trusted, and a small one may ask for more memory than a machine has. Each limit is far above what honest files need. The
environment variable ``TORCHPROBE_LIMITS`` changes them for a process, :func:`changed` for a block of code::

    TORCHPROBE_LIMITS=picture_pixels=200000000,table_rows=50000000 torchprobe scan …

>>> from torchprobe.common import limits
>>> with limits.changed(picture_pixels=200_000_000):
...     limits.value("picture_pixels")
200000000
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

VARIABLE = "TORCHPROBE_LIMITS"
"""The environment variable: ``name=number,name=number``."""


@dataclass(frozen=True)
class Limit:
    """``default``: the largest number that is accepted. ``unit`` and ``of``: what it counts, of what."""

    default: int
    unit: str
    of: str


LIMITS: Mapping[str, Limit] = {
    "picture_side": Limit(1 << 14, "pixels", "the longer side of a picture or a label map"),
    "picture_pixels": Limit(1 << 26, "pixels", "a picture or a label map"),
    "picture_bytes": Limit(1 << 28, "bytes", "the file of a picture or a label map"),
    "row_pixels": Limit(1 << 26, "pixels", "all label maps of one image together"),
    "files": Limit(1 << 24, "files", "a folder of images and its subfolders"),
    "shards": Limit(1 << 20, "shards", "a set of images in shards"),
    "members": Limit(1 << 24, "members", "a shard"),
    "member_name": Limit(1 << 12, "bytes", "the name of a member of a shard, or another of its extended headers"),
    "label_bytes": Limit(1 << 20, "bytes", "a member of a shard that holds a label"),
    "table_bytes": Limit(1 << 28, "bytes", "a table in CSV"),
    "table_rows": Limit(10_000_000, "lines", "a table in CSV"),
    "table_cell": Limit(1 << 17, "characters", "a cell of a table in CSV"),
    "text_bytes": Limit(1 << 24, "bytes", "a list of names or concepts"),
    "text_line": Limit(1 << 20, "characters", "a line in a file of texts"),
    "json_bytes": Limit(1 << 28, "bytes", "a JSON file, an element of a larger one, or the footer of a Parquet file"),
    "json_depth": Limit(64, "levels", "lists and objects of JSON or TOML inside one another"),
    "toml_bytes": Limit(1 << 20, "bytes", "a TOML file"),
    "suite_rows": Limit(10_000, "encoders", "a suite"),
    "arrays": Limit(10_000, "arrays", "a file of arrays"),
    "array_bytes": Limit(1 << 32, "bytes", "an array that is unpacked into memory; one that is mapped from its file has no limit"),
    "array_ratio": Limit(100, "times the file", "an array above 64 MiB that is unpacked into memory"),
    "checkpoint_bytes": Limit(1 << 36, "bytes", "a file of weights"),
    "checkpoint_ratio": Limit(8, "times the file", "the tensors of a file of weights above 64 MiB, which may share memory"),
    "head_numbers": Limit(1 << 30, "numbers", "the weight of a head"),
}
"""By name."""

_changes: dict[str, int] = {}
_lock = threading.Lock()


class LimitError(ValueError):
    """Something is larger than its limit. The message says what, the limit, and how to raise it."""


def value(name: str) -> int:
    """The limit that holds now.

    Raises:
        KeyError: no limit has this name.
        ValueError: the environment variable cannot be read.
    """
    if name in _changes:
        return _changes[name]
    return _of_environment(os.environ.get(VARIABLE, "")).get(name, LIMITS[name].default)


def problem(name: str, found: int) -> str | None:
    """What is wrong with a number, for an error of the caller; None if it is within the limit.

    >>> problem("json_depth", 5), problem("json_depth", 70)
    (None, 'more than 64 levels (70): make it smaller, or raise the limit with TORCHPROBE_LIMITS=json_depth=70')
    """
    if found <= (most := value(name)):
        return None
    unit = LIMITS[name].unit
    return f"more than {most:,} {unit} ({found:,}): make it smaller, or raise the limit with {VARIABLE}={name}={found}"


def check(name: str, found: int, where: str) -> None:
    """Refuses what is larger than its limit; ``where``: what it is, at the beginning of the message.

    Raises:
        LimitError: it is larger.

    >>> check("table_rows", 20_000_000, "a.csv")
    Traceback (most recent call last):
    torchprobe.common.limits.LimitError: a.csv has more than 10,000,000 lines (20,000,000): make it smaller, or raise the limit with \
TORCHPROBE_LIMITS=table_rows=20000000
    """
    if (why := problem(name, found)) is not None:
        raise LimitError(f"{where} has {why}")


@contextlib.contextmanager
def changed(**limits: int) -> Iterator[None]:
    """Other limits within a block, in all threads of the process.

    Raises:
        ValueError: no limit has this name, or one is below 1.
    """
    for name, most in limits.items():
        _require(name, most)
    with _lock:
        before = dict(_changes)
        _changes.update(limits)
    try:
        yield
    finally:
        with _lock:
            for name in limits:
                _changes.pop(name, None)
                if name in before:
                    _changes[name] = before[name]


def _of_environment(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        digits = number.strip().replace("_", "")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
            raise ValueError(f"{VARIABLE}: {part!r} is not NAME=NUMBER")
        _require(name.strip(), int(digits))
        found[name.strip()] = int(digits)
    return found


def _require(name: str, most: int) -> None:
    if name not in LIMITS:
        raise ValueError(f"there is no limit {name!r}; there are {', '.join(LIMITS)}")
    if most < 1:
        raise ValueError(f"the limit {name} must be at least 1, got {most}")
