"""What a data set holds, as a fact that a result depends on: see :mod:`torchprobe.common.facts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchprobe.common.facts import digest_of, files_digest
from torchprobe.datasets.broden.reader import Broden


def broden_facts(broden: Broden, rows: Sequence[int] | None = None) -> dict[str, str]:
    """What a data set holds: digests of each table, of the pictures and of the label maps of some rows, and of what was chosen of them.
    Each file is read, once in a process.

    Args:
        broden: the data set.
        rows: those that are used; None: all.
    """
    chosen = range(len(broden)) if rows is None else rows
    tables = [broden.index, "label.csv", "category.csv", *(f"c_{category}.csv" for category in broden.categories)]
    used = [broden.rows[number] for number in chosen]
    maps = dict.fromkeys(entry for row in used for entries in row.entries for entry in entries if isinstance(entry, str))
    parts = {**{name: [name] for name in tables}, "pictures": [row.image for row in used], "label maps": [*maps]}
    found = {name: files_digest(names, [_path(broden, name, one) for one in names]) for name, names in parts.items()}
    return {**found, "chosen rows": digest_of([broden.split, [*broden.categories], [*chosen]])}


def _path(broden: Broden, part: str, name: str) -> Path:
    return Path(broden.root, name) if part == name else Path(broden.root, "images", name)


def broden_digest(broden: Broden, rows: Sequence[int] | None = None) -> str:
    """A digest of the tables, and of the bytes of the images and label maps of some rows. Each file is read, once in a process.

    Args:
        broden: the data set.
        rows: those that are used; None: all.

    >>> import tempfile, numpy as np
    >>> from torchprobe.datasets import BrodenWriter
    >>> folder = tempfile.mkdtemp()
    >>> with BrodenWriter(folder, {"object": ["sky", "sea"]}, size=32) as writer:
    ...     writer.add("mine/1", np.zeros((32, 32, 3), np.uint8), {"object": np.eye(16, dtype=int)})
    >>> before = broden_digest(Broden(folder))
    >>> table = Path(folder, "label.csv")
    >>> _ = table.write_text(table.read_text().replace("sky", "sun"))
    >>> broden_digest(Broden(folder)) == before
    False
    """
    return digest_of(broden_facts(broden, rows))
