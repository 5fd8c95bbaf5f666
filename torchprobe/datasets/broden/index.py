"""The tables of a Broden folder: categories, labels and rows, read and written. Each problem is reported with its line."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torchprobe.common.csv_files import read_rows as read_csv
from torchprobe.common.csv_files import write_rows
from torchprobe.common.limits import LimitError
from torchprobe.datasets.broden.image_files import MAX_LABEL, locate, unsafe
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.pictures import FileError, size_problem

INDEX = "index.csv"
ROW_COLUMNS = ("image", "split", "ih", "iw", "sh", "sw")
SPLITS = ("train", "val")

TRAIN_SHARE = 0.7
"""Share of images in the training split, as in the release; a hash of the path decides."""


@dataclass(frozen=True)
class Finding:
    """One problem of a Broden folder.

    ``file``: relative to the folder. ``row``: the line of that CSV file, where the header is line 1; for an image or label map the line of
    the index. ``what``: the problem. ``fix``: what to do about it. ``index``: the name of the index. ``note``: it is worth knowing, but no
    fault.
    """

    row: int | None
    file: str
    what: str
    fix: str
    index: str = INDEX
    note: bool = False

    def __str__(self) -> str:
        line = "" if self.row is None else f" line {self.row}" if self.file.endswith(".csv") else f" ({self.index} line {self.row})"
        return f"{'Note: ' if self.note else ''}{self.file}{line}: {self.what}; {self.fix}"


OnFinding = Callable[[Finding], None]
"""Called with each problem: the validator collects it, the reader raises an error. The line with the problem is left out."""


@dataclass(frozen=True)
class Label:
    """A concept. ``number``: its number in the label maps. ``category``: its primary category. ``categories``: all its categories.
    ``frequency``: images with the label, summed over categories. ``coverage``: its share of the pixels, summed over images."""

    number: int
    name: str
    category: str
    categories: tuple[str, ...]
    frequency: int
    coverage: float
    synonyms: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name as people read it: with spaces, without the suffix of colors and scenes.

        >>> Label(12, "wheat_field-s", "scene", ("scene",), 10, 10.0).title
        'wheat field'
        """
        suffix = {"color": "-c", "scene": "-s"}.get(self.category)
        return (self.name.removesuffix(suffix) if suffix else self.name).replace("_", " ")


class Row(NamedTuple):
    """One line of the index. ``entries``: for each category, the entries of its column: names of label maps in images/ (str) and
    whole-image labels (int). The entry 0 means unlabeled and is left out."""

    line: int
    image: str
    split: str
    height: int
    width: int
    label_height: int
    label_width: int
    entries: tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class Tables:
    """``categories``: the chosen ones, in the order of category.csv. ``labels``: all labels of label.csv, by ascending number.
    ``coverage``: (category, number) → the coverage in the c_*.csv of the chosen categories."""

    categories: tuple[str, ...]
    labels: tuple[Label, ...]
    coverage: dict[tuple[str, int], float]


def check_index(root: Path, index: str) -> Path:
    """The path of an index, which must lie in the folder.

    Raises:
        DatasetError: it leads out of the folder, or is not called .csv.
    """
    try:
        path = Path(locate(str(root), index, "of the data set"))
    except FileError as error:
        raise DatasetError(f"index {index!r}: {error}; give the name of a CSV file in {root}") from None
    if path.suffix != ".csv":
        raise DatasetError(f"index {index!r}: not a CSV file; give the name of one in {root}")
    return path


def read_tables(root: Path, report: OnFinding, categories: Sequence[str] | None = None) -> Tables:
    """Reads category.csv, label.csv and the c_*.csv of ``categories`` (None for all).

    The primary category of a label is the chosen category in which it has the largest coverage; of equal categories the last, as in the
    original.
    """
    names = [values[0] for _, values in _lines(root, "category.csv", ("name",), report)]
    chosen = [name for name in dict.fromkeys(names) if categories is None or name in categories]
    if not names and (root / "category.csv").is_file():
        report(Finding(None, "category.csv", "it lists no category", "write a line for each category, with its name"))
    for name in {name for name in names if names.count(name) > 1}:
        report(Finding(None, "category.csv", f"category {name!r} is listed more than once", "keep one line of it"))

    coverage: dict[tuple[str, int], float] = {}
    for category in list(chosen):
        if unsafe(category) or "/" in category or category in ROW_COLUMNS:
            report(Finding(None, "category.csv", f"{category!r} cannot be the name of a category", "use letters, digits and _"))
            chosen.remove(category)
            continue
        file = f"c_{category}.csv"
        for line, (number, covered) in _lines(root, file, ("number", "coverage"), report):
            found, share = _label_number(number), _number(covered)
            if not found or share is None:
                what = f"number {number!r}, coverage {covered!r}"
                report(Finding(line, file, what, f"write a number from 1 to {MAX_LABEL} and a coverage ≥ 0"))
            else:
                coverage[category, found] = share

    labels: dict[int, Label] = {}
    columns = ("number", "name", "frequency", "coverage", "syns")
    for line, (number, name, frequency, covered, synonyms) in _lines(root, "label.csv", columns, report):
        found, share, count = _label_number(number), _number(covered), _number(frequency)
        if not found or share is None or count is None or not name:
            what = f"number {number!r}, name {name!r}, frequency {frequency!r}, coverage {covered!r}"
            fix = f"write a number from 1 to {MAX_LABEL}, a name, and a frequency and coverage ≥ 0"
            report(Finding(line, "label.csv", what, fix))
            continue
        if found in labels:
            report(Finding(line, "label.csv", f"label {found} is listed more than once", "give every label its own number"))
            continue
        own = [category for category in chosen if (category, found) in coverage]
        # A label without a chosen category gets the last one, as in the original.
        _, primary = max(((coverage.get((category, found), 0.0), at) for at, category in enumerate(chosen)), default=(0.0, -1))
        category = chosen[primary] if chosen else ""
        labels[found] = Label(found, name, category, tuple(own), int(count), share, tuple(s for s in synonyms.split(";") if s))
    return Tables(tuple(chosen), tuple(labels[number] for number in sorted(labels)), coverage)


