"""How much each image shows each concept, in the opinion of another model: soft labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchprobe.common import storage
from torchprobe.common.arrays import open_arrays
from torchprobe.common.messages import listing
from torchprobe.datasets.images import DatasetError
from torchprobe.dissection.words.concepts import LONGEST, MOST_CONCEPTS, NOUN, TEMPLATES, Concepts, find_concepts

CAVEAT = (
    "The concepts of the images are the opinion of another model, the labeler. It may be wrong, it knows some words better than others, "
    "and it has biases of its own. A match says that a unit and that opinion agree over these images. The p-value says only that they "
    "agree more than by chance."
)
"""What every result of soft labels says of itself."""

_KIND = "torchprobe.soft_labels"
_CAPTIONS = 256  # in one pass through the text tower


class Labeler(Protocol):
    """What labels images with words, such as :class:`torchprobe.encoders.ClipEncoder`.

    It is a module from images (N, 3, H, W) to embeddings (N, d), and has two more attributes.
    """

    preprocess: Callable[[Any], Tensor]
    """PIL image → tensor (3, H, W)."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts → embeddings (texts, d)."""


class SoftLabels:
    """The soft labels of images.

    Args:
        values: float32 (images, concepts), finite. With a CLIP model these are cosines.
        concepts: the columns.
        images: the names of the images, in order; None if unknown.
        labeler: what gave them.
        metadata: how they were made; plain values.

    Raises:
        ValueError: the shapes do not fit together, or a value is not finite; the message names the image and the concept.

    >>> SoftLabels(torch.tensor([[0.3, 0.1]]), ["cat", "dog"], ["a.png"]).concepts.names
    ('cat', 'dog')
    """

    def __init__(
        self,
        values: Tensor,
        concepts: Concepts | Sequence[str],
        images: Sequence[str] | None = None,
        labeler: str = "given soft labels",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.values, self.concepts = values.detach().cpu().float(), find_concepts(concepts)
        self.images = None if images is None else tuple(images)
        self.labeler = labeler
        self.metadata: dict[str, Any] = dict(metadata or {})
        if self.values.dim() != 2 or self.values.shape[1] != len(self.concepts) or not len(self.values):
            raise ValueError(f"expected soft labels (images, {len(self.concepts)} concepts), got {tuple(values.shape)}")
        if self.images is not None and len(self.images) != len(self.values):
            raise ValueError(f"{len(self.values)} rows of soft labels for {len(self.images)} images")
        if not bool((sound := self.values.isfinite()).all()):
            row, column = divmod(int(sound.flatten().int().argmin()), self.values.shape[1])
            name = row if self.images is None else self.images[row]
            raise ValueError(f"the soft label of image {name} for {self.concepts.names[column]!r} is {float(self.values[row, column])}")

    @classmethod
    def from_embeddings(
        cls,
        images: Tensor,
        texts: Tensor,
        concepts: Concepts | Sequence[str],
        names: Sequence[str] | None = None,
        labeler: str = "given embeddings",
        metadata: Mapping[str, Any] | None = None,
    ) -> SoftLabels:
        """The cosines of embeddings of images (images, d) and of concepts (concepts, d). Neither need be normalized.

        Raises:
            ValueError: the shapes do not fit together, or an embedding is 0 or not finite; the message names it.

        >>> SoftLabels.from_embeddings(torch.tensor([[3.0, 0.0]]), torch.eye(2), ["x", "y"]).values
        tensor([[1., 0.]])
        """
        concepts = find_concepts(concepts)
        if images.dim() != 2 or texts.dim() != 2 or images.shape[1] != texts.shape[1] or len(texts) != len(concepts):
            raise ValueError(
                f"expected embeddings (images, d) and ({len(concepts)} concepts, d), got {tuple(images.shape)} and {tuple(texts.shape)}"
            )
        image_rows = _unit(images, "image", names)
        return cls(image_rows @ _unit(texts, "concept", concepts.names).T, concepts, names, labeler, metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes them as safetensors, for other models and layers over the same images."""
        values = {
            "concepts": list(self.concepts.names),
            "kinds": list(self.concepts.kinds),
            "images": None if self.images is None else list(self.images),
            "labeler": self.labeler,
            "metadata": self.metadata,
        }
        storage.write(path, _KIND, {"values": self.values}, values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SoftLabels:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is of another kind, or a part of it does not fit.
        """
        file = storage.File(path, _KIND)
        concepts = stored_concepts(file)
        images = file.values.get("images")
        if images is not None and not (isinstance(images, list) and all(isinstance(name, str) for name in images)):
            raise file.error("images", "expected names")
        count = None if images is None else len(images)
        values = file.tensor("values", torch.float32, (count, len(concepts)))
        try:
            return cls(values, concepts, images, file.value("labeler", str), file.value("metadata", dict))
        except ValueError as error:
            raise file.error("values", str(error)) from error

    def rows_of(self, images: Sequence[str]) -> Tensor:
        """The soft labels of these images, in this order. Without names of their own, the rows must be as many, in the same order.

        Raises:
            DatasetError: images without soft labels, or another number of rows.
        """
        if self.images is None:
            if len(images) != len(self.values):
                raise DatasetError(
                    f"{len(self.values)} rows of soft labels for {len(images)} images: expected one for each image file, sorted by path"
                )
            return self.values
        row = {name: i for i, name in enumerate(self.images)}
        if missing := [name for name in images if name not in row]:
            raise DatasetError(f"{len(missing)} of {len(images)} images have no soft labels: {listing(missing, 3)}")
        return self.values[[row[name] for name in images]]


def read_soft_labels(path: str | os.PathLike[str], concepts: Concepts) -> SoftLabels:
    """Soft labels in a file: one of :meth:`SoftLabels.save`, which has its own concepts, or a ``.npy`` matrix (images, concepts).

    Raises:
        DatasetError: the file cannot be read, or it does not fit the concepts.
    """
    if Path(path).suffix != ".npy":
        return SoftLabels.load(path)
    try:
        (array,) = open_arrays(path).values()
        values = array.tensor() if array.kind in ("float", "whole") or array.dtype == "object" else None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as a NumPy file: {error}") from error
    if values is None or values.dim() != 2 or values.shape[1] != len(concepts):
        raise DatasetError(
            f"{path} holds {array.dtype} {array.shape}; expected numbers (images, {len(concepts)} concepts): one column for each concept "
            f"of {concepts.source}. Name the file of its concepts with --concepts (concepts= in Python)"
        )
    return SoftLabels(values.float(), concepts, labeler=Path(path).name)


def embed_concepts(
    labeler: Any, concepts: Concepts, templates: Sequence[str] | Mapping[str, Sequence[str]] | None = None
) -> tuple[Tensor, dict[str, list[str]]]:
    """Embeddings of concepts, float32 (concepts, d), of length 1, and the captions that were used, by kind.

    The captions of a concept are embedded and normalized; the mean over the captions is normalized again (Radford et al. 2021, section
    3.1.4).

    Args:
        labeler: see :class:`Labeler`.
        concepts: the words.
        templates: captions with ``{}`` in the place of the concept; the same for all kinds, or by kind. Default: by kind, see
            :mod:`torchprobe.dissection.words.concepts`.

    Raises:
        ValueError: the labeler has no text tower, a template has no ``{}``, or an embedding is not finite.
    """
    if not callable(getattr(labeler, "encode_text", None)):
        raise ValueError(f"the labeler must have encode_text, as CLIP encoders have; {type(labeler).__name__} has not")
    used: dict[str, list[str]] = {}
    for kind in dict.fromkeys(concepts.kinds):
        used[kind] = list(_templates(kind, templates))
        if wrong := [template for template in used[kind] if "{}" not in template]:
            raise ValueError(f"a template must have {{}} in the place of the concept, got {wrong[0]!r}")
    captions = [[t.replace("{}", name) for t in used[kind]] for name, kind in zip(concepts.names, concepts.kinds, strict=True)]
    flat = [caption for each in captions for caption in each]
    with torch.no_grad():
        embedded = torch.cat([labeler.encode_text(flat[i : i + _CAPTIONS]).float().cpu() for i in range(0, len(flat), _CAPTIONS)])
    unit = _unit(embedded, "caption", flat)
    means = torch.stack([part.mean(0) for part in unit.split([len(each) for each in captions])])
    return _unit(means, "concept", concepts.names).float(), used


def _templates(kind: str, templates: Sequence[str] | Mapping[str, Sequence[str]] | None) -> Sequence[str]:
    if templates is None:
        return TEMPLATES.get(kind, NOUN)
    chosen = templates.get(kind, NOUN) if isinstance(templates, Mapping) else templates
    if isinstance(chosen, str) or not chosen:
        raise ValueError(f"templates: expected a list of captions, got {chosen!r}")
    return chosen


def labeler_name(labeler: Any) -> str:
    """For messages and metadata."""
    return str(getattr(labeler, "name", type(labeler).__name__))


def labeler_weights(labeler: nn.Module) -> str:
    """Digest of the weights of both towers."""
    text = getattr(labeler, "text", None)
    towers = [labeler, text] if isinstance(text, nn.Module) else [labeler]
    return storage.digest(part for tower in towers for part in (*tower.parameters(), *tower.buffers()))


def stored_concepts(file: storage.File) -> Concepts:
    """The concepts in a file, checked."""
    names, kinds = file.value("concepts", list), file.value("kinds", list)
    if not all(isinstance(text, str) and len(text) <= LONGEST for text in [*names, *kinds]) or len(names) > MOST_CONCEPTS:
        raise file.error("concepts", f"expected at most {MOST_CONCEPTS:,} texts of at most {LONGEST} characters")
    try:
        return Concepts(names, kinds)
    except ValueError as error:
        raise file.error("concepts", str(error)) from error


def _unit(rows: Tensor, what: str, names: Sequence[str] | None) -> Tensor:
    """Rows of length 1, float64."""
    rows = rows.detach().cpu().double()
    size = rows.abs().amax(1, keepdim=True)
    if not bool((usable := (rows.isfinite().all(1) & (size[:, 0] > 0))).all()):
        row = int(usable.int().argmin())
        raise ValueError(f"the embedding of {what} {row if names is None else names[row]!r} is 0 or not finite")
    rows = rows / size
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return unit
