"""The file of embeddings, and one that grows batch by batch and survives a kill.

A safetensors file with ``h`` F32 (n, d), ``y`` I32 (n,) and ``names`` U8: JSON with the ids and what was skipped. While it grows, the
representations are appended to ``.NAME.part``, where they will stay, and ``.NAME.progress`` says, one line of JSON a batch, what belongs
to them, with a checksum. A line or rows that did not reach the disk are noticed by that, and made again. At the end labels, names and the
header, for which room was left, are added, and the file takes its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.common.storage import FORMAT

KIND = "torchprobe.embeddings"

_PIECE = 1 << 24  # bytes read at a time


@dataclass
class Part:
    """One batch: representations float32 (rows, d), labels, ids, and what could not be read."""

    h: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    y: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def files(self) -> int:
        return len(self.ids) + len(self.skipped)


class GrowingFile:
    """Embeddings on their way to the disk.

    Args:
        path: what the file will be called.
        made: what the embeddings depend on; a file can only go on with the same.
        beside: what else the finished file says, see :func:`values`.
        total: the images there are.
    """

    def __init__(self, path: Path, made: Mapping[str, Any], beside: Mapping[str, Any], total: int) -> None:
        self.path, self.made, self.beside, self.total = path, json.loads(json.dumps(made)), dict(beside), total
        self.rows, self.features, self.batches, self.files = 0, 0, 0, 0
        self.y: list[int] = []
        self.ids: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._open = contextlib.ExitStack()
        # As long as the header can get; h begins behind it, at a multiple of 64.
        self.start = -(-(8 + len(self._header(total, 10**9, 10**15))) // 64) * 64

    @property
    def part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def progress(self) -> Path:
        return self.path.with_name(f".{self.path.name}.progress")

    def open(self, resume: bool) -> int:
        """Begins, or goes on where an earlier run was interrupted; returns the batches that are there.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the unfinished file is another run's, made otherwise or being written.
        """
        if not self.path.resolve().parent.is_dir():
            raise FileNotFoundError(f"cannot save to {os.fspath(self.path)!r}: there is no folder {str(self.path.resolve().parent)!r}")
        self._log = self._open.enter_context(self.progress.open("a+b"))
        _lock(self._log, self.path)
        self._log.seek(0)
        end = self._recover() if resume else 0
        self._log.truncate(end)
        self._data = self._open.enter_context(self.part.open("r+b" if end else "w+b"))
        self._data.truncate(self.start + 4 * self.rows * self.features)
        if not end:
            self._write({"format": FORMAT, "start": self.start, "made": self.made})
        return self.batches

    def append(self, part: Part) -> None:
        """Adds a batch."""
        rows = part.h.numpy().tobytes()
        self._data.seek(self.start + 4 * self.rows * self.features)
        self._data.write(rows)
        self._data.flush()  # before the line that says so
        said = {"d": part.h.shape[1], "sum": zlib.crc32(rows), "y": part.y, "ids": part.ids, "skipped": part.skipped}
        self._write(said)
        self._count(part.y, part.ids, part.skipped, part.h.shape[1])

    def finish(self) -> None:
        """Gives the file its name, once everything is on the disk."""
        end = self.start + 4 * self.rows * self.features
        labels, names = small(torch.tensor(self.y, dtype=torch.int64)), packed(self.ids, self.skipped)
        self._data.seek(end)
        self._data.write(labels.numpy().tobytes() + names.numpy().tobytes())
        self._data.truncate()
        header = self._header(self.rows, self.features, len(names)).ljust(self.start - 8)
        self._data.seek(0)
        self._data.write(struct.pack("<Q", len(header)) + header)
        self._data.flush()
        os.fsync(self._data.fileno())
        self._open.close()
        os.replace(self.part, self.path)
        self.discard()

    def so_far(self, rows: int, features: int) -> Tensor:
        """The representations that are there, memory-mapped."""
        return torch.from_numpy(np.memmap(self.part, np.float32, "c", self.start, (rows, features)))

    def close(self) -> None:
        """Leaves what is there to be gone on with."""
        self._open.close()

    def discard(self) -> None:
        """Removes what an unfinished run left."""
        self.part.unlink(missing_ok=True)
        self.progress.unlink(missing_ok=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(record).encode() + b"\n")
        self._log.flush()

    def _count(self, y: Sequence[int], ids: Sequence[str], skipped: Iterable[Sequence[str]], features: int) -> None:
        self.y += y
        self.ids += ids
        self.skipped += [(str(name), str(why)) for name, why in skipped]
        self.rows, self.batches, self.files = len(self.ids), self.batches + 1, len(self.ids) + len(self.skipped)
        self.features = features if len(ids) else self.features

    def _recover(self) -> int:
        """Counts the batches that are whole, and returns where their lines end; 0 when there is nothing to go on with."""
        lines = _lines(self._log)
        first, end = next(lines, (None, 0))
        if not isinstance(first, dict) or not isinstance(first.get("made"), dict):
            return 0
        require_alike(self.path, first["made"], self.made)
        if first.get("format") != FORMAT or first.get("start") != self.start or not self.part.exists():
            return 0
        with open(self.part, "rb") as data:
            data.seek(self.start)
            for record, after in lines:
                try:
                    size = 4 * len(record["ids"]) * int(record["d"])
                    if not _agrees(data, size, record["sum"]) or len(record["y"]) != len(record["ids"]):
                        break
                    self._count(record["y"], record["ids"], record["skipped"], int(record["d"]))
                except (KeyError, TypeError, ValueError):
                    break
                end = after
        return end

    def _header(self, rows: int, features: int, names: int) -> bytes:
        metadata = {"format": FORMAT, "kind": KIND, "values": json.dumps({"made": self.made, **self.beside})}
        ends = np.cumsum([0, 4 * rows * features, 4 * rows, names]).tolist()
        shapes = {"h": ("F32", [rows, features]), "y": ("I32", [rows]), "names": ("U8", [names])}
        tensors = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": ends[i : i + 2]}
            for i, (name, (dtype, shape)) in enumerate(shapes.items())
        }
        return json.dumps({"__metadata__": metadata, **tensors}).encode()


def values(classes: Iterable[int] | None, groups: Mapping[int, tuple[int, ...]] | None, partial: bool = False) -> dict[str, Any]:
    """What a file says beside its tensors and how it was made, as JSON takes it."""
    return {
        "classes": None if classes is None else list(classes),
        "groups": None if groups is None else {str(label): list(rows) for label, rows in groups.items()},
        "partial": partial,
    }


def packed(ids: Sequence[str], skipped: Sequence[tuple[str, str]]) -> Tensor:
    """Names as a tensor of bytes, JSON."""
    text = json.dumps({"ids": list(ids), "skipped": [list(pair) for pair in skipped]})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def small(y: Tensor) -> Tensor:
    """Labels in int32, so that they may follow h, of any size, without a gap.

    Raises:
        ValueError: one does not fit.
    """
    if len(y) and int(y.max()) >= 1 << 31:
        raise ValueError(f"label {int(y.max())} is beyond 2³¹ − 1, the largest that can be saved")
    return y.cpu().to(torch.int32)


def require_alike(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with, or to take over, what was made otherwise.

    Raises:
        ValueError: it was; says what differs.
    """
    if other := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        key = "encoder" if "encoder" in other else other[0]
        raise ValueError(
            f"{path} was made with another {key}: {before.get(key)!r}, now it is {now.get(key)!r}. "
            "Give another path, or resume=False to begin anew"
        )


def _lines(log: IO[bytes]) -> Iterator[tuple[Any, int]]:
    """What each whole line says, and where it ends; stops at one that is torn."""
    end = 0
    for line in log:
        if not line.endswith(b"\n"):
            return
        try:
            content = json.loads(line)
        except ValueError:
            return
        end += len(line)
        yield content, end


def _agrees(data: IO[bytes], size: int, checksum: int) -> bool:
    """Whether the next ``size`` bytes are there and have this checksum."""
    found = 0
    while size > 0:
        piece = data.read(min(size, _PIECE))
        if not piece:
            return False
        found = zlib.crc32(piece, found)
        size -= len(piece)
    return found == checksum


def _lock(file: IO[bytes], path: Path) -> None:
    """Keeps other processes out until the file is closed, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another process") from error
    except OSError:  # some network file systems cannot
        return
