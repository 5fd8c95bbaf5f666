"""Locks against other processes. The system frees the lock of a process that ends, so a killed process leaves none."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from torchprobe.common.reading import parse_json

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
_POLL = 0.1  # seconds


class InUseError(ValueError):
    """Another process, or another run of this process, writes to the same place. The message says who."""


@contextlib.contextmanager
def locked(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Within the block, no other process has the lock ``path``.

    Args:
        path: of the lock file, in an existing folder that can be written to. It holds who has the lock, and is removed at the end.
        what: is locked, for the message.
        wait: seconds to wait for another process.

    Raises:
        InUseError: another process has the lock.
        OSError: the lock file cannot be made.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with locked(folder / ".lock", "the folder"), locked(folder / ".lock", "the folder"):
    ...     pass  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchprobe.common.locks.InUseError: the folder is in use by process ... since ...: wait for it, or end it
    """
    end = time.monotonic() + wait
    while (file := _try(path)) is None:
        if time.monotonic() >= end:
            raise InUseError(f"{what} is in use by {_holder(path)}: wait for it, or end it")
        time.sleep(_POLL)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, and Windows does not remove open files
            path.unlink()
        file.close()


def _try(path: Path) -> IO[bytes] | None:
    """The open lock file; None if another process has it."""
    while True:
        file = _open(path)
        try:
            _lock(file)
        except OSError as error:
            file.close()
            if error.errno in _HELD:
                return None
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"the file system of {path.parent} has no locks: do not write there from two processes", stacklevel=4)
            file = _open(path)
        else:
            # Its holder may have removed the file since it was opened here: then another one has its name.
            with contextlib.suppress(FileNotFoundError):
                if os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    _write(file)
                    return file
            file.close()
            continue
        _write(file)
        return file


def _open(path: Path) -> IO[bytes]:
    """The lock file; a link in its place is an error, since what it names would be overwritten."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666), "r+b")


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 20)  # others can read what stands at the beginning
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write(file: IO[bytes]) -> None:
    """Who has the lock."""
    command = " ".join(Path(part).name if i == 0 else part for i, part in enumerate(sys.argv[:2]))
    holder = {"process": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        file.seek(0)
        file.truncate()
        file.write(json.dumps(holder).encode())
        file.flush()


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):  # it has just begun, or just ended
        holder = parse_json(path.read_bytes()[: 1 << 16])
        if isinstance(holder, dict) and type(holder.get("process")) is int:
            host, command, since = (holder.get(key) for key in ("host", "command", "since"))
            if all(isinstance(text, str) and text.isprintable() and len(text) < 1000 for text in (host, command, since)):
                return f"process {holder['process']}{'' if host == socket.gethostname() else f' on {host}'} ({command}) since {since}"
    return "another process"
