"""Which words the units of one layer agree with: its tables and its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.common.csv_files import write_rows
from torchprobe.dissection.sparse import read_density
from torchprobe.dissection.words.report import write_words_report
from torchprobe.dissection.words.soft_labels import stored_concepts
from torchprobe.dissection.words.word_tables import WordTables

if TYPE_CHECKING:
    from torchprobe.datasets import ImageSet

_KIND = "torchprobe.word_dissection"

SHOWN = 5
"""Concepts of a unit in the CSV file."""


class WordDissection(WordTables):
    """Which words the units of one layer agree with; :class:`WordTables` lists the tables."""

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes a table with one line for each unit, the most significant first; returns the path.

        The columns are ``layer``, ``unit`` (from 0), ``description`` and ``similarity``, as CLIP-Dissect writes them, then ``kind``, ``p``
        and ``adjusted_p``; ``density`` and ``dead_share`` if they are known; the next best concepts and their scores; and the name of the
        labeler.
        """
        values, index = (part.tolist() for part in self.ranked(SHOWN))
        names = self.concepts.names
        others = [f"{head}_{i}" for i in range(2, min(SHOWN, len(names)) + 1) for head in ("description", "similarity")]
        shares = [] if self.density is None else ["density", "dead_share"]
        table: list[list[object]] = [["layer", "unit", "description", "similarity", "kind", "p", "adjusted_p", *shares, *others, "labeler"]]
        for row in self.rows():
            unit = row["unit"]
            further = list(zip(index[unit], values[unit], strict=True))[1:] if row["index"] >= 0 else []
            cells = [cell for i, value in further for cell in (names[i], value)] or [""] * len(others)
            own = [row["concept"], row["score"], row["kind"], row["p"], row["adjusted"]]
            table.append([self.layer, unit, *own, *(row[key] for key in shares), *cells, self.metadata.get("labeler", "")])
        return write_rows(path, table)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as safetensors; an older file of that name is replaced only when everything is written."""
        tensors = {name: getattr(self, name) for name in ("score", "p_values", "adjusted")}
        tensors |= {name: part for name in ("scores", "labels") if (part := getattr(self, name)) is not None}
        if self.top is not None:
            tensors["top/ids"], tensors["top/scores"] = self.top
        if self.density is not None:
            tensors |= self.density.tensors()
        values = {
            "layer": self.layer,
            "concepts": list(self.concepts.names),
            "kinds": list(self.concepts.kinds),
            "images": list(self.images),
            "metadata": self.metadata,
        }
        storage.write(path, _KIND, tensors, values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordDissection:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is of another kind, or a part of it does not fit; the message names the file and the key.
        """
        file = storage.File(path, _KIND)
        concepts, images = stored_concepts(file), file.value("images", list)
        if not images or not all(isinstance(name, str) for name in images):
            raise file.error("images", "expected names")
        score = file.tensor("score", torch.float64, (None, len(concepts)))
        units, pairs = len(score), (len(score), len(concepts))
        if not units:
            raise file.error("score", "expected at least one unit")
        p, adjusted = (_probabilities(file, name, score) for name in ("p_values", "adjusted"))
        top = None
        if "top/ids" in file.keys:
            ids = file.tensor("top/ids", torch.int64, (units, None))
            if ids.numel() and not -1 <= int(ids.amin()) <= int(ids.amax()) < len(images):
                raise file.error("top/ids", f"expected positions of {len(images)} images")
            top = ids, file.tensor("top/scores", torch.float32, (units, ids.shape[1]))
        scores = file.tensor("scores", torch.float32, (units, len(images))) if "scores" in file.keys else None
        labels = file.tensor("labels", torch.float32, (len(images), pairs[1])) if "labels" in file.keys else None
        return cls(
            file.value("layer", str), concepts, tuple(images), score, p, adjusted, top, read_density(file, units), scores, labels,
            file.value("metadata", dict),
        )  # fmt: skip

    def report(self, path: str | os.PathLike[str], images: ImageSet | None = None, **options: Any) -> Path:
        """Writes one self-contained HTML page; see :func:`torchprobe.dissection.words.report.write_words_report`."""
        return write_words_report(self, path, images, **options)


def _probabilities(file: storage.File, key: str, score: Tensor) -> Tensor:
    p = file.tensor(key, torch.float64, tuple(score.shape))
    if bool(((p < 0) | (p > 1)).any()) or bool((p.isnan() != score.isnan()).any()):
        raise file.error(key, "expected numbers from 0 to 1, and nan where the score is nan")
    return p
