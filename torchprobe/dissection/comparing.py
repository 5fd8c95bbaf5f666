"""Two dissections, unit by unit and concept by concept: before and after fine-tuning, two layers, two networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.messages import counted, listing
from torchprobe.common.records import Record
from torchprobe.dissection import summaries
from torchprobe.dissection.concepts import ConceptUnits
from torchprobe.dissection.result_file import ResultFile
from torchprobe.dissection.scores import LayerScores

CHANGES = ("kept", "other", "gained", "lost", "none")
"""What became of a unit: it counts for the same concept in both, for another one, only after, only before, or in neither."""

_SETTINGS = ("mode", "quantile", "positions", "pooling", "sign", "negatives", "minimum_area", "shuffle_labels", "basis")


@dataclass(frozen=True, eq=False)
class UnitChange(Record):
    """A unit in two dissections, by one score.

    ``label`` and ``category`` are those with the highest score, empty if all scores are 0; ``score`` is that score, ``counts`` whether the
    unit counts with it. ``before_now``: the score after with the label before, nan if that label is not in both. ``change``: see
    :data:`CHANGES`.
    """

    unit: int
    change: str
    category_before: str
    label_before: str
    score_before: float
    category_after: str
    label_after: str
    score_after: float
    before_now: float
    difference: float


@dataclass(frozen=True, eq=False)
class ConceptChange(Record):
    """A concept in two dissections. ``change``: it has a unit in both ("kept"), only after ("gained"), only before ("lost"), in neither
    ("none"), or the images of one do not show it ("missing").

    ``units_before``, ``units_after``: units that encode or detect it, by the scores that both dissections have; ``detected`` and
    ``encoded`` are their numbers. ``iou`` and ``ap``: the highest of any unit. nan, or None for a number, where it was not computed or the
    label is missing.
    """

    category: str
    label: str
    change: str
    detected_before: int | None
    detected_after: int | None
    encoded_before: int | None
    encoded_after: int | None
    iou_before: float
    iou_after: float
    ap_before: float
    ap_after: float
    units_before: list[int]
    units_after: list[int]


@dataclass
class DissectionComparison:
    """See :func:`compare_dissections`.

    Attributes:
        before, after: the two dissections.
        units: score → one row for each unit, the largest differences first. Empty if the numbers of units differ.
        concepts: one row for each concept of either, those that changed first.
        remarks: how the inputs and settings differ; nothing is wrong with a comparison without remarks.
    """

    before: LayerScores
    after: LayerScores
    units: dict[str, list[UnitChange]] = field(default_factory=dict)
    concepts: list[ConceptChange] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain numbers: ``layers``; ``units``, score → number of units of each change; ``concepts``, the names of each change;
        ``remarks``."""
        names = {change: [row.label for row in self.concepts if row.change == change] for change in ("kept", "gained", "lost")}
        counts = {score: Counter(row.change for row in rows) for score, rows in self.units.items()}
        return {
            "layers": [self.before.layer, self.after.layer],
            "units": {score: {change: count[change] for change in CHANGES} for score, count in counts.items()},
            "concepts": names,
            "remarks": self.remarks,
        }


