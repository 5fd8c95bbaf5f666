"""The file of embeddings, which grows batch by batch and survives a kill.

It is a safetensors file with ``h`` F32 (n, d), ``y`` I32 (n,) and ``names`` U8, JSON with the ids and the skipped images. While it grows,
the representations are appended to ``.NAME.part``. One line of JSON per batch in ``.NAME.progress`` holds labels, names and a checksum. The
checksum detects lines or rows that did not reach the disk, and these batches are computed again. At the end, labels and names are appended,
the header is written into the space that was left for it, and the part file is renamed to ``NAME``.
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

_PIECE = 1 << 24  # bytes to read at a time


@dataclass
class Part:
    """One batch: representations float32 (rows, d), labels, ids, and the images that could not be read, each with the reason.

    ``inputs`` is the number of images if each has several rows.
    """

    h: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    y: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    inputs: int | None = None

    @property
    def files(self) -> int:
        return (len(self.ids) if self.inputs is None else self.inputs) + len(self.skipped)


class GrowingFile:
    """A file of embeddings that is being written.

    Args:
        path: of the complete file.
        metadata: see :func:`metadata`. A file is continued only with the same provenance.
        total: the largest possible number of rows.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], total: int) -> None:
        self.path, self.metadata, self.total = path, json.loads(json.dumps(metadata)), total
        self.rows, self.features, self.batches, self.files = 0, 0, 0, 0
        self.y: list[int] = []
        self.ids: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._open = contextlib.ExitStack()
        # The longest possible header; h begins after it, at a multiple of 64.
        self.start = -(-(8 + len(self._header(total, 10**9, 10**15))) // 64) * 64

    @property
    def provenance(self) -> dict[str, Any]:
        """The facts from which the embeddings are computed."""
        return dict(self.metadata["made"])

    @property
    def part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def progress(self) -> Path:
        return self.path.with_name(f".{self.path.name}.progress")

    def open(self, resume: bool) -> int:
        """Starts the file, or continues an interrupted run; returns the number of batches that are done.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the unfinished file has another provenance, or another process is writing it.
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
            self._write({"format": FORMAT, "start": self.start, "made": self.provenance})
        return self.batches

    def append(self, part: Part) -> None:
        """Adds a batch."""
        rows = part.h.numpy().tobytes()
        self._data.seek(self.start + 4 * self.rows * self.features)
        self._data.write(rows)
        self._data.flush()  # before the line that counts them
        line = {"d": part.h.shape[1], "sum": zlib.crc32(rows), "y": part.y, "ids": part.ids, "skipped": part.skipped}
        self._write(line)
        self._count(part.y, part.ids, part.skipped, part.h.shape[1])

    def finish(self) -> None:
        """Completes the file, and renames it when everything is on the disk."""
        end = self.start + 4 * self.rows * self.features
        labels, names = labels_int32(torch.tensor(self.y, dtype=torch.int64)), names_tensor(self.ids, self.skipped)
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
        """The representations that are done, memory-mapped."""
        return torch.from_numpy(np.memmap(self.part, np.float32, "c", self.start, (rows, features)))

    def close(self) -> None:
        """Closes the file. Its batches stay for a run that resumes."""
        self._open.close()

    def discard(self) -> None:
        """Removes the files of an unfinished run."""
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
        """Counts the complete batches and returns the position where their lines end; 0 if there is nothing to continue."""
        lines = _lines(self._log)
        first, end = next(lines, (None, 0))
        if not isinstance(first, dict) or not isinstance(first.get("made"), dict):
            return 0
        require_same(self.path, first["made"], self.provenance)
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
        metadata = {"format": FORMAT, "kind": KIND, "values": json.dumps(self.metadata)}
        ends = np.cumsum([0, 4 * rows * features, 4 * rows, names]).tolist()
        shapes = {"h": ("F32", [rows, features]), "y": ("I32", [rows]), "names": ("U8", [names])}
        tensors = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": ends[i : i + 2]}
            for i, (name, (dtype, shape)) in enumerate(shapes.items())
        }
        return json.dumps({"__metadata__": metadata, **tensors}).encode()


def metadata(
    provenance: Mapping[str, Any], classes: Iterable[int] | None, groups: Mapping[int, tuple[int, ...]] | None, partial: bool = False
) -> dict[str, Any]:
    """The values of a file that are not tensors, as JSON holds them."""
    return {
        "made": dict(provenance),
        "classes": None if classes is None else list(classes),
        "groups": None if groups is None else {str(label): list(rows) for label, rows in groups.items()},
        "partial": partial,
    }


def names_tensor(ids: Sequence[str], skipped: Sequence[tuple[str, str]]) -> Tensor:
    """The names as a tensor of bytes, which are JSON."""
    text = json.dumps({"ids": list(ids), "skipped": [list(pair) for pair in skipped]})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def labels_int32(y: Tensor) -> Tensor:
    """The labels in int32, so that they can follow h of any size without a gap.

    Raises:
        ValueError: a label is too large.
    """
    if len(y) and int(y.max()) >= 1 << 31:
        raise ValueError(f"label {int(y.max())} is above 2³¹ − 1, the largest label that can be saved")
    return y.cpu().to(torch.int32)


def require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to continue or load a file of another provenance. Files of earlier versions do not say what their transform does.

    Raises:
        ValueError: the provenance differs; the message says in what.
    """
    compared = (before.keys() | now.keys()) - ({"transform"} - before.keys())
    if other := sorted(key for key in compared if before.get(key) != now.get(key)):
        key = "encoder" if "encoder" in other else other[0]
        raise ValueError(
            f"{path} was made with another {key}: {before.get(key)!r}, now it is {now.get(key)!r}. "
            "Give another path, or resume=False to start over"
        )


def _lines(log: IO[bytes]) -> Iterator[tuple[Any, int]]:
    """The content of each complete line, and the position of its end; stops at an incomplete one."""
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
    """Whether the next ``size`` bytes exist and have this checksum."""
    found = 0
    while size > 0:
        piece = data.read(min(size, _PIECE))
        if not piece:
            return False
        found = zlib.crc32(piece, found)
        size -= len(piece)
    return found == checksum


def _lock(file: IO[bytes], path: Path) -> None:
    """Locks the file against other processes until it is closed, if the system can do so."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another process") from error
    except OSError:  # some network file systems have no locks
        return
