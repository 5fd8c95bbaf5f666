"""Locks: one process at a time, in any order of beginnings and ends, and none that outlives its process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from torchprobe.common.locks import InUseError, locked

SPAWN = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


def holding(path: Path, told: Connection) -> None:
    with locked(path, "it"):
        told.send("has it")
        told.recv()


def started(path: Path) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    mine, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=holding, args=(path, theirs))
    process.start()
    assert mine.recv() == "has it"
    return process, mine


def test_the_message_says_who_has_it(tmp_path: Path) -> None:
    process, told = started(tmp_path / "lock")
    with (
        pytest.raises(InUseError, match=rf"the folder is in use by process {process.pid} \(.*\) since 20\d\d-"),
        locked(tmp_path / "lock", "the folder"),
    ):
        pass
    told.send("end")
    process.join()
    assert not (tmp_path / "lock").exists()


def test_it_waits_if_asked(tmp_path: Path) -> None:
    process, told = started(tmp_path / "lock")
    told.send("end")
    with locked(tmp_path / "lock", "it", wait=30):
        assert (tmp_path / "lock").exists()
    process.join()
    process, told = started(tmp_path / "lock")
    begin = time.monotonic()
    with pytest.raises(InUseError), locked(tmp_path / "lock", "it", wait=0.3):
        pass
    assert time.monotonic() - begin >= 0.3
    told.send("end")
    process.join()


def test_a_killed_process_leaves_none(tmp_path: Path) -> None:
    process, _ = started(tmp_path / "lock")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "lock").exists()  # its file, but nobody has it
    with locked(tmp_path / "lock", "it"):
        pass
    assert not (tmp_path / "lock").exists()


def test_the_content_of_the_file_does_not_matter(tmp_path: Path) -> None:
    holder = {"process": 1, "host": "a", "command": "scan", "since": "today"}
    wrong = ({"process": float("inf")}, {"process": True}, {"host": "\x1b[31m"}, {"command": "a\nb"}, {"since": "a" * 5000}, {"since": 3})
    others = [json.dumps(holder | change).encode() for change in wrong]
    for content in (b"", b"[]", b"\x1b[31m", b'{"process": "x"}', b"{" * 1000, *others):
        (tmp_path / "lock").write_bytes(content)
        with locked(tmp_path / "lock", "it"):
            (tmp_path / "lock").write_bytes(content)
            with pytest.raises(InUseError, match="it is in use by another process"), locked(tmp_path / "lock", "it"):
                pass


def counting(path: Path, times: int) -> None:
    for _ in range(times):
        with locked(path / "lock", "it", wait=60):
            value = int((path / "count").read_text())
            (path / "count").write_text(str(value + 1))


def test_two_never_have_it(tmp_path: Path) -> None:
    """The file is removed at each end, while others wait for it."""
    (tmp_path / "count").write_text("0")
    processes = [SPAWN.Process(target=counting, args=(tmp_path, 25)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "100"


def test_a_folder_that_is_removed_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / "lock", "it"):
        (tmp_path / "a" / "lock").unlink()
        (tmp_path / "a").rmdir()


def test_a_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks: do not write there from two processes"), locked(tmp_path / "lock", "it"):
        pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system opens links")
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock", "it"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
