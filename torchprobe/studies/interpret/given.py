"""Representations that are given, in the place of an encoder and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torchprobe.analysis.baseline import IMAGENET, Baseline, ImagenetClasses
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.given_files import Given, keep, open_given, open_head
from torchprobe.analysis.outliers import Rule
from torchprobe.common.arrays import located
from torchprobe.common.messages import counted
from torchprobe.common.runs import RunOptions
from torchprobe.common.storage import digest
from torchprobe.common.version import VERSION
from torchprobe.encoders import EncoderError, Head
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.inputs import NO_HEAD, Choices, Inputs
from torchprobe.studies.interpret.results import Stages


@dataclass(frozen=True)
class GivenSubject:
    """Representations with everything that they are measured with; the fields are as of :class:`~.inputs.Subject`.

    Attributes:
        name: of the encoder that they come from, or of their file.
        images: the representations of the unshifted images, or of the texts.
        shifts: name → representations under a shift.
    """

    name: str
    images: Given
    shifts: Mapping[str, Given] = field(default_factory=dict)
    head: Head | None = None
    baseline: Baseline | None = None
    imagenet_classes: ImagenetClasses = "full"
    about: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    outlier_rule: Rule = "robust"

    @property
    def why_no_head(self) -> str:
        """Why there is no accuracy without a head."""
        return NO_HEAD

    def __post_init__(self) -> None:
        for name, one in self.sets.items():
            if one.h.shape[1] != self.features:
                raise ValueError(f"{name} has {one.h.shape[1]} features, but {self.name} has {self.features}")
        if self.head is not None and self.head.in_features != self.features:
            raise ValueError(f"the head takes {self.head.in_features} features, but {self.name} has {self.features}")
        if IMAGENET in self.shifts:
            raise ValueError(f"{IMAGENET!r} is the name of the unshifted images; give the shift another name")

    @property
    def features(self) -> int:
        """The width of the representation."""
        return int(self.images.h.shape[1])

    @property
    def sets(self) -> dict[str, Given]:
        """All sets by name, the unshifted images first."""
        return {IMAGENET: self.images, **self.shifts}

    def remarks(self, name: str) -> list[str]:
        """What is unexpected in a set."""
        h = self.sets[name].h
        invalid = sum(int((~rows.isfinite().all(1)).sum()) for rows in h.split(max(1, (1 << 22) // h.shape[1])))
        return [f"{counted(invalid, 'row')} of {len(h):,} with nan or inf, left out of kurtosis and wrong in accuracy"] if invalid else []


def load_given(
    file: str, labels: str | None, head: str, inputs: Inputs, about: Mapping[str, Any] | None = None, seed: int = 0
) -> GivenSubject:
    """Representations, labels and a head from files.

    Args:
        file, labels: see :func:`torchprobe.analysis.given_files.open_given`.
        head: a file for :func:`torchprobe.analysis.given_files.open_head`; "auto" and "none" stand for no head.
        inputs: shifts, whose folders are files here, baseline, limit and choices.
        about: facts to keep with the results. A name stands for the name of the file.
        seed: of ``inputs.limit``.

    Raises:
        FileNotFoundError, ValueError, EncoderError: a file is missing, cannot be used, or does not fit the others.
    """
    if head in ("own", "zero-shot"):
        raise EncoderError(f"--head {head} needs a network: with --embeddings, give a file with an array (classes, features), or none")
    images = open_given(file, labels)
    shifts = {name: open_given(path, prefix=f"{name} ") for name, path in inputs.shifts.items()}
    if inputs.limit is not None:
        images, *rest = (one.sample(inputs.limit, seed) for one in (images, *shifts.values()))
        shifts = dict(zip(shifts, rest, strict=True))
    path, array = located(file)
    facts = {"source": file, "labels": labels, **{f"shift {name}": str(one) for name, one in inputs.shifts.items()}, "limit": inputs.limit}
    return GivenSubject(
        name=f"{path.stem}:{array}" if array else path.stem,
        images=images,
        shifts=shifts,
        head=None if head in ("auto", "none") else open_head(head, images.h.shape[1]),
        baseline=inputs.baseline,
        imagenet_classes=inputs.imagenet_classes,
        about={**facts, "head": None if head in ("auto", "none") else head, **(about or {})},
        choices=inputs.choices,
        outlier_rule=inputs.outlier_rule,
    )


@dataclass
class GivenFiles:
    """The representations of one run, kept in its folder as those of an encoder are.

    Args:
        subject: the representations and what they are measured with.
        folder: of the run.
        options: of the run.
    """

    subject: GivenSubject
    folder: Path
    options: RunOptions

    @cached_property
    def stages(self) -> Stages:
        """What the run keeps on disk."""
        return Stages(self.folder, self.options.resume)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts that every stage depends on."""
        head = self.subject.head
        identity = None if head is None else [digest(head.parameters()), head.normalize]
        return {"torchprobe": VERSION, "seed": self.options.seed, "head": identity}

    def embed(self) -> dict[str, Embeddings]:
        """The representations of every set, by name, from the folder."""
        (self.folder / "embeddings").mkdir(parents=True, exist_ok=True)
        names = file_names(self.subject.sets)
        return {
            name: keep(
                given,
                self.folder / "embeddings" / f"{names[name]}.safetensors",
                self.subject.name if name == IMAGENET else f"{self.subject.name}, {name}",
                self.options.resume,
            )
            for name, given in self.subject.sets.items()
        }
