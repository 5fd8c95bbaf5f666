"""From folders and words to a subject: an encoder with its images, the sets under a shift, and a head that fits them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from torchprobe.analysis.baseline import IMAGENET, Baseline, ImagenetClasses
from torchprobe.analysis.given_files import open_head
from torchprobe.analysis.outliers import Rule
from torchprobe.analysis.positions import LayerEncoder
from torchprobe.common.messages import counted
from torchprobe.common.runs import RunOptions
from torchprobe.common.storage import digest
from torchprobe.datasets import Broden, DatasetError, Images, LabeledImages, image_folder, imagenet_set, labeled_folder, text_file
from torchprobe.datasets.imagenet import KINDS
from torchprobe.datasets.images import SUFFIXES
from torchprobe.encoders import ClipEncoder, Encoder, EncoderError, Head, load_head
from torchprobe.encoders.encoder import Template
from torchprobe.encoders.outputs import AUTO
from torchprobe.encoders.suite import SuiteRow
from torchprobe.studies.interpret.results import Stages

LAYER_IMAGES = 1024
"""Images on which the layers are recorded. A profile over depth does not need more (we chose the number)."""

KeepHead = Callable[[Mapping[str, Any], Callable[[], Head]], Head]
"""Called with the facts that a head depends on and a function that makes it. Returns a kept head of the same facts, or a new one."""

NO_HEAD = "no head was given"

_WNID = re.compile(r"n\d{8}")


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
    images: Images
    shifts: Mapping[str, Images] = field(default_factory=dict)
    head: Head | None = None
    broden: Broden | None = None
    baseline: Baseline | None = None
    imagenet_classes: ImagenetClasses = "full"
    layers: str | Sequence[str] | None = None
    layer_images: int = LAYER_IMAGES
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
        images = self.sets[name]
        return list(images.remarks) if isinstance(images, LabeledImages) else []

    @property
    def sets(self) -> dict[str, Images]:
        """All sets by name, the unshifted images first."""
        return {IMAGENET: self.images, **self.shifts}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a study: what every encoder is measured on.

    Args:
        images: the folder of the unshifted images, see :func:`load_images`.
        shifts: name → folder.
        broden: concepts, or None.
        baseline, imagenet_classes: of effective robustness.
        templates: of zero-shot heads; None: those of ImageNet.
        limit: number of images of each set, chosen at random; None: all.
        layers: the layers to record and to compare; None: the blocks.
        layer_images, outlier_rule: see :func:`torchprobe.studies.interpret.interpret`.
        choices: see :class:`Choices`.
    """

    images: Path
    shifts: Mapping[str, Path] = field(default_factory=dict)
    broden: Broden | None = None
    baseline: Baseline | None = None
    imagenet_classes: ImagenetClasses = "full"
    templates: Sequence[Template] | None = None
    limit: int | None = None
    layers: Sequence[str] | None = None
    layer_images: int = LAYER_IMAGES
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
        subject = self.subject(encoder, row.head, options.seed, keep)
        head = subject.head
        if head is not None and row.normalize is not None and row.normalize != head.normalize:
            head = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), normalize=row.normalize, names=head.names)
        keys = ("name", "role", "backbone", "pretraining", "source", "checkpoint")
        about = {key: getattr(row, key) for key in keys} | self.about()
        return replace(subject, head=head, about=about, published=row.accuracy)

    def subject(self, encoder: Encoder, head: str = "auto", seed: int = 0, keep: KeepHead | None = None) -> Subject:
        """An encoder with its sets and a head that fit each other.

        A zero-shot head is made for ImageNet's classes if the images are ImageNet's. Otherwise it is made for the class folders, with "_"
        read as a space. The folders of every set are matched to the names of the rows of the head. If the head has no names, the folders
        are assumed to be in the order of its rows. A head that "auto" found is left out, with a warning, if the folders do not fit it: the
        images alone give the outlier features. The head is on the device of the encoder.

        Args:
            encoder: on its device.
            head: see :func:`make_head`.
            seed: of ``limit``.
            keep: called with what a zero-shot head depends on and the function that makes it; returns the head.

        Raises:
            DatasetError, EncoderError: as :func:`load_images` and :func:`make_head`; or the head has no names and another number of rows
                than there are folders.
        """
        imagenet = is_imagenet(self.images)
        images = load_images(self.images, None, self.limit, seed)
        classes = [name.replace("_", " ") for name in images.names or ()] if isinstance(images, LabeledImages) and not imagenet else None
        found = make_head(encoder, head, classes or None, self.templates, keep)
        names: Sequence[str] | None = None
        if found is not None and isinstance(images, LabeledImages):
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
            choices=self.choices,
            outlier_rule=self.outlier_rule,
        )

    def _matched(self, images: LabeledImages, head: Head, seed: int) -> tuple[Images, Sequence[str] | None]:
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


