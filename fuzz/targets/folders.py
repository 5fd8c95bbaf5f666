"""The records of output folders, and locks."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from fuzz.target import Target, resealed
from torchprobe.common.files import replacing
from torchprobe.common.folders import HIDDEN, listed, output_folder, record
from torchprobe.common.locks import InUseError, locked

_OTHERS = ("precious.txt", "out/notes.md")
"""Files that belong to no run."""


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        with replacing(folder / name) as temporary:
            temporary.write_text("text")


def _make(folder: Path) -> None:
    for name in _OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    with output_folder(folder / "out", "scan", of="a model"):
        _write(folder / "out", "scan.csv", "figures/a.svg", "figures/b.svg")


def _read(folder: Path) -> Any:
    """The record; then another run replaces the files of this one, and no others."""
    out = folder / "out"
    found = record(out), listed(out)
    with output_folder(out, "compare", overwrite=True):
        _write(out, "comparison.json")
    if lost := [name for name in _OTHERS if (folder / name).read_text() != "mine"]:
        raise AssertionError(f"{lost[0]} was replaced")
    known = record(out)
    return found, known is not None and known["command"]


def _make_lock(folder: Path) -> None:
    holder = {"process": 12, "host": "a", "command": "torchprobe scan", "since": "2026-01-01 00:00:00"}
    (folder / "lock").write_text(json.dumps(holder))


def _take(folder: Path) -> Any:
    """Somebody has the lock; what the file says of them is only for the message."""
    with open(folder / "lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            with locked(folder / "lock", "the folder"):
                raise AssertionError("the lock was taken twice")
        except InUseError as error:
            return str(error)


_FILES = {f"out/{HIDDEN}/run.json": "json"}
RECORDS = Target("folder-records", _FILES, _make, _read, (ValueError,), guarded=tuple(_FILES), restore=True, weight=0.3)

TARGETS = [
    RECORDS,
    resealed(RECORDS),
    Target("locks", {"lock": "json"}, _make_lock, _take, ()),
    Target("folder-lists", {f"out/{HIDDEN}/files": "lines"}, _make, _read, (ValueError,), restore=True, weight=0.3),
]
