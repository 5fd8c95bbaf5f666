"""Plain values in JSON files with a checksum: a changed byte is an error, not another value."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from torchprobe.common.files import replacing, to_json
from torchprobe.common.limits import LimitError
from torchprobe.common.reading import read_json

CHECKSUM = "checksum"
"""The key of the checksum, beside those of the value."""

_DIGEST = re.compile("[0-9a-f]{64}")


class DamagedError(ValueError):
    """A file is not as it was written. The message names the file."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as plain JSON values, with its checksum: SHA-256 of the other keys and values.

    >>> unsealed(sealed({"a": [1, None]}), "a.json")
    {'a': [1, None]}
    """
    plain = json.loads(to_json({key: item for key, item in value.items() if key != CHECKSUM}))
    return {**plain, CHECKSUM: _sum(plain)}


def unsealed(plain: object, where: str, required: bool = True) -> dict[str, Any]:
    """The value of :func:`sealed`, without its checksum.

    Args:
        plain: from JSON.
        where: the name of the file, for messages.
        required: refuse a value without a checksum; earlier versions wrote some.

    Raises:
        DamagedError: it is not a JSON object, it has no checksum, or another one.

    >>> unsealed({**sealed({"a": 1}), "a": 2}, "a.json")
    Traceback (most recent call last):
    torchprobe.common.checked.DamagedError: a.json is damaged: its checksum does not fit its content
    """
    if not isinstance(plain, dict):
        raise DamagedError(f"{where} is damaged: expected a JSON object, got {type(plain).__name__}")
    value = {key: item for key, item in plain.items() if key != CHECKSUM}
    if CHECKSUM not in plain:
        last = next(reversed(value.values()), None)  # where the checksum stands: its name may be what was damaged
        if required or (isinstance(last, str) and _DIGEST.fullmatch(last)):
            raise DamagedError(f"{where} is damaged: it has no checksum")
        return value
    if plain[CHECKSUM] != _sum(value):
        raise DamagedError(f"{where} is damaged: its checksum does not fit its content")
    return value


def write_checked(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum, as a whole or not at all.

    Raises:
        OSError: the file cannot be written.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/a.json"
    >>> write_checked(path, {"steps": 3})
    >>> read_checked(path)
    {'steps': 3}
    """
    with replacing(path) as temporary:
        temporary.write_text(to_json(sealed(value)), encoding="utf-8")


def read_checked(path: str | os.PathLike[str], required: bool = True) -> dict[str, Any]:
    """Reads a file of :func:`write_checked`.

    Args:
        path: of the file.
        required: refuse a file without a checksum.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it is not a regular file.
        DamagedError: the file is damaged.
        LimitError: it is too large or too deep.
    """
    try:
        plain = read_json(path)
    except LimitError:
        raise
    except ValueError as error:
        raise DamagedError(str(error)) from error
    return unsealed(plain, os.fspath(path), required)


def _sum(value: Mapping[str, Any]) -> str:
    """A checksum of plain values. The order of keys counts, because tables are written in that order."""
    try:
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    except RecursionError:
        raise DamagedError("the value is nested too deeply") from None
    return hashlib.sha256(text.encode()).hexdigest()
