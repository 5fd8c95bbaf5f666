"""The results of an interpretation: the sections together, and the files from which a resumed run reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torchprobe.common.deprecation import RenamedAttribute
from torchprobe.common.files import replacing, to_json
from torchprobe.common.records import Key, Record, decode, encode
from torchprobe.dissection import Dissection
from torchprobe.studies.interpret.accuracy import Accuracy, Robustness
from torchprobe.studies.interpret.concepts import Concepts
from torchprobe.studies.interpret.directions import HeadDirections, Pruning
from torchprobe.studies.interpret.representation import Ablation, Kurtosis, Layers, Outliers

FORMAT = 1
"""The format of ``results.json``."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class HeadFacts(Record):
    """The head that was used."""

    classes: int
    normalize: bool
    digest: str


@dataclass(frozen=True, eq=False)
class Unreadable(Record):
    """An image that could not be read."""

    file: str
    reason: str


@dataclass(frozen=True, eq=False)
class SetFacts(Record):
    """One set: the numbers of images, labeled images and classes (None: all of the head), and what is unexpected in its folders."""

    images: int
    labeled: Annotated[int, Key("labelled")]
    skipped: list[Unreadable]
    classes: int | None
    remarks: list[str]


@dataclass(frozen=True, eq=False)
class Settings(Record):
    """The settings of the run."""

    batch_size: int
    device: str
    seed: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Results(Record):
    """The content of ``results.json``. A section that was not computed is None, and ``skipped`` says why.

    ``given`` is True if the representations were given, not computed from images. ``chosen_features`` and ``same_images`` are as of
    :class:`torchprobe.studies.interpret.inputs.Choices`; None if they are the default.
    """

    format: int = FORMAT
    torchprobe: str
    torch: str
    name: str
    features: int
    head: HeadFacts | None
    data: dict[str, SetFacts]
    settings: Settings
    kurtosis: Kurtosis
    outliers: Outliers
    accuracy: dict[str, Accuracy] | None = None
    directions: HeadDirections | None = None
    ablation: Ablation | None = None
    pruning: Pruning | None = None
    robustness: Robustness | None = None
    skipped: dict[str, str]
    layers: Layers | None = None
    concepts: Concepts | None = None
    about: dict[str, Any]
    given: bool | None = None
    chosen_features: list[int] | None = None
    same_images: bool | None = None

    @property
    def title(self) -> str:
        """The name in the suite, or else the name of the encoder."""
        return str(self.about.get("name") or self.name)


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


class Stages:
    """The stages of one run in ``folder/stages``, one JSON file each.

    A stage is read, not computed, if a resumed run finds it with the same facts. The facts of a stage include those of the stages that it
    depends on.

    Args:
        folder: of the run.
        resume: read the stages of an earlier run; otherwise every stage is computed.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Stages(folder).run("sum", {"of": [1, 2]}, dict[str, int], lambda: {"sum": 3})
    {'sum': 3}
    >>> Stages(folder, resume=True).run("sum", {"of": [1, 2]}, dict[str, int], lambda: {"sum": 99})
    {'sum': 3}
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder / "stages"
        self.resume = resume

    def run(self, name: str, facts: Mapping[str, Any], kind: type[T], compute: Callable[[], T]) -> T:
        """The result of a stage, of the type ``kind``: read if it was found with the same facts, otherwise computed and written."""
        if (known := self.known(name, facts, kind)) is not None:
            return known
        found = json.loads(to_json(encode(compute())))  # through JSON, so that a fresh and a resumed run get the same
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(name)) as temporary:
            temporary.write_text(to_json({"facts": facts, "found": found}), encoding="utf-8")
        return decode(kind, found, name)

    def known(self, name: str, facts: Mapping[str, Any], kind: type[T]) -> T | None:
        """The result of a stage with the same facts in a resumed run; None if it is missing or its file is damaged."""
        if not self.resume:
            return None
        try:
            saved = json.loads(self._path(name).read_text(encoding="utf-8"))
            if not isinstance(saved, dict) or saved.get("facts") != json.loads(to_json(facts)):
                return None
            return decode(kind, saved.get("found"), name)
        except (OSError, ValueError):
            return None

    def forget(self, name: str) -> None:
        """Deletes the file of a stage."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
