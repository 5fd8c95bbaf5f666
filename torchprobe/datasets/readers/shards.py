"""Images in shards: ``tar`` archives as WebDataset writes them, of images, each with a label in a member beside it.

Members whose names are the same up to the first dot of their last part are one sample: ``000017.jpg``, ``000017.cls``, ``000017.json``.
The shards are indexed, not streamed, so that any batch can be read alone: see :class:`torchprobe.datasets.protocol.ImageSet`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torchprobe.common import limits
from torchprobe.common.messages import counted, listing, reason
from torchprobe.common.ranks import Ranks
from torchprobe.common.reading import parse_json
from torchprobe.datasets.images import SUFFIXES, DatasetError
from torchprobe.datasets.labeled import MOST_NAMES
from torchprobe.datasets.readers.stored import Member, StoredImages, short_names
from torchprobe.datasets.readers.stores import is_address, opened_store, read_start
from torchprobe.datasets.readers.tar import Entry, Tape, entries

LABEL_KEYS = ("label", "cls")
"""The keys of a ``.json`` member that hold the label; the first that is there."""

CLASS_NAMES = "classnames.txt"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_THREADS = 8
_UNKNOWN = -1


@dataclass
class _Index:
    """The images of one shard: their places without names of the shard, their labels, and what else is in it."""

    members: list[tuple[str, int, int, str]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    others: int = 0
    examples: list[str] = field(default_factory=list)
    digest: str | None = None


def open_shards(
    shards: Sequence[str | os.PathLike[str]], *, labels: bool = True, identity: str | None = None, ranks: Ranks | None = None
) -> StoredImages:
    """The images of tar shards, in the order of the shards and of their members.

    A shard on this machine is indexed by its headers. One elsewhere is read once to its end for its index and its digest. Compressed shards
    are refused: no part of them can be read alone. Members that are refused (links, devices, names that lead out of the archive, a name
    that occurs twice) and what is left of a damaged shard stay in the set as images that cannot be read, so they are counted and named.

    Args:
        shards: paths or addresses, of ``.tar`` files.
        labels: read the labels: of the member ``.cls`` of a sample, a whole number, or else of its ``.json`` under :data:`LABEL_KEYS`. The
            names of their classes are those of :func:`class_names`.
        identity: a text of yours that changes whenever the content of the shards does; see :class:`StoredImages`.
        ranks: processes that share the work: each indexes some of the shards, and all get the whole set. All must call this.

    Raises:
        DatasetError: a shard is missing, compressed, or not a tar archive; there are no images; or a label is not a row of a head.

    >>> import io, tarfile, tempfile
    >>> path = tempfile.mkdtemp() + "/000.tar"
    >>> with tarfile.open(path, "w") as shard:
    ...     for name, data in (("a.jpg", b"..."), ("a.cls", b"7")):
    ...         member = tarfile.TarInfo(name)
    ...         member.size = len(data)
    ...         shard.addfile(member, io.BytesIO(data))
    >>> images = open_shards([path])
    >>> [images.name(one) for one in images.paths], images.labels
    (['000.tar/a.jpg'], [7])
    """
    files = [os.fspath(shard) for shard in shards]
    if why := limits.problem("shards", len(files)):
        raise DatasetError(f"the set has {why}")
    found = _indexes(files, labels, ranks)
    short = short_names(files)
    paths = [
        Member(file, f"{short[file]}/{name}", start, start + size, problem)
        for file, index in zip(files, found, strict=True)
        for name, start, size, problem in index.members
    ]
    others = sum(index.others for index in found)
    examples = [example for index in found for example in index.examples][: MOST_NAMES + 1]
    if not any(not path.problem for path in paths):
        why = f"; {paths[0].name}: {paths[0].problem}" if paths else f", but {counted(others, 'other member')}" if others else ""
        raise DatasetError(f"no images in {listing(files, 3)}{why}. Expected members ending in {', '.join(sorted(SUFFIXES))}")
    remarks = [f"left out: {counted(others, 'other member')}, such as {', '.join(examples[:3])}"] if others else []
    known = {file: index.digest for file, index in zip(files, found, strict=True) if index.digest is not None}
    rows = [label for index in found for label in index.labels]
    root = None if any(map(is_address, files)) else Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
    names = class_names(files[0]) if labels and any(row >= 0 for row in rows) else None
    return StoredImages(paths, root, labels=rows, names=names, remarks=remarks, known=known, identity_of=identity)


def class_names(shard: str) -> tuple[str, ...] | None:
    """The names of the rows of the head, one in each line of :data:`CLASS_NAMES`; None if there is no such file.

    It is beside the shard or in the folder above, as in the data sets of CLIP benchmark.

    Raises:
        DatasetError: it is too large, or a line between the names is empty: leaving it out would move all later names to other rows.
    """
    folder = shard.replace(os.sep, "/").rpartition("/")[0]
    for place in (folder, folder.rpartition("/")[0]):
        try:
            data = read_start(f"{place or '.'}/{CLASS_NAMES}", limits.value("text_bytes") + 1)
        except Exception:  # each store has errors of its own
            continue
        if why := limits.problem("text_bytes", len(data)):
            raise DatasetError(f"{place}/{CLASS_NAMES} has {why}")
        names = [line.strip() for line in data.decode("utf-8-sig", "replace").rstrip().splitlines()]
        if "" in names:
            raise DatasetError(f"{place or '.'}/{CLASS_NAMES}: line {names.index('') + 1} is empty, and the line of a name is its row")
        return tuple(names)
    return None


def _indexes(files: list[str], labels: bool, ranks: Ranks | None) -> list[_Index]:
    """The index of each shard. Ranks send each other an error, so that none of them waits for ever."""
    size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
    mine: list[_Index] | str
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="torchprobe-shards") as threads:
            mine = [*threads.map(lambda file: _indexed(file, labels), files[rank::size])]
    except DatasetError as error:
        if ranks is None:
            raise
        mine = str(error)
    if ranks is None:
        return mine if isinstance(mine, list) else []
    together = ranks.from_first([mine, *ranks.to_first(mine)])
    for one in together:
        if isinstance(one, str):
            raise DatasetError(one)
    return [together[number % size][number // size] for number in range(len(files))]


def _indexed(file: str, labels: bool) -> _Index:
    try:
        opened, size = opened_store(file)
        with opened:
            return _read(Tape(opened, size), file, labels)
    except DatasetError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"there is no shard {file}") from None
    except Exception as error:  # each store has errors of its own
        raise DatasetError(f"the shard {file} cannot be read: {reason(error)}") from error


def _read(tape: Tape, file: str, labels: bool) -> _Index:
    index, sample = _Index(), _Sample("", file)
    for entry in entries(tape, _is_label if labels else lambda name: False):
        if entry.name == "(from byte 0)":
            raise DatasetError(f"{file} is not a tar archive{_hint(file)}: {entry.problem.rpartition(': ')[2]}")
        key, kind = sample_of(entry.name)
        if key != sample.key:
            sample.close(index)
            sample = _Sample(key, file)
        if entry.problem or kind in SUFFIXES:
            sample.images.append(len(index.members))
            index.members.append((entry.name, entry.offset, entry.size, entry.problem))
            index.labels.append(_UNKNOWN)
        elif labels and kind in (".cls", ".json"):
            sample.add(kind, entry)
        else:
            index.others += 1
            index.examples = [*index.examples, entry.name][: MOST_NAMES + 1]
    sample.close(index)
    index.digest = tape.digest()
    return index


def sample_of(name: str) -> tuple[str, str]:
    """The sample of a member, and its kind: all from the first dot of its last part on, in small letters.

    >>> sample_of("a.b/000017.JPG"), sample_of("000017.seg.png")
    (('a.b/000017', '.jpg'), ('000017', '.seg.png'))
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{kind}".lower()


