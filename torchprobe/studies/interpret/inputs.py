"""From folders and words to a subject: an encoder with its images, the sets under a shift, and a head that fits them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchprobe.analysis.baseline import IMAGENET, Baseline, ImagenetClasses
from torchprobe.analysis.given_files import open_head
from torchprobe.analysis.outliers import Rule
from torchprobe.analysis.positions import FeatureDim, LayerEncoder
from torchprobe.common.facts import file_digests
from torchprobe.common.messages import counted
from torchprobe.common.runs import Clock, CountCallback, RunOptions
from torchprobe.common.storage import digest
from torchprobe.common.version import VERSION
from torchprobe.datasets import Broden, DatasetError, ImageSet, LabeledImages
from torchprobe.encoders import ClipEncoder, Encoder, EncoderError, Head, load_head
from torchprobe.encoders.encoder import Template
from torchprobe.encoders.outputs import AUTO
from torchprobe.encoders.suite import SuiteRow
from torchprobe.studies.interpret.image_sets import is_imagenet, load_images, load_shift, may_have_labels, outside_a_folder
from torchprobe.studies.interpret.provenance import PROVENANCE_IMAGES
from torchprobe.studies.interpret.results import Stages

LAYER_IMAGES = 1024
"""Images on which the layers are recorded. A profile over depth does not need more (we chose the number)."""

KeepHead = Callable[[Mapping[str, Any], Callable[[], Head]], Head]
"""Called with the facts that a head depends on and a function that makes it. Returns a kept head of the same facts, or a new one."""

NO_HEAD = "no head was given"


@dataclass(frozen=True)
class Choices:
    """What a run may do in another way than by default.

    Attributes:
        features: the features that directions are compared with and that are ablated; None: the outlier features.
        same_images: measure importance and the means of ablated features on the images that are evaluated, not on others. The accuracies of
            pruning are then too high, by as much as the order of the directions fits these images.
    """

    features: tuple[int, ...] | None = None
    same_images: bool = False

    def facts(self) -> dict[str, Any]:
        """What a stage depends on, only what is not the default."""
        chosen = {"chosen_features": None if self.features is None else list(self.features), "same_images": self.same_images or None}
        return {key: value for key, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class Subject:
    """One encoder with everything that it is measured on; see :func:`torchprobe.studies.interpret.interpret` for the fields."""

    encoder: Encoder
    images: ImageSet
    shifts: Mapping[str, ImageSet] = field(default_factory=dict)
    head: Head | None = None
    broden: Broden | None = None
    baseline: Baseline | None = None
    imagenet_classes: ImagenetClasses = "full"
    layers: str | Sequence[str] | None = None
    layer_images: int = LAYER_IMAGES
    feature_dim: FeatureDim = None
    provenance_images: int = PROVENANCE_IMAGES
    about: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    outlier_rule: Rule = "robust"

    @property
    def name(self) -> str:
        """The name of the encoder."""
        return self.encoder.name

    @property
    def features(self) -> int:
        """The width of the representation."""
        return self.encoder.features

    @property
    def several(self) -> bool:
        """Whether one image gives several vectors."""
        return isinstance(self.encoder, LayerEncoder) and self.encoder.several

    @property
    def why_no_head(self) -> str:
        """Why there is no accuracy without a head."""
        return self.encoder.why_no_head if isinstance(self.encoder, LayerEncoder) else NO_HEAD

    def remarks(self, name: str) -> list[str]:
        """What is unexpected in the folders of a set."""
        return list(getattr(self.sets[name], "remarks", ()))

    @property
    def sets(self) -> dict[str, ImageSet]:
        """All sets by name, the unshifted images first."""
        return {IMAGENET: self.images, **self.shifts}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a study: what every encoder is measured on.

    Args:
        images: where the unshifted images are, see :func:`load_images`.
        shifts: name → the same.
        broden: concepts, or None.
        baseline, imagenet_classes: of effective robustness.
        templates: of zero-shot heads; None: those of ImageNet.
        limit: number of images of each set, chosen at random; None: all.
        layers: the layers to record and to compare; None: the blocks.
        layer_images, feature_dim, provenance_images, outlier_rule: see :func:`torchprobe.studies.interpret.interpret`.
        choices: see :class:`Choices`.
    """

    images: Path | str
    shifts: Mapping[str, Path | str] = field(default_factory=dict)
    broden: Broden | None = None
    baseline: Baseline | None = None
    imagenet_classes: ImagenetClasses = "full"
    templates: Sequence[Template] | None = None
    limit: int | None = None
    layers: Sequence[str] | None = None
    layer_images: int = LAYER_IMAGES
    feature_dim: FeatureDim = None
    provenance_images: int = PROVENANCE_IMAGES
    choices: Choices = field(default_factory=Choices)
    outlier_rule: Rule = "robust"

    def about(self) -> dict[str, Any]:
        """The folders, to keep with the results."""
        folders = {"images": str(self.images), **{f"shift {name}": str(folder) for name, folder in self.shifts.items()}}
        return folders | {"broden": None if self.broden is None else str(self.broden.root), "limit": self.limit}

    def load(self, row: SuiteRow, options: RunOptions, keep: KeepHead | None = None) -> Subject:
        """An encoder of a suite, on the device, with its sets and its head; ``keep`` as for :meth:`subject`.

        Raises:
            DatasetError, EncoderError: as :meth:`subject`, or the encoder is unavailable.
        """
        encoder = row.load()
        encoder = encoder if options.device is None else encoder.to(options.device)
        subject = self.subject(encoder, row.head, options.seed, keep, caption_progress(options))
        head = subject.head
        if head is not None and row.normalize is not None and row.normalize != head.normalize:
            head = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), normalize=row.normalize, names=head.names)
        keys = ("name", "role", "backbone", "pretraining", "source", "checkpoint")
        about = {key: getattr(row, key) for key in keys} | self.about()
        return replace(subject, head=head, about=about, published=row.accuracy)

    def subject(
        self,
        encoder: Encoder,
        head: str = "auto",
        seed: int = 0,
        keep: KeepHead | None = None,
        progress: CountCallback | None = None,
    ) -> Subject:
        """An encoder with its sets and a head that fit each other.

        A zero-shot head is made for ImageNet's classes if the images are ImageNet's. Otherwise it is made for the class folders, with "_"
        read as a space. The folders of every set are matched to the names of the rows of the head. If the head has no names, the folders
        are assumed to be in the order of its rows. A head that "auto" found is left out, with a warning, if the folders do not fit it: the
        images alone give the outlier features. The head is on the device of the encoder.

        The labels of shards, stores and data sets are rows of the head already. A zero-shot head needs the names of their classes.

        Args:
            encoder: on its device.
            head: see :func:`make_head`.
            seed: of ``limit``.
            keep: called with what a zero-shot head depends on and the function that makes it; returns the head.
            progress: called with (classes done, classes in all) while a zero-shot head is made.

        Raises:
            DatasetError, EncoderError: as :func:`load_images` and :func:`make_head`; or the head has no names and another number of rows
                than there are folders.
        """
        imagenet = is_imagenet(self.images)
        images = load_images(self.images, None, self.limit, seed)
        numbered = outside_a_folder(self.images)
        known: Sequence[str] = getattr(images, "names", None) or ()
        classes = [name.replace("_", " ") for name in known] if not imagenet else None
        if numbered and not classes and may_have_labels(images):
            head = _without_names(encoder, head, self.images)
        found = make_head(encoder, head, classes or None, self.templates, keep, progress)
        names: Sequence[str] | None = None
        if numbered:
            names = None if found is None else found.names
            if found is not None and classes and found.out_features != len(classes):
                raise DatasetError(
                    f"{self.images} has the names of {len(classes)} classes, but the head has {found.out_features} rows: "
                    "give a head for these classes, or --head none"
                )
        elif found is not None and isinstance(images, LabeledImages):
            if imagenet and found.out_features != 1000:
                raise DatasetError(f"{self.images} holds ImageNet's classes, but the head has {found.out_features} rows, not 1000")
            if not imagenet:
                try:
                    images, names = self._matched(images, found, seed)
                except DatasetError as error:
                    if head != "auto":
                        raise
                    warnings.warn(f"the trained head is left out, and with it accuracy, because {error}", stacklevel=2)
                    found = None
        shifts = {name: load_shift(name, folder, names, imagenet, self.limit, seed) for name, folder in self.shifts.items()}
        return Subject(
            encoder=encoder,
            images=images,
            shifts=shifts,
            head=found,
            broden=self.broden,
            baseline=self.baseline,
            imagenet_classes=self.imagenet_classes,
            layers=self.layers,
            layer_images=self.layer_images,
            feature_dim=self.feature_dim,
            provenance_images=self.provenance_images,
            choices=self.choices,
            outlier_rule=self.outlier_rule,
        )

    def _matched(self, images: LabeledImages, head: Head, seed: int) -> tuple[ImageSet, Sequence[str] | None]:
        """The images with rows of the head as labels, and the names of these rows."""
        if head.names is not None:
            return load_images(self.images, head.names, self.limit, seed), head.names
        folders = len(images.names or ())
        if head.out_features != folders:
            raise DatasetError(
                f"{self.images} has {counted(folders, 'class folder')}, but the head has {head.out_features} rows without names, so the "
                "class of a folder is unknown. Give a head with names, or no head (--head none)"
            )
        return images, images.names


