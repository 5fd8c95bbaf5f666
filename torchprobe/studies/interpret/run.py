"""One encoder through the whole analysis. The output is a folder of results, and an interrupted run can be resumed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import torchprobe
from torchprobe.analysis.baseline import IMAGENET, Baseline, ImagenetClasses
from torchprobe.analysis.directions import Directions, privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.ranks import Ranks
from torchprobe.common.records import decode, encode
from torchprobe.common.runs import Clock, Progress, ProgressCallback, RunOptions
from torchprobe.datasets import Broden, Images, LabeledImages
from torchprobe.dissection import Dissection
from torchprobe.encoders import Encoder, Head
from torchprobe.recording.layers import select_layers
from torchprobe.studies.interpret.accuracy import Accuracy, Robustness, measure_accuracy, measure_robustness
from torchprobe.studies.interpret.concepts import Concepts, summarize_concepts
from torchprobe.studies.interpret.directions import HeadDirections, Pruning, measure_directions, measure_pruning
from torchprobe.studies.interpret.inputs import LAYER_IMAGES, Subject
from torchprobe.studies.interpret.passes import Passes, identity
from torchprobe.studies.interpret.report import write
from torchprobe.studies.interpret.representation import (
    Ablation,
    Kurtosis,
    Outliers,
    measure_ablation,
    measure_kurtosis,
    measure_outliers,
    why_no_ablation,
)
from torchprobe.studies.interpret.results import HeadFacts, Interpretation, Results, SetFacts, Settings, Stages, Unreadable

__all__ = ["Interpretation", "Progress", "interpret", "interpret_subject"]


@renamed_arguments(x="imagenet_classes")
def interpret(
    encoder: Encoder,
    images: Images,
    out: str | os.PathLike[str],
    *,
    head: nn.Linear | None = None,
    shifts: Mapping[str, Images] | None = None,
    broden: Broden | None = None,
    baseline: Baseline | None = None,
    imagenet_classes: ImagenetClasses = "full",
    layers: str | Iterable[str] | None = None,
    layer_images: int = LAYER_IMAGES,
    about: Mapping[str, Any] | None = None,
    published: Mapping[str, float] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 2,
    seed: int = 0,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> Interpretation:
    """Repeats the analysis of "Interpreting CLIP" on one encoder, and writes the results into ``out``.

    The sections and their inputs: outlier features and layers need images; accuracy, privileged directions, ablation and pruning need a
    head and labels; effective robustness also needs shifts; concepts need ``broden``. A section without its input is left out, and the
    results say why.

    Directions are ordered by their importance on one half of the images. Pruning and ablation are evaluated on the other half.

    Args:
        encoder: images → representations, before normalization.
        images: the evaluation set, such as ImageNet's validation images; with labels for everything that needs a head.
        out: a folder, which is made if needed. It gets ``results.json``, CSV tables, plots as PNG and SVG, ``index.html`` and the
            representations.
        head: on top of the encoder, a :class:`torchprobe.encoders.Head` or a linear layer; None: only the sections without a head.
        shifts: name → labeled images under a shift. The names are those of :data:`torchprobe.analysis.SHIFTS`, or columns of the baseline.
        broden: concepts.
        baseline: the standard models of effective robustness; None: the published fits.
        imagenet_classes: of effective robustness, see :func:`torchprobe.analysis.effective_robustness`.
        layers: the layers to record over depth, see :func:`torchprobe.record`.
        layer_images: number of images to record them on, chosen at random; 0 leaves the layers out.
        about: facts to keep with the results, such as ``role``, ``backbone`` and ``pretraining``.
        published: accuracies in percent, ``"imagenet"`` and shifts, for effective robustness if no shifts are given.
        batch_size, device, workers: of the passes through the encoder.
        seed: of everything random.
        resume: continue an interrupted run in ``out``. Stages that were finished with the same inputs are not computed again.
        progress: called with a :class:`Progress` after every batch.
        stop: called before every batch; the run stops if it returns True.

    Under ``torchrun`` the ranks share the passes. Every rank returns the same result, and the first rank writes it.

    Raises:
        ValueError: a head of another width, or arguments that do not fit each other.
        DatasetError: no image could be read.
        KeyboardInterrupt: ``stop`` returned True; finished work is kept for ``resume``.
    """
    subject = Subject(
        encoder=encoder,
        images=images,
        shifts=shifts or {},
        head=None if head is None else Head.of(head),
        broden=broden,
        baseline=baseline,
        imagenet_classes=imagenet_classes,
        layers=layers if layers is None or isinstance(layers, str) else list(layers),
        layer_images=layer_images,
        about=about or {},
        published=published or {},
    )
    return interpret_subject(subject, out, RunOptions(batch_size, device, workers, seed, resume, progress, stop))


def interpret_subject(subject: Subject, out: str | os.PathLike[str], options: RunOptions) -> Interpretation:
    """As :func:`interpret`, with its arguments in two objects."""
    encoder, head = subject.encoder, subject.head
    if head is not None and head.in_features != encoder.features:
        raise ValueError(f"the head takes {head.in_features} features, but the representation of {encoder.name} has {encoder.features}")
    if IMAGENET in subject.shifts:
        raise ValueError(f"{IMAGENET!r} is the name of the unshifted images; give the shift another name")
    if subject.layers is not None and subject.layer_images:
        select_layers(encoder, subject.layers)  # a wrong name is an error before anything is computed
    # Copied to the CPU, where the representations are. Without a copy, moving the encoder would also move the head.
    subject = replace(subject, head=None if head is None else copy.deepcopy(head).cpu())
    folder = Path(out)
    clock = Clock(options.progress, len(subject.sets) + (subject.layer_images > 0) + (subject.broden is not None))
    with Ranks() as ranks:
        passes = Passes(subject, folder, options, Stages(folder, options.resume), clock, ranks)
        embedded = passes.embed()
        halves = _halves(subject.head, embedded[IMAGENET], options.seed)
        concepts: dict[str, Dissection] = {}
        facts: dict[str, Any] = {}
        if subject.broden is not None:
            concepts, facts = passes.concepts(subject.broden, halves.directions, embedded[IMAGENET])

        def measure() -> Interpretation:
            found = _Sections(passes, embedded, halves).measure(concepts, facts)
            write(found)
            return found

        result = ranks.on_first(measure)
    result.concepts = concepts  # every rank has read them, so they are not sent from rank to rank
    return result


class _Halves(NamedTuple):
    """Two halves of the images, and the directions of the head with their importance on the first half; or why they are missing."""

    directions: Directions | None
    first: Embeddings
    second: Embeddings
    why: str = ""


def _halves(head: Head | None, images: Embeddings, seed: int) -> _Halves:
    if head is None:
        return _Halves(None, images, images, "no head was given")
    try:
        first, second = split(images, seed=seed)
        return _Halves(privileged_directions(head, first.h), first, second)
    except ValueError as error:  # too few images, a head of zeros, no finite representation
        return _Halves(None, images, images, str(error))


class _Sections:
    """The sections of one run, from its representations. ``skipped`` says why a section is missing."""

    def __init__(self, passes: Passes, embedded: Mapping[str, Embeddings], halves: _Halves) -> None:
        self.passes, self.subject, self.stages, self.seed = passes, passes.subject, passes.stages, passes.options.seed
        self.embedded, self.images, self.halves = embedded, embedded[IMAGENET], halves
        self.labeled = {name: one for name, one in embedded.items() if bool((one.y >= 0).any())}
        self.unlabeled = "no head was given" if self.subject.head is None else "the images have no labels"
        self.skipped: dict[str, str] = {}
        baseline = self.subject.baseline
        self.image_facts = passes.facts | {"images": identity(self.images)}
        self.set_facts = passes.facts | {
            "sets": {name: identity(one) for name, one in embedded.items()},
            "x": self.subject.imagenet_classes,
            "baseline": None if baseline is None else {name: list(map(float, row)) for name, row in baseline.accuracies.items()},
        }

    def measure(self, dissections: Mapping[str, Dissection], concept_facts: Mapping[str, Any]) -> Interpretation:
        """Every section that has its input."""
        subject, head = self.subject, self.subject.head
        kurtosis = self.stages.run("kurtosis", self.image_facts, Kurtosis, lambda: measure_kurtosis(self.images, self.seed))
        outliers = self.stages.run("outliers", self.image_facts, Outliers, lambda: measure_outliers(self.images))
        accuracy, correct = self.accuracy()
        directions = self.directions(outliers.indices)
        ablation, pruning = self.ablation_and_pruning(outliers.indices)
        robustness = self.robustness(accuracy or {})
        layers = concepts = None
        if subject.layer_images:
            layers = self.passes.layers(self.images)
        else:
            self.skipped["layers"] = "no images were asked for (layer_images = 0)"
        if dissections:
            concepts = self.stages.run("concepts", concept_facts, Concepts, lambda: summarize_concepts(dissections))
        else:
            self.skipped["concepts"] = "no concepts were given (--broden)"
        options = self.passes.options
        results = Results(
            torchprobe=torchprobe.__version__,
            torch=torch.__version__,
            name=subject.encoder.name,
            features=subject.encoder.features,
            head=None if head is None else HeadFacts(head.out_features, head.normalize, self.passes.facts["head"][0]),
            data={name: _set_facts(one, subject.sets[name]) for name, one in self.embedded.items()},
            settings=Settings(options.batch_size, str(options.device or "cpu"), options.seed),
            kurtosis=replace(kurtosis, per_image=None, peaks=None),
            outliers=outliers,
            accuracy=accuracy,
            directions=directions,
            ablation=ablation,
            pruning=pruning,
            robustness=robustness,
            skipped=self.skipped,
            layers=layers,
            concepts=concepts,
            about=encode(subject.about),
        )
        return Interpretation(results, kurtosis.per_image or [], kurtosis.peaks or [], self.images.ids, self.passes.folder, correct)

    def accuracy(self) -> tuple[dict[str, Accuracy] | None, list[bool | None]]:
        """The accuracy on every labeled set, and for each unshifted image whether the head is correct."""
        head = self.subject.head
        if head is None or IMAGENET not in self.labeled:
            self.skipped["accuracy"] = self.skipped["robustness"] = self.unlabeled
            return None, []
        found = self.stages.run("accuracy", self.set_facts, dict[str, Any], lambda: measure_accuracy(head, self.labeled, self.seed))
        correct = decode(list[bool | None], found.pop("right"), "right")
        return decode(dict[str, Accuracy], found, "accuracy"), correct

    def directions(self, features: Sequence[int]) -> HeadDirections | None:
        """The directions of the head, with their importance on the first half."""
        head, found = self.subject.head, self.halves.directions
        if head is None or found is None:
            self.skipped["directions"] = self.halves.why
            return None
        first = self.halves.first
        return self.stages.run("directions", self.image_facts, HeadDirections, lambda: measure_directions(head, found, first, features))

    def ablation_and_pruning(self, features: Sequence[int]) -> tuple[Ablation | None, Pruning | None]:
        """Accuracy on the second half, without the outlier features and along pruning."""
        head, (found, first, second, why) = self.subject.head, self.halves
        if head is None or found is None:
            self.skipped |= dict.fromkeys(("ablation", "pruning"), why)
            return None, None
        if not bool((second.y >= 0).any()):
            no_labels = "the half of the images that would be evaluated has no labels" if IMAGENET in self.labeled else self.unlabeled
            self.skipped |= dict.fromkeys(("ablation", "pruning"), no_labels)
            return None, None
        ablation, seed, subject = None, self.seed, self.subject
        if why_not := why_no_ablation(features, self.images.features):
            self.skipped["ablation"] = why_not
        else:
            ablation = self.stages.run(
                "ablation", self.image_facts, Ablation, lambda: measure_ablation(head, second, first, features, seed)
            )
        others = {name: _without(one, first) for name, one in self.labeled.items() if name != IMAGENET}
        sets = {IMAGENET: second} | {name: one for name, one in others.items() if one is not None}
        pruning = self.stages.run(
            "pruning",
            self.set_facts,
            Pruning,
            lambda: measure_pruning(head, found, sets, subject.imagenet_classes, subject.baseline, seed),
        )
        return ablation, pruning

    def robustness(self, accuracy: Mapping[str, Accuracy]) -> Robustness | None:
        """Effective robustness from the measured accuracies, or from published ones if no shifts are given."""
        subject, shifts = self.subject, list(self.subject.shifts)
        accuracies, source = {name: 100 * one.accuracy for name, one in accuracy.items()}, "measured"
        if shifts and not accuracies:
            return None  # without a head or labels; ``accuracy`` said so
        if not shifts:
            accuracies, source = dict(subject.published), "published"
            shifts = [name for name in accuracies if name != IMAGENET]
        if not shifts:
            self.skipped.setdefault("robustness", "no shifted images were given (--shift)")
            return None
        facts = self.set_facts | {"accuracies": accuracies, "shifts": shifts}
        classes, baseline = subject.imagenet_classes, subject.baseline
        found = self.stages.run("robustness", facts, Robustness, lambda: measure_robustness(accuracies, shifts, classes, baseline, source))
        if not found.rows:
            self.skipped["robustness"] = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
            return None
        self.skipped.pop("robustness", None)
        return found


def _set_facts(embeddings: Embeddings, images: Images) -> SetFacts:
    return SetFacts(
        images=len(embeddings),
        labeled=int((embeddings.y >= 0).sum()),
        skipped=[Unreadable(file, reason) for file, reason in embeddings.skipped],
        classes=None if embeddings.classes is None else len(embeddings.classes),
        remarks=list(images.remarks) if isinstance(images, LabeledImages) else [],
    )


def _without(shifted: Embeddings, first: Embeddings) -> Embeddings | None:
    """The shifted images without those whose unshifted original, of the same name, is in ``first``; None if no labeled one is left."""
    used = set(first.ids)
    rest = shifted.select([name not in used for name in shifted.ids])
    return rest if bool((rest.y >= 0).any()) else None
