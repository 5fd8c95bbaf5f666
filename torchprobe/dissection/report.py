"""The page of one layer: which concepts its units go along with, what each unit responds to, and what all of that is read against."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchprobe.dissection import report_text
from torchprobe.dissection.report_pictures import Pictures
from torchprobe.dissection.summaries import THRESHOLD
from torchprobe.rendering.dissection_page import CategoryBar, DissectionPage, UnitRow, write_dissection
from torchprobe.rendering.page import Fact, require
from torchprobe.rendering.tables import Column, number

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden
    from torchprobe.dissection.dissection import Dissection, UnitConcept

OTHERS = 4
"""Further concepts that a row names."""


@dataclass
class Report:
    """What a page is made of, and from what value on a unit counts.

    Attributes:
        dissection: of the layer.
        nulls: the same layer under conditions in which its units cannot know the concepts – random weights, shuffled labels –, by name.
        threshold: the IoU from which a unit counts as a detector.
        ap_threshold, alpha: the average precision from which, and the level at which, a unit counts as encoding a concept.
        score: by which units are ordered and labelled: "iou", or "gain", average precision above prevalence. Default: IoU if there is one.
    """

    dissection: Dissection
    nulls: Mapping[str, Dissection] = field(default_factory=dict)
    threshold: float = THRESHOLD
    ap_threshold: float = 0.9
    alpha: float = 0.05
    score: str = ""

    def __post_init__(self) -> None:
        self.score = self.score or ("iou" if self.dissection.counts is not None else "gain")
        self.best: list[UnitConcept] = self.dissection.best(self.score)
        ap = self.dissection.average_precision is not None
        self.encoded: Tensor | None = self.dissection.encoded(self.ap_threshold, self.alpha) if ap else None

    def detects(self, row: UnitConcept) -> bool:
        """Whether a unit counts by its best label: an IoU of the threshold, or a concept that it encodes."""
        if row.index < 0:
            return False
        if self.score == "iou":
            return row.score >= self.threshold
        return self.encoded is not None and bool(self.encoded[row.unit, row.index])

    def bars(self) -> list[CategoryBar]:
        """Each unit that counts, by its best label; categories in the order of the data set."""
        title = self.titles()
        counted = Counter((row.category, title[row.index]) for row in self.best if self.detects(row))
        names = [name for name in self.dissection.categories if any(category == name for category, _ in counted)]
        return [CategoryBar(name, [(label, n) for (category, label), n in counted.most_common() if category == name]) for name in names]

    def titles(self) -> list[str]:
        """The labels as people read them; where two of a category would be the same, as the data set calls them."""
        labels = self.dissection.labels
        seen = Counter((label.category, label.title) for label in labels)
        return [label.title if seen[label.category, label.title] == 1 else label.name for label in labels]

    def columns(self) -> list[Column]:
        """Those of the table of units."""
        columns = [
            Column("unit", "unit", "index of the unit within the layer, from 0", "index"),
            Column("label", "concept", "the concept with the unit's highest score", "text"),
            Column("category", "category", "its category", "text"),
        ]
        if self.dissection.counts is not None:
            columns.append(Column("iou", "IoU", "pixels where the unit is active and the concept is, over those where either is"))
        if self.dissection.average_precision is not None:
            columns += [
                Column("ap", "AP", "average precision: how well the unit's score ranks the images that show the concept before the others"),
                Column("prevalence", "chance", "share of the images that show the concept: about the AP of a random ranking"),
                Column(
                    "p", "p", "probability that a random ranking reaches that AP; for this pair alone, not corrected for the many pairs"
                ),
                Column("encodes", "encodes", f"concepts with AP ≥ {self.ap_threshold:g} that is significant after correction", "count"),
            ]
        columns += [
            Column("threshold", "threshold", "the level that an active position exceeds", optional=True),
            Column("others", "then", "the next best concepts", "text"),
        ]
        return columns

    def units(self, pictures: Pictures | None = None) -> list[UnitRow]:
        """One row a unit, best first."""
        table = self.dissection._table(self.score).nan_to_num(nan=-math.inf)
        scores, order = table.topk(min(OTHERS + 1, table.shape[1]), dim=1)
        title, labels = self.titles(), self.dissection.labels
        encodes = None if self.encoded is None else self.encoded.sum(1).tolist()
        thresholds = None if self.dissection.thresholds is None else self.dissection.thresholds.tolist()
        rows = []
        for row in self.best:
            found = zip(scores[row.unit].tolist(), order[row.unit].tolist(), strict=True)
            others = [(i, score) for score, i in found if i != row.index and score > 0][:OTHERS]
            values = {
                "unit": row.unit,
                "label": title[row.index] if row.index >= 0 else "",
                "category": row.category,
                "iou": row.iou,
                "ap": row.average_precision,
                "prevalence": row.prevalence,
                "p": row.p_value,
                "encodes": None if encodes is None else encodes[row.unit],
                "threshold": None if thresholds is None else thresholds[row.unit],
                "others": ", ".join(f"{title[i]} {number(score, 2)}" for i, score in others),
                "detector": self.detects(row),
            }
            search = " ".join([row.label, *(f"{title[i]} {labels[i].name}" for i, _ in others)])
            rows.append(UnitRow(values, pictures.of(row.unit) if pictures else (), search))
        return rows

    def facts(self) -> list[Fact]:
        """The numbers at the head."""
        d = self.dissection
        facts = [Fact("Directions" if d.metadata.get("basis") else "Units", number(d.units))]
        if d.counts is not None:
            report, paper = d.unique_detectors("report", self.threshold), d.unique_detectors("paper", self.threshold)
            facts += [
                Fact(
                    "Detectors",
                    number(report.detectors),
                    f"units with an IoU of {self.threshold:g} or more, {report.detectors / d.units:.0%}",
                ),
                Fact(
                    "Concepts with a detector", number(report.unique), f"by the best label of each unit; {paper.unique} by the paper's rule"
                ),
            ]
        if self.encoded is not None:
            count = int(self.encoded.any(0).sum())
            facts.append(
                Fact("Concepts encoded", number(count), f"AP ≥ {self.ap_threshold:g}, significant at {self.alpha:g} after correction")
            )
        return [*facts, Fact("Images", number(len(d.images)), report_text.dataset(d))]

    def comparison(self) -> list[dict[str, Any]]:
        """The layer beside its nulls: one row each."""
        rows = []
        for name, d in {report_text.OWN: self.dissection, **self.nulls}.items():
            row: dict[str, Any] = {"layer": name}
            if d.counts is not None:
                found, best = d.unique_detectors("report", self.threshold), d._table("iou").amax(1)
                row |= {"detectors": found.detectors, "concepts": found.unique, "paper": d.unique_detectors("paper", self.threshold).unique}
                row |= {"median": float(best.median()), "highest": float(best.amax())}
            if d.average_precision is not None:
                row["encoded"] = len(d.unique_concepts(self.ap_threshold, self.alpha))
            rows.append(row)
        return rows

    def page(self, pictures: Pictures | None = None) -> DissectionPage:
        """Everything together."""
        d = self.dissection
        return DissectionPage(
            kind="dissection",
            title=f"{d.metadata.get('model', 'model')} · {d.layer or 'output'}",
            summary=report_text.SUMMARY,
            notice=report_text.notice(d),
            facts=self.facts(),
            lead=[report_text.beside_nulls(self)],
            sections=[report_text.reading(self)],
            footer=report_text.footer(d),
            bars=self.bars(),
            bars_note=report_text.bars_note(self),
            units=self.units(pictures),
            units_note=report_text.units_note(pictures),
            columns=self.columns(),
            thumbnails=pictures.thumbnails if pictures else (),
        )


def write_report(
    dissection: Dissection,
    path: str | os.PathLike[str],
    broden: Broden | None = None,
    encoder: Any = None,
    *,
    nulls: Mapping[str, Dissection] | None = None,
    images: int = 5,
    evidence: int = 0,
    basis: Tensor | None = None,
    units: Sequence[int] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **choices: Any,
) -> Path:
    """Writes one self-contained HTML page about a layer, and returns the path.

    Args:
        dissection: of the layer.
        path: the file.
        broden: the data set it was made from; without it the page has no pictures.
        encoder: the network it was made from; without it the pictures show where the concept is, but not where the unit is active.
        nulls: dissections of the same layer to read it against, by name: the network at random initialisation, shuffled labels.
        images: of the top images, how many are shown for each unit.
        evidence: units, best first, for which the page also shows what speaks for them by integrated gradients; needs captum.
        basis: the directions, where it is no dissection of units.
        units: only pictures of these; default: of all.
        progress: told (steps done, steps in all); a unit's evidence is one step, all other pictures together are another.
        choices: ``threshold``, ``ap_threshold``, ``alpha``, ``score``; see :class:`Report`.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; the message has the command.
        DatasetError: a picture or label map cannot be read.
        ValueError: ``encoder`` has another number of units than the dissection.
    """
    require()

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, 1 + evidence)

    report = Report(dissection, nulls or {}, **choices)
    pictures = None
    if broden is not None and dissection.top is not None and images > 0:
        chosen = [row for row in report.best if units is None or row.unit in set(units)]
        pictures = Pictures(dissection, broden, {row.unit: row.index for row in chosen}, images)
        if encoder is not None:
            pictures.add_regions(encoder, basis)
            for done, row in enumerate(chosen[:evidence], 1):
                tell(done)
                pictures.add_evidence(encoder, row.unit, basis)
    written = write_dissection(report.page(pictures), path)
    tell(1 + evidence)
    return written