def read_rows(root: Path, report: OnFinding, categories: Sequence[str], known: Callable[[int], bool], index: str = INDEX) -> Iterator[Row]:
    """The valid lines of ``index``, including those without labels; ``known``: whether a label number exists."""
    columns = (*ROW_COLUMNS, *categories)
    cells_seen: dict[str, _Entries] = {}  # label numbers and sizes repeat; file names do not
    sizes_seen: dict[tuple[str, ...], _Sizes] = {}
    for line, (image, split, ih, iw, sh, sw, *cells) in _lines(root, index, columns, report, len(ROW_COLUMNS)):
        texts = (ih, iw, sh, sw)
        if (sizes := sizes_seen.get(texts)) is None:
            sizes = sizes_seen[texts] = _sizes(texts)
        problems = list(sizes[1])
        if split not in SPLITS:
            problems.append((f"split {split!r}", "write train or val"))
        if unsafe(image):
            problems.append((f"image {image!r} leaves the folder images/", "paths are relative to images/, with / and without .."))
        entries = []
        for category, cell in zip(categories, cells, strict=True):
            if (found := cells_seen.get(cell)) is None:
                found = _entries(cell, known)
                if ".png" not in cell:
                    cells_seen[cell] = found
            entries.append(found[0])
            if found[1]:
                problems += [(f"{what} in column {category}", fix) for what, fix in found[1]]
        for what, fix in problems:
            report(Finding(line, index, what, fix))
        if not problems:
            yield Row(line, image, split, *sizes[0], tuple(entries))


_Problems = list[tuple[str, str]]  # what, fix
_Sizes = tuple[tuple[int, int, int, int], _Problems]
_Entries = tuple[tuple[str | int, ...], _Problems]


def _sizes(texts: tuple[str, str, str, str]) -> _Sizes:
    """ih, iw, sh, sw as numbers."""
    ih, iw, sh, sw = (int(text) if text.isascii() and text.isdigit() and len(text) < 9 else -1 for text in texts)
    if min(ih, iw, sh, sw) < 0:
        return (ih, iw, sh, sw), [(f"ih, iw, sh, sw = {', '.join(map(repr, texts))}", "write the four sizes as whole numbers")]
    problems = [size_problem(ih, iw), size_problem(sh, sw)]
    return (ih, iw, sh, sw), [(problem, "resize the image, and correct the row") for problem in problems if problem]


def _entries(cell: str, known: Callable[[int], bool]) -> _Entries:
    """The entries in the cell of a category."""
    entries: list[str | int] = []
    problems: _Problems = []
    for entry in cell.split(";"):
        if entry.isdigit():
            number = _label_number(entry)
            if number is None or (number and not known(number)):
                problems.append((f"label {entry[:20]} is not in label.csv", "add it there, or write 0 for unlabeled"))
            elif number:
                entries.append(number)
        elif entry and not entry.lower().endswith(".png"):
            problems.append((f"entry {entry[:100]!r}", "it must be a label number or the path of a PNG"))
        elif entry and unsafe(entry):
            problems.append((f"path {entry!r} leaves the folder images/", "paths are relative to images/, with / and without .."))
        elif entry:
            entries.append(entry)
    return tuple(entries), problems


def _lines(root: Path, file: str, columns: Sequence[str], report: OnFinding, needed: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line number, the values of ``columns``) for every line of a CSV file. A missing column is reported. If it is one of the first
    ``needed`` columns (default: all), no line is read, otherwise its values are empty."""
    try:
        lines = read_csv(root / file)
        _, header = next(lines, (1, []))
        if missing := [name for name in columns if name not in header and name != "syns"]:
            report(Finding(1, file, f"no column {', '.join(missing)}", f"expected {','.join(columns)}"))
            if not set(missing).isdisjoint(columns[:needed]):
                return
        at = [header.index(name) if name in header else -1 for name in columns]
        for line, values in lines:
            if len(values) == len(header):
                yield line, [values[i] if i >= 0 else "" for i in at]
            else:
                report(Finding(line, file, f"{len(values)} fields", f"write {len(header)}, as in the header"))
    except FileNotFoundError:
        near = difflib.get_close_matches(file, sorted(path.name for path in root.glob("*.csv")))
        fix = f"did you mean {' or '.join(near)}?" if near else "copy it from the release, or write the data set with BrodenWriter"
        report(Finding(None, file, "the file is missing", fix))
    except LimitError as error:
        report(Finding(None, file, "the table is too large", str(error)))
    except (OSError, ValueError) as error:
        report(Finding(None, file, f"the table cannot be read ({type(error).__name__}: {error})", "it must be CSV in UTF-8"))


def _label_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 and int(text) <= MAX_LABEL else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


# -- writing ----------------------------------------------------------------------------------------------------------------


@dataclass
class Occurrence:
    """``frequency``: images that have a label. ``coverage``: its share of the pixels, summed over images."""

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
A label map encodes the number n as red n % 256, green n // 256, blue 0; 0 means unlabeled. A map of 0 alone says that no label of its
category is in the image; an empty cell says that this is unknown.
"""


def _write(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    write_rows(path, [header, *lines])
