"""What one run found, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchprobe.dissection import Dissection
from torchprobe.studies.interpret.stages import Plain

FORMAT = 1
"""Of ``results.json``."""


@dataclass
class Interpretation:
    """What one run found.

    Attributes:
        results: everything, as ``results.json`` has it: a section is missing where its input was, and ``skipped`` says why.
        kurtosis: vector kurtosis by image, with ``ids``; nan where there is none.
        peaks: max|h| / mean|h| by image.
        ids: the images.
        folder: where the files lie.
        right: by image, whether the head is right; None where the class is not known, empty without a head.
        concepts: by basis, see :func:`torchprobe.analysis.concepts.concepts`; empty where none were given.
    """

    results: Plain
    kurtosis: list[float]
    peaks: list[float]
    ids: list[str]
    folder: Path
    right: list[bool | None] = field(default_factory=list)
    concepts: dict[str, Dissection] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a suite calls it, else the name of the encoder."""
        return str(self.results["about"].get("name") or self.results["name"])
