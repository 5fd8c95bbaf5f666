"""What the units of one layer detect: its scores, its files and its page.

On disk, a dissection is a safetensors file with everything (:mod:`torchprobe.dissection.dissection_file`), and tables as CSV.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchprobe.datasets.broden import Label
from torchprobe.dissection.csv_tables import write_csv
from torchprobe.dissection.dissection_file import load_dissection, save_dissection
from torchprobe.dissection.report import Report, write_report
from torchprobe.dissection.result_file import ResultFile, read_csv
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.segment import SegmentedPicture, segment_pictures
from torchprobe.rendering.notebook import fragment

if TYPE_CHECKING:
    from PIL.Image import Image

    from torchprobe.datasets.broden import Broden


class Dissection(LayerScores):
    """What the units of one layer detect; :class:`torchprobe.dissection.scores.LayerScores` lists its tables and summaries."""

    def _repr_html_(self) -> str:
        """The facts and the units, best first, for a notebook."""
        report = Report(self)
        rows = [unit.values for unit in report.units()]
        title = f"{self.layer or '(output)'}: {self.units:,} units, {len(self.labels):,} labels, {len(self.images):,} images"
        note = "Compare with random weights and with shuffled labels: units of an untrained network overlap concepts too."
        return fragment(title, report.facts(), rows, report.columns(), note, of="units")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as safetensors; an older file of that name is replaced only when everything is written."""
        save_dissection(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dissection:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a dissection, or a part of it does not fit; the message names the file and the key.
        """
        return load_dissection(path, cls)

    def to_csv(self, path: str | os.PathLike[str], score: str = "iou") -> Path:
        """Writes a table with one line for each unit, best unit first; returns the path.

        The columns are ``unit`` (from 1, as in the original), and ``category``, ``label`` and ``score`` of its best label. Then come, for
        each category, the columns of the best label there, with the prefix ``<category>-``: those of the original, ``label``, ``truth``,
        ``activation``, ``intersect`` and ``iou``, or ``label``, ``images``, ``positives``, ``ap``, ``prevalence`` and ``p``. If all scores
        of a category are 0 or nan, its label is empty and its numbers are 0. For latents, ``density`` and ``dead_share`` come last.

        Args:
            path: the file.
            score: "iou", "ap" or "gain".

        Raises:
            ValueError: the score was not computed.
        """
        return write_csv(self, path, score)

    @staticmethod
    def from_csv(path: str | os.PathLike[str], layer: str | None = None, labels: Sequence[Label] | None = None) -> ResultFile:
        """Reads a result file of Network Dissection (``<layer>-result.csv``, ``tally.csv``), or one of :meth:`to_csv`.

        The file holds the best label of each unit in each category. Its best labels, detectors and table can be compared with those of a
        new dissection. What it does not hold is unknown, see :class:`torchprobe.dissection.result_file.ResultFile`.

        Args:
            path: the file.
            layer: the name of the layer; default: the name of the file, without ``.csv``.
            labels: the columns of the tables, such as ``broden.labels``; default: the labels in the file, by category and name. A label
                without a name, as some published files have, comes after those given.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a result file, its numbers contradict each other, or a label is not among those given. The message names
                the line.

        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/conv5.csv"
        >>> with open(path, "w") as file:
        ...     _ = file.write("unit,category,label,score,part-label,part-truth,part-activation,part-intersect,part-iou\\n"
        ...                    "2,part,wheel,0.5,wheel,30,30,20,0.5\\n1,part,leg,0.25,leg,20,30,10,0.25\\n")
        >>> old = Dissection.from_csv(path)
        >>> old.iou
        tensor([[0.2500,    nan],
                [   nan, 0.5000]], dtype=torch.float64)
        >>> [(row.unit, row.label) for row in old.best()], old.unique_detectors().unique
        ([(1, 'wheel'), (0, 'leg')], 2)
        """
        return read_csv(path, layer, labels)

    def report(self, path: str | os.PathLike[str], broden: Broden, encoder: nn.Module | None = None, **options: Any) -> Path:
        """Writes one self-contained HTML page; options and errors as for :func:`torchprobe.dissection.report.write_report`."""
        return write_report(self, path, broden, encoder, **options)

    def segment(self, model: nn.Module, pictures: Iterable[str | os.PathLike[str] | Image], **options: Any) -> list[SegmentedPicture]:
        """Where units are above their thresholds on new pictures; options and errors as for
        :func:`torchprobe.dissection.segment.segment_pictures`."""
        return segment_pictures(self, model, pictures, **options)
