"""Output folders: everything in one belongs to one run, which has it alone.

A run keeps a hidden folder ``.torchprobe`` in its output folder: ``run.json`` says which command made the folder, of what, and whether it
ended; ``files`` lists every file that the run wrote, one a line, as JSON text, before it is written; ``lock`` is there while it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from torchprobe.common.checked import DamagedError, read_checked, write_checked
from torchprobe.common.files import naming, remove_leftovers, watching
from torchprobe.common.locks import InUseError, locked
from torchprobe.common.ranks import Ranks
from torchprobe.common.reading import parse_json
from torchprobe.common.version import VERSION

HIDDEN = ".torchprobe"
"""The folder of the record, in every output folder."""

_MADE_BEFORE = ("results.json", "summary.json", "comparison.json", "index.html", "checkpoint", "stages")
"""What earlier versions wrote into an output folder, without a record."""

_MOST_FILES = 1 << 26  # bytes of the list


class OtherRunError(ValueError):
    """A folder holds the results of another run. The message says which, and what to do."""


@dataclass
class _Run:
    """A run of this process.

    Attributes:
        folder: of its output.
        begin: called before the first file is written.
        noted: the names of the files that are in the list.
        thread: that runs it.
        list: the open list; None before the first file is written.
        lock: threads may write files of one run.
    """

    folder: Path
    begin: Callable[[], object]
    noted: set[str] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)
    list: IO[bytes] | None = None
    lock: Any = field(default_factory=threading.RLock)  # the record is itself a file that is noted

    def note(self, path: Path) -> None:
        """Adds a file to the list before it is written."""
        with self.lock:
            self._note(path)

    def _note(self, path: Path) -> None:
        path = path.parent.resolve() / path.name
        if not path.is_relative_to(self.folder) or path.is_relative_to(self.folder / HIDDEN):
            return
        name = path.relative_to(self.folder).as_posix()
        if self.list is None:
            self.begin()
            path.parent.mkdir(parents=True, exist_ok=True)  # it was perhaps removed, being empty
            self.list = open(self.folder / HIDDEN / "files", "ab+")  # noqa: SIM115
            _end_line(self.list)
            self.noted = {*listed(self.folder)}
        if name not in self.noted:
            self.noted.add(name)
            self.list.write(json.dumps(name).encode() + b"\n")
            self.list.flush()

    def sync(self) -> None:
        """Brings the list to the disk."""
        if self.list is not None:
            os.fsync(self.list.fileno())

    def close(self) -> None:
        if self.list is not None:
            self.list.close()


def _end_line(file: IO[bytes]) -> None:
    """Ends a line that was being written when a run was killed, so that what follows is not taken for its rest."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


_running: dict[Path, _Run] = {}


@contextlib.contextmanager
def output_folder(
    folder: str | os.PathLike[str],
    command: str,
    *,
    of: str = "",
    resume: bool | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    ranks: Ranks | None = None,
) -> Iterator[Path]:
    """Within the block, the folder is that of one run. It is made if needed, locked, and every file that is written is noted.

    A folder of another run is refused. A run that ends before it wrote a file leaves nothing. A block within the block of the
    same folder, of the same process, joins it.

    Args:
        folder: of the results.
        command: that makes them, such as "interpret".
        of: what they are of, for messages.
        resume: whether to continue the run in the folder; None: the command cannot. Its unfinished runs are then replaced.
        overwrite: remove the files of the run that is there, whatever command it is of, and nothing else. If the command cannot resume
            them, they are removed when the first file is written, so that an error before leaves them.
        inputs: files and folders that the run reads. If the folder holds one, it is not overwritten.
        ranks: the processes that share the run, entered; the first has the lock.

    Raises:
        OtherRunError: the folder holds another run.
        InUseError: another process is writing to it.
        OSError: the folder cannot be made, or not be written to.

    >>> import tempfile
    >>> from torchprobe.common.files import replacing
    >>> out = Path(tempfile.mkdtemp(), "out")
    >>> def run(text, **options):
    ...     with output_folder(out, "scan", **options), replacing(out / f"{text}.txt") as temporary:
    ...         _ = temporary.write_text(text)
    >>> run("first")
    >>> run("second", overwrite=True)
    >>> [path.name for path in out.iterdir() if path.suffix]
    ['second.txt']
    """
    given, folder = Path(folder), Path(folder).absolute()  # the working folder may change within the block
    if (running := _running.get(folder.resolve())) is not None:
        if running.thread != threading.get_ident():
            raise InUseError(f"{folder} is in use by another thread of this process: choose another folder")
        yield given
        return
    first, existed = ranks is None or ranks.first, folder.is_dir()
    with contextlib.ExitStack() as stack:
        later = False

        def take() -> bool:
            if overwrite and folder.is_dir():
                _refuse_inputs(folder, inputs)
            return _take(stack, folder, command, resume, overwrite)

        def begin() -> None:
            if first:
                if later:
                    _remove(folder)
                _record(folder, command, of, finished=False)

        later = take() if ranks is None else ranks.on_first(take)
        run = _Run(folder.resolve(), begin)
        _running[run.folder] = run
        stack.callback(_running.pop, run.folder, None)
        stack.callback(run.close)
        stack.enter_context(watching(run.note))
        try:
            yield given
            if first and run.noted:
                run.sync()  # before the record says that it is whole
                _record(folder, command, of, finished=True)
        finally:
            if first and not listed(folder):
                shutil.rmtree(folder / HIDDEN, ignore_errors=True)
                if not existed:
                    _remove_empty(folder)


