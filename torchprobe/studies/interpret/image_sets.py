"""Where the images of a study are: class folders, ImageNet, shards, stores, data sets, or a file of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchprobe.analysis.baseline import IMAGENET
from torchprobe.common.messages import counted
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import ImageSet, LabeledImages, image_folder, imagenet_set, labeled_folder, text_file
from torchprobe.datasets.imagenet import KINDS
from torchprobe.datasets.images import SUFFIXES
from torchprobe.datasets.readers import is_elsewhere, open_images, shards_in

_WNID = re.compile(r"n\d{8}")


def outside_a_folder(where: Path | str) -> bool:
    """Whether images are not the files of a folder: shards, a store, a data set."""
    return is_elsewhere(where) or (Path(where).is_dir() and bool(shards_in(Path(where))))


def may_have_labels(images: ImageSet) -> bool:
    """Whether images have labels; True if that is known only when they are read."""
    labels = getattr(images, "labels", None)
    return labels is None or any(label >= 0 for label in labels)


def load_images(folder: Path | str, names: Sequence[str] | None = None, limit: int | None = None, seed: int = 0) -> ImageSet:
    """The images of a folder, of shards or of a store; or the texts of a file.

    They are ImageNet's validation set if the name of a class folder is a WordNet id. Otherwise each folder in it is a class. Without
    folders, all images are taken, without labels.

    Args:
        folder: of the images; or shards, an address or a data set, see :func:`torchprobe.datasets.open_images`. A file holds texts, see
            :func:`torchprobe.datasets.text_file`.
        names: the names of the rows of the head, to match class folders with; not for ImageNet.
        limit: number of images, chosen at random; None: all.
        seed: of that choice.

    Raises:
        DatasetError: no images, or class folders that do not match.
    """
    if outside_a_folder(folder):
        with Ranks() as ranks:
            return open_images(folder, limit, seed, ranks=ranks)
    folder = Path(folder)
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


def is_imagenet(folder: Path | str) -> bool:
    """Whether the name of a class folder is a WordNet id: in ``folder``, in its folder ``val``, or in its only folder."""
    if outside_a_folder(folder):
        return False
    folder = Path(folder)
    folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")] if folder.is_dir() else []
    inner = [entry for entry in folders if entry.name == "val" or len(folders) == 1]
    return any(entry.is_dir() and _WNID.fullmatch(entry.name) for place in (folder, *inner) if place.is_dir() for entry in place.iterdir())


def load_shift(
    name: str, folder: Path | str, names: Sequence[str] | None, imagenet: bool, limit: int | None = None, seed: int = 0
) -> ImageSet:
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
    if outside_a_folder(folder):
        return load_images(folder, None, limit, seed)
    if imagenet and name in KINDS:
        return imagenet_set(folder, name, limit, seed)
    if imagenet and is_imagenet(folder):
        return imagenet_set(folder, IMAGENET, limit, seed)
    return labeled_folder(folder, limit, seed, names)
