"""Texts from a file in batches: one a line, or JSONL."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchprobe.common import limits
from torchprobe.common.facts import digest_of
from torchprobe.common.messages import reason
from torchprobe.common.reading import open_regular, parse_json
from torchprobe.datasets.images import Batch, DatasetError, Images

KEYS = ("text", "caption", "sentence", "content")
"""The keys of a JSON object that hold its text; the first that is there."""

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
"""The endings of files with JSON in each line, in small or capital letters."""

_SHOWN = 80


@dataclass(frozen=True)
class Texts(Images):
    """Texts, in order. They take the place of :class:`Images` where an encoder of texts takes that of one of images.

    Args:
        paths: what stands for each text: its number, from 1 on.
        root: the file.
        texts: number → text.

    Of a long text, :meth:`name` has the beginning and a digest.

    >>> texts = Texts.of(["a cat", "a dog"])
    >>> [texts.name(path) for path in texts.paths]
    ['1: a cat', '2: a dog']
    """

    texts: Mapping[PurePath, str] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, texts: Sequence[str], numbers: Sequence[int] | None = None, root: Path | None = None) -> Texts:
        """Texts with their numbers; None: 1, 2, …"""
        paths = [Path(str(number)) for number in (range(1, len(texts) + 1) if numbers is None else numbers)]
        return cls(paths, root, dict(zip(paths, texts, strict=True)))

    def name(self, path: Path) -> str:
        """The number of a text and its beginning."""
        whole = self.texts[path]
        shown = " ".join(whole.split())[:_SHOWN]
        return f"{path}: {shown}" if shown == whole else f"{path}: {shown}… {hashlib.sha256(whole.encode()).hexdigest()[:8]}"

    def size(self, path: Path) -> int:
        """The bytes of a text in UTF-8."""
        return len(self.texts[path].encode())

    def digest(self) -> str:
        """A digest of the numbers and the texts."""
        return digest_of([[str(path), self.texts[path]] for path in self.paths])

    def batches(
        self, preprocess: Callable[[Any], Tensor], size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Batches of up to ``size`` texts, as tokens and mask, int64 (texts, 2, length), padded at the end to the longest of the batch.

        Args:
            preprocess: text → int64 (2, length), as that of :class:`torchprobe.encoders.TextEncoder`.
            size: texts in a batch.
            workers: not used; one thread is fast enough.
            only: the numbers of the batches to return, in this order; None: all.

        Raises:
            ValueError: ``size`` below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        for start in [size * i for i in only] if only is not None else range(0, len(self.paths), size):
            group = self.paths[start : start + size]
            batch, found = Batch(files=len(group)), list[Tensor]()
            for index, path in enumerate(group, start):
                try:
                    tokens = preprocess(self.texts[path])
                    if not bool(tokens[1].any()):
                        raise ValueError("the text has no tokens")
                except Exception as error:  # a tokenizer may raise anything
                    batch.unreadable.append((self.name(path), reason(error)))
                    continue
                found.append(tokens)
                batch.names.append(self.name(path))
                batch.indices.append(index)
            width = max((tokens.shape[1] for tokens in found), default=0)
            padded = [functional.pad(tokens, (0, width - tokens.shape[1])) for tokens in found]
            batch.pixels = torch.stack(padded) if padded else batch.pixels
            yield batch


def text_file(path: str | os.PathLike[str], limit: int | None = None, seed: int = 0) -> Texts:
    """The texts of a file.

    Args:
        path: UTF-8. In a ``.jsonl`` file, or one with another of the endings :data:`JSON_LINES`, each line is a JSON string, or an object
            with its text under one of :data:`KEYS`. In every other file each line is a text; a ``.json`` file is refused. Empty lines are
            left out. The number of a text is that of its line.
        limit: take this number of texts, chosen at random.
        seed: of the random choice.

    Raises:
        DatasetError: the file cannot be read, or has no texts, or a line that is none; the message names the line.
        ValueError: ``limit`` below 1.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "texts.jsonl")
    >>> _ = file.write_text('{"text": "a cat", "id": 7}\\n\\n"a dog"\\n')
    >>> texts = text_file(file)
    >>> [texts.name(path) for path in texts.paths]
    ['1: a cat', '3: a dog']
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not path.is_file():
        raise DatasetError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a file with one text in each line")
    ending = path.suffix.lower()
    if ending == ".json":
        raise DatasetError(f"{path} is JSON, whose lines are no texts: write one text in each line, or .jsonl, with JSON in each line")
    found: dict[int, str] = {}
    try:
        longest = limits.value("text_line")
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as lines:
            number = 0
            while line := lines.readline(longest + 1):
                number += 1
                if len(line) > longest:
                    why = limits.problem("text_line", len(line))
                    raise DatasetError(f"{path}, line {number}: {why}; expected one text in each line")
                if line.strip():
                    found[number] = _text(line, path, number) if ending in JSON_LINES else line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8: {reason(error)}") from error
    if not found:
        raise DatasetError(f"no texts in {path}: expected one in each line")
    numbers = list(found)
    if limit is not None and limit < len(numbers):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    return Texts.of([found[number] for number in numbers], numbers, path)


def _text(line: str, path: Path, number: int) -> str:
    """The text in one line of JSONL."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DatasetError(f"{path}, line {number}: not JSON ({reason(error)})") from error
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{path}, line {number}: expected a string, or an object with a string under {', '.join(KEYS)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # json reads half of a pair, which no encoding can write
        raise DatasetError(f"{path}, line {number}: the text has half of a surrogate pair: write the whole character")
    return value