def compare_dissections(
    before: LayerScores,
    after: LayerScores,
    threshold: float = summaries.THRESHOLD,
    ap_threshold: float = 0.9,
    alpha: float = 0.05,
    gain_threshold: float | None = None,
) -> DissectionComparison:
    """Compares two dissections. Units are matched by index, labels by name and category.

    Units are compared by every score that both have: "iou", where a unit counts if its best IoU reaches ``threshold``, and "gain", where it
    counts if it encodes its best concept. Nothing is refused: where data, images or settings differ, a remark says so.

    Args:
        before, after: the dissections.
        threshold: the smallest IoU of a detector.
        ap_threshold, alpha, gain_threshold: with which a unit encodes a concept; see :meth:`LayerScores.encoded`.

    >>> import torch
    >>> from torchprobe.datasets.broden import Label
    >>> from torchprobe.dissection import Counts, Dissection
    >>> def layer(intersection):
    ...     labels = [Label(1, "sky", "object", ("object",), 1, 1.0, ()), Label(2, "sea", "object", ("object",), 1, 1.0, ())]
    ...     counts = Counts(torch.tensor([intersection]), torch.tensor([[10, 10]]), torch.tensor([10, 10]))
    ...     return Dissection("a", labels, ["object"], torch.zeros(2, dtype=torch.int64), 1, torch.arange(3), counts=counts)
    >>> found = compare_dissections(layer([5, 1]), layer([1, 6]))
    >>> found.units["iou"][0].label_before, found.units["iou"][0].label_after, found.summary()["concepts"]["gained"]
    ('sky', 'sea', ['sea'])
    """
    rule = (ap_threshold, alpha, "holm", 1, gain_threshold)
    found = DissectionComparison(before, after, remarks=remarks(before, after))
    if before.units == after.units:
        if before.counts is not None and after.counts is not None:
            counting = [one.table("iou") >= threshold for one in (before, after)]
            found.units["iou"] = _units(before, after, "iou", counting)
        if _encodes(before) and _encodes(after):
            found.units["gain"] = _units(before, after, "gain", [one.encoded(*rule) for one in (before, after)])
    old, new = (_by_label(one, rule, threshold) for one in (before, after))
    found.concepts = _concepts(old, new, before, after)
    return found


def remarks(before: LayerScores, after: LayerScores) -> list[str]:
    """How two dissections differ in data, images, labels and settings, one sentence each."""
    found = []
    a, b = before.metadata, after.metadata
    if before.layer != after.layer:
        found.append(f"The layers are {before.layer or '(output)'} and {after.layer or '(output)'}.")
    if before.units != after.units:
        found.append(f"They have {before.units:,} and {after.units:,} units, so units are not compared one by one.")
    elif a.get("weights") is not None and a.get("weights") == b.get("weights") and before.layer == after.layer:
        found.append("The weights are the same.")
    for name, which in (("counts", "IoU"), ("average_precision", "Average precision")):
        if (given := getattr(before, name) is not None) != (getattr(after, name) is not None):
            found.append(f"{which} is only in the {'first' if given else 'second'}, so it does not count.")
    if files := [which for which, d in (("first", before), ("second", after)) if isinstance(d, ResultFile)]:
        what = "is a result file, which holds" if len(files) == 1 else "are result files, which hold"
        found.append(f"The {' and the '.join(files)} {what} best labels only: data set, images, settings and other scores are unknown.")
        return found
    one, other = a.get("dataset", {}), b.get("dataset", {})
    if one.get("name") != other.get("name"):
        found.append(f"The data sets are {one.get('name')} and {other.get('name')}.")
    elif one.get("digest") != other.get("digest"):
        found.append("The data sets have the same name, but other images, labels or parts.")
    if not torch.equal(before.images, after.images):
        shared = int(torch.isin(before.images, after.images).sum())
        found.append(f"The images are {len(before.images):,} and {len(after.images):,} rows of the data set, {shared:,} of them the same.")
    if a.get("preprocessing") != b.get("preprocessing"):
        found.append("The pictures were preprocessed in different ways.")
    found += [f"{name}: {_plain(a.get(name))} and {_plain(b.get(name))}." for name in _SETTINGS if a.get(name) != b.get(name)]
    for which, this, that in (("first", before, after), ("second", after, before)):
        known = {_label(that, i) for i in range(len(that.labels))}
        if missing := [this.labels[i].name for i in range(len(this.labels)) if _label(this, i) not in known]:
            found.append(f"{counted(len(missing), 'label')} only in the {which}: {listing(missing)}.")
    return found


