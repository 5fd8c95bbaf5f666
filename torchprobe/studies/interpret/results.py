"""The results of an interpretation: the sections together, and the files from which a resumed run reads them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torchprobe.common.checked import read_checked, write_checked
from torchprobe.common.facts import changed
from torchprobe.common.files import to_json
from torchprobe.common.folders import output_folder
from torchprobe.common.ranks import Ranks
from torchprobe.common.records import Key, Record, decode, encode
from torchprobe.common.runs import RunOptions, RunWarning
from torchprobe.studies.interpret.accuracy import Accuracy, Robustness
from torchprobe.studies.interpret.concepts import Concepts
from torchprobe.studies.interpret.directions import HeadDirections, Pruning
from torchprobe.studies.interpret.provenance import Origin
from torchprobe.studies.interpret.representation import Ablation, Kurtosis, Layers, Outliers

FORMAT = 1
"""The format of ``results.json``."""

MEASURES = 3
"""Counts the definitions of outlier features and of intervals. A resumed run computes the stages of an earlier definition again."""

INTERPRET = "interpret"
"""The command whose output folder holds an interpretation."""

READ_BACK = ("kurtosis", "correct")
"""The tables that a comparison reads beside ``results.json``."""

TABLE_DIGESTS = "tables"
"""The key of their digests in ``results.json``."""

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
    provenance: Origin | None = None
    about: dict[str, Any]
    given: bool | None = None
    chosen_features: list[int] | None = None
    same_images: bool | None = None

    @property
    def title(self) -> str:
        """The name in the suite, or else the name of the encoder."""
        return str(self.about.get("name") or self.name)

    @property
    def unit(self) -> str:
        """What one input is, for sentences about these results."""
        return "text" if self.about.get("modality") == "text" else "image"


def output_of(
    folder: str | os.PathLike[str], name: str, options: RunOptions, ranks: Ranks | None = None
) -> contextlib.AbstractContextManager[Path]:
    """The output folder of an interpretation of the encoder ``name``; see :func:`torchprobe.common.folders.output_folder`."""
    return output_folder(folder, INTERPRET, of=name, resume=options.resume, overwrite=options.overwrite, ranks=ranks)


class Stages:
    """The stages of one run in ``folder/stages``, one JSON file each.

    A stage is read, not computed, if a resumed run finds it with the same facts. The facts of a stage include those of the stages that it
    depends on. If a fact has changed, the stage is computed again, and a warning says which fact. Each file has a checksum; a damaged stage
    is computed again too.

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
        self._told: set[str] = set()

    def run(self, name: str, facts: Mapping[str, Any], kind: type[T], compute: Callable[[], T]) -> T:
        """The result of a stage, of the type ``kind``: read if it was found with the same facts, otherwise computed and written."""
        if (known := self.known(name, facts, kind)) is not None:
            return known
        found = json.loads(to_json(encode(compute())))  # through JSON, so that a fresh and a resumed run get the same
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checked(self._path(name), {"stage": name, "facts": facts, "found": found})
        return decode(kind, found, name)

    def known(self, name: str, facts: Mapping[str, Any], kind: type[T]) -> T | None:
        """The result of a stage with the same facts in a resumed run; None if it is missing or its file is damaged."""
        if not self.resume:
            return None
        try:
            saved = read_checked(self._path(name))
            before = saved.get("facts")
            if saved.get("stage") != name or not isinstance(before, dict):
                return None
            if (other := changed(before, json.loads(to_json(facts)))) is not None:
                self._tell(name, *other)
                return None
            return decode(kind, saved.get("found"), name)
        except (OSError, ValueError):
            return None

    def _tell(self, name: str, fact: str, before: object, now: object) -> None:
        """Says once for each fact that stages are computed again."""
        if fact not in self._told:
            self._told.add(fact)
            why = f"because of another {fact}: {before!r:.200}, now {now!r:.200}"
            warnings.warn(f"{name}, and what else depends on it, is computed again, {why}", RunWarning, stacklevel=4)

    def forget(self, name: str) -> None:
        """Deletes the file of a stage."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