def _take(stack: contextlib.ExitStack, folder: Path, command: str, resume: bool | None, overwrite: bool) -> bool:
    """Locks a folder, and clears it or finds that it may be used. True: it is to be cleared when the first file is written."""
    with naming(folder):
        (folder / HIDDEN).mkdir(parents=True, exist_ok=True)
    stack.callback(_remove_empty, folder / HIDDEN)  # it stays if there is a record
    stack.enter_context(locked(folder / HIDDEN / "lock", os.fspath(folder)))
    later = False
    known = record(folder)
    finished = known is not None and known["finished"]
    if known is not None and (overwrite or (resume is None and not finished and known["command"] == command)):
        later = resume is None
        if not later:
            _remove(folder)
    elif known is not None and not listed(folder):
        pass  # it had begun, and was killed before it wrote anything
    elif known is not None and not (resume and known["command"] == command):
        raise OtherRunError(_occupied(folder, known, command, resume))
    elif known is None and not resume and (names := [name for name in _MADE_BEFORE if (folder / name).exists()]):
        raise OtherRunError(
            f"{folder} holds {names[0]} of a run without a list of its files, as earlier versions left them: choose another folder "
            "(--out), or delete this one"
        )
    for inside in {folder, *((folder / name).parent for name in listed(folder))}:
        remove_leftovers(inside, alone=True)
    return later


def _refuse_inputs(folder: Path, inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    for one in inputs:
        if one is not None and Path(one).exists() and Path(one).resolve().is_relative_to(folder.resolve()):
            raise OtherRunError(f"{folder} is not overwritten, because this run reads {one}: choose another folder (--out)")


def _occupied(folder: Path, known: dict[str, Any], command: str, resume: bool | None) -> str:
    what = f"{known['command']}{' of ' + known['of'] if known['of'] else ''}"
    state = "the results" if known["finished"] else "an unfinished run"
    same = known["command"] == command
    go_on = "continue it with --resume (resume=True), " if same and resume is not None else ""
    return (
        f"{folder} holds {state} of torchprobe {what}, from {known['started']}: {go_on}replace it with --overwrite (overwrite=True), or "
        "choose another folder (--out)"
    )


def record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What run a folder is of: ``command``, ``of``, ``started``, ``finished``, ``torchprobe``; None if it has no record.

    Raises:
        DamagedError: the record is damaged.
    """
    path = Path(folder) / HIDDEN / "run.json"
    try:
        found = read_checked(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    kinds = {"command": str, "of": str, "started": str, "finished": bool, "torchprobe": str}
    if not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise DamagedError(f"{path} is damaged: expected {', '.join(kinds)}")
    return found


def _record(folder: Path, command: str, of: str, finished: bool) -> None:
    known = record(folder) or {}
    started = known.get("started", time.strftime("%Y-%m-%d %H:%M"))
    write_checked(
        folder / HIDDEN / "run.json",
        {"command": command, "of": of or known.get("of", ""), "started": started, "finished": finished, "torchprobe": VERSION},
    )


def listed(folder: str | os.PathLike[str]) -> list[str]:
    """The files that the run of a folder wrote and that are still there, relative to the folder. Names that point
    elsewhere are left out."""
    path = Path(folder) / HIDDEN / "files"
    if not path.is_file() or path.stat().st_size > _MOST_FILES:
        return []
    found = dict[str, None]()
    for line in path.read_bytes().split(b"\n"):
        try:
            name = parse_json(line)
        except ValueError:  # the last line may be incomplete
            continue
        if isinstance(name, str) and _inside(Path(folder), name):
            found[name] = None
    return [*found]


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is of an existing file in the folder, not behind a link to another folder."""
    pure = PurePosixPath(name)
    if "\0" in name or pure.is_absolute() or ".." in pure.parts or not pure.parts or HIDDEN in pure.parts[:1]:
        return False
    path = folder / name
    try:
        return path.parent.resolve().is_relative_to(folder.resolve()) and (path.is_symlink() or path.is_file())
    except (OSError, ValueError):  # no file can have such a name
        return False


def _remove(folder: Path) -> None:
    """Removes the files of the run in a folder, and of runs within it, and folders that are then empty."""
    names = listed(folder)
    parents = {parent for name in names for parent in (folder / name).parents if parent != folder and parent.is_relative_to(folder)}
    for parent in parents:
        remove_leftovers(parent, alone=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        if (parent / HIDDEN).is_dir() and not listed(parent):  # of a run within this one, whose files are gone
            shutil.rmtree(parent / HIDDEN, ignore_errors=True)
        _remove_empty(parent)
    (folder / HIDDEN / "files").unlink(missing_ok=True)
    (folder / HIDDEN / "run.json").unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def file_name(text: str) -> str:
    """A name of a file or folder, without a suffix, that is valid on every system.

    >>> file_name("open_clip:ViT-B-32/laion2b"), file_name("..")
    ('open_clip_ViT-B-32_laion2b', 'output')
    """
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in text)
    return plain.strip(".")[:100] or "output"
