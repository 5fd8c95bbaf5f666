"""What a result depends on: one list of facts, kept beside every result that can be resumed, and compared before it is.

A fact is a plain value. Content is told by digests: of every file, tensor and text, never of names, sizes or dates. What has no digest,
such as a function or a data set of another library, says itself what it is, in an attribute ``identity``; see :func:`told`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FACTS: Mapping[str, str] = {
    "encoder": "the name of the network",
    "model": "the name of the network",
    "weights": "a digest of its parameters and buffers",
    "modules": "a digest of its modules and their settings",
    "layer": "the layer whose activation is the representation",
    "position": "the positions of that layer",
    "sites": "the layers, with the digests of their bases and given thresholds",
    "representations": "a digest of representations that were given",
    "head": "a digest of the head",
    "preprocessing": "what the transform says of itself, or its class",
    "transform": "a digest of what the transform makes of fixed pictures; for other inputs, what it says of itself",
    "data": "the number of inputs, and a digest of the bytes of every picture or text, of their names, labels and classes",
    "dataset": "the same of a labeled data set: pictures, masks, index and label tables",
    "labels": "a digest of labels that were given",
    "ids": "a digest of names that were given",
    "concepts": "a digest of the words or concepts",
    "baseline": "the accuracies of the standard models",
    "batch_size": "images in a batch: a network gives slightly different numbers in batches of another size",
    "seed": "of everything random",
    "torchprobe": "the version of this library",
}
"""The facts and their meanings, in the order in which a change is reported. Options of a command are facts under their own names."""

UNIDENTIFIED = "unidentified"
"""The fact of what has no digest and does not say what it is. It never equals another one."""

NOT_NOTED = "not noted"
"""The value of a fact that a result lacks."""

_PIECE = 1 << 22  # bytes to read at a time


class ChangedError(ValueError):
    """What a result depends on has changed, or cannot be told, so the result cannot be continued.

    Attributes:
        fact: the name of the fact.
        before, now: its values.
    """

    def __init__(self, message: str, fact: str, before: object, now: object) -> None:
        super().__init__(message)
        self.fact, self.before, self.now = fact, before, now

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent from rank to rank
        return type(self), (str(self), self.fact, self.before, self.now)


def require_same(where: str | os.PathLike[str], before: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Refuses to continue or to load a result if a fact has changed.

    Args:
        where: the file or folder of the result.
        before: the facts of the result.
        now: those of this run.
        advice: what to do, as the end of the message.

    Raises:
        ChangedError: a fact differs, is missing, or cannot be told; the message says which.

    >>> require_same("a.safetensors", {"seed": 0}, {"seed": 0}, "start over")
    >>> require_same("a.safetensors", {"seed": 0}, {"seed": 1}, "start over")
    Traceback (most recent call last):
    torchprobe.common.facts.ChangedError: a.safetensors was made with another seed: 0, now it is 1; start over
    """
    found = changed(before, now)
    if found is None:
        return
    fact, was, is_now = found
    if is_now == UNIDENTIFIED:
        why = (
            f"{os.fspath(where)} cannot be resumed, because nothing tells whether its {fact} is still the same: give the object an "
            f"attribute `identity`, a text that changes whenever what it does or holds changes; or {advice}"
        )
    elif was == NOT_NOTED:
        why = f"{os.fspath(where)} was made in another way or by another version of torchprobe, which did not note its {fact}; {advice}"
    else:
        why = f"{os.fspath(where)} was made with another {fact}: {_short(was)}, now it is {_short(is_now)}; {advice}"
    raise ChangedError(why, fact, was, is_now)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first fact that differs or cannot be told, down to what differs in it, with both values; None if all are the same.

    >>> changed({"data": {"images": 3, "digest": "a"}}, {"data": {"images": 4, "digest": "b"}})
    ('data: images', 3, 4)
    """
    before, now = plain(before), plain(now)
    order = [*FACTS]

    def rank(key: str) -> tuple[int, bool, str]:  # a digest says less than what is beside it
        return (order.index(key) if key in FACTS else len(order)), key in ("digest", "fingerprint"), key

    keys = sorted(before.keys() | now.keys(), key=rank)
    for key in keys:
        was, is_now = before.get(key, NOT_NOTED), now.get(key, NOT_NOTED)
        if isinstance(was, dict) and isinstance(is_now, dict):
            if (inner := changed(was, is_now)) is not None:
                return f"{key}: {inner[0]}", inner[1], inner[2]
        elif was != is_now or is_now == UNIDENTIFIED:
            return key, was, is_now
    return None


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON holds them."""
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def told(thing: object) -> str | None:
    """What an object says of itself in its attribute ``identity``: a text that changes whenever what it does or holds changes; or None.

    Raises:
        TypeError: it is not a text.

    >>> class Photos:
    ...     identity = "photos of 2024, second edition"
    >>> told(Photos()), told(3)
    ('photos of 2024, second edition', None)
    """
    found = getattr(thing, "identity", None)
    found = None if callable(found) else found
    if found is not None and not isinstance(found, str):
        raise TypeError(f"`identity` of {type(thing).__name__} must be a text, got {type(found).__name__}")
    return found


# -- digests --------------------------------------------------------------------------------------------------------------


def digest_of(value: object) -> str:
    """SHA-256, in hexadecimal, of plain values.

    >>> digest_of([1, "a"]) == digest_of([1, "b"])
    False
    """
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


_known: dict[tuple[int, ...], bytes] = {}
_lock = threading.Lock()


def file_digests(paths: Sequence[Path], workers: int | None = None) -> list[str | None]:
    """SHA-256 of the content of each file, in hexadecimal; None for what cannot be read, or is no file.

    Threads read the files. A process reads a file once: its digest is kept while identity, size and times of the file stay the same.

    Args:
        paths: of the files.
        workers: threads; None: as many as processors, at most 8.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = path.write_text("a")
    >>> [str(one)[:8] for one in file_digests([path, path.with_name("missing")])]
    ['ca978112', 'None']
    """
    threads = workers or min(8, os.cpu_count() or 1)
    if len(paths) < 2 or threads == 1:
        return [_file_digest(path) for path in paths]
    with ThreadPoolExecutor(threads, thread_name_prefix="torchprobe-digests") as pool:
        return [*pool.map(_file_digest, paths, chunksize=16)]


def files_digest(names: Iterable[str], paths: Sequence[Path]) -> str:
    """One digest of many files: of their names and contents, in order."""
    return digest_of([[*names], file_digests(paths)])


def _file_digest(path: Path) -> str | None:
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # a pipe without a writer would wait
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                return None
            key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
            with _lock:
                known = _known.get(key)
            if known is not None:
                return known.hex()
            found = hashlib.sha256()
            while piece := file.read(_PIECE):
                found.update(piece)
    except OSError:
        return None
    with _lock:
        _known[key] = found.digest()
    return found.hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:199] + "…"