def _without_names(encoder: Encoder, head: str, where: Path | str) -> str:
    """The head for images whose labels are numbers without names: none is made from the names of other classes."""
    why = f"the labels of {where} are numbers, and the names of their classes are unknown: put them into classnames.txt beside the shards"
    if head == "zero-shot":
        raise DatasetError(f"a zero-shot head is made from the names of classes, and {why}, one in each line")
    if head == "auto" and encoder.head is None and _has_text_tower(encoder):
        warnings.warn(f"no zero-shot head is made, and there is no accuracy, because {why}, or give a head", stacklevel=3)
        return "none"
    return head


def make_head(
    encoder: Encoder,
    which: str,
    classes: Sequence[str] | None = None,
    templates: Sequence[Template] | None = None,
    keep: KeepHead | None = None,
    progress: CountCallback | None = None,
) -> Head | None:
    """The head that a word or a file stands for.

    Args:
        encoder: the encoder below the head.
        which: "zero-shot", made from captions; "own", the trained head; "auto", the own head if there is one, otherwise zero-shot if
            possible, otherwise none; "none"; or a file for :func:`torchprobe.analysis.given_files.open_head`.
        classes: the classes of a zero-shot head; None: those of ImageNet.
        templates: the captions of a zero-shot head; None: those of ImageNet.
        keep, progress: see :meth:`Inputs.subject`.

    Raises:
        EncoderError: there is no such head; the message has the reason.
    """
    if which == "auto":
        which = "own" if encoder.head is not None else "zero-shot" if _has_text_tower(encoder) else "none"
    if which == "none":
        return None
    if which == "own":
        if isinstance(encoder, LayerEncoder):
            raise EncoderError(f"{encoder.why_no_head}: give a head of your own that does (a file), or --head none")
        if encoder.head is None:
            raise EncoderError(f"{encoder.name} has no trained head of one linear layer: give a file, zero-shot for CLIP, or none")
        return encoder.head
    if which == "zero-shot":
        given = (None if classes is None else list(classes)), (None if templates is None else list(templates))

        def make() -> Head:
            if progress is not None:
                progress(0, 0)
            return encoder.zero_shot_head(*given, progress=progress)

        tower = getattr(encoder, "text", None)
        if keep is None or tower is None:
            return make()
        captions = None if templates is None else [one if isinstance(one, str) else one("{}") for one in templates]
        return keep({"name": encoder.name, "text": digest(tower.parameters()), "classes": classes, "templates": captions}, make)
    return open_head(which, encoder.features)


