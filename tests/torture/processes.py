"""Processes that run a command, and what became of them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from processes import FORKS, free_port

from .commands import COMMANDS

PATIENCE = 120.0
"""Seconds after which a process that should have ended counts as one that hangs."""


@dataclass(frozen=True)
class Setting:
    """How a process runs. ``resume``: a run. ``most``: bytes of a file, as if the disk were full. ``ordinary``: root obeys permissions."""

    resume: bool = False
    most: int | None = None
    ordinary: bool = False


@dataclass
class Ended:
    """What became of a process: "ended", "raised" or "killed"; and the error."""

    how: str
    error: str = ""
    kind: str = ""
    bases: tuple[str, ...] = field(default=())

    @property
    def clear(self) -> bool:
        """Whether it ended with an error that a user can read."""
        documented = {"OSError", "ValueError", "RuntimeError", "KeyboardInterrupt"} & {*self.bases}
        return self.how == "raised" and bool(documented) and (bool(self.error) or self.kind == "KeyboardInterrupt")


def child(name: str, inputs: Path, out: Path, setting: Setting, rank: int, port: int, told: Connection) -> None:
    """The process: it says when it begins and how it ends."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(out.parent / "temporary")
    for number in (1, 2):
        os.dup2(os.open(out.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    command = COMMANDS[name]
    try:
        if command.ranks > 1:
            torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=command.ranks)
        if setting.most is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (setting.most, resource.RLIM_INFINITY))
        if setting.ordinary and os.geteuid() == 0:
            obey_permissions()
        told.send(("begins", "", "", ()))
        command.run(inputs, out, setting.resume)
        told.send(("ended", "", "", ()))
    except BaseException as error:
        with contextlib.suppress(OSError):  # the log, too, may be on the full disk
            traceback.print_exc()
        told.send(("raised", str(error)[:2000], type(error).__name__, tuple(kind.__name__ for kind in type(error).__mro__)))


def obey_permissions() -> None:
    """Takes from root what lets it write where permissions say no (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for i in range(3):
        sets[i] &= ~0b110
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


class Running:
    """A run of a command: one process, or several ranks."""

    def __init__(self, name: str, inputs: Path, out: Path, setting: Setting) -> None:
        (out.parent / "temporary").mkdir(exist_ok=True)
        self.name, self.processes, self.pipes = name, list[Any](), list[Connection]()
        port = free_port()
        for rank in range(COMMANDS[name].ranks):
            pipe, theirs = FORKS.Pipe(duplex=False)
            process = FORKS.Process(target=child, args=(name, inputs, out, setting, rank, port, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(pipe)
        self.begun = [self._receive(pipe) for pipe in self.pipes]

    def _receive(self, pipe: Connection, seconds: float = PATIENCE) -> Ended:
        try:
            return Ended(*pipe.recv()) if pipe.poll(seconds) else Ended("hangs")
        except EOFError:
            return Ended("killed")

    @property
    def alive(self) -> bool:
        """Whether a rank runs."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to some ranks, default all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(self.processes[rank].pid, number)

    def end(self, seconds: float = PATIENCE) -> list[Ended]:
        """How each rank ended; those that do not end are killed."""
        limit = time.monotonic() + seconds
        found = []
        for begun, process, pipe in zip(self.begun, self.processes, self.pipes, strict=True):
            found.append(self._receive(pipe, max(0.1, limit - time.monotonic())) if begun.how == "begins" else begun)
            if found[-1].how == "hangs":
                process.kill()
            process.join(PATIENCE)
            pipe.close()
        return found


def tree(out: Path) -> dict[str, str]:
    """The files of results and their digests. The record of the run, which holds dates, is left out."""
    found = {}
    for path in sorted(out.rglob("*")) if out.exists() else ():
        name = path.relative_to(out).as_posix()
        if path.is_file() and not name.startswith(".torchprobe/") and "/.torchprobe/" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(found: dict[str, str], right: dict[str, str]) -> list[str]:
    """The names of files that are missing, that should not be there, or that differ."""
    return [f"{name} {'differs' if name in found and name in right else 'is missing' if name in right else 'is left'}"
            for name in sorted(found.keys() | right.keys()) if found.get(name) != right.get(name)]  # fmt: skip
