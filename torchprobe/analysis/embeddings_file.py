"""The file of embeddings, which grows batch by batch and survives a kill.

It is a safetensors file with ``h`` F32 (n, d), ``y`` I32 (n,) and ``names`` U8, JSON with the ids and the skipped images. While it grows,
the representations are appended to ``.NAME.part``. One line of JSON per batch in ``.NAME.progress`` holds labels, names, a checksum of the
rows, and one of the line itself. They detect lines or rows that did not reach the disk or were changed; these batches are computed again.
At the end, labels and names are appended, the header is written into the space that was left for it, and the part file is renamed to
``NAME``. ``.NAME.lock`` is there while a process writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.analysis.given import row_names
from torchprobe.common.checked import sealed, unsealed
from torchprobe.common.facts import require_same
from torchprobe.common.files import naming, note, sync_folder
from torchprobe.common.locks import locked
from torchprobe.common.reading import parse_json
from torchprobe.common.records import Record, decode, encode
from torchprobe.common.storage import FORMAT, File, checksum, header, sealed_sum

KIND = "torchprobe.embeddings"

START_OVER = "give another path, or resume=False (--overwrite) to start over"
"""What to do if a file cannot be continued."""

_PIECE = 1 << 24  # bytes to read at a time
_WAIT = 2.0  # seconds for a process that just reads a complete file


@dataclass(frozen=True, eq=False)
class StoredNames(Record):
    """The JSON in the tensor ``names``."""

    ids: list[str]
    skipped: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class StoredFacts(Record):
    """The values of a file that are not tensors; see :func:`metadata`. The keys of ``groups`` are labels."""

    made: dict[str, Any]
    classes: list[int] | None = None
    groups: dict[str, list[int]] | None = None
    partial: bool = False


@dataclass(frozen=True, eq=False)
class StoredBatch(Record):
    """One line of the progress: the width and the CRC-32 of the rows, their labels and ids, and what could not be read."""

    d: int
    sum: int
    y: list[int]
    ids: list[str]
    skipped: list[tuple[str, str]]


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
        self._sum = 0  # CRC-32 of the rows
        self._files, self._alone = contextlib.ExitStack(), contextlib.ExitStack()
        # The longest possible header; h begins after it, at a multiple of 64.
        self.start = -(-len(self._header(total, 10**9, 10**15, {"h": 1 << 32, "y": 1 << 32, "names": 1 << 32})) // 64) * 64

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

    def lock(self) -> None:
        """Keeps other processes away until :meth:`close` or :meth:`finish`.

        Raises:
            FileNotFoundError: there is no such folder.
            InUseError: another process is writing the file.
        """
        if not self.path.resolve().parent.is_dir():
            raise FileNotFoundError(f"cannot save to {os.fspath(self.path)!r}: there is no folder {str(self.path.resolve().parent)!r}")
        lock = self.path.with_name(f".{self.path.name}.lock")
        with naming(self.path, lock):
            self._alone.enter_context(locked(lock, os.fspath(self.path), _WAIT))

    def open(self, resume: bool) -> int:
        """Starts the file, or continues an interrupted run; returns the number of batches that are done. It is locked.

        Raises:
            ChangedError: the unfinished file has another provenance.
        """
        for path in (self.path, self.part, self.progress):
            note(path)
        with self._naming():
            self._log = self._files.enter_context(self.progress.open("a+b"))
            self._log.seek(0)
            end = self._recover() if resume else 0
            self._log.truncate(end)
            self._data = self._files.enter_context(self.part.open("r+b" if end else "w+b"))
            self._data.truncate(self.start + 4 * self.rows * self.features)
            if not end:
                self._write({"format": FORMAT, "start": self.start, "made": self.provenance})
        return self.batches

    def append(self, part: Part) -> None:
        """Adds a batch."""
        rows = part.h.numpy().tobytes()
        with self._naming():
            self._data.seek(self.start + 4 * self.rows * self.features)
            self._data.write(rows)
            self._data.flush()  # before the line that counts them
            self._write(encode(StoredBatch(part.h.shape[1], zlib.crc32(rows), part.y, part.ids, part.skipped)))
        self._sum = zlib.crc32(rows, self._sum)
        self._count(part.y, part.ids, part.skipped, part.h.shape[1])

    def finish(self) -> None:
        """Completes the file, and renames it when everything is on the disk."""
        end = self.start + 4 * self.rows * self.features
        labels, names = labels_int32(torch.tensor(self.y, dtype=torch.int64)), names_tensor(self.ids, self.skipped)
        y, text = labels.numpy().tobytes(), names.numpy().tobytes()
        sums = {
            "h": sealed_sum(self._sum, "F32", (self.rows, self.features)),
            "y": checksum("I32", labels.shape, [y]),
            "names": checksum("U8", names.shape, [text]),
        }
        with self._naming():
            self._data.seek(end)
            self._data.write(y + text)
            self._data.truncate()
            self._data.seek(0)
            self._data.write(self._header(self.rows, self.features, len(names), sums, self.start))
            self._data.flush()
            os.fsync(self._data.fileno())
            self._files.close()
            os.replace(self.part, self.path)
            sync_folder(self.path.parent)
            self.discard()
        self.close()  # others may only now take the lock

    def so_far(self, rows: int, features: int) -> Tensor:
        """The representations that are done, memory-mapped."""
        return torch.from_numpy(np.memmap(self.part, np.float32, "c", self.start, (rows, features)))

    def close(self) -> None:
        """Closes the file and gives the lock back. Its batches stay for a run that resumes."""
        self._files.close()
        self._alone.close()

    def discard(self) -> None:
        """Removes the files of an unfinished run."""
        self.part.unlink(missing_ok=True)
        self.progress.unlink(missing_ok=True)

    def _naming(self) -> contextlib.AbstractContextManager[None]:
        """Errors of the disk name the file that the user knows."""
        return naming(self.path, self.part, self.progress)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(sealed(record)).encode() + b"\n")
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
        require_same(self.path, first["made"], self.provenance, START_OVER)
        if first.get("format") != FORMAT or first.get("start") != self.start or not self.part.exists():
            return 0
        with open(self.part, "rb") as data:
            data.seek(self.start)
            for plain, after in lines:
                try:
                    line = decode(StoredBatch, plain)
                except ValueError:
                    break
                fits = not line.ids or (line.d > 0 and self.features in (0, line.d))
                both = _sums(data, 4 * len(line.ids) * line.d, self._sum) if fits and len(line.y) == len(line.ids) else None
                if both is None or both[0] != line.sum:
                    break
                self._sum = both[1]
                self._count(line.y, line.ids, line.skipped, line.d)
                end = after
        return end

    def _header(self, rows: int, features: int, names: int, sums: Mapping[str, int], length: int | None = None) -> bytes:
        tensors = {
            "h": ("F32", [rows, features], 4 * rows * features),
            "y": ("I32", [rows], 4 * rows),
            "names": ("U8", [names], names),
        }
        return header(tensors, {"format": FORMAT, "kind": KIND, "values": json.dumps(self.metadata)}, sums, length)


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


def read_names(file: File, rows: int) -> tuple[StoredNames, StoredFacts]:
    """The names and the values of a complete file.

    Raises:
        ValueError: one is damaged, or a name is there twice; the message names the file.
    """
    names = file.tensor("names", torch.uint8, (None,))
    try:
        stored = decode(StoredNames, parse_json(names.numpy().tobytes()))
        row_names(rows, stored.ids)
    except ValueError as error:
        raise file.error("names", f"is damaged ({error})") from error
    try:
        return stored, decode(StoredFacts, file.values)
    except ValueError as error:
        raise ValueError(f"{file.path} is damaged: {error}") from error


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


def _lines(log: IO[bytes]) -> Iterator[tuple[Any, int]]:
    """The content of each complete line, and the position of its end; stops at an incomplete or damaged one."""
    end = 0
    for line in log:
        if not line.endswith(b"\n"):
            return
        try:
            content = unsealed(parse_json(line), "the line")
        except ValueError:
            return
        end += len(line)
        yield content, end


def _sums(data: IO[bytes], size: int, before: int) -> tuple[int, int] | None:
    """The CRC-32 of the next ``size`` bytes, alone and after those before; None if there are fewer."""
    alone = 0
    while size > 0:
        piece = data.read(min(size, _PIECE))
        if not piece:
            return None
        alone, before = zlib.crc32(piece, alone), zlib.crc32(piece, before)
        size -= len(piece)
    return alone, before
