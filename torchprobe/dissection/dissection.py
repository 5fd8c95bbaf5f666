"""What the units of one layer detect: its scores, its files and its page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchprobe.dissection import file
from torchprobe.dissection.report import write_report
from torchprobe.dissection.scores import LayerScores

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden


class Dissection(LayerScores):
    """What the units of one layer detect; :class:`torchprobe.dissection.scores.LayerScores` lists its tables and summaries."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as safetensors; an older file of that name is replaced only when everything is written."""
        file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dissection:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a dissection, or a part of it does not fit; the message names the file and the key.
        """
        return file.load(path, cls)

    def to_csv(self, path: str | os.PathLike[str], score: str = "iou") -> Path:
        """Writes a table; for "iou" it has the columns of the original. See :func:`torchprobe.dissection.file.write_csv`."""
        return file.write_csv(self, path, score)

    def report(self, path: str | os.PathLike[str], broden: Broden, encoder: nn.Module | None = None, **options: Any) -> Path:
        """Writes one self-contained HTML page; options and errors as for :func:`torchprobe.dissection.report.write_report`."""
        return write_report(self, path, broden, encoder, **options)
