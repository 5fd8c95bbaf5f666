"""One encoder through the whole analysis. The output is a folder of results, and an interrupted run can be resumed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import torchprobe
from torchprobe.analysis.baseline import IMAGENET, Baseline, ImagenetClasses
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.inputs import HeadLike, as_head
from torchprobe.analysis.outliers import Rule
from torchprobe.analysis.positions import FeatureDim, LayerEncoder, Position, at_layer, recorded_dims
from torchprobe.analysis.vectors import images_of
from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.ranks import Ranks
from torchprobe.common.records import decode, encode
from torchprobe.common.runs import Clock, Progress, ProgressCallback, RunOptions
from torchprobe.datasets import Broden, ImageSet, open_images
from torchprobe.dissection import Dissection
from torchprobe.encoders import Encoder
from torchprobe.recording.layers import select_layers
from torchprobe.studies.interpret.accuracy import Accuracy, Robustness, measure_accuracy, measure_robustness
from torchprobe.studies.interpret.concepts import Concepts, summarize_concepts
from torchprobe.studies.interpret.directions import HeadDirections, Pruning, measure_directions, measure_pruning
from torchprobe.studies.interpret.given import GivenFiles, GivenSubject
from torchprobe.studies.interpret.halves import Halves, halves_of
from torchprobe.studies.interpret.inputs import LAYER_IMAGES, Choices, Subject
from torchprobe.studies.interpret.interpretation import Interpretation
from torchprobe.studies.interpret.passes import Passes, identity
from torchprobe.studies.interpret.provenance import PROVENANCE_IMAGES, Origin
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
from torchprobe.studies.interpret.results import MEASURES, HeadFacts, Results, SetFacts, Settings, Stages, Unreadable, output_of

__all__ = ["Interpretation", "Progress", "interpret", "interpret_given", "interpret_subject"]


@renamed_arguments(x="imagenet_classes")
def interpret(
    encoder: Encoder,
    images: ImageSet | Any,
    out: str | os.PathLike[str],
    *,
    head: HeadLike | None = None,
    shifts: Mapping[str, ImageSet | Any] | None = None,
    broden: Broden | None = None,
    baseline: Baseline | None = None,
    imagenet_classes: ImagenetClasses = "full",
    layer: str | None = None,
    position: Position | None = None,
    layers: str | Iterable[str] | None = None,
    layer_images: int = LAYER_IMAGES,
    feature_dim: FeatureDim = None,
    provenance_images: int = PROVENANCE_IMAGES,
    about: Mapping[str, Any] | None = None,
    published: Mapping[str, float] | None = None,
    features: Sequence[int] | None = None,
    same_images: bool = False,
    outlier_rule: Rule = "robust",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 2,
    seed: int = 0,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    stop: Callable[[], bool] | None = None,
    overwrite: bool = False,
) -> Interpretation:
    """Repeats the analysis of "Interpreting CLIP" on one encoder, and writes the results into ``out``.

    The sections and their inputs: outlier features and layers need images; accuracy, privileged directions, ablation and pruning need a
    head and labels; effective robustness also needs shifts; concepts need ``broden``. A section without its input is left out, and the
    results say why.

    Directions are ordered by their importance on one half of the images. Pruning and ablation are evaluated on the other half.

    Args:
        encoder: images → representations, before normalization.
        images: the evaluation set, such as ImageNet's validation images; with labels for everything that needs a head.
        out: a folder, which is made if needed. It gets ``results.json``, tables, ``figures`` for a paper, ``index.html`` and the
            representations.
        head: on top of the encoder, a :class:`torchprobe.encoders.Head` or a linear layer; None: only the sections without a head.
        shifts: name → labeled images under a shift. The names are those of :data:`torchprobe.analysis.SHIFTS`, or columns of the baseline.
        broden: concepts.
        baseline: the standard models of effective robustness; None: the published fits.
        imagenet_classes: of effective robustness, see :func:`torchprobe.analysis.effective_robustness`.
        layer, position: a layer, and which of its positions, as the representation instead of the output of the encoder; see
            :class:`torchprobe.analysis.positions.LayerEncoder`. The head of the encoder does not see it, so give a head only if it does.
            With several vectors for an image there is neither accuracy nor a search for concepts.
        layers: the layers to record over depth, see :func:`torchprobe.record`.
        layer_images: number of images to record them on, filled up to whole batches; 0 leaves the layers out. The unshifted images pass in
            an order that is random, and the same in every run, so the first ones are a sample, and it costs no pass of its own.
        feature_dim: the dimension of the features of layers for which it is unsure, as for :func:`torchprobe.record`: of all layers, or
            ``{name or glob: dim}``; also of ``layer``.
        provenance_images: number of images on which the origin of the outlier features (or of ``features``) is looked for, see
            :func:`torchprobe.analysis.provenance`; 0 leaves it out. The images pass about 2 + 2 × features times more.
        about: facts to keep with the results, such as ``role``, ``backbone`` and ``pretraining``.
        published: accuracies in percent, ``"imagenet"`` and shifts, for effective robustness if no shifts are given.
        features: the features to compare directions with and to ablate; None: the outlier features.
        same_images: measure importance on the images that are evaluated, not on other ones.
        outlier_rule: "robust" or "classical", see :func:`torchprobe.analysis.outlier_features`. Ablation and alignment use its features.
        batch_size, device, workers: of the passes through the encoder.
        seed: of everything random.
        resume: continue an interrupted run in ``out``. Stages that were finished with the same facts are not computed again.
        progress: called with a :class:`Progress` after every batch.
        stop: called before every batch; the run stops if it returns True.
        overwrite: remove the files of another run in ``out``, and no others.

    Under ``torchrun`` the ranks share the passes. Every rank returns the same result, and the first rank writes it.

    Raises:
        ValueError: a head of another width, or arguments that do not fit each other.
        OtherRunError, ChangedError: ``out`` holds another run, or what the run there depends on has changed since.
        DatasetError, KeyboardInterrupt: no image could be read; ``stop`` returned True, and finished work is kept for ``resume``.
    """
    subject = Subject(
        encoder=at_layer(encoder, layer, position, feature_dim=feature_dim),
        images=open_images(images),
        shifts={name: open_images(one) for name, one in (shifts or {}).items()},
        head=None if head is None else as_head(head),
        broden=broden,
        baseline=baseline,
        imagenet_classes=imagenet_classes,
        layers=layers if layers is None or isinstance(layers, str) else list(layers),
        layer_images=layer_images,
        feature_dim=feature_dim,
        provenance_images=provenance_images,
        about=about or {},
        published=published or {},
        choices=Choices(None if features is None else tuple(features), same_images),
        outlier_rule=outlier_rule,
    )
    return interpret_subject(subject, out, RunOptions(batch_size, device, workers, seed, resume, progress, stop, overwrite))


def interpret_subject(subject: Subject, out: str | os.PathLike[str], options: RunOptions) -> Interpretation:
    """As :func:`interpret`, with its arguments in two objects."""
    encoder, head = subject.encoder, subject.head
    if head is not None and head.in_features != encoder.features:
        raise ValueError(f"the head takes {head.in_features} features, but the representation of {encoder.name} has {encoder.features}")
    if head is not None and subject.several:
        raise ValueError(f"a head decides for one vector of an image, and {encoder.name} gives several: choose a position that gives one")
    if IMAGENET in subject.shifts:
        raise ValueError(f"{IMAGENET!r} is the name of the unshifted images; give the shift another name")
    if subject.layer_images:  # a wrong name is an error before anything is computed
        chosen = None if subject.layers is None else ["", *([subject.layers] if isinstance(subject.layers, str) else subject.layers)]
        select_layers(encoder, chosen, recorded_dims(encoder, chosen, subject.feature_dim))
    # Copied to the CPU, where the representations are. Without a copy, moving the encoder would also move the head.
    about = {**subject.about, **(encoder.facts if isinstance(encoder, LayerEncoder) else {})}
    if encoder.inputs != "image" and not about.get("modality"):
        about["modality"] = encoder.inputs
    broden = None if subject.several else subject.broden
    subject = replace(subject, head=None if head is None else copy.deepcopy(head).cpu(), about=about, broden=broden)
    folder = Path(out)
    clock = Clock(options.progress, len(subject.sets) + (subject.broden is not None))
    with Ranks() as ranks, output_of(folder, subject.name, options, ranks):
        passes = Passes(subject, folder, options, Stages(folder, options.resume), clock, ranks)
        embedded = passes.embed()
        halves = halves_of(subject, embedded[IMAGENET], options.seed)
        concepts: dict[str, Dissection] = {}
        facts: dict[str, Any] = {}
        if subject.broden is not None:
            concepts, facts = passes.concepts(subject.broden, halves.directions, embedded[IMAGENET])

        def measure() -> Interpretation:
            clock.start("measures", 0, 0)
            found = _Sections(passes, embedded, halves).measure(concepts, facts)
            clock.start("figures and page", 0, 0)
            write(found)
            return found

        result = ranks.on_first(measure)
    result.concepts = concepts  # every rank has read them, so they are not sent from rank to rank
    return result


def interpret_given(given: GivenSubject, out: str | os.PathLike[str], options: RunOptions) -> Interpretation:
    """As :func:`interpret_subject`, of representations that are given. Under ``torchrun``, the first rank does it all."""
    with Ranks() as ranks, output_of(out, given.name, options, ranks):

        def measure() -> Interpretation:
            files = GivenFiles(given, Path(out), options)
            embedded = files.embed()
            halves = halves_of(given, embedded[IMAGENET], options.seed)
            found = _Sections(files, embedded, halves).measure({}, {})
            write(found)
            return found

        return ranks.on_first(measure)


class _Sections:
    """The sections of one run, from its representations. ``skipped`` says why a section is missing."""

    def __init__(self, passes: Passes | GivenFiles, embedded: Mapping[str, Embeddings], halves: Halves) -> None:
        self.passes, self.subject, self.stages, self.seed = passes, passes.subject, passes.stages, passes.options.seed
        self.embedded, self.images, self.halves = embedded, embedded[IMAGENET], halves
        self.labeled = {name: one for name, one in embedded.items() if bool((one.y >= 0).any())}
        self.unlabeled = self.subject.why_no_head if self.subject.head is None else "the images have no labels"
        self.skipped: dict[str, str] = {}
        baseline, chosen = self.subject.baseline, self.subject.choices.facts()
        self.image_facts = passes.facts | {"images": identity(self.images), "measures": MEASURES}
        self.feature_facts = self.image_facts | {"outlier_rule": self.subject.outlier_rule}  # of what depends on the outlier features
        self.head_facts = self.feature_facts | chosen
        self.set_facts = passes.facts | {
            "measures": MEASURES,
            "sets": {name: identity(one) for name, one in embedded.items()},
            "x": self.subject.imagenet_classes,
            **chosen,
            "baseline": None if baseline is None else {name: list(map(float, row)) for name, row in baseline.accuracies.items()},
            "minimum": None if baseline is None else baseline.minimum,
        }

    def measure(self, dissections: Mapping[str, Dissection], concept_facts: Mapping[str, Any]) -> Interpretation:
        """Every section that has its input."""
        subject, head = self.subject, self.subject.head
        kurtosis = self.stages.run("kurtosis", self.image_facts, Kurtosis, lambda: measure_kurtosis(self.images, self.seed))
        rule = subject.outlier_rule
        outliers = self.stages.run("outliers", self.feature_facts, Outliers, lambda: measure_outliers(self.images, rule))
        accuracy, correct, under_shift = self.accuracy()
        choices = subject.choices
        chosen = outliers if choices.features is None else replace(outliers, indices=list(choices.features))
        directions = self.directions(chosen.indices)
        ablation, pruning = self.ablation_and_pruning(chosen)
        robustness = self.robustness(accuracy or {})
        layers = concepts = None
        if isinstance(self.passes, GivenFiles):
            self.skipped |= dict.fromkeys(("layers", "concepts"), "the representations were given, not a network that computes them")
        elif self.passes.subject.layer_images:
            layers = self.passes.layers(self.images)
        else:
            self.skipped["layers"] = "no images were asked for (layer_images = 0)"
        origin = self.origin(chosen.indices)
        if dissections:
            concepts = self.stages.run("concepts", concept_facts, Concepts, lambda: summarize_concepts(dissections))
        elif isinstance(self.passes, Passes) and self.passes.subject.several:
            self.skipped["concepts"] = "an image gives several vectors, and concepts are of one"
        else:
            self.skipped.setdefault("concepts", "no concepts were given (--broden)")
        options = self.passes.options
        results = Results(
            torchprobe=torchprobe.__version__,
            torch=torch.__version__,
            name=subject.name,
            features=subject.features,
            head=None if head is None else HeadFacts(head.out_features, head.normalize, self.passes.facts["head"][0]),
            data={name: _set_facts(one, subject.remarks(name)) for name, one in self.embedded.items()},
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
            provenance=origin,
            about=encode(subject.about),
            given=isinstance(self.passes, GivenFiles) or None,
            chosen_features=None if choices.features is None else list(choices.features),
            same_images=choices.same_images or None,
        )
        ids, per_image, peaks = _images_seen(self.images), kurtosis.per_image or [], kurtosis.peaks or []
        if isinstance(self.passes, Passes):
            order = self.passes.order(ids)
            ids, per_image, peaks = [ids[i] for i in order], [per_image[i] for i in order], [peaks[i] for i in order]
            correct = [correct[i] for i in order] if correct else []
        return Interpretation(results, per_image, peaks, ids, self.passes.folder, correct, under_shift)

    def origin(self, features: Sequence[int]) -> Origin | None:
        """Where these features come from."""
        why = ""
        if isinstance(self.passes, GivenFiles):
            why = "the representations were given, not a network that computes them"
        elif not self.passes.subject.provenance_images:
            why = "no images were asked for (provenance_images = 0)"
        elif not features:
            why = "there are no outlier features"
        else:
            found = self.passes.origin(features, self.head_facts)
            if found.found is not None:
                return found
            why = found.why
        self.skipped["provenance"] = why
        return None

    def accuracy(self) -> tuple[dict[str, Accuracy] | None, list[bool | None], dict[str, dict[str, bool]]]:
        """The accuracy on every labeled set, for each unshifted image whether the head is correct, and for the images under each shift."""
        head = self.subject.head
        if head is None or IMAGENET not in self.labeled:
            self.skipped["accuracy"] = self.skipped["robustness"] = self.unlabeled
            return None, [], {}
        found = self.stages.run("accuracy", self.set_facts, dict[str, Any], lambda: measure_accuracy(head, self.labeled))
        correct = decode(list[bool | None], found.pop("right"), "right")
        shifted = decode(dict[str, list[bool | None]], found.pop("right_under_shift"), "right_under_shift")
        by_image = {
            name: {image: right for image, right in zip(self.embedded[name].ids, each, strict=True) if right is not None}
            for name, each in shifted.items()
        }
        return decode(dict[str, Accuracy], found, "accuracy"), correct, by_image

    def directions(self, features: Sequence[int]) -> HeadDirections | None:
        """The directions of the head, with their importance on the first half."""
        head, found = self.subject.head, self.halves.directions
        if head is None or found is None:
            self.skipped["directions"] = self.halves.why
            return None
        first = self.halves.first
        return self.stages.run("directions", self.head_facts, HeadDirections, lambda: measure_directions(head, found, first, features))

    def ablation_and_pruning(self, outliers: Outliers) -> tuple[Ablation | None, Pruning | None]:
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
        if why_not := why_no_ablation(outliers):
            self.skipped["ablation"] = why_not
        else:
            features = outliers.indices
            ablation = self.stages.run("ablation", self.head_facts, Ablation, lambda: measure_ablation(head, second, first, features, seed))
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
        images = {name: one.images for name, one in accuracy.items()} if source == "measured" else None
        facts = self.set_facts | {"accuracies": accuracies, "shifts": shifts, "images_of": images}
        classes, baseline = subject.imagenet_classes, subject.baseline
        found = self.stages.run(
            "robustness", facts, Robustness, lambda: measure_robustness(accuracies, shifts, classes, baseline, source, images)
        )
        if not found.rows:
            self.skipped["robustness"] = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
            return None
        self.skipped.pop("robustness", None)
        return found


def _set_facts(embeddings: Embeddings, remarks: list[str]) -> SetFacts:
    return SetFacts(
        images=len(_images_seen(embeddings)),
        labeled=int((embeddings.y >= 0).sum()),
        skipped=[Unreadable(file, reason) for file, reason in embeddings.skipped],
        classes=None if embeddings.classes is None else len(embeddings.classes),
        remarks=remarks,
    )


def _images_seen(embeddings: Embeddings) -> list[str]:
    """The names of the images, each once."""
    return list(dict.fromkeys(images_of(embeddings.ids, embeddings.provenance) or [])) or embeddings.ids


def _without(shifted: Embeddings, first: Embeddings) -> Embeddings | None:
    """The shifted images without those whose unshifted original, of the same name, is in ``first``; None if no labeled one is left."""
    used = set(first.ids)
    rest = shifted.select([name not in used for name in shifted.ids])
    return rest if bool((rest.y >= 0).any()) else None
