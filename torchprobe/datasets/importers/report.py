"""What an import did: what was written, what was dropped, and what was changed on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = 5
"""Names that a :class:`Remark` keeps."""


class Unusable(ValueError):
    """An image, a mask or an annotation that cannot be used.

    ``reason``: why, in words that are the same for all of a kind, so that they can be counted. ``detail``: what is special about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class Remark:
    """Something that happened ``count`` times. ``what``: to what, in the plural, such as "images". ``examples``: the first few."""

    what: str
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        examples = f" ({', '.join(self.examples)}{', …' if self.count > len(self.examples) else ''})" if self.examples else ""
        return f"{self.what} ({self.count:,}): {self.reason}{examples}"


@dataclass
class ImportReport:
    """What an importer did. The file import.json of the data set holds the same.

    Attributes:
        source: the format that was read, such as ``"coco"``.
        root: the folder of the data set.
        images: images written.
        labels: labels that occur in them.
        empty: images that are annotated for a category, and have none of its labels. They are kept, as images without the concepts.
        pixels: pixels of all label maps, in the size of the source, where each image counts once.
        dropped: what is not in the data set, and why.
        changed: what is in it, but not as in the source: merged, renamed, or without its meaning, such as void pixels.

    >>> report = ImportReport("coco", Path("set"))
    >>> report.drop("images", "the file is missing", "a.jpg")
    >>> print(report.dropped[0])
    images (1): the file is missing (a.jpg)
    """

    source: str
    root: Path
    images: int = 0
    labels: int = 0
    empty: int = 0
    pixels: int = 0
    dropped: list[Remark] = field(default_factory=list)
    changed: list[Remark] = field(default_factory=list)

    def drop(self, what: str, reason: str, example: str = "", count: int = 1) -> None:
        """Counts something that is left out; ``what`` is in the plural."""
        _count(self.dropped, what, reason, example, count)

    def change(self, what: str, reason: str, example: str = "", count: int = 1) -> None:
        """Counts something that is kept, but not as it was."""
        _count(self.changed, what, reason, example, count)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        numbers = {"images": self.images, "labels": self.labels, "empty": self.empty, "pixels": self.pixels}
        lists = {"dropped": [vars(remark) for remark in self.dropped], "changed": [vars(remark) for remark in self.changed]}
        return {"source": self.source, "root": str(self.root), **numbers, **lists}


def _count(remarks: list[Remark], what: str, reason: str, example: str, count: int) -> None:
    if count < 1:
        return
    found = next((remark for remark in remarks if (remark.what, remark.reason) == (what, reason)), None)
    if found is None:
        found = Remark(what, reason)
        remarks.append(found)
    found.count += count
    if example and len(found.examples) < EXAMPLES and example not in found.examples:
        found.examples.append(example)
