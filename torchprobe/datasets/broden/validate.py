"""Checks a Broden folder and lists every problem."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from torchprobe.datasets.broden.image_files import locate, read_image, read_labels
from torchprobe.datasets.broden.index import INDEX, Finding, Row, Tables, check_index, read_rows, read_tables
from torchprobe.datasets.broden.reader import known_labels, unknown_labels
from torchprobe.datasets.pictures import FileError


def validate(
    root: str | os.PathLike[str],
    workers: int = 2,
    progress: Callable[[int, int], object] | None = None,
    index: str = INDEX,
    notes: bool = False,
) -> list[Finding]:
    """Every problem of a Broden folder: first the tables, then the rows, then the images in the order of the index. Empty without problems.

    These are reported: missing, unreadable or inconsistent tables; invalid rows; names that leave the folder; invalid sizes; images that
    are missing, truncated or damaged; label maps of another size than in their row, or with blue; labels that are not in label.csv, or not
    in the table of their category; images that two rows name.

    Args:
        root: the folder, see :class:`~torchprobe.datasets.Broden`.
        workers: threads that decode.
        progress: called with (rows done, rows in all).
        index: another index in the folder.
        notes: also list what is worth knowing but no fault: the rows that :class:`~torchprobe.datasets.Broden` leaves out because nothing
            is annotated in them. They come last, with ``note=True``.

    Raises:
        DatasetError: the index lies outside the folder, or is not a CSV file.

    >>> import tempfile
    >>> for finding in validate(tempfile.mkdtemp())[:2]:
    ...     print(finding)
    category.csv: the file is missing; copy it from the release, or write the data set with BrodenWriter
    label.csv: the file is missing; copy it from the release, or write the data set with BrodenWriter
    """
    root = Path(root)
    findings: list[Finding] = []
    check_index(root, index)
    if not root.is_dir():
        findings.append(Finding(None, ".", f"the folder {root} is not there", "give the folder that holds the index"))
    tables = read_tables(root, findings.append)
    findings += _table_problems(root, tables)
    known = known_labels(tables.labels)
    numbers = {label.number for label in tables.labels}
    rows = list(read_rows(root, findings.append, tables.categories, numbers.__contains__, index))
    findings += _repeated(rows, index)
    listed = [_listed(tables, category, len(known)) for category in tables.categories]
    check = functools.partial(_row_problems, root, tables.categories, known, listed, index)
    with ThreadPoolExecutor(workers, thread_name_prefix="torchprobe-check") as threads:
        for start in range(0, len(rows), 256):  # small blocks, so that few results wait
            for done, found in enumerate(threads.map(check, rows[start : start + 256]), start + 1):
                findings += found
                if progress is not None:
                    progress(done, len(rows))
    return findings + (_left_out(rows, index) if notes else [])


def _left_out(rows: Sequence[Row], index: str) -> list[Finding]:
    """A note on the rows that the reader leaves out."""
    lines = [row.line for row in rows if not any(row.entries)]
    if not lines:
        return []
    what = f"{len(lines)} of {len(rows)} rows are left out, since nothing is annotated in them: line{'s' if len(lines) > 1 else ''} "
    fix = "if an image shows no label of a category, say so with a label map that holds only 0"
    return [Finding(None, index, what + _few(lines), fix, index, note=True)]


def _table_problems(root: Path, tables: Tables) -> list[Finding]:
    """Tables that contradict each other."""
    findings = []
    if not (root / "images").is_dir():
        findings.append(Finding(None, "images", "the folder is missing", "it holds the images and label maps that the index names"))
    numbers = {label.number for label in tables.labels}
    for category in tables.categories:
        if unlisted := sorted({number for name, number in tables.coverage if name == category} - numbers):
            what = f"{_some(unlisted)} not in label.csv"
            findings.append(Finding(None, f"c_{category}.csv", what, "add a line for each to label.csv"))
    if lost := [label.number for label in tables.labels if not label.categories]:
        findings.append(Finding(None, "label.csv", f"{_some(lost)} in the c_*.csv of no category", "list each in its category"))
    first: dict[str, int] = {}
    for label in tables.labels:
        if first.setdefault(label.name, label.number) != label.number:
            what = f"labels {first[label.name]} and {label.number} are both called {label.name!r}"
            findings.append(Finding(None, "label.csv", what, "give every label its own name"))
    return findings


def _repeated(rows: Sequence[Row], index: str) -> list[Finding]:
    """Images that two rows name."""
    first: dict[str, int] = {}
    lines = [(row, first.setdefault(row.image, row.line)) for row in rows]
    return [
        Finding(row.line, index, f"{row.image} is already in line {line}", "list every image once", index)
        for row, line in lines
        if line != row.line
    ]


def _row_problems(
    root: Path, categories: Sequence[str], known: np.ndarray[Any, Any], listed: Sequence[np.ndarray[Any, Any]], index: str, row: Row
) -> list[Finding]:
    """Problems with the files and the labels of a row."""
    images = str(root / "images")
    findings = []

    def found(name: str, what: str, fix: str) -> None:
        findings.append(Finding(row.line, f"images/{name}", what, fix, index))

    try:
        width, height = read_image(locate(images, row.image)).size
        if (height, width) != (row.height, row.width):
            what = f"the image is {height} × {width} pixels, its row says ih × iw = {row.height} × {row.width}"
            found(row.image, what, "correct the row")
    except FileError as error:
        found(row.image, str(error), "replace the file, or remove the row")
    for category, entries, own in zip(categories, row.entries, listed, strict=True):
        for entry in entries:
            if isinstance(entry, int):
                if not own[entry]:
                    what = f"label {entry} in column {category}, but c_{category}.csv does not list it"
                    findings.append(Finding(row.line, index, what, "add it there", index))
                continue
            try:
                plane = read_labels(locate(images, entry), row.label_height, row.label_width)
            except FileError as error:
                found(entry, str(error), "replace the file, or remove it from the row")
                continue
            if unknown := unknown_labels(plane, known):
                found(entry, f"{_some(unknown)} not in label.csv", "add them there, or correct the label map (red + 256 · green)")
            elif strays := unknown_labels(plane, own):
                found(entry, f"{_some(strays)} not in c_{category}.csv", "add them there")
    return findings


def _listed(tables: Tables, category: str, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """By number, whether a category lists the label."""
    listed = np.zeros(size, bool)
    listed[[0, *(number for name, number in tables.coverage if name == category and number < size)]] = True
    return listed


def _some(numbers: Sequence[int]) -> str:
    """The first few of many labels."""
    return f"label{'s' if len(numbers) > 1 else ''} {_few(numbers)}"


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
