"""The page of one layer: which concepts its units coincide with, what each unit responds to, and the nulls to compare with."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.messages import listing
from torchprobe.common.runs import CountCallback
from torchprobe.datasets.geometry import Box
from torchprobe.dissection import report_text
from torchprobe.dissection.batches import Preprocess
from torchprobe.dissection.concepts import concept_units
from torchprobe.dissection.facts import require_same_data
from torchprobe.dissection.report_pictures import Pictures, show_pictures
from torchprobe.dissection.report_sparse import DENSITY_COLUMNS, UNITS_OF, density_facts, kind_of
from torchprobe.dissection.report_text import Limits
from torchprobe.dissection.scores import LayerScores, UnitConcept
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.summaries import THRESHOLD, default_gain
from torchprobe.rendering.dissection_page import CategoryBar, ConceptRow, DissectionPage, UnitRow, write_dissection
from torchprobe.rendering.page import Fact, require
from torchprobe.rendering.tables import Column, Row, number

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden

OTHERS = 4
"""Further concepts that a row names."""


@dataclass
class Report:
    """The tables of a page.

    Attributes:
        dissection: of the layer.
        nulls: name → the same layer in conditions where its units cannot know the concepts: random weights, shuffled labels.
        threshold: the smallest IoU of a detector.
        ap_threshold, gain_threshold, alpha: the smallest average precision and gain over prevalence, and the level of significance, with
            which a unit encodes a concept. Default of the gain: 2 · ap_threshold − 1.
        score: orders and labels the units: "iou", or "gain", average precision above prevalence. Default: IoU if it was computed.
    """

    dissection: LayerScores
    nulls: Mapping[str, LayerScores] = field(default_factory=dict)
    threshold: float = THRESHOLD
    ap_threshold: float = 0.9
    alpha: float = 0.05
    score: str = ""
    gain_threshold: float | None = None

    def __post_init__(self) -> None:
        least = default_gain(self.ap_threshold) if self.gain_threshold is None else self.gain_threshold
        self.limits = Limits(self.threshold, self.ap_threshold, self.alpha, least)
        self.score = self.score or ("iou" if self.dissection.counts is not None else "gain")
        self.best: list[UnitConcept] = self.dissection.best(self.score)
        ap = self.dissection.average_precision is not None
        self.encoded: Tensor | None = self._encoded(self.dissection) if ap else None
        self.concepts = concept_units(self.dissection, self.encoded, self.threshold)

    def _encoded(self, dissection: LayerScores) -> Tensor:
        return dissection.encoded(self.ap_threshold, self.alpha, gain_threshold=self.limits.gain)

    def detects(self, row: UnitConcept) -> bool:
        """Whether a unit counts with its best label: its IoU reaches the threshold, or it encodes the concept."""
        if row.index < 0:
            return False
        if self.score == "iou":
            return row.score >= self.threshold
        return self.encoded is not None and bool(self.encoded[row.unit, row.index])

    def bars(self) -> list[CategoryBar]:
        """Each unit that counts, with its best label; categories in the order of the data set."""
        title = self.titles()
        counted = Counter((row.category, title[row.index]) for row in self.best if self.detects(row))
        names = [name for name in self.dissection.categories if any(category == name for category, _ in counted)]
        return [CategoryBar(name, [(label, n) for (category, label), n in counted.most_common() if category == name]) for name in names]

    def titles(self) -> list[str]:
        """The labels as people read them; if two labels of a category have the same title, their names in the data set."""
        labels = self.dissection.labels
        seen = Counter((label.category, label.title) for label in labels)
        return [label.title if seen[label.category, label.title] == 1 else label.name for label in labels]

    def columns(self) -> list[Column]:
        """The columns of the table of units."""
        columns = [
            Column("unit", "unit", "index of the unit within the layer, from 0", "index"),
            Column("label", "concept", "the concept with the highest score of the unit", "text"),
            Column("category", "category", "category of the concept", "text"),
        ]
        if self.dissection.counts is not None:
            columns.append(Column("iou", "IoU", "pixels where the unit is active and the concept is, over pixels where either is"))
        if self.dissection.iou_null is not None:
            columns += [
                Column("iou_chance", "chance IoU", "mean IoU with the labels exchanged among images"),
                Column(
                    "iou_p", "p of IoU", "probability that any unit and concept exceed their chance by as much; corrected for all pairs"
                ),
            ]
        if self.dissection.average_precision is not None:
            columns += [
                Column("ap", "AP", "average precision: how well the score of the unit ranks the images that show the concept first"),
                Column("prevalence", "chance", "share of the images that show the concept: about the AP of a random ranking"),
                Column("gain", "gain", "AP above chance: 0 for a random ranking, 1 for a perfect one"),
                Column("p", "p", "probability that a random ranking reaches this AP; for this pair alone, without correction"),
                Column("encodes", "encodes", f"concepts that the unit encodes: {self.limits.rule}", "text"),
            ]
        if self.dissection.density is not None:
            columns += list(DENSITY_COLUMNS)
        columns += [
            Column("active", "active", "share of the values of the unit that exceed its threshold", "share", optional=True),
            Column("threshold", "threshold", "the level that an active position exceeds", optional=True),
            Column("others", "then", "the next best concepts", "text"),
        ]
        return columns

    def units(self, pictures: Pictures | None = None) -> list[UnitRow]:
        """One row for each unit, best first."""
        table = self.dissection.table(self.score).nan_to_num(nan=-math.inf)
        scores, order = table.topk(min(OTHERS + 1, table.shape[1]), dim=1)
        title, labels = self.titles(), self.dissection.labels
        d = self.dissection
        encodes: dict[int, list[int]] = {}
        for unit, i in [] if self.encoded is None else self.encoded.nonzero().tolist():
            encodes.setdefault(unit, []).append(i)
        thresholds = None if d.thresholds is None else d.thresholds.tolist()
        shares: list[dict[str, float]] = [{}] * d.units if d.density is None else d.density.rows()
        active = None if d.level is None else d.level.above.tolist()
        silence = d.silence()
        rows = []
        for row in self.best:
            found = zip(scores[row.unit].tolist(), order[row.unit].tolist(), strict=True)
            others = [(i, score) for score, i in found if i != row.index and score > 0][:OTHERS]
            cells = {
                "unit": row.unit,
                "label": title[row.index] if row.index >= 0 else "",
                "category": row.category,
                "iou": row.iou,
                "iou_chance": row.iou_chance,
                "iou_p": row.iou_p_value,
                "ap": row.average_precision,
                "prevalence": row.prevalence,
                "p": row.p_value,
                "gain": row.gain,
                "encodes": listing([title[i] for i in encodes.get(row.unit, [])], OTHERS),
                "active": None if active is None else active[row.unit],
                "threshold": None if thresholds is None else thresholds[row.unit],
                "others": ", ".join(f"{title[i]} {number(score, 2)}" for i, score in others),
                "detector": self.detects(row),
                **shares[row.unit],
            }
            if silence and silence[row.unit] and thresholds is not None:
                cells["others"] = report_text.silent(silence[row.unit], thresholds[row.unit])
            known = {*encodes.get(row.unit, []), *(i for i, _ in others)}
            search = " ".join([row.label, str(cells["others"]), *(f"{title[i]} {labels[i].name}" for i in sorted(known))])
            rows.append(UnitRow(cells, [] if pictures is None else pictures.shown.get(row.unit, []), search))
        return rows

    def concept_columns(self) -> list[Column]:
        """The columns of the table of concepts; the units come after the first two."""
        columns = [Column("label", "concept", "name of the concept", "text"), Column("category", "category", "its category", "text")]
        if self.encoded is not None:
            among = "annotated for its category" if self.dissection.metadata.get("negatives") == "category" else "of the data set"
            columns += [
                Column("images", "images", f"images {among}, which are ranked", "count"),
                Column("positives", "positives", "those of them that show the concept", "count"),
                Column("prevalence", "chance", "their share: about the AP of a random ranking"),
                Column("ap", "AP", "highest average precision of a unit"),
                Column("gain", "gain", "AP above chance, of that unit"),
                Column("p", "p, corrected", "p-value of that AP, corrected for all units and concepts"),
            ]
        if self.dissection.counts is not None:
            columns += [
                Column("pixels", "pixels", "pixels that have the label", "count"),
                Column("iou", "IoU", "highest IoU of a unit"),
            ]
        return columns

    def concept_rows(self) -> list[ConceptRow]:
        """One row for each concept that some image shows, those of most units first."""
        title = self.titles()
        rows = []
        for row in self.concepts:
            cells = {
                "label": title[row.index],
                "category": row.category,
                "images": row.images,
                "positives": row.positives,
                "prevalence": row.prevalence,
                "ap": row.average_precision,
                "gain": row.gain,
                "p": row.p_value,
                "pixels": row.pixels,
                "iou": row.iou,
            }
            rows.append(ConceptRow(cells, row.encoded_by, row.detected_by))
        return rows

    def facts(self) -> list[Fact]:
        """The numbers at the head of the page."""
        d = self.dissection
        facts = [Fact(UNITS_OF[kind_of(d.metadata.get("basis"))], number(d.units)), *density_facts(d.density)]
        if d.counts is not None:
            report, paper = d.unique_detectors("report", self.threshold), d.unique_detectors("paper", self.threshold)
            silent = sum(map(bool, d.silence()))
            alive = d.units - silent
            among = f"the {number(alive)} units that are ever active" if silent else "the units"
            share = f"{report.detectors / max(alive, 1):.0%} of {among}, with an IoU of {self.threshold:g} or more"
            facts += [
                Fact("Detectors", number(report.detectors), share),
                Fact("Concepts with a detector", number(report.unique), f"best label of each unit; {paper.unique} by the paper's rule"),
            ]
            if d.iou_null is not None:
                note = f"IoU significant at {self.alpha:g} after correction; {len(d.iou_null.largest)} permutations"
                facts.append(Fact("Detectors beyond chance", number(d.detectors_beyond_chance(self.threshold, self.alpha)), note))
            if silent:
                facts.append(Fact("Never active", number(silent), "units without a pixel above their threshold; see “active” below"))
        if self.encoded is not None:
            count = int(self.encoded.any(0).sum())
            facts.append(Fact("Concepts encoded", number(count), f"{self.limits.rule}; named below"))
        return [*facts, Fact("Images", number(len(d.images)), report_text.dataset(d))]

    def comparison(self) -> Sequence[Row]:
        """The layer and its nulls, one row for each, with the columns :data:`torchprobe.dissection.report_text.COMPARISON`."""
        rows = []
        for name, d in {report_text.OWN: self.dissection, **self.nulls}.items():
            row: dict[str, Any] = {"layer": name}
            if d.counts is not None:
                found, best = d.unique_detectors("report", self.threshold), d.table("iou").nan_to_num(nan=0).amax(1)
                row |= {"detectors": found.detectors, "concepts": found.unique, "paper": d.unique_detectors("paper", self.threshold).unique}
                row |= {"never_active": sum(map(bool, d.silence())), "median": float(best.median()), "highest": float(best.amax())}
            if d.iou_null is not None:
                row["beyond"] = d.detectors_beyond_chance(self.threshold, self.alpha)
            if d.average_precision is not None:
                row["encoded"] = int(self._encoded(d).any(0).sum())
            rows.append(row)
        return rows

    def page(self, pictures: Pictures | None = None) -> DissectionPage:
        """The whole page."""
        d = self.dissection
        regions, evidence = (False, False) if pictures is None else (pictures.regions, pictures.evidence)
        return DissectionPage(
            kind="dissection",
            title=f"{d.metadata.get('model', 'model')} · {d.layer or 'output'}",
            summary=report_text.SUMMARY,
            notice=report_text.notice(d),
            facts=self.facts(),
            lead=[report_text.nulls_section(self.comparison() if self.nulls else None, d.iou_null is not None)],
            sections=[report_text.reading_section(d, self.limits)],
            footer=report_text.footer(d),
            bars=self.bars(),
            bars_note=report_text.bars_note(self.score, self.limits),
            concepts=self.concept_rows(),
            concepts_note=report_text.concepts_note(self.limits, self.encoded is not None, d.counts is not None),
            concept_columns=self.concept_columns(),
            units=self.units(pictures),
            units_note=report_text.units_note(pictures is not None, regions, evidence),
            columns=self.columns(),
            thumbnails=pictures.thumbnails if pictures else (),
        )


@renamed_arguments(images="top_images")
def write_report(
    dissection: LayerScores,
    path: str | os.PathLike[str],
    broden: Broden | None = None,
    encoder: nn.Module | None = None,
    *,
    nulls: Mapping[str, LayerScores] | None = None,
    top_images: int = 5,
    evidence: int = 0,
    basis: Tensor | SparseBasis | None = None,
    units: Sequence[int] | None = None,
    preprocess: Preprocess | str | None = None,
    geometry: str | Callable[[int, int], Box] | None = None,
    progress: CountCallback | None = None,
    **choices: Any,
) -> Path:
    """Writes one self-contained HTML page about a layer, and returns the path.

    Args:
        dissection: of the layer.
        path: the file.
        broden: the data set of the dissection; without it the page has no pictures.
        encoder: the network of the dissection. Its maps of the top images are usually kept in the dissection; otherwise, without the
            network, the pictures show where the concept is, but not where the unit is active. Evidence needs it.
        nulls: name → dissection of the same layer to compare with: random weights, shuffled labels.
        top_images: how many of the top images are shown for each unit.
        evidence: units, best first, for which the page also shows evidence by integrated gradients; needs captum.
        basis: the directions or the encoder, if the units are directions or latents.
        units: units whose pictures are shown; default: all.
        preprocess, geometry: those of the dissection, if they were given there; needed only if pictures pass the network again.
        progress: called with (steps done, steps in all). The evidence of a unit is one step; all other pictures together are one step.
        choices: ``threshold``, ``ap_threshold``, ``gain_threshold``, ``alpha``, ``score``; see :class:`Report`.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; the message has the command.
        DatasetError: an image or a label map cannot be read.
        ValueError: pictures pass the network again, and ``encoder``, ``basis`` or the preprocessing are not those of the dissection. Or
            ``broden`` is another data set, as its index, split or categories show.
    """
    require()
    if broden is not None:
        require_same_data(dissection.metadata, dissection.images, broden)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, 1 + evidence)

    report = Report(dissection, nulls or {}, **choices)
    pictures = None
    if broden is not None and dissection.top is not None and top_images > 0:
        wanted = None if units is None else set(units)
        labels = {row.unit: row.index for row in report.best if wanted is None or row.unit in wanted}
        explained = list(labels)[:evidence] if encoder is not None else []
        pictures = show_pictures(dissection, broden, labels, top_images, encoder, basis, explained, tell, preprocess, geometry)
    written = write_dissection(report.page(pictures), path)
    tell(1 + evidence)
    return written
