"""The members of a tar archive, without unpacking it.

The archive is not trusted. The standard library's ``tarfile`` reads extended headers of any size into memory, and follows one to the next
by recursion. So the archive is walked here, block by block, and ``tarfile`` only reads the single header of 512 bytes. Formats:
POSIX.1-1988 (ustar), POSIX.1-2001 (pax), and GNU tar for long names.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from torchprobe.common import limits

BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_REFUSED = {
    tarfile.LNKTYPE: "a link, which is not followed",
    tarfile.SYMTYPE: "a link, which is not followed",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file, whose bytes are not in one piece",
}
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class Entry:
    """A member that is not a folder.

    Attributes:
        name: as the archive has it; bytes that are no UTF-8 are written as escapes.
        offset, size: where its bytes are in the archive.
        problem: why it cannot be used; empty if it can.
        data: its bytes, if they were wanted.
    """

    name: str
    offset: int
    size: int
    problem: str = ""
    data: bytes | None = None


class Tape:
    """A file that is read from its start to its end.

    Args:
        file: at its start.
        size: its bytes, if it can seek; None: it is read to its end, and its digest becomes known.
    """

    def __init__(self, file: BinaryIO, size: int | None) -> None:
        self.file, self.size, self.at = file, size, 0
        self._digest = hashlib.sha256() if size is None else None

    def read(self, count: int) -> bytes:
        """So many bytes, or those that are left."""
        parts = []
        while count > 0 and (part := self.file.read(min(count, _PIECE))):
            parts.append(part)
            count -= len(part)
            self.at += len(part)
            if self._digest is not None:
                self._digest.update(part)
        return b"".join(parts)

    def skip(self, count: int) -> bool:
        """Passes over so many bytes; False if the file ends before."""
        if self.size is not None:
            self.at += count
            if self.at > self.size:
                return False
            self.file.seek(self.at)
            return True
        end = self.at + count
        while self.at < end and self.read(min(_PIECE, end - self.at)):
            pass
        return self.at == end

    def digest(self) -> str | None:
        """SHA-256 of the file, in hexadecimal, after what is left was read; None if it can seek."""
        if self._digest is None:
            return None
        while self.read(_PIECE):
            pass
        return self._digest.hexdigest()


def entries(tape: Tape, wanted: Callable[[str], bool] = lambda name: False) -> Iterator[Entry]:
    """The members of an archive, in order.

    Links, devices, pipes and sparse files, absolute names, names with ``..`` or a null character, and names that occur twice have a
    ``problem``. Where the archive is damaged or truncated, there is one last entry with a problem, whose name says from which byte on.

    Args:
        tape: the archive.
        wanted: name → whether its bytes are returned, if they are within the limit ``label_bytes``.
    """
    names: set[str] = set()
    given: dict[str, str] = {}  # what extended headers say of the next member
    count = 0
    while True:
        at, block = tape.at, tape.read(BLOCK)
        if (problem := _of_block(block) or limits.problem("members", count)) is not None:
            yield _rest(at, problem)
            return
        if not any(block):
            if (problem := _after_the_end(tape)) is not None:
                yield _rest(tape.at, problem)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            yield _rest(at, f"its header is damaged ({error})")
            return
        count += 1
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            found = _extended(tape, header)
            if isinstance(found, str):
                yield _rest(at, found)
                return
            given.update(found)
            continue
        entry = _entry(tape, header, bool(block[482]), given, wanted)
        given = {}
        if isinstance(entry, str):
            yield _rest(at, entry)
            return
        if entry is None:
            continue
        if entry.name in names:
            entry = Entry(f"{entry.name} (from byte {at})", entry.offset, entry.size, "its name occurs twice in the shard")
        names.add(entry.name)
        yield entry


def _entry(tape: Tape, header: tarfile.TarInfo, more: bool, given: dict[str, str], wanted: Callable[[str], bool]) -> Entry | str | None:
    """The member of a header, after its data; None for a folder; a text if the archive cannot be read on.

    ``more``: whether further headers follow that of an old sparse file of GNU tar.
    """
    size = header.size
    if "size" in given:
        if not (given["size"].isascii() and given["size"].isdigit() and len(given["size"]) < 19):
            return "the size in its extended header is not a number"
        size = int(given["size"])
    if size < 0:
        return "its header is damaged (a negative size)"
    raw = given.get("path", header.name)
    name = _readable(raw)
    if header.type == tarfile.DIRTYPE:
        return None
    problem = _REFUSED.get(header.type) or ("" if header.type in tarfile.REGULAR_TYPES else f"a member of the unknown type {header.type!r}")
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in given):
        problem = _REFUSED[tarfile.GNUTYPE_SPARSE]
    if header.type == tarfile.GNUTYPE_SPARSE and not _skip_sparse(tape, more):
        return "the archive is truncated"
    start, data = tape.at, None
    if header.type not in _WITHOUT_DATA:
        padded = -(-size // BLOCK) * BLOCK
        if not problem and size <= limits.value("label_bytes") and wanted(name):
            data = tape.read(size)
            whole = len(data) == size and tape.skip(padded - size)
        else:
            whole = tape.skip(padded)
        if not whole:
            return f"the archive is truncated: {name[:200]} has {size:,} bytes"
    return Entry(name, start, size, problem or _problem_of_name(raw), data)


def _extended(tape: Tape, header: tarfile.TarInfo) -> dict[str, str] | str:
    """What an extended header says of the next member; a text if it cannot be used."""
    if why := limits.problem("member_name", header.size):
        return f"an extended header has {why}"
    if header.size < 0:
        return "its header is damaged (a negative size)"
    data = tape.read(header.size)
    if len(data) < header.size or not tape.skip(-header.size % BLOCK):
        return "the archive is truncated"
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    records = _records(data)
    if records is None:
        return "an extended header is damaged"
    used = {key: value for key, value in records.items() if key in ("path", "size") or key.startswith("GNU.sparse.")}
    if used and header.type == tarfile.XGLTYPE:
        return f"a global header sets the {next(iter(used))} of all members"
    return used


def _records(data: bytes) -> dict[str, str] | None:
    """The records ``length key=value`` of pax; None if they are damaged."""
    found, at = dict[str, str](), 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            return None
        end = at + int(digits)
        record = data[space + 1 : end]
        if not space + 1 < end <= len(data) or not record.endswith(b"\n") or b"=" not in record:
            return None
        key, _, value = record[:-1].partition(b"=")
        found[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return found


def _skip_sparse(tape: Tape, more: bool) -> bool:
    """Passes over the further headers of an old sparse file of GNU tar; False if the archive ends before."""
    while more:
        block = tape.read(BLOCK)
        if len(block) < BLOCK:
            return False
        more = bool(block[504])
    return True


def _of_block(block: bytes) -> str | None:
    """What is wrong where a header should be."""
    if not block:
        return "the archive ends without its end mark, so it may be truncated"
    return "the archive is truncated" if len(block) < BLOCK else None


def _after_the_end(tape: Tape) -> str | None:
    """What is wrong if other things than zeros come after the end mark."""
    while piece := tape.read(_PIECE):
        if piece.count(0) < len(piece):
            return "more data come after its end mark, such as a second archive: list both"
    return None


def _rest(at: int, problem: str) -> Entry:
    return Entry(f"(from byte {at})", at, 0, f"the rest of the shard cannot be read: {problem}")


def _readable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _problem_of_name(name: str) -> str:
    """Nothing is written under the name of a member; but an honest archive has no such names."""
    if not name or "\0" in name:
        return "its name is empty, or has a null character"
    if name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the archive"
    return ""