def _units(before: LayerScores, after: LayerScores, score: str, counts: Sequence[Tensor]) -> list[UnitChange]:
    column = {_label(after, i): i for i in range(len(after.labels))}
    second = {row.unit: row for row in after.best(score)}
    table = after.table(score)
    rows = []
    for one in before.best(score):
        other = second[one.unit]
        at = column.get((one.category, one.label)) if one.index >= 0 else None
        had, has = (row.index >= 0 and bool(counted[row.unit, row.index]) for row, counted in zip((one, other), counts, strict=True))
        same = (one.category, one.label) == (other.category, other.label)
        change = ("kept" if same else "other") if had and has else "gained" if has else "lost" if had else "none"
        now = float("nan") if at is None else float(table[one.unit, at])
        rows.append(
            UnitChange(
                one.unit, change, one.category, one.label, one.score, other.category, other.label, other.score, now, other.score - one.score
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row.difference))


def _encodes(one: LayerScores) -> bool:
    """Whether it is known which unit encodes which concept."""
    return one.average_precision is not None and not isinstance(one, ResultFile)


def _by_label(one: LayerScores, rule: tuple[float, float, str, int, float | None], threshold: float) -> dict[tuple[str, str], ConceptUnits]:
    """(Category, label) → its units. Of a result file, only labels that are the best of some unit."""
    if not isinstance(one, ResultFile):
        return {(row.category, row.label): row for row in one.concepts(*rule, iou_threshold=threshold)}
    units: dict[int, list[int]] = {i: [] for i in range(len(one.labels))}
    for row in one.best() if one.counts is not None else ():
        if row.index >= 0 and row.score >= threshold:
            units[row.index].append(row.unit)
    found = {}
    for i, detecting in units.items():
        category, label = key = _label(one, i)
        found[key] = ConceptUnits(
            i, one.labels[i].number, category, label, None, None, None, None, (), tuple(detecting), None, None, None, None, None, None
        )  # fmt: skip
    return found


def _concepts(
    old: dict[tuple[str, str], ConceptUnits], new: dict[tuple[str, str], ConceptUnits], before: LayerScores, after: LayerScores
) -> list[ConceptChange]:
    encoded = [_encodes(one) for one in (before, after)]
    detected = [one.counts is not None for one in (before, after)]
    both = [by for by, given in (("encoded_by", encoded), ("detected_by", detected)) if all(given)]  # one alone says nothing of a change
    rows = []
    for key in dict.fromkeys([*old, *new]):
        pair = one, other = old.get(key), new.get(key)
        had, has = ([*dict.fromkeys(unit for by in both for unit in getattr(row, by, ()))] for row in pair)
        change = "kept" if had and has else "gained" if has else "lost" if had else "none"
        if any(row is None and not isinstance(of, ResultFile) for row, of in zip(pair, (before, after), strict=True)):
            change = "missing"
        detecting = [_number(row, "detected_by", given, of) for row, given, of in zip(pair, detected, (before, after), strict=True)]
        encoding = [_number(row, "encoded_by", given, of) for row, given, of in zip(pair, encoded, (before, after), strict=True)]
        rows.append(
            ConceptChange(
                *key, change, detecting[0], detecting[1], encoding[0], encoding[1],
                _value(one, "iou"), _value(other, "iou"), _value(one, "average_precision"), _value(other, "average_precision"),
                had, has,
            )
        )  # fmt: skip
    order = ("gained", "lost", "kept", "none", "missing")
    return sorted(rows, key=lambda row: (order.index(row.change), -abs(len(row.units_after) - len(row.units_before)), row.label))


def _label(dissection: LayerScores, column: int) -> tuple[str, str]:
    return dissection.categories[int(dissection.category[column])], dissection.labels[column].name


def _number(row: ConceptUnits | None, units: str, given: bool, of: LayerScores) -> int | None:
    """How many units; None if that is unknown. A label that a result file does not hold is the best of no unit."""
    if not given or (row is None and not isinstance(of, ResultFile)):
        return None
    return len(getattr(row, units, ()))


def _value(row: ConceptUnits | None, name: str) -> float:
    value = None if row is None else getattr(row, name)
    return float("nan") if value is None else float(value)


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
