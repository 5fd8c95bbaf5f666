"""Writes the tables of a Broden folder."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchprobe.common.files import replacing
from torchprobe.datasets.broden.index import ROW_COLUMNS

TRAIN_SHARE = 0.7
"""Share of the range of hashes that belongs to the training split, as in the release."""


@dataclass
class Occurrence:
    """``frequency``: images that have a label. ``coverage``: its area in units of whole images."""

    frequency: int = 0
    coverage: float = 0.0


@dataclass
class LabelCounts:
    """How often each label occurs in each category: ``by_label[label][category]``."""

    by_label: dict[str, dict[str, Occurrence]] = field(default_factory=dict)

    def add(self, category: str, label: str, share: float) -> None:
        """Counts one image, of which the label covers ``share``."""
        found = self.by_label.setdefault(label, {}).setdefault(category, Occurrence())
        found.frequency += 1
        found.coverage += share

    def total(self, label: str) -> Occurrence:
        """The sum over all categories."""
        found = self.by_label[label].values()
        return Occurrence(sum(part.frequency for part in found), sum(part.coverage for part in found))

    def numbers(self, min_frequency: int, min_coverage: float) -> dict[str, int]:
        """Label → number: 1 for the most frequent, then by coverage, then by name. Labels that are too rare are left out."""
        totals = {label: self.total(label) for label in self.by_label}
        kept = [label for label, total in totals.items() if total.frequency >= min_frequency and total.coverage >= min_coverage]
        kept.sort(key=lambda label: (-totals[label].frequency, -totals[label].coverage, label))
        return {label: number for number, label in enumerate(kept, 1)}


@dataclass
class WrittenRow:
    """A future line of the index. ``entries``: by category, files in images/ and label numbers."""

    image: str
    size: tuple[int, int]
    label_size: tuple[int, int]
    entries: dict[str, list[str | int]]


def image_hash(image: str) -> int:
    """The number that decides order and split: the first 8 bytes, big-endian, of the md5 of the path in images/."""
    return int.from_bytes(hashlib.md5(image.encode(), usedforsecurity=False).digest()[:8], "big")


def image_split(image: str) -> str:
    """``"train"`` or ``"val"``.

    >>> image_split("ade20k/ADE_train_00003891.jpg")
    'train'
    """
    return "train" if image_hash(image) / 2**64 <= TRAIN_SHARE else "val"


def write_tables(
    root: Path, rows: Sequence[WrittenRow], counts: LabelCounts, numbers: Mapping[str, int], synonyms: Mapping[str, Sequence[str]]
) -> None:
    """Writes every table, index.csv last, so that a folder with an index is complete; ``numbers``: label → number."""
    members: dict[str, list[str]] = {}  # category → labels by number; categories in the order of their smallest number
    for label in sorted(numbers, key=lambda label: numbers[label]):
        for category in counts.by_label[label]:
            members.setdefault(category, []).append(label)

    _write_labels(root, numbers, counts, synonyms)
    table = []
    for category, own in members.items():
        found = {label: counts.by_label[label][category] for label in own}
        table.append((category, numbers[own[0]], numbers[own[-1]], len(own), sum(count.frequency for count in found.values())))
        own = sorted(own, key=lambda label: (-found[label].frequency, -found[label].coverage))
        codes = [(code, numbers[label], label, found[label].frequency, f"{found[label].coverage:f}") for code, label in enumerate(own, 1)]
        _write(root / f"c_{category}.csv", ("code", "number", "name", "frequency", "coverage"), codes)
    _write(root / "category.csv", ("name", "first", "last", "count", "frequency"), table)
    (root / "README.txt").write_text(_readme(rows, members), encoding="utf-8")
    index = []
    for row in sorted(rows, key=lambda row: image_hash(row.image)):
        cells = (";".join(map(str, row.entries.get(category, ()))) for category in members)
        index.append((row.image, image_split(row.image), *row.size, *row.label_size, *cells))
    _write(root / "index.csv", (*ROW_COLUMNS, *members), index)


def _write_labels(root: Path, numbers: Mapping[str, int], counts: LabelCounts, synonyms: Mapping[str, Sequence[str]]) -> None:
    lines = []
    for label, number in sorted(numbers.items(), key=lambda pair: pair[1]):
        own = sorted(counts.by_label[label].items(), key=lambda pair: -pair[1].frequency)
        where = ";".join(f"{category}({count.frequency})" for category, count in own)
        total = counts.total(label)
        lines.append((number, label, where, total.frequency, f"{total.coverage:f}", ";".join(synonyms.get(label, ()))))
    _write(root / "label.csv", ("number", "name", "category", "frequency", "coverage", "syns"), lines)
    aliases = [f"{line[1]}: {', '.join(synonyms[line[1]])}\n" for line in lines if synonyms.get(line[1])]
    (root / "syns.txt").write_text("".join(aliases), encoding="utf-8")


def _readme(rows: Sequence[WrittenRow], members: Mapping[str, Sequence[str]]) -> str:
    counts = "\n".join(f"  {category}: {len(own)} labels" for category, own in members.items())
    return f"""A segmentation data set in the format of Broden, written by torchprobe.

{len(rows)} images in {len(members)} categories:
{counts}

index.csv     one line for each image: path in images/, split, size of the image (ih, iw) and of its label maps (sh, sw); then a
              column for each category, with label maps (PNG, in images/) and whole-image label numbers, joined by semicolons
label.csv     the labels by number, with their categories, the number of images that have them, and their total area
category.csv  the categories, with the first and last number of their labels
c_*.csv       the labels of one category
A label map encodes the number n as red n % 256, green n // 256, blue 0; 0 means unlabeled.
"""


def _write(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])
