"""Where bytes are kept: files of this machine, and addresses such as ``s3://bucket/000.tar`` by way of fsspec."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from torchprobe.common import limits
from torchprobe.common.facts import file_digests
from torchprobe.common.messages import counted, install_hint, reason
from torchprobe.common.reading import open_regular
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.pictures import FileError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PARTS = re.compile(r"\{([^{}]*)\}")
_PIECE = 1 << 22
MOST = 1 << 24
"""Files or shards of one pattern."""


def is_address(where: str) -> bool:
    """Whether it is an address such as ``s3://…`` or ``memory://…``, not a path.

    >>> is_address("s3://bucket/a.tar"), is_address("C:\\\\a.tar"), is_address("a/b.tar")
    (True, False, False)
    """
    return _SCHEME.match(where) is not None


def localized(where: str) -> str:
    """A path instead of ``file://…``; everything else as it is.

    >>> localized("file:///a/b.tar"), localized("s3://a/b.tar")
    ('/a/b.tar', 's3://a/b.tar')
    """
    if not where.lower().startswith("file://"):
        return where
    parts = urlsplit(where)
    if parts.netloc not in ("", "localhost"):
        raise DatasetError(f"{where} names another machine, {parts.netloc}; expected file:///path")
    return unquote(parts.path)


def expanded(pattern: str) -> list[str]:
    """The texts that braces stand for, as in a shell: ``{a,b}`` and ``{000..009}``.

    Raises:
        DatasetError: a brace that cannot be read, or more texts than the limit ``shards``.

    >>> expanded("{a,b}/{08..10}.tar")
    ['a/08.tar', 'a/09.tar', 'a/10.tar', 'b/08.tar', 'b/09.tar', 'b/10.tar']
    """
    found = [""]
    at = 0
    for match in _PARTS.finditer(pattern):
        choices = _choices(match[1], pattern)
        if why := limits.problem("shards", len(found) * len(choices)):
            raise DatasetError(f"{pattern} stands for {why}")
        found = [f"{before}{pattern[at : match.start()]}{choice}" for before in found for choice in choices]
        at = match.end()
    return [f"{before}{pattern[at:]}" for before in found]


def _choices(inside: str, pattern: str) -> list[str]:
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside, re.ASCII)
    if span is None:
        if "," not in inside:
            raise DatasetError(f"{pattern}: expected {{a,b}} or {{000..009}}, got {{{inside}}}")
        return inside.split(",")
    first, last = int(span[1]), int(span[2])
    if last < first:
        raise DatasetError(f"{pattern}: {{{inside}}} counts down")
    if why := limits.problem("shards", last - first + 1):
        raise DatasetError(f"{pattern} stands for {why}")
    padded = any(len(one) > 1 and one.startswith("0") for one in span.groups())
    width = max(map(len, span.groups())) if padded else 0
    return [f"{number:0{width}}" for number in range(first, last + 1)]


def matching(pattern: str) -> list[str]:
    """The files or addresses that a pattern with braces, ``*``, ``?`` and ``[]`` names, sorted within each text of the braces.

    Raises:
        DatasetError: nothing matches a pattern with ``*``, ``?`` or ``[]``; or as :func:`expanded`.
    """
    found = []
    for one in expanded(localized(pattern)):
        if not any(sign in one for sign in "*?["):
            found.append(one)
            continue
        here = _glob(one)
        if not here:
            raise DatasetError(f"nothing matches {one}")
        found += here
    if len(set(found)) < len(found):
        twice = next(one for one in found if found.count(one) > 1)
        raise DatasetError(f"{pattern} names {twice} more than once, and each image is read once")
    return found


def _glob(pattern: str) -> list[str]:
    if not is_address(pattern):
        import glob

        return sorted(one for one in glob.glob(pattern, recursive=True) if os.path.isfile(one))
    system, path = _system(pattern)
    try:
        return sorted(system.unstrip_protocol(one) for one in system.glob(path))
    except Exception as error:  # each file system has errors of its own
        raise DatasetError(f"{pattern} cannot be listed: {reason(error)}") from error


def listing_of(folder: str) -> Iterator[tuple[str, str, int | None]]:
    """All files below a folder of a store, sorted: the address of each, its name in the folder, and its bytes, if they are known.

    Raises:
        DatasetError: it cannot be listed, or has more files than the limit ``files``.
    """
    system, path = _system(folder)
    try:
        found = system.find(path, detail=True)
    except Exception as error:  # each file system has errors of its own
        raise DatasetError(f"{folder} cannot be listed: {reason(error)}") from error
    if why := limits.problem("files", len(found)):
        raise DatasetError(f"{folder} has {why}")
    start = f"{path.rstrip('/')}/"
    for name in sorted(found):
        size = found[name].get("size")
        yield system.unstrip_protocol(name), name.removeprefix(start), size if isinstance(size, int) and size >= 0 else None


def opened_store(where: str) -> tuple[BinaryIO, int | None]:
    """A file to read from its start, and its bytes if it can seek at no cost.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_address(where):
        file = open_regular(where)
        return file, os.fstat(file.fileno()).st_size
    system, path = _system(where)
    return cast(BinaryIO, system.open(path, "rb")), None


