"""The units of one layer and their concepts: what follows from the tables of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchprobe.datasets.broden import Label
from torchprobe.dissection import activity, nulls, summaries
from torchprobe.dissection.concepts import ConceptUnits, concept_units
from torchprobe.dissection.layer_tables import LayerTables
from torchprobe.dissection.merging import add_images

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class UnitConcept:
    """A unit and the label with its best score.

    ``unit`` counts from 0. ``index`` is the column of the label in the tables, ``number`` its number in the data set. ``iou``,
    ``average_precision``, ``prevalence``, ``p_value`` and ``gain`` are those of this pair, and so are ``iou_chance`` and ``iou_p_value``,
    which is corrected for all pairs; None if they were not computed. If all scores of the unit are 0 or nan, ``index`` is −1, ``label`` and
    ``category`` are empty. ``never_active``: no pixel exceeds its threshold.
    """

    unit: int
    category: str
    label: str
    score: float
    index: int
    number: int
    iou: float | None
    average_precision: float | None
    prevalence: float | None
    p_value: float | None
    gain: float | None = None
    never_active: bool | None = None
    iou_chance: float | None = None
    iou_p_value: float | None = None


class ConceptOverlap(NamedTuple):
    """The concepts that both layers encode, that only this one encodes, and that only the other one encodes."""

    shared: list[Label]
    mine: list[Label]
    theirs: list[Label]


class LayerScores(LayerTables):
    """The units (or directions) U of one layer against the labels L of a data set; :class:`LayerTables` lists the tables."""

    # -- units and concepts --------------------------------------------------------------------------------------------

    def best(self, score: str = "iou") -> list[UnitConcept]:
        """The best label of every unit, best unit first; of equal labels the first.

        Args:
            score: "iou"; "ap", which is high for a label that nearly all images show; "gain", which corrects for that.

        Raises:
            ValueError: that score was not computed.
        """
        table = self.table(score)
        value, index = summaries.first_best(table.nan_to_num(nan=-torch.inf))
        index = index.where(value > 0, -1)
        prevalence = None if self.prevalence is None else self.prevalence.expand(self.units, -1)
        null = (None, None) if self.iou_null is None else (self.iou_null.chance, self.iou_null.adjusted)
        tables = (self.iou, self.average_precision, prevalence, self.p_values, self.gain, *null)
        iou, ap, rarity, p, above, chance, adjusted = (_picked(part, index) for part in tables)
        never = [None] * self.units if self.never_active is None else self.never_active.tolist()
        rows = []
        for unit in value.argsort(descending=True, stable=True).tolist():
            i = int(index[unit])
            category, label = (self.categories[int(self.category[i])], self.labels[i]) if i >= 0 else ("", None)
            name, score_of, number = ("", 0.0, 0) if label is None else (label.name, float(value[unit]), label.number)
            own = (iou[unit], ap[unit], rarity[unit], p[unit], above[unit], never[unit], chance[unit], adjusted[unit])
            rows.append(UnitConcept(unit, category, name, score_of, i, number, *own))
        return rows

    def rows(self, score: str | None = None) -> list[dict[str, Any]]:
        """:meth:`best` as dicts, one for each unit, with the density of latents; ``score``: default "iou" if it was computed, else
        "gain"."""
        rows = [asdict(row) for row in self.best(score or ("gain" if self.counts is None else "iou"))]
        if self.density is None:
            return rows
        shares = self.density.rows()
        return [{**row, **shares[row["unit"]]} for row in rows]

    def summary(self, thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)) -> dict[str, Any]:
        """The layer as plain numbers.

        Returns:
            ``layer``, ``units``, ``images``, ``labels``, ``metadata``. For latents: ``density``. With IoU: ``detectors`` by both rules,
            ``never_active``, the number of units without any active pixel for each cause, and the 20 ``best`` units; with its null
            ``iou_null``, permutations and the detectors beyond chance at 0.05. With average precision: ``rule`` and ``encoded``, what
            "encodes" means and the concepts that units encode by that rule (see :meth:`concepts`); ``concepts``, one entry for each of
            ``thresholds``, and the 20 units ``best_by_gain``. In ``concepts``, ``unique`` is the number of concepts encoded, ``units`` the
            number of units that encode at least one, ``polysemanticity`` the concepts per unit, mean over all units.
        """
        found: dict[str, Any] = {
            "layer": self.layer,
            "units": self.units,
            "images": len(self.images),
            "labels": len(self.labels),
            "metadata": self.metadata,
        }
        if self.density is not None:
            found["density"] = self.density.summary()
        if self.counts is not None:
            found["detectors"] = {rule: self.unique_detectors(rule)._asdict() for rule in summaries.RULES}
            silence = self.silence()
            found["never_active"] = {cause: silence.count(cause) for cause in activity.CAUSES}
            if self.iou_null is not None:
                found["iou_null"] = {"permutations": len(self.iou_null.largest), "detectors": self.detectors_beyond_chance()}
            found["best"] = self.rows("iou")[:20]
        if self.average_precision is not None:
            found["rule"] = {"ap": 0.9, "gain": summaries.default_gain(0.9), "alpha": 0.05, "method": "holm"}
            found["encoded"] = [asdict(row) for row in self.concepts() if row.encoded_by]
            found["concepts"] = []
            for threshold in thresholds:
                pairs = self.encoded(threshold)
                per_unit = pairs.sum(1)
                found["concepts"].append(
                    {
                        "threshold": threshold,
                        "unique": int(pairs.any(0).sum()),
                        "units": int((per_unit > 0).sum()),
                        "polysemanticity": float(per_unit.double().mean()),
                    }
                )
            found["best_by_gain"] = self.rows("gain")[:20]
        return found

    def unique_detectors(self, rule: str = "paper", threshold: float = summaries.THRESHOLD) -> summaries.Detectors:
        """Distinct concepts that units detect by IoU, counted in one of two ways; see :func:`unique_detectors`."""
        return summaries.unique_detectors(self.table("iou"), self.category, self.categories, rule, threshold)

    def encoded(
        self,
        threshold: float = 0.9,
        alpha: float = 0.05,
        method: str = "holm",
        minimum_positives: int = 1,
        gain_threshold: float | None = None,
    ) -> Tensor:
        """Which unit encodes which concept, bool (U, L): an AP of at least ``threshold``, significant at ``alpha`` after correction, and a
        gain over prevalence of at least ``gain_threshold``, for a concept that at least ``minimum_positives`` images show.

        The default of ``gain_threshold`` is 2 · threshold − 1, see :func:`torchprobe.dissection.summaries.default_gain`; with
        ``-math.inf`` the gain does not count.
        """
        ap, prevalence = self.table("ap"), self.prevalence
        assert self.support is not None
        pairs = summaries.encoded(ap, self.adjusted_p_values(method), threshold, alpha, prevalence, gain_threshold)
        return pairs & (self.support.positives >= minimum_positives)

    def beyond_chance(self, alpha: float = 0.05) -> Tensor:
        """Which unit overlaps which label significantly, bool (U, L): its IoU exceeds chance by more than any pair does, but for a
        probability of ``alpha``, when labels are exchanged among images; see :mod:`torchprobe.dissection.iou_null`.

        Raises:
            ValueError: the null was not computed.
        """
        if self.iou_null is None:
            raise ValueError(f"layer {self.layer!r} has no null of IoU: dissect(…, iou_permutations=99)")
        return self.iou_null.adjusted <= alpha

    def detectors_beyond_chance(self, threshold: float = summaries.THRESHOLD, alpha: float = 0.05) -> int:
        """The number of units that are detectors, by the rule "report", and overlap that label significantly."""
        value, index = summaries.first_best(self.table("iou"))
        significant = self.beyond_chance(alpha)[torch.arange(self.units), index] if len(self.labels) else value > 0
        return int((significant & (value >= threshold)).sum())

    def unique_concepts(
        self,
        threshold: float = 0.9,
        alpha: float = 0.05,
        method: str = "holm",
        minimum_positives: int = 1,
        gain_threshold: float | None = None,
    ) -> list[Label]:
        """The concepts that at least one unit encodes; see :meth:`encoded`."""
        pairs = self.encoded(threshold, alpha, method, minimum_positives, gain_threshold)
        return [self.labels[i] for i in summaries.unique_concepts(pairs).tolist()]

    def polysemanticity(
        self,
        threshold: float = 0.9,
        alpha: float = 0.05,
        method: str = "holm",
        minimum_positives: int = 1,
        gain_threshold: float | None = None,
    ) -> Tensor:
        """The number of concepts that each unit encodes, int64 (U,); see :meth:`encoded`."""
        return summaries.polysemanticity(self.encoded(threshold, alpha, method, minimum_positives, gain_threshold))

    def concepts(
        self,
        threshold: float = 0.9,
        alpha: float = 0.05,
        method: str = "holm",
        minimum_positives: int = 1,
        gain_threshold: float | None = None,
        iou_threshold: float = summaries.THRESHOLD,
    ) -> list[ConceptUnits]:
        """Every concept that some image shows, with its units, positives and images; those of most units first. ``iou_threshold``: the
        smallest IoU of a detector; the other arguments: see :meth:`encoded`."""
        ap = self.average_precision is not None
        pairs = self.encoded(threshold, alpha, method, minimum_positives, gain_threshold) if ap else None
        return concept_units(self, pairs, iou_threshold)

    def overlap(
        self,
        other: LayerScores,
        threshold: float = 0.9,
        alpha: float = 0.05,
        method: str = "holm",
        minimum_positives: int = 1,
        gain_threshold: float | None = None,
    ) -> ConceptOverlap:
        """The concepts that both layers encode, and those that only one encodes; labels are compared by name."""
        rule = (threshold, alpha, method, minimum_positives, gain_threshold)
        mine, theirs = self.unique_concepts(*rule), other.unique_concepts(*rule)
        names, other_names = {label.name for label in mine}, {label.name for label in theirs}
        return ConceptOverlap(
            [label for label in mine if label.name in other_names],
            [label for label in mine if label.name not in other_names],
            [label for label in theirs if label.name not in names],
        )

    def permutation_test(self, permutations: int = 99, seed: int = 0) -> nulls.Permutation:
        """A null that makes no assumption about ties; needs ``keep_scores=True``. See :func:`permutation_test`."""
        if self.scores is None or self.ranking is None:
            raise ValueError("the scores of the images were not kept: dissect with keep_scores=True")
        return self.ranking.permutation_test(self.scores.contiguous(), permutations, seed)

    def merge(self, other: LayerScores) -> Self:
        """Adds, in place, what ``other`` counted on other images; returns self.

        Raises:
            TypeError: ``other`` is of another kind.
            ValueError: layer, labels, thresholds or scores differ; images in common; average precision without kept scores.
        """
        if not isinstance(other, LayerScores):
            raise TypeError(f"cannot merge a {type(self).__name__} with {type(other).__name__}")
        add_images(self, other)
        return self


def _picked(table: Tensor | None, index: Tensor) -> list[float | None]:
    if table is None or not table.shape[1]:
        return [None] * len(index)
    values = table[torch.arange(len(index)), index.clamp(min=0)].tolist()
    return [value if i >= 0 and value == value else None for value, i in zip(values, index.tolist(), strict=True)]