class _Sample:
    """The members of one sample: the numbers of its images, and its label."""

    def __init__(self, key: str, file: str) -> None:
        self.key, self.file = key, file
        self.images: list[int] = []
        self.found: dict[str, int] = {}

    def add(self, kind: str, entry: Entry) -> None:
        if entry.data is None:
            raise DatasetError(f"{self.file}: {entry.name} has {limits.problem('label_bytes', entry.size)}; labels=False leaves labels out")
        read: Callable[[bytes], int | None] = _of_cls if kind == ".cls" else _of_json
        try:
            label = read(entry.data)
        except ValueError as error:
            raise DatasetError(
                f"{self.file}: the label {entry.name} cannot be used: {error}. A label is a whole number, a row of the head, or -1 if "
                "unknown; labels=False leaves labels out"
            ) from None
        if label is not None:
            self.found[kind] = label

    def close(self, index: _Index) -> None:
        label = self.found.get(".cls", self.found.get(".json", _UNKNOWN))
        for number in self.images:
            index.labels[number] = label


def _is_label(name: str) -> bool:
    return sample_of(name)[1] in (".cls", ".json")


def _of_cls(data: bytes) -> int:
    text = data.strip()
    digits = text.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 9:
        raise ValueError(f"{text[:40]!r} is not a whole number below a thousand million")
    return _row(int(text))


def _of_json(data: bytes) -> int | None:
    value = parse_json(data)
    if isinstance(value, dict):
        value = next((value[key] for key in LABEL_KEYS if key in value), None)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} is not a whole number")
    return _row(value)


def _row(label: int) -> int:
    if not _UNKNOWN <= label < 1 << 31:
        raise ValueError(f"{label} is not a row of a head")
    return label


def _hint(file: str) -> str:
    try:
        start = read_start(file, 2)
    except Exception:  # each store has errors of its own
        return ""
    kind = _COMPRESSED.get(start)
    return f", but compressed with {kind}, and no part of it could be read alone; decompress it" if kind else ""