def read_start(where: str, most: int) -> bytes:
    """The first bytes of a file: all, or ``most``. Some stores give fewer at a time than are asked for.

    Raises:
        OSError: they cannot be read. Each store has further errors of its own.
    """
    parts, left = [], most
    with opened_store(where)[0] as file:
        while left > 0 and (part := file.read(min(left, _PIECE))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def whole(where: str) -> bytes:
    """The bytes of a picture whose size is unknown.

    Raises:
        FileError: more than the limit ``picture_bytes``.
        OSError: see :func:`read_start`.
    """
    data = read_start(where, limits.value("picture_bytes") + 1)
    if problem := limits.problem("picture_bytes", len(data)):
        raise FileError(f"the file has {problem}")
    return data


def read_range(where: str, start: int, end: int) -> bytes:
    """The bytes from ``start`` to ``end``.

    Raises:
        OSError: they cannot be read, or there are not so many.
    """
    if is_address(where):
        system, path = _system(where)
        data = bytes(system.cat_file(path, start=start, end=end))
    else:
        with open_regular(where) as file:
            file.seek(start)
            data = file.read(end - start)
    if len(data) != end - start:
        why = "it has changed" if len(data) < end - start else "its server does not give parts of files"
        raise OSError(f"{where} gave {len(data):,} bytes instead of {counted(end - start, 'byte')}: {why}")
    return data


def digests(places: list[str]) -> list[str | None]:
    """SHA-256 of the whole content of each file, in hexadecimal; None for what cannot be read."""
    here = [place for place in places if not is_address(place)]
    known = dict(zip(here, file_digests([Path(one) for one in here]), strict=True))
    return [known[place] if place in known else _digest(place) for place in places]


def _digest(where: str) -> str | None:
    found = hashlib.sha256()
    try:
        file, _ = opened_store(where)
        with file:
            while piece := file.read(_PIECE):
                found.update(piece)
    except Exception:  # each file system has errors of its own
        return None
    return found.hexdigest()


@functools.lru_cache(maxsize=256)
def _of_scheme(scheme: str, place: str) -> Any:
    try:
        fsspec = importlib.import_module("fsspec.core")
    except ModuleNotFoundError:
        raise DatasetError(f"{scheme}:// needs the package fsspec: {install_hint('data')}") from None
    try:
        return fsspec.url_to_fs(f"{scheme}://{place}")[0]
    except ImportError as error:  # such as s3fs, which it names
        raise DatasetError(f"{scheme}:// needs another package: {error}") from None
    except Exception as error:
        raise DatasetError(f"{scheme}://{place} cannot be used: {reason(error)}") from error


def _system(where: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    inside, chained, archive = where.partition("::")  # zip://a.png::s3://bucket/a.zip is a file in an archive
    scheme, _, rest = inside.partition("://")
    system = _of_scheme(scheme.lower(), f"::{archive}" if chained else rest.partition("/")[0])
    return system, str(system._strip_protocol(inside))