def load_images(folder: Path, names: Sequence[str] | None = None, limit: int | None = None, seed: int = 0) -> Images:
    """The images of a folder, or the texts of a file.

    They are ImageNet's validation set if the name of a class folder is a WordNet id. Otherwise each folder in it is a class. Without
    folders, all images are taken, without labels.

    Args:
        folder: of the images; a file holds texts, see :func:`torchprobe.datasets.text_file`.
        names: the names of the rows of the head, to match class folders with; not for ImageNet.
        limit: number of images, chosen at random; None: all.
        seed: of that choice.

    Raises:
        DatasetError: no images, or class folders that do not match.
    """
    if folder.is_file():
        return text_file(folder, limit, seed)
    if is_imagenet(folder):
        return imagenet_set(folder, IMAGENET, limit, seed)
    if folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return _with_remark(labeled_folder(folder, limit, seed, names))
    return image_folder(folder, limit, seed)


def _with_remark(images: LabeledImages) -> LabeledImages:
    """With a remark about images outside the class folders."""
    assert images.root is not None
    outside = sum(entry.is_file() and entry.suffix.lower() in SUFFIXES for entry in images.root.iterdir())
    remark = f"{counted(outside, 'image')} outside the class folders left out"
    return replace(images, remarks=[*images.remarks, remark]) if outside else images


def is_imagenet(folder: Path) -> bool:
    """Whether the name of a class folder is a WordNet id: in ``folder``, in its folder ``val``, or in its only folder."""
    folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")] if folder.is_dir() else []
    inner = [entry for entry in folders if entry.name == "val" or len(folders) == 1]
    return any(entry.is_dir() and _WNID.fullmatch(entry.name) for place in (folder, *inner) if place.is_dir() for entry in place.iterdir())


def load_shift(name: str, folder: Path, names: Sequence[str] | None, imagenet: bool, limit: int | None = None, seed: int = 0) -> Images:
    """The images of one shift.

    Args:
        name: one of ImageNet's shifts, in the folders of its release, if the head has ImageNet's classes; or any name.
        folder: of the images.
        names: the names of the rows of the head.
        imagenet: whether the head has ImageNet's 1000 classes.
        limit, seed: as for :func:`load_images`.

    Raises:
        DatasetError: no images, or class folders that do not match.
    """
    if imagenet and name in KINDS:
        return imagenet_set(folder, name, limit, seed)
    if imagenet and is_imagenet(folder):
        return imagenet_set(folder, IMAGENET, limit, seed)
    return labeled_folder(folder, limit, seed, names)


def sample(images: Images, count: int, seed: int) -> Images:
    """Some of the images, chosen at random, in their order; all if there are not more."""
    if count >= len(images):
        return images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    paths = [images.paths[i] for i in chosen]
    if isinstance(images, LabeledImages):
        return replace(images, paths=paths, labels=[images.labels[i] for i in chosen])
    return replace(images, paths=paths)


def make_head(
    encoder: Encoder,
    which: str,
    classes: Sequence[str] | None = None,
    templates: Sequence[Template] | None = None,
    keep: KeepHead | None = None,
) -> Head | None:
    """The head that a word or a file stands for.

    Args:
        encoder: the encoder below the head.
        which: "zero-shot", made from captions; "own", the trained head; "auto", the own head if there is one, otherwise zero-shot if
            possible, otherwise none; "none"; or a file for :func:`torchprobe.analysis.given_files.open_head`.
        classes: the classes of a zero-shot head; None: those of ImageNet.
        templates: the captions of a zero-shot head; None: those of ImageNet.
        keep: see :meth:`Inputs.subject`.

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
            return encoder.zero_shot_head(*given)

        tower = getattr(encoder, "text", None)
        if keep is None or tower is None:
            return make()
        captions = None if templates is None else [one if isinstance(one, str) else one("{}") for one in templates]
        return keep({"name": encoder.name, "text": digest(tower.parameters()), "classes": classes, "templates": captions}, make)
    return open_head(which, encoder.features)


def _has_text_tower(encoder: Encoder) -> bool:
    """Whether captions can be compared with the representation."""
    return isinstance(encoder, ClipEncoder) and encoder.representation in (AUTO, "projection")


def kept_head(folder: Path, resume: bool) -> KeepHead:
    """Keeps zero-shot heads in ``folder``. ImageNet's 80,000 captions take a while, so a resumed run does not embed them again."""

    def keep(facts: Mapping[str, Any], make: Callable[[], Head]) -> Head:
        stages, path = Stages(folder, resume), folder / "head.safetensors"
        if (known := stages.known("head", facts, dict[str, int])) is not None and path.is_file():
            return load_head(path, known["features"])
        head = make()
        folder.mkdir(parents=True, exist_ok=True)
        stages.forget("head")
        head.save(path)
        stages.run("head", facts, dict[str, int], lambda: {"features": head.in_features})
        return head

    return keep
