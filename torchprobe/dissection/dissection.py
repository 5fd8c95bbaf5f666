"""What the units of one layer detect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchprobe.datasets.broden import Label
from torchprobe.dissection import nulls, summaries
from torchprobe.dissection.average_precision import Support, gain
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking
from torchprobe.statistics.top_inputs import ranked

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden

SCORES = ("iou", "ap", "gain")


@dataclass(frozen=True, slots=True)
class UnitConcept:
    """A unit and the label it scores best on. ``unit`` counts from 0, ``index`` is the label's column in the tables (−1 where every score
    of the unit is 0 or nan; then ``label`` and ``category`` are empty). ``iou``, ``average_precision``, ``prevalence`` and ``p_value`` are
    those of this pair, None where they were not computed."""

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


class ConceptOverlap(NamedTuple):
    """Concepts that both layers encode, only this one, and only the other one."""

    shared: list[Label]
    mine: list[Label]
    theirs: list[Label]


@dataclass
class Dissection:
    """The units (or directions) U of one layer against the labels L of a data set.

    Attributes:
        layer: its name.
        units: how many.
        labels: the columns of every table; ``labels[i]`` is the label of column i.
        categories: names, in the order of the data set.
        category: int64 (L,), the primary category of each label.
        images: int64 (N,), the rows of the data set that were seen.
        thresholds: float32 (U,), the level that an active pixel exceeds, or None.
        counts: pixels, see :class:`Counts`, or None.
        average_precision: float64 (U, L), nan for a label that no image shows, or None.
        support: among how many images each label was ranked, and how many show it, or None.
        p_values: float64 (U, L), of average precision, for each pair by itself; see :meth:`adjusted_p_values`.
        top: ids (rows of the data set), int64 (U, k), and scores, float32 (U, k), of the images with the highest scores; −1 where there are
            no more. None if they were not kept.
        scores: float32 (U, N) if they were kept, else None; and with them ``ranking``.
        metadata: model, data set and settings: plain values. ``threshold_error``: by how much the share of values above a threshold may be
            off, the largest standard deviation of all units (:meth:`torchprobe.statistics.Quantile.error`); 0 where they are exact, None
            where they were given.
    """

    layer: str
    labels: Sequence[Label]
    categories: Sequence[str]
    category: Tensor
    units: int
    images: Tensor
    thresholds: Tensor | None = None
    counts: Counts | None = None
    average_precision: Tensor | None = None
    support: Support | None = None
    p_values: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    scores: Tensor | None = None
    ranking: Ranking | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def rank(self, ranking: Ranking, scores: Tensor, keep: bool = False) -> None:
        """Fills in average precision and what belongs to it from scores (U, N); ``keep`` keeps them."""
        self.average_precision, self.support = ranking.average_precision(scores), ranking.support()
        self.p_values = nulls.p_values(self.average_precision, self.support)
        self.scores, self.ranking = (scores, ranking) if keep else (None, None)

    # -- tables --------------------------------------------------------------------------------------------------------

    @property
    def iou(self) -> Tensor | None:
        """Intersection over union, float64 (U, L), or None."""
        return None if self.counts is None else self.counts.iou()

    @property
    def prevalence(self) -> Tensor | None:
        """Share of the images ranked that show each label, float64 (L,): about the average precision of a random ranking."""
        return None if self.support is None else self.support.prevalence

    @property
    def gain(self) -> Tensor | None:
        """(AP − π) / (1 − π) with the prevalence π: float64 (U, L); 0 for a random ranking, 1 for a perfect one."""
        if self.average_precision is None or self.prevalence is None:
            return None
        return gain(self.average_precision, self.prevalence)

    def adjusted_p_values(self, method: str = "holm") -> Tensor:
        """p-values corrected for all pairs, and both signs if both were tried; see :func:`correct`.

        Raises:
            ValueError: average precision was not computed.
        """
        self._table("ap")
        assert self.p_values is not None
        return nulls.correct(self.p_values, method, 2 if self.metadata.get("sign") == "both" else 1)

    # -- summaries -----------------------------------------------------------------------------------------------------

    def best(self, score: str = "iou") -> list[UnitConcept]:
        """The best label of every unit, best unit first; of equals the first.

        Args:
            score: "iou"; "ap", which favours what nearly all images show; "gain", which does not.

        Raises:
            ValueError: that score was not computed.
        """
        table = self._table(score)
        value, index = _first_best(table.nan_to_num(nan=-torch.inf))
        index = index.where(value > 0, -1)
        numbers = {"iou": self.iou, "ap": self.average_precision, "p": self.p_values}
        picked = {key: _picked(part, index) for key, part in numbers.items()}
        rarity = _picked(None if self.prevalence is None else self.prevalence.expand(self.units, -1), index)
        rows = []
        for unit in value.argsort(descending=True, stable=True).tolist():
            i = int(index[unit])
            label = self.labels[i] if i >= 0 else None
            rows.append(
                UnitConcept(
                    unit,
                    "" if label is None else self.categories[int(self.category[i])],
                    "" if label is None else label.name,
                    float(value[unit]) if label else 0.0,
                    i,
                    0 if label is None else label.number,
                    picked["iou"][unit],
                    picked["ap"][unit],
                    rarity[unit],
                    picked["p"][unit],
                )
            )
        return rows

    def unique_detectors(self, rule: str = "paper", threshold: float = summaries.THRESHOLD) -> summaries.Detectors:
        """Distinct concepts that units detect by IoU, in two ways of counting; see :func:`unique_detectors`."""
        return summaries.unique_detectors(self._table("iou"), self.category, self.categories, rule, threshold)

    def encoded(self, threshold: float = 0.9, alpha: float = 0.05, method: str = "holm", minimum_positives: int = 1) -> Tensor:
        """Which unit encodes which concept, bool (U, L): AP of at least ``threshold``, significant at ``alpha`` after correction, and the
        concept shown by at least ``minimum_positives`` images."""
        ap = self._table("ap")
        assert self.support is not None
        return summaries.encoded(ap, self.adjusted_p_values(method), threshold, alpha) & (self.support.positives >= minimum_positives)

    def unique_concepts(self, threshold: float = 0.9, alpha: float = 0.05, method: str = "holm", minimum_positives: int = 1) -> list[Label]:
        """The concepts that some unit encodes; see :meth:`encoded`."""
        pairs = self.encoded(threshold, alpha, method, minimum_positives)
        return [self.labels[i] for i in summaries.unique_concepts(pairs).tolist()]

    def polysemanticity(self, threshold: float = 0.9, alpha: float = 0.05, method: str = "holm", minimum_positives: int = 1) -> Tensor:
        """How many concepts each unit encodes, int64 (U,); see :meth:`encoded`."""
        return summaries.polysemanticity(self.encoded(threshold, alpha, method, minimum_positives))

    def overlap(
        self, other: Dissection, threshold: float = 0.9, alpha: float = 0.05, method: str = "holm", minimum_positives: int = 1
    ) -> ConceptOverlap:
        """The concepts that both layers encode, and those of one only; labels are compared by name."""
        mine = self.unique_concepts(threshold, alpha, method, minimum_positives)
        theirs = other.unique_concepts(threshold, alpha, method, minimum_positives)
        names, other_names = {label.name for label in mine}, {label.name for label in theirs}
        return ConceptOverlap(
            [label for label in mine if label.name in other_names],
            [label for label in mine if label.name not in other_names],
            [label for label in theirs if label.name not in names],
        )

    def permutation_test(self, permutations: int = 99, seed: int = 0) -> nulls.Permutation:
        """The null without assumptions on ties; needs ``keep_scores=True``. See :func:`permutation_test`."""
        if self.scores is None or self.ranking is None:
            raise ValueError("the scores of the images were not kept: dissect with keep_scores=True")
        return self.ranking.permutation_test(self.scores.contiguous(), permutations, seed)

    # -- together, and on disk -----------------------------------------------------------------------------------------

    def merge(self, other: Dissection) -> Dissection:
        """Adds, in place, what ``other`` counted on other images; returns self.

        Raises:
            TypeError: it is no :class:`Dissection`.
            ValueError: another layer, other labels, thresholds or scores; images in common; average precision without kept scores.
        """
        if not isinstance(other, Dissection):
            raise TypeError(f"cannot merge a Dissection with {type(other).__name__}")
        self._require_alike(other)
        if self.counts is not None and other.counts is not None:
            self.counts = Counts(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))
        if self.ranking is not None and other.ranking is not None and self.scores is not None and other.scores is not None:
            self.rank(self.ranking.joined(other.ranking), torch.cat([self.scores, other.scores], 1), keep=True)
        if self.top is not None and other.top is not None:
            k = self.top[0].shape[1]
            scores, ids = ranked(torch.cat([self.top[1], other.top[1]], 1), torch.cat([self.top[0], other.top[0]], 1))
            self.top = ids[:, :k], scores[:, :k]
        self.images = torch.cat([self.images, other.images])
        return self

    def _require_alike(self, other: Dissection) -> None:
        for name in ("layer", "units"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"cannot merge the {name} {getattr(self, name)!r} and {getattr(other, name)!r}")
        if tuple(self.labels) != tuple(other.labels) or not torch.equal(self.category, other.category):
            raise ValueError(f"layer {self.layer!r}: the labels differ")
        for name in ("thresholds", "counts", "average_precision", "top"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError(f"layer {self.layer!r}: only one of the two has {name}")
        if self.counts is not None and not _same(self.thresholds, other.thresholds):
            raise ValueError(f"layer {self.layer!r} was counted with other thresholds: give dissect() the same thresholds= for all parts")
        for name in ("mode", "pooling", "sign", "negatives", "minimum_area", "weights"):
            if (mine := self.metadata.get(name)) != (theirs := other.metadata.get(name)):
                raise ValueError(f"layer {self.layer!r} was dissected with {name} {mine!r} and {theirs!r}")
        if self.average_precision is not None and (self.scores is None or other.scores is None):
            raise ValueError(
                f"layer {self.layer!r}: to merge average precision takes the scores of the images: dissect with keep_scores=True"
            )
        if self.top is not None and other.top is not None and self.top[0].shape != other.top[0].shape:
            raise ValueError(f"layer {self.layer!r}: {self.top[0].shape[1]} and {other.top[0].shape[1]} top images were kept")
        if bool(torch.isin(self.images, other.images).any()):
            raise ValueError(f"layer {self.layer!r}: both have seen some of the same images, which would count twice")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as safetensors; a file of that name is replaced only when all is written."""
        from torchprobe.dissection.file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dissection:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no dissection, or something in it does not fit; names the file and the key.
        """
        from torchprobe.dissection.file import load

        return load(path)

    def to_csv(self, path: str | os.PathLike[str], score: str = "iou") -> Path:
        """Writes a table with the original's columns (for "iou"); see :func:`torchprobe.dissection.csv.write_csv`."""
        from torchprobe.dissection.csv import write_csv

        return write_csv(self, path, score)

    def report(self, path: str | os.PathLike[str], broden: Broden, encoder: Any = None, **options: Any) -> Path:
        """Writes one self-contained HTML page; options and errors are those of :func:`torchprobe.dissection.report.write_report`."""
        from torchprobe.dissection.report import write_report

        return write_report(self, path, broden, encoder, **options)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _table(self, score: str) -> Tensor:
        """The table of a score, or an error that says how to get it."""
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        table = {"iou": self.iou, "ap": self.average_precision, "gain": self.gain}[score]
        if table is None:
            needed = "iou" if score == "iou" else "ap"
            raise ValueError(f'layer {self.layer!r} was dissected without this score; it needs dissect(…, score="{needed}")')
        return table

    def __repr__(self) -> str:
        found = [name for name in ("counts", "average_precision", "top", "scores") if getattr(self, name) is not None]
        return f"Dissection({self.layer!r}: {self.units} units, {len(self.labels)} labels, {len(self.images)} images, {', '.join(found)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dissection):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


def _first_best(table: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest value and where it first stands."""
    if not table.shape[1]:
        return table.new_zeros(len(table)), torch.zeros(len(table), dtype=torch.int64)
    value = table.amax(1)
    return value, (table == value[:, None]).int().cumsum(1).eq(1).int().argmax(1)


def _picked(table: Tensor | None, index: Tensor) -> list[float | None]:
    if table is None or not table.shape[1]:
        return [None] * len(index)
    values = table[torch.arange(len(index)), index.clamp(min=0)].tolist()
    return [value if i >= 0 else None for value, i in zip(values, index.tolist(), strict=True)]


def _same(a: Any, b: Any) -> bool:
    """Equal, tensors by value; nan equals nan."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
    if isinstance(a, Ranking) and isinstance(b, Ranking):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
