"""Images that are pieces of larger files, or files of a store: ``tar`` shards, and folders such as ``s3://bucket/photos``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchprobe.common import limits
from torchprobe.common.facts import UNIDENTIFIED, digest_of
from torchprobe.common.messages import reason
from torchprobe.datasets.images import load
from torchprobe.datasets.labeled import LabeledImages
from torchprobe.datasets.pictures import FileError
from torchprobe.datasets.readers.stores import digests, is_address, read_range, whole

if TYPE_CHECKING:
    from PIL.Image import Image

GAP, RUN = 1 << 16, 1 << 24
"""Bytes between two images that are read together, and bytes that are read together at most."""


@dataclass(frozen=True)
class Member:
    """Where one image is.

    Attributes:
        file: a path, or an address.
        name: of the image.
        start, end: its bytes in the file; ``end`` None: to its end.
        problem: why it cannot be read; empty if it can.
    """

    file: str
    name: str
    start: int
    end: int | None
    problem: str = ""


@dataclass(frozen=True)
class StoredImages(LabeledImages):
    """Images in shards or in a store; made by :func:`torchprobe.datasets.open_images`.

    Args:
        paths: :class:`Member`, one for each image.
        root, labels, names, classes, groups, border, remarks: see :class:`~torchprobe.datasets.LabeledImages`.
        known: file → SHA-256 of its content, as far as it was read already.
        identity_of: a text of yours that changes whenever the content of the files does, instead of their digests: then they are not read
            for them.
    """

    known: dict[str, str] = field(default_factory=dict)
    identity_of: str | None = None

    def name(self, path: Any) -> str:
        return str(path.name)

    def size(self, path: Any) -> int | None:
        """The bytes of an image; None if unknown."""
        return None if path.end is None else int(path.end - path.start)

    def digest(self) -> str:
        """A digest of the names and places of the images, and of the bytes of their files. What is not known already is read once. If a
        store does not give them, the set is unidentified."""
        places = [[one.name, one.file, one.start, one.end, one.problem] for one in self.paths]
        if self.identity_of is not None:
            return digest_of(["told", self.identity_of, places])
        files = [*dict.fromkeys(one.file for one in self.paths)]
        missing = [file for file in files if file not in self.known]
        found = {**self.known, **{file: one for file, one in zip(missing, digests(missing), strict=True) if one is not None}}
        if any(is_address(file) and file not in found for file in files):
            return UNIDENTIFIED  # what a store did not give now, it may give when the images are read
        numbers = {file: number for number, file in enumerate(files)}  # content counts, not where it is kept
        plain = [[name, numbers[file], *rest] for name, file, *rest in places]
        return digest_of([plain, [found.get(file) for file in files]])

    def content(self, path: Any) -> bytes:
        """The bytes of one image.

        Raises:
            FileError: they cannot be read.
        """
        _check(path)
        try:
            return whole(path.file) if path.end is None else read_range(path.file, path.start, path.end)
        except FileError:
            raise
        except Exception as error:  # each store has errors of its own
            raise FileError(f"it cannot be read ({reason(error)})") from None

    def begin(self, threads: ThreadPoolExecutor, group: Sequence[Any], preprocess: Callable[[Image], Tensor]) -> list[Future[Tensor | str]]:
        """As :meth:`torchprobe.datasets.Images.begin`; images that lie side by side are read with one request."""
        found: list[Future[Tensor | str]] = []
        for run in _runs(group):
            if len(run) == 1:
                found += super().begin(threads, run, preprocess)
                continue
            # Threads take tasks in order, so one that waits for the bytes waits for a task that has begun.
            first, last = run[0].start, run[-1].start + _bytes(run[-1])
            data = threads.submit(read_range, run[0].file, first, last)
            found += [threads.submit(load, _part(data, one.start - first, one.start - first + _bytes(one)), preprocess) for one in run]
        return found


def _check(member: Member) -> None:
    if (problem := _problem(member)) is not None:
        raise FileError(problem)


def _problem(member: Member) -> str | None:
    """Why an image is not read."""
    if member.problem:
        return member.problem
    found = None if member.end is None else limits.problem("picture_bytes", member.end - member.start)
    return f"the file has {found}" if found else None


def _part(data: Future[bytes], start: int, end: int) -> Callable[[], bytes]:
    def part() -> bytes:
        try:
            return data.result()[start:end]
        except Exception as error:
            raise FileError(f"it cannot be read ({reason(error)})") from None

    return part


def _runs(group: Sequence[Member]) -> Iterator[list[Member]]:
    """Members in order, together if one read gives them all."""
    run: list[Member] = []
    for one in group:
        usable = _problem(one) is None and one.end is not None and one.end - one.start <= RUN
        if run and not (usable and run[-1].file == one.file and _fits(run, one)):
            yield run
            run = []
        if usable:
            run.append(one)
        else:
            yield [one]
    if run:
        yield run


def _fits(run: list[Member], one: Member) -> bool:
    before = run[-1].start + _bytes(run[-1])
    return 0 <= one.start - before <= GAP and one.start + _bytes(one) - run[0].start <= RUN


def _bytes(one: Member) -> int:
    return 0 if one.end is None else one.end - one.start


def short_names(files: Sequence[str]) -> dict[str, str]:
    """File → its name without what all of them begin with.

    >>> short_names(["s3://a/b/0.tar", "s3://a/b/c/1.tar"])
    {'s3://a/b/0.tar': '0.tar', 's3://a/b/c/1.tar': 'c/1.tar'}
    """
    parts = [file.replace(os.sep, "/").split("/") for file in files]
    common = 0
    while all(len(one) > common + 1 and one[common] == parts[0][common] for one in parts):
        common += 1
    return {file: "/".join(one[common:]) for file, one in zip(files, parts, strict=True)}
