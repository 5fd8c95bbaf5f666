"""What units detect, as a table on disk: the columns of the original's result file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchprobe.common.files import replacing
from torchprobe.dissection.summaries import best_labels

if TYPE_CHECKING:
    from torchprobe.dissection.dissection import Dissection

IOU_COLUMNS = ("label", "truth", "activation", "intersect", "iou")
AP_COLUMNS = ("label", "images", "positives", "ap", "prevalence", "p")


def write_csv(dissection: Dissection, path: str | os.PathLike[str], score: str = "iou") -> Path:
    """One line a unit, best first: ``unit`` (from 1, as in the original), ``category``, ``label``, ``score`` of its best label, then for
    each category its best label there, prefixed ``<category>-``: :data:`IOU_COLUMNS`, the original's, or :data:`AP_COLUMNS`.

    Where every score of a category is 0 or nan, label and numbers are empty or 0.
    """
    table = dissection._table(score)
    columns = IOU_COLUMNS if score == "iou" else AP_COLUMNS
    best = best_labels(table.nan_to_num(), dissection.category, len(dissection.categories))
    overall = best.iou.amax(1)
    order = overall.argsort(descending=True, stable=True).tolist()
    header = ["unit", "category", "label", "score", *(f"{name}-{column}" for name in dissection.categories for column in columns)]
    cells = _iou_cells(dissection, best.label) if score == "iou" else _ap_cells(dissection, best.label)
    first = (best.iou == overall[:, None]).int().cumsum(1).eq(1).int().argmax(1).tolist()
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for unit in order:
            label = int(best.label[unit, first[unit]])
            category = dissection.categories[first[unit]] if label >= 0 else ""
            name = dissection.labels[label].name if label >= 0 else ""
            writer.writerow([unit + 1, category, name, float(overall[unit]), *(cell for part in cells for cell in part[unit])])
    return Path(path)


def _iou_cells(dissection: Dissection, label: Tensor) -> list[list[Sequence[Any]]]:
    """For each category and unit the cells of :data:`IOU_COLUMNS`."""
    counts, iou = dissection.counts, dissection.iou
    assert counts is not None and iou is not None
    return [
        [
            (name, *numbers)
            for name, *numbers in zip(
                _names(dissection, column),
                _pick(counts.truth.expand_as(counts.intersection), column),
                _pick(counts.activation, column),
                _pick(counts.intersection, column),
                _pick(iou, column),
                strict=True,
            )
        ]
        for column in label.unbind(1)
    ]


def _ap_cells(dissection: Dissection, label: Tensor) -> list[list[Sequence[Any]]]:
    """The same for :data:`AP_COLUMNS`."""
    ap, p, support, prevalence = dissection.average_precision, dissection.p_values, dissection.support, dissection.prevalence
    assert ap is not None and p is not None and support is not None and prevalence is not None
    return [
        [
            (name, *numbers)
            for name, *numbers in zip(
                _names(dissection, column),
                *(_pick(part.expand_as(ap), column) for part in (support.images, support.positives)),
                *(_pick(part.expand_as(ap), column) for part in (ap, prevalence, p)),
                strict=True,
            )
        ]
        for column in label.unbind(1)
    ]


def _names(dissection: Dissection, column: Tensor) -> list[str]:
    return [dissection.labels[label].name if label >= 0 else "" for label in column.tolist()]


def _pick(table: Tensor, column: Tensor) -> list[Any]:
    """Of each unit the number of its label; 0 where it has none."""
    if table.shape[1] == 0:
        return [0] * len(column)
    picked = table[torch.arange(len(column)), column.clamp(min=0)]
    return picked.where(column >= 0, 0).tolist()
