"""Small Broden folders on disk that hold every trap of the format, with the truth beside them; written without the library.

``write_trap_set(tmp_path / "broden", images=24, seed=0).rows[0].labels["object"]`` is what the files say: label maps (sh, sw), int64, and
whole-image numbers, in the order of the index.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = ("object", "color", "part", "material", "scene", "texture")  # in the order of their smallest label; not the usual order

# Number → (name, categories). 256 has red byte 0; 319 is 63 + 256; 3, 4 and 9 sit in two categories.
NAMED = {
    1: ("sky", ("object",)),
    2: ("black-c", ("color",)),
    3: ("wall", ("object", "part")),
    4: ("door", ("object", "part")),
    5: ("grey-c", ("color",)),
    6: ("glass", ("material",)),
    7: ("wood", ("material",)),
    8: ("wheel", ("part",)),
    9: ("window", ("object", "part")),
    10: ("<img src=x onerror=alert(1)>", ("object",)),
    11: ('oven, "old"', ("object",)),
    12: ("street-s", ("scene",)),
    13: ("cobwebbed", ("texture",)),
    63: ("lamp", ("object",)),
    256: ("pane", ("part",)),
    257: ("beach-s", ("scene",)),
    258: ("fibrous", ("texture",)),
    260: ("fur", ("material",)),
    319: ("heater", ("object",)),
    320: ("red-c", ("color",)),
}
LABELS = 330  # the rest are objects that occur now and then
COVERAGE = {("object", 3): 50.0, ("part", 3): 1.0, ("object", 4): 1.0, ("part", 4): 50.0, ("object", 9): 2.0, ("part", 9): 2.0}
PRIMARY = {3: "object", 4: "part", 9: "part"}  # the larger coverage; of equals the last


@dataclass
class TrapRow:
    """One line of index.csv, and what its label files hold."""

    image: str
    height: int
    width: int
    label_height: int
    label_width: int
    labels: dict[str, list[np.ndarray | int]] = field(default_factory=dict)

    @property
    def hash(self) -> int:
        return int.from_bytes(hashlib.md5(self.image.encode()).digest()[:8], "big")

    @property
    def split(self) -> str:
        return "train" if self.hash / 2**64 <= 0.7 else "val"

    @property
    def has_data(self) -> bool:
        """Whether anything but the literal 0 stands in a category column."""
        return any(not (isinstance(entry, int) and entry == 0) for entries in self.labels.values() for entry in entries)

    def numbers(self, category: str | None = None) -> set[int]:
        """The labels that occur in the row, 0 left out."""
        found: set[int] = set()
        for name, entries in self.labels.items():
            if category in (None, name):
                for entry in entries:
                    found |= {int(n) for n in np.unique(entry)}
        return found - {0}


@dataclass
class TrapSet:
    """The folder and the truth: rows in the order of the index, those without data included (the reader leaves them out)."""

    root: Path
    categories: tuple[str, ...]
    names: dict[int, str]
    membership: dict[int, tuple[str, ...]]
    primary: dict[int, str]
    rows: list[TrapRow]

    @property
    def data_rows(self) -> list[TrapRow]:
        return [row for row in self.rows if row.has_data]


def write_trap_set(root: Path | str, images: int = 24, seed: int = 0) -> TrapSet:
    """Writes a folder of ``images`` rows (8 or more hold every trap) and returns what is in it."""
    root = Path(root)
    rng = np.random.default_rng(seed)
    names = {number: NAMED.get(number, (f"thing {number}", ("object",)))[0] for number in range(1, LABELS + 1)}
    membership = {number: NAMED.get(number, ("", ("object",)))[1] for number in range(1, LABELS + 1)}
    primary = {number: PRIMARY.get(number, categories[0]) for number, categories in membership.items()}
    rows = sorted((_row(i, rng) for i in range(images)), key=lambda row: row.hash)
    for row in rows:
        _write_row(root / "images", row, rng)
    _write_tables(root, rows, names, membership)
    return TrapSet(root, CATEGORIES, names, membership, primary, rows)


def _row(i: int, rng: np.random.Generator) -> TrapRow:
    def colors() -> np.ndarray:
        return _map(rng, row, (2, 5, 320))

    def objects() -> np.ndarray:
        return _map(rng, row, (0, 0, 1, 3, 4, 9, 10, 11, 63, 319, 14 + i % 40))

    kind = i % 8
    name = f"set a/pic_{i:05d}.jpg"
    row = TrapRow(name, 64, 64, 32, 32)
    if kind == 0:  # all there is, several part planes; the same label twice at one pixel, in two planes and in two categories
        row.labels = {"object": [objects()], "color": [colors()], "scene": [12]}
        first = np.where(row.labels["object"][0] == 3, 3, _map(rng, row, (0, 4, 8, 9)))
        second = np.where(rng.random(first.shape) < 0.3, first, _map(rng, row, (0, 256)))
        row.labels["part"] = [first, second, _map(rng, row, (0, 0, 0, 8)), _map(rng, row, (0, 0, 0, 256))][: 2 + i // 8 % 3]
    elif kind == 1:  # no pixel label at all, not even a color; several whole-image labels; a size that is not halved
        row.image = f'set_b/g, "{i}".jpg'
        row.height, row.width, row.label_height, row.label_width = 46, 58, 46, 58
        row.labels = {"texture": [258, 13]}
    elif kind == 2:  # a scene that was filtered away and yet written
        row.labels = {"scene": [0], "color": [colors()]}
    elif kind == 3:  # a file beside a whole-image label in one category
        row.labels = {"color": [colors()], "material": [_map(rng, row, (0, 6, 7)), 260]}
    elif kind == 4:  # odd sizes, not square; a label map that is empty; a scene number above 255
        row.image = f"set a/sub/é {i}.jpg"
        row.height, row.width, row.label_height, row.label_width = 33, 61, 16, 30
        row.labels = {"object": [np.zeros((16, 30), np.int64)], "color": [colors()], "scene": [257]}
    elif kind == 5:  # only labels whose red byte misleads
        row.labels = {"object": [_map(rng, row, (319, 63))], "part": [_map(rng, row, (256, 0))], "color": [colors()], "scene": [0]}
    elif kind == 6:  # nothing but the literal 0
        row.labels = {"scene": [0]}
    else:  # sparse: one pixel of one label; another primary category than the one it stands in
        sparse = np.zeros((32, 32), np.int64)
        sparse[rng.integers(32), rng.integers(32)] = 4
        row.labels = {"object": [sparse], "part": [_map(rng, row, (0, 0, 3, 9))]}
    return row


def _map(rng: np.random.Generator, row: TrapRow, choices: tuple[int, ...]) -> np.ndarray:
    """A label map in patches, with one-pixel specks."""
    height, width = row.label_height, row.label_width
    coarse = rng.choice(choices, (-(-height // 8), -(-width // 8)))
    patches = np.kron(coarse, np.ones((8, 8), np.int64))[:height, :width]
    return np.where(rng.random((height, width)) < 0.03, rng.choice(choices, (height, width)), patches).astype(np.int64)


def _write_row(images: Path, row: TrapRow, rng: np.random.Generator) -> None:
    path = images / row.image
    path.parent.mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize((row.width, row.height), Image.Resampling.BICUBIC).save(path, quality=90)
    for file, plane in label_files(row).items():
        save_label_png(images / file, plane)


def label_files(row: TrapRow) -> dict[str, np.ndarray]:
    """File name below images/ → label map."""
    files = {}
    for category in CATEGORIES:
        planes = [entry for entry in row.labels.get(category, []) if not isinstance(entry, int)]
        for k, plane in enumerate(planes, 1):
            suffix = category if len(planes) == 1 else f"{category}_{k}"
            files[f"{row.image.removesuffix('.jpg')}_{suffix}.png"] = plane
    return files


def save_label_png(path: Path, numbers: np.ndarray) -> None:
    pixels = np.stack([numbers % 256, numbers // 256, np.zeros_like(numbers)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _write_tables(root: Path, rows: list[TrapRow], names: dict[int, str], membership: dict[int, tuple[str, ...]]) -> None:
    files = {row.image: iter(label_files(row)) for row in rows}
    index = []
    for row in rows:
        line = [row.image, row.split, row.height, row.width, row.label_height, row.label_width]
        for category in CATEGORIES:
            entries = row.labels.get(category, [])
            line.append(";".join(str(entry) if isinstance(entry, int) else next(files[row.image]) for entry in entries))
        index.append(line)
    _csv(root / "index.csv", ["image", "split", "ih", "iw", "sh", "sw", *CATEGORIES], index)

    frequency: Counter[tuple[str, int]] = Counter()
    for row in rows:
        for category in row.labels:
            frequency.update((category, number) for number in row.numbers(category))
    coverage = {(c, n): COVERAGE.get((c, n), max(frequency[c, n], 0.01) / 3) for n, categories in membership.items() for c in categories}
    labels = []
    for number, name in names.items():
        own = sorted(membership[number], key=lambda c: -frequency[c, number])
        total = sum(frequency[c, number] for c in own)
        where = ";".join(f"{c}({frequency[c, number]})" for c in own)
        labels.append([number, name, where, total, f"{sum(coverage[c, number] for c in own):.6f}", ""])
    _csv(root / "label.csv", ["number", "name", "category", "frequency", "coverage", "syns"], labels)

    table = []
    for category in CATEGORIES:
        numbers = [n for n, categories in membership.items() if category in categories]
        table.append([category, numbers[0], numbers[-1], len(numbers), sum(frequency[category, n] for n in numbers)])
        numbers.sort(key=lambda n: (-frequency[category, n], -coverage[category, n]))
        codes = [[i, n, names[n], frequency[category, n], f"{coverage[category, n]:.6f}"] for i, n in enumerate(numbers, 1)]
        _csv(root / f"c_{category}.csv", ["code", "number", "name", "frequency", "coverage"], codes)
    _csv(root / "category.csv", ["name", "first", "last", "count", "frequency"], table)


def _csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
