"""What the units of one layer detect: its scores, its files and its page.

On disk, a dissection is a safetensors file with everything, which is checked when it is read, and tables as CSV.
"""

from __future__ import annotations

import csv
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from torchprobe.common import storage
from torchprobe.common.files import replacing
from torchprobe.datasets.broden import Label
from torchprobe.dissection.activity import Level
from torchprobe.dissection.average_precision import NEGATIVES, SIGNS, Support
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking
from torchprobe.dissection.report import write_report
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.sparse import read_density
from torchprobe.dissection.summaries import best_labels, first_best

if TYPE_CHECKING:
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

IOU_COLUMNS = ("label", "truth", "activation", "intersect", "iou")
AP_COLUMNS = ("label", "images", "positives", "ap", "prevalence", "p")

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
        each category, the columns of the best label there, with the prefix ``<category>-``: those of the original, :data:`IOU_COLUMNS`,
        or :data:`AP_COLUMNS`. If all scores of a category are 0 or nan, its label is empty and its numbers are 0. For latents,
        ``density`` and ``dead_share`` come last.

        Args:
            path: the file.
            score: "iou", "ap" or "gain".

        Raises:
            ValueError: the score was not computed.
        """
        return _write_csv(self, path, score)

    def report(self, path: str | os.PathLike[str], broden: Broden, encoder: nn.Module | None = None, **options: Any) -> Path:
        """Writes one self-contained HTML page; options and errors as for :func:`torchprobe.dissection.report.write_report`."""
        return write_report(self, path, broden, encoder, **options)


# -- the file ----------------------------------------------------------------------------------------------------------------


def _save(dissection: LayerScores, path: str | os.PathLike[str]) -> None:
    """See :meth:`Dissection.save`."""
    tensors = {"category": dissection.category, "images": dissection.images}
    for name in ("thresholds", "outside", "average_precision", "p_values", "scores"):
        if (part := getattr(dissection, name)) is not None:
            tensors[name] = part
    for prefix, group in (("counts", dissection.counts), ("support", dissection.support), ("level", dissection.level)):
        if group is not None:
            tensors |= {f"{prefix}/{name}": part for name, part in group._asdict().items()}
    if dissection.top is not None:
        tensors["top/ids"], tensors["top/scores"] = dissection.top
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
    if dissection.average_precision is not None:
        if dissection.p_values is None:
            raise file.error("p_values", "missing")
        dissection.support = Support(*(_counts(file, f"support/{name}", (count,)) for name in Support._fields))
    if "top/ids" in file.keys:
        ids = file.tensor("top/ids", torch.int64, (units, None))
        dissection.top = ids, file.tensor("top/scores", torch.float32, (units, ids.shape[1]))
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


# -- tables ------------------------------------------------------------------------------------------------------------------


def _write_csv(dissection: LayerScores, path: str | os.PathLike[str], score: str = "iou") -> Path:
    """See :meth:`Dissection.to_csv`."""
    table = dissection.table(score)
    columns = IOU_COLUMNS if score == "iou" else AP_COLUMNS
    best = best_labels(table.nan_to_num(), dissection.category, len(dissection.categories))
    overall, first = first_best(best.iou)
    order = overall.argsort(descending=True, stable=True).tolist()
    header = ["unit", "category", "label", "score", *(f"{name}-{column}" for name in dissection.categories for column in columns)]
    shares = None if dissection.density is None else dissection.density.rows()
    if shares is not None:
        header += ["density", "dead_share"]
    tables = _tables(dissection, score)
    cells = [  # by category and unit
        list(zip(_names(dissection, label), *(_pick(table, label) for table in tables), strict=True)) for label in best.label.unbind(1)
    ]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for unit in order:
            label = int(best.label[unit, first[unit]])
            category = dissection.categories[int(first[unit])] if label >= 0 else ""
            name = dissection.labels[label].name if label >= 0 else ""
            writer.writerow(
                [
                    unit + 1,
                    category,
                    name,
                    float(overall[unit]),
                    *(cell for part in cells for cell in part[unit]),
                    *(shares[unit].values() if shares else ()),
                ]
            )
    return Path(path)


def _tables(dissection: LayerScores, score: str) -> tuple[Tensor, ...]:
    """The numbers of :data:`IOU_COLUMNS` or :data:`AP_COLUMNS`, each (units, labels)."""
    if score == "iou":
        counts, iou = dissection.counts, dissection.iou
        assert counts is not None and iou is not None
        return counts.truth.expand_as(iou), counts.activation, counts.intersection, iou
    ap, p, support, prevalence = dissection.average_precision, dissection.p_values, dissection.support, dissection.prevalence
    assert ap is not None and p is not None and support is not None and prevalence is not None
    return support.images.expand_as(ap), support.positives.expand_as(ap), ap, prevalence.expand_as(ap), p


def _names(dissection: LayerScores, label: Tensor) -> list[str]:
    return [dissection.labels[i].name if i >= 0 else "" for i in label.tolist()]


def _pick(table: Tensor, label: Tensor) -> list[Any]:
    """For each unit, the number in the column of its label; 0 if it has no label."""
    if table.shape[1] == 0:
        return [0] * len(label)
    picked = table[torch.arange(len(label)), label.clamp(min=0)]
    return picked.where(label >= 0, 0).tolist()
