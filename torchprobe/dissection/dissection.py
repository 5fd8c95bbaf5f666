"""What the units of one layer detect: its scores, its files and its page.

On disk, a dissection is a safetensors file with everything, which is checked when it is read, and tables as CSV.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from torchprobe.common import storage
from torchprobe.datasets.broden import Label
from torchprobe.dissection.activity import Level
from torchprobe.dissection.average_precision import NEGATIVES, SIGNS, Support
from torchprobe.dissection.csv_tables import write_csv
from torchprobe.dissection.iou_null import IoUNull
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking
from torchprobe.dissection.report import write_report
from torchprobe.dissection.result_file import ResultFile, read_csv
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.segment import SegmentedPicture, segment_pictures
from torchprobe.dissection.sparse import read_density

if TYPE_CHECKING:
    from PIL.Image import Image

    from torchprobe.datasets.broden import Broden

_KIND = "torchprobe.dissection"
_LABEL: dict[str, type | tuple[type, ...]] = {
    "number": int,
    "name": str,
    "category": str,
    "categories": list,
    "frequency": int,
    "coverage": (int, float),
    "synonyms": list,
}

Scores = TypeVar("Scores", bound=LayerScores)


class Dissection(LayerScores):
    """What the units of one layer detect; :class:`torchprobe.dissection.scores.LayerScores` lists its tables and summaries."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as safetensors; an older file of that name is replaced only when everything is written."""
        _save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dissection:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a dissection, or a part of it does not fit; the message names the file and the key.
        """
        return _load(path, cls)

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
            FileNotFoundError: there is no such file.
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


# -- the file ----------------------------------------------------------------------------------------------------------------


def _save(dissection: LayerScores, path: str | os.PathLike[str]) -> None:
    """See :meth:`Dissection.save`."""
    tensors = {"category": dissection.category, "images": dissection.images}
    for name in ("thresholds", "outside", "average_precision", "p_values", "scores"):
        if (part := getattr(dissection, name)) is not None:
            tensors[name] = part
    for prefix, group in (
        ("counts", dissection.counts),
        ("support", dissection.support),
        ("level", dissection.level),
        ("iou_null", dissection.iou_null),
    ):
        if group is not None:
            tensors |= {f"{prefix}/{name}": part for name, part in group._asdict().items()}
    if dissection.top is not None:
        tensors["top/ids"], tensors["top/scores"] = dissection.top
    if dissection.top_maps is not None:
        tensors["top/maps"], tensors["top/boxes"] = dissection.top_maps
    if dissection.density is not None:
        tensors |= dissection.density.tensors()
    values = {
        "layer": dissection.layer,
        "units": dissection.units,
        "labels": [asdict(label) for label in dissection.labels],
        "categories": list(dissection.categories),
        "metadata": dissection.metadata,
    }
    if (ranking := dissection.ranking) is not None:
        tensors |= {f"ranking/{name}": getattr(ranking, name) for name in ("crow", "column", "annotated")}
        values["ranking"] = {"sign": ranking.sign, "negatives": ranking.negatives}
    storage.write(path, _KIND, tensors, values)


def _load(path: str | os.PathLike[str], kind: type[Scores]) -> Scores:
    """Reads a file of :func:`_save`. ``kind``: the class of the result."""
    file = storage.File(path, _KIND)
    labels = tuple(_label(file, record) for record in file.value("labels", list))
    categories = tuple(file.value("categories", list))
    units, count = file.value("units", int), len(labels)
    if not all(isinstance(name, str) for name in categories) or units < 1:
        raise file.error("categories", "names are text, and there is at least one unit")
    category = file.tensor("category", torch.int64, (count,))
    images = file.tensor("images", torch.int64, (None,))
    if count and not 0 <= int(category.amin()) <= int(category.amax()) < len(categories):
        raise file.error("category", f"expected numbers from 0 to {len(categories) - 1}")
    dissection = kind(file.value("layer", str), labels, categories, category, units, images, metadata=file.value("metadata", dict))
    pairs = (units, count)
    dissection.thresholds = _maybe(file, "thresholds", torch.float32, (units,))
    for name in ("average_precision", "p_values"):
        setattr(dissection, name, _shares(file, name, pairs) if name in file.keys else None)
    dissection.scores = _maybe(file, "scores", torch.float32, (units, len(images)))
    if "outside" in file.keys:
        dissection.outside = _counts(file, "outside", (count,))
    if "counts/truth" in file.keys:
        shapes = {"intersection": pairs, "activation": pairs, "truth": (count,)}
        dissection.counts = Counts(*(_counts(file, f"counts/{name}", shape) for name, shape in shapes.items()))
    if "level/values" in file.keys:
        above, equal = (_shares(file, f"level/{name}", (units,)) for name in ("above", "equal"))
        dissection.level = Level(_counts(file, "level/values", (units,)), above, equal)
    if "iou_null/chance" in file.keys:
        chance, p, adjusted = (_shares(file, f"iou_null/{name}", pairs) for name in ("chance", "p", "adjusted"))
        scale, largest = file.tensor("iou_null/scale", torch.float64, (count,)), file.tensor("iou_null/largest", torch.float64, (None,))
        dissection.iou_null = IoUNull(chance, p, adjusted, scale, largest)
    if dissection.average_precision is not None:
        if dissection.p_values is None:
            raise file.error("p_values", "missing")
        dissection.support = Support(*(_counts(file, f"support/{name}", (count,)) for name in Support._fields))
    if "top/ids" in file.keys:
        ids = file.tensor("top/ids", torch.int64, (units, None))
        dissection.top = ids, file.tensor("top/scores", torch.float32, (units, ids.shape[1]))
        if "top/maps" in file.keys:
            maps = file.tensor("top/maps", torch.float32, (*ids.shape, None, None))
            dissection.top_maps = maps, file.tensor("top/boxes", torch.float64, (*ids.shape, 4))
    dissection.density = read_density(file, units)
    if dissection.scores is not None:
        dissection.ranking = _ranking(file, category, len(categories), len(images))
    return dissection


def _label(file: storage.File, record: object) -> Label:
    if not (
        isinstance(record, dict) and record.keys() == _LABEL.keys() and all(isinstance(record[name], kind) for name, kind in _LABEL.items())
    ):
        raise file.error("labels", f"each label has {', '.join(_LABEL)}; got {str(record)[:200]}")
    for name in ("categories", "synonyms"):
        if not all(isinstance(text, str) for text in record[name]):
            raise file.error("labels", f"{name} are text; got {str(record[name])[:200]}")
    return Label(**{**record, "categories": tuple(record["categories"]), "synonyms": tuple(record["synonyms"])})


def _maybe(file: storage.File, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    return file.tensor(key, dtype, shape) if key in file.keys else None


def _shares(file: storage.File, key: str, shape: tuple[int | None, ...]) -> Tensor:
    shares = file.tensor(key, torch.float64, shape)
    if bool(((shares < 0) | (shares > 1)).any()):
        raise file.error(key, "expected numbers from 0 to 1")
    return shares


def _counts(file: storage.File, key: str, shape: tuple[int | None, ...]) -> Tensor:
    counts = file.tensor(key, torch.int64, shape)
    if bool((counts < 0).any()):
        raise file.error(key, "holds negative counts")
    return counts


def _ranking(file: storage.File, category: Tensor, categories: int, images: int) -> Ranking:
    crow = _counts(file, "ranking/crow", (images + 1,))
    column = _counts(file, "ranking/column", (None,))
    annotated = file.tensor("ranking/annotated", torch.bool, (images, None))
    rules = file.value("ranking", dict)
    sound = bool((crow.diff() >= 0).all()) and int(crow[0]) == 0 and int(crow[-1]) == len(column)
    if not sound or bool((column >= len(category)).any()) or annotated.shape[1] > categories:
        raise file.error("ranking/crow", "expected the rows of a matrix of images and labels")
    if rules.get("sign") not in SIGNS or rules.get("negatives") not in NEGATIVES:
        raise file.error("ranking", f"unknown sign or negatives: {str(rules)[:200]}")
    return Ranking(crow, column, annotated, category, rules["sign"], rules["negatives"])
