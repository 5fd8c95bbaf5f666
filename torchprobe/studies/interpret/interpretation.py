"""The result of one run of ``interpret``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchprobe.common.deprecation import RenamedAttribute
from torchprobe.dissection import Dissection
from torchprobe.rendering.notebook import fragment
from torchprobe.rendering.page import Page
from torchprobe.rendering.wording import worded_page
from torchprobe.studies.interpret.headline import MISSING_COLUMNS, facts, measured
from torchprobe.studies.interpret.results import Results


@dataclass
class Interpretation:
    """The result of one run.

    Attributes:
        results: the content of ``results.json``. Sections are attributes, and also keys, as in the file.
        kurtosis: vector kurtosis of each image, in the order of ``ids``; nan if it is undefined.
        peaks: max|h| / mean|h| of each image.
        ids: the names of the images.
        folder: the folder of the files.
        correct: for each image, whether the head is correct; None if the class is unknown. Empty without a head.
        correct_under_shift: set → image → whether the head is correct, for images with a known class.
        concepts: by basis, see :func:`torchprobe.analysis.concepts`; empty without concepts.
    """

    results: Results
    kurtosis: list[float]
    peaks: list[float]
    ids: list[str]
    folder: Path
    correct: list[bool | None] = field(default_factory=list)
    correct_under_shift: dict[str, dict[str, bool]] = field(default_factory=dict)
    concepts: dict[str, Dissection] = field(default_factory=dict)

    right = RenamedAttribute("correct")

    @property
    def name(self) -> str:
        """The name in the suite, or else the name of the encoder."""
        return self.results.title

    def _repr_html_(self) -> str:
        """The headline numbers for a notebook, and the sections that are missing, with the reason."""
        page = worded_page(Page("interpret", self.name, measured(self.results), facts(self.results)), self.results.unit)
        missing = [{"section": section, "why": why} for section, why in self.results.skipped.items()]
        note = f"The whole page: {self.folder / 'index.html'}"
        return fragment(f"{page.title}: {page.summary}", page.facts, missing, MISSING_COLUMNS, note, of="sections")