def caption_progress(options: RunOptions) -> CountCallback:
    """Reports how many classes of a zero-shot head have their captions, and ends when the run shall stop."""
    clock = Clock(options.progress, stages=1)

    def tell(done: int, total: int) -> None:
        if options.stop is not None and options.stop():
            raise KeyboardInterrupt
        if not done:
            clock.start("captions of the zero-shot head", 0, total, "classes")
        else:
            clock.count(done, total)

    return tell


def _has_text_tower(encoder: Encoder) -> bool:
    """Whether captions can be compared with the representation."""
    return isinstance(encoder, ClipEncoder) and encoder.representation in (AUTO, "projection")


def kept_head(folder: Path, resume: bool) -> KeepHead:
    """Keeps zero-shot heads in ``folder``. ImageNet's 80,000 captions take a while, so a resumed run does not embed them again."""

    def keep(facts: Mapping[str, Any], make: Callable[[], Head]) -> Head:
        stages, path = Stages(folder, resume), folder / "head.safetensors"
        facts = {**facts, "torchprobe": VERSION}
        known = stages.known("head", facts, dict[str, Any])
        if known is not None and known.get("file") == file_digests([path])[0]:
            return load_head(path, known["features"])
        head = make()
        folder.mkdir(parents=True, exist_ok=True)
        stages.forget("head")
        head.save(path)
        stages.run("head", facts, dict[str, Any], lambda: {"features": head.in_features, "file": file_digests([path])[0]})
        return head

    return keep
