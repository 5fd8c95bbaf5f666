"""From folders and words to what :func:`interpret` takes: images with labels, and the head that goes with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchprobe.common.digest import digest
from torchprobe.common.messages import counted
from torchprobe.datasets import DatasetError, Images, LabeledImages, image_folder, imagenet_set, labeled_folder
from torchprobe.datasets.imagenet import KINDS
from torchprobe.datasets.images import SUFFIXES
from torchprobe.encoders import Encoder, EncoderError, Head, load_head
from torchprobe.encoders.encoder import Template
from torchprobe.studies.interpret.stages import Stages

IMAGENET = "imagenet"

Keep = Callable[[Mapping[str, Any], Callable[[], Head]], Head]
"""Makes a head, or gives the one that was made from the same facts before."""

_WNID = re.compile(r"n\d{8}")


def load_images(folder: Path, names: Sequence[str] | None = None, limit: int | None = None, seed: int = 0) -> Images:
    """The images to look at: ImageNet's validation set where a class folder is called by a WordNet id, else a folder for each class, else
    whatever images there are, without labels.

    Args:
        folder: where they lie.
        names: what the rows of the head are called, to match class folders with; not for ImageNet.
        limit: take so many, chosen at random.
        seed: of that choice.

    Raises:
        DatasetError: no images, or class folders that do not fit.
    """
    if is_imagenet(folder):
        return imagenet_set(folder, IMAGENET, limit, seed)
    if folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return _with_loose(labeled_folder(folder, limit, seed, names))
    return image_folder(folder, limit, seed)


def _with_loose(images: LabeledImages) -> LabeledImages:
    """With a remark on images beside the class folders, which are in none of them."""
    assert images.root is not None
    loose = sum(entry.is_file() and entry.suffix.lower() in SUFFIXES for entry in images.root.iterdir())
    remark = f"{counted(loose, 'image')} beside the class folders left out"
    return replace(images, remarks=[*images.remarks, remark]) if loose else images


def is_imagenet(folder: Path) -> bool:
    """Whether some class folder in it, in its ``val`` or in its only folder, is called by a WordNet id; see :func:`imagenet_set`."""
    folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")] if folder.is_dir() else []
    inner = [entry for entry in folders if entry.name == "val" or len(folders) == 1]
    return any(entry.is_dir() and _WNID.fullmatch(entry.name) for place in (folder, *inner) if place.is_dir() for entry in place.iterdir())


def load_shift(name: str, folder: Path, names: Sequence[str] | None, imagenet: bool, limit: int | None = None, seed: int = 0) -> Images:
    """The images of one shift.

    Args:
        name: one of ImageNet's shifts, in the folders of its release, where the head has ImageNet's classes; or any name.
        folder: where they lie.
        names: what the rows of the head are called.
        imagenet: whether the head has ImageNet's 1000 classes.
        limit, seed: as for :func:`load_images`.

    Raises:
        DatasetError: no images, or class folders that do not fit.
    """
    if imagenet and name in KINDS:
        return imagenet_set(folder, name, limit, seed)
    if imagenet and is_imagenet(folder):
        return imagenet_set(folder, IMAGENET, limit, seed)
    return labeled_folder(folder, limit, seed, names)


def make_head(
    encoder: Encoder,
    which: str,
    classes: Sequence[str] | None = None,
    templates: Sequence[Template] | None = None,
    keep: Keep | None = None,
) -> Head | None:
    """The head that a word or a file stands for.

    Args:
        encoder: what it goes on top of.
        which: "zero-shot", from captions; "own", the trained one; "auto", the own one where there is one, else zero-shot, else none;
            "none"; or a file for :func:`torchprobe.encoders.load_head`.
        classes: what a zero-shot head is to tell apart; None: ImageNet's classes.
        templates: of its captions; None: those of ImageNet.
        keep: see :func:`gather`.

    Raises:
        EncoderError: there is no such head, with the reason.
    """
    if which == "auto":
        which = "own" if encoder.head is not None else "zero-shot" if hasattr(encoder, "text") else "none"
    if which == "none":
        return None
    if which == "own":
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
    return load_head(which, encoder.features)


def gather(
    encoder: Encoder,
    images: Path,
    shifts: Mapping[str, Path],
    head: str,
    templates: Sequence[Template] | None = None,
    limit: int | None = None,
    seed: int = 0,
    keep: Keep | None = None,
) -> tuple[Images, dict[str, Images], Head | None]:
    """Images, shifts and head, made to fit each other.

    A zero-shot head tells apart ImageNet's classes where the images are ImageNet's, else the class folders, "_" read as a space. The
    folders of every set are matched to the names of the head's rows; where it has none, they are taken to be in the order of its rows.
    The head is where the encoder is.

    Args:
        keep: is given what a zero-shot head depends on and what makes it; returns it, made now or kept from before.

    Raises:
        DatasetError, EncoderError: as :func:`load_images` and :func:`make_head`; a head without names and another number of folders.
    """
    imagenet = is_imagenet(images)
    seen = load_images(images, None, limit, seed)
    classes = [name.replace("_", " ") for name in seen.names or ()] if isinstance(seen, LabeledImages) and not imagenet else None
    made = make_head(encoder, head, classes or None, templates, keep)
    if made is None or not isinstance(seen, LabeledImages):
        return seen, {name: load_shift(name, folder, None, imagenet, limit, seed) for name, folder in shifts.items()}, made
    names: Sequence[str] | None = None
    if not imagenet:
        folders = len(seen.names or ())
        names = made.names
        if names is not None:
            seen = load_images(images, names, limit, seed)
        elif made.out_features == folders:
            names = seen.names
        else:
            raise DatasetError(
                f"{images} has {counted(folders, 'class folder')}, the head {made.out_features} classes without names: which folder is "
                "which "
                "class is not known. Without a head (--head none) the folders mean nothing"
            )
    if imagenet and made.out_features != 1000:
        raise DatasetError(f"{images} holds ImageNet's classes, but the head has {made.out_features}, not 1000")
    return seen, {name: load_shift(name, folder, names, imagenet, limit, seed) for name, folder in shifts.items()}, made


def kept_head(folder: Path, resume: bool) -> Keep:
    """Keeps zero-shot heads in ``folder``: 80,000 captions take a while, so a resumed run does not make them again."""

    def keep(facts: Mapping[str, Any], make: Callable[[], Head]) -> Head:
        stages, path = Stages(folder, resume), folder / "head.safetensors"
        if (known := stages.known("head", facts)) is not None and path.is_file():
            return load_head(path, known["features"])
        head = make()
        folder.mkdir(parents=True, exist_ok=True)
        stages.forget("head")
        head.save(path)
        stages.run("head", facts, lambda: {"features": head.in_features})
        return head

    return keep
