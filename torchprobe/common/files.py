"""Writing files: an interruption leaves no incomplete file, a power loss no empty one, and JSON is valid JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32] or "host"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9]+)-(?P<process>\d+)-\d+\.part|\.(?P<old>.+)\.(?P<older>\d+)\.part|\.tmp\w{6}")
"""Unfinished files; the last two are of earlier versions."""

_count = itertools.count()
_watchers: list[Callable[[Path], object]] = []
_watching = threading.Lock()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path next to ``path``. It replaces ``path`` when the block ends, and it is removed if the block raises.

    The content and the folder are on the disk (fsync) before and after the exchange, so that a power loss leaves the old or the new file.
    What a killed process left of the same file is removed.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full; the message names it.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    temporary = unfinished(path)
    with naming(path, temporary):
        _sweep(path)
        note(path)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask says; some writers create files that only their owner can read
            yield temporary
            temporary.chmod(mode)
            replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Puts a written file in the place of another. Both names are in one folder."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder to the disk, if the system can do so."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        with contextlib.suppress(OSError):  # nor do all network file systems sync them
            os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def naming(path: Path, *temporary: Path) -> Iterator[None]:
    """Within the block, an :class:`OSError` without a path, or with a temporary one, is raised again with ``path``.

    >>> with naming(Path("a.csv")):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'a.csv'
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) not in map(os.fspath, temporary):
            raise
        if error.errno is None:  # such as Pillow's
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path)) from error


def is_leftover(path: Path) -> bool:
    """Whether a file was being written by a process that is gone. Of a process on another host this is unknown, so it is False.

    >>> is_leftover(Path(".a.csv.elsewhere-12-0.part")), is_leftover(Path("a.csv"))
    (False, False)
    """
    found = _LEFTOVER.fullmatch(path.name)
    if found is None:
        return False
    process = found["process"] or found["older"]
    return process is None or (found["host"] in (None, _HOST) and not _alive(int(process)))


def remove_leftovers(folder: Path, alone: bool = False) -> None:
    """Removes the unfinished files and folders that killed processes left in a folder; not in its subfolders.

    Args:
        folder: of the files; it may be missing.
        alone: no other process writes there, so that unfinished files of every process are left ones.
    """
    if not folder.is_dir():
        return
    for path in [*folder.iterdir()]:
        if _LEFTOVER.fullmatch(path.name) and (alone or is_leftover(path)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """The name of an unfinished file or folder next to ``path``, which :func:`remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{next(_count)}.part")


def _sweep(path: Path) -> None:
    """Removes what killed processes left of one file."""
    start = f".{path.name}."
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(start) and entry.name.endswith(".part")]
        for one in left:
            if (found := _LEFTOVER.fullmatch(one.name)) and path.name in (found["name"], found["old"]) and is_leftover(one):
                one.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is of another user
        return True
    return True


# -- which files a run writes ---------------------------------------------------------------------------------------------


def note(path: Path) -> None:
    """Tells the watchers that ``path`` is about to be written. :func:`replacing` does so; other writers call it themselves."""
    for watcher in tuple(_watchers):
        watcher(path)


@contextlib.contextmanager
def watching(watcher: Callable[[Path], object]) -> Iterator[None]:
    """Within the block, ``watcher`` is called with the path of each file of this process that is about to be written."""
    with _watching:
        _watchers.append(watcher)
    try:
        yield
    finally:
        with _watching:
            _watchers.remove(watcher)


# -- JSON -----------------------------------------------------------------------------------------------------------------


def to_json(value: object) -> str:
    """JSON, with null in place of nan and inf, which JSON does not have.

    >>> to_json({"a": math.nan})
    '{\\n  "a": null\\n}'
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=True, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
