"""From each concept to its units: which units encode it or detect it, and among how many images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.dissection import summaries
from torchprobe.dissection.layer_tables import LayerTables


@dataclass(frozen=True, slots=True)
class ConceptUnits:
    """A concept and its units, which count from 0.

    ``index`` is the column of the label in the tables, ``number`` its number in the data set. ``images`` are ranked for average
    precision, ``positives`` of them show the concept, ``prevalence`` is the share. ``pixels`` have the label. ``encoded_by``: units that
    encode it, best gain first. ``detected_by``: units whose best label it is, with an IoU that reaches the threshold, best first.
    ``best_unit`` has the highest average precision; ``average_precision``, ``gain`` and ``p_value``, corrected for all pairs, are its own.
    ``iou`` is the highest of any unit, that of ``iou_unit``. What was not computed is None.
    """

    index: int
    number: int
    category: str
    label: str
    images: int | None
    positives: int | None
    prevalence: float | None
    pixels: int | None
    encoded_by: tuple[int, ...]
    detected_by: tuple[int, ...]
    best_unit: int | None
    average_precision: float | None
    gain: float | None
    p_value: float | None
    iou_unit: int | None
    iou: float | None


def concept_units(dissection: LayerTables, encoded: Tensor | None, threshold: float = summaries.THRESHOLD) -> list[ConceptUnits]:
    """Every concept that some image shows, those of most units first.

    Args:
        dissection: of the layer.
        encoded: bool (U, L), see :meth:`torchprobe.dissection.scores.LayerScores.encoded`; None without average precision.
        threshold: the smallest IoU of a detector.
    """
    iou, ap, gain, support = dissection.iou, dissection.average_precision, dissection.gain, dissection.support
    truth = None if dissection.counts is None else dissection.counts.truth
    adjusted = None if ap is None else dissection.adjusted_p_values()
    best_iou = None if iou is None or not iou.shape[1] else summaries.first_best(iou)
    rows = []
    for i, label in enumerate(dissection.labels):
        positives = None if support is None else int(support.positives[i])
        pixels = None if truth is None else int(truth[i])
        if not positives and not pixels:
            continue
        encoding = [] if encoded is None or gain is None else _descending(gain[:, i], encoded[:, i])
        detecting = [] if best_iou is None else _descending(best_iou[0], (best_iou[1] == i) & (best_iou[0] >= max(threshold, 1e-300)))
        ap_unit = None if ap is None or not positives else int(ap[:, i].nan_to_num(nan=-1).argmax())
        iou_unit = None if iou is None or not pixels else int(iou[:, i].argmax())
        rows.append(
            ConceptUnits(
                i, label.number, dissection.categories[int(dissection.category[i])], label.name,
                None if support is None else int(support.images[i]), positives, _at(dissection.prevalence, i), pixels,
                tuple(encoding), tuple(detecting),
                ap_unit, _at(ap, ap_unit, i), _at(gain, ap_unit, i), _at(adjusted, ap_unit, i), iou_unit, _at(iou, iou_unit, i),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-len(row.encoded_by), -len(row.detected_by), -_known(row.gain), -_known(row.iou)))


def _descending(value: Tensor, chosen: Tensor) -> list[int]:
    units = chosen.nonzero().flatten()
    return [int(units[k]) for k in value[units].argsort(descending=True, stable=True)]


def _at(table: Tensor | None, *index: int | None) -> float | None:
    if table is None or None in index:
        return None
    value = table[tuple(torch.tensor(index))]
    return None if value.isnan() else float(value)


def _known(value: float | None) -> float:
    return -1.0 if value is None else value
