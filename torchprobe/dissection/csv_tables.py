"""The tables of units as CSV, with the columns of the original: one line for each unit, with its best label in each category."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.csv_files import write_rows
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.summaries import best_labels, first_best

UNIT_COLUMNS = ("unit", "category", "label", "score")
IOU_COLUMNS = ("label", "truth", "activation", "intersect", "iou")
AP_COLUMNS = ("label", "images", "positives", "ap", "prevalence", "p")


def write_csv(dissection: LayerScores, path: str | os.PathLike[str], score: str = "iou") -> Path:
    """See :meth:`torchprobe.dissection.Dissection.to_csv`."""
    table = dissection.table(score)
    columns = IOU_COLUMNS if score == "iou" else AP_COLUMNS
    best = best_labels(table.nan_to_num(), dissection.category, len(dissection.categories))
    overall, first = first_best(best.iou)
    order = overall.argsort(descending=True, stable=True).tolist()
    header = [*UNIT_COLUMNS, *(f"{name}-{column}" for name in dissection.categories for column in columns)]
    shares = None if dissection.density is None else dissection.density.rows()
    header += [] if shares is None else ["density", "dead_share"]
    tables = _tables(dissection, score)
    cells = [  # by category and unit
        list(zip(_names(dissection, label), *(_pick(table, label) for table in tables), strict=True)) for label in best.label.unbind(1)
    ]
    rows: list[list[object]] = [list(header)]
    for unit in order:
        label = int(best.label[unit, first[unit]])
        category = dissection.categories[int(first[unit])] if label >= 0 else ""
        name = dissection.labels[label].name if label >= 0 else ""
        last = [] if shares is None else [*shares[unit].values()]
        rows.append([unit + 1, category, name, float(overall[unit]), *(cell for part in cells for cell in part[unit]), *last])
    return write_rows(path, rows)


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
