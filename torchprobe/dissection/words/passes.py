"""Passes over image files: the embeddings of a labeler, and the activations of layers. Shared by ranks, and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import listing
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock
from torchprobe.datasets.images import Batch, DatasetError
from torchprobe.datasets.protocol import ImageSet
from torchprobe.dissection.average_precision import pooled
from torchprobe.dissection.batches import Preprocess
from torchprobe.dissection.sparse import MAPS, Density, SparseBasis
from torchprobe.dissection.taps import Site
from torchprobe.dissection.walk import Checkpoint, ImageVectors, Mergeable, Walk
from torchprobe.dissection.words.concepts import Concepts
from torchprobe.dissection.words.soft_labels import SoftLabels, embed_concepts, labeler_name
from torchprobe.recording.reader import LayerReader, device_of, eval_mode

_READ = "read"  # the vectors that say which images could be read
_UNREADABLE = "unreadable"


def images_fact(images: ImageSet) -> str:
    """A digest of the names and sizes of images. The metadata of every result hold it."""
    described = [[images.name(path), images.size(path)] for path in images.paths]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


class Unreadable:
    """Why each file that could not be read could not. A mergeable statistic.

    ``reasons``: name → reason.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def update(self, unreadable: Iterable[tuple[str, str]]) -> None:
        """Adds pairs of a name and a reason."""
        self.reasons.update(unreadable)

    def merge(self, other: Unreadable) -> Unreadable:
        """Adds, in place, the files of ``other``; returns self."""
        self.reasons.update(other.reasons)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: it holds other things than texts.
        """
        reasons = state.get("reasons")
        if not isinstance(reasons, dict) or not all(isinstance(text, str) for pair in reasons.items() for text in pair):
            raise ValueError("the saved reasons of unreadable files are not texts")
        self.reasons = dict(reasons)


@dataclass
class ImagePass:
    """How the files are read: in batches of ``size``, of which each rank reads its own."""

    files: ImageSet
    size: int
    workers: int
    ranks: Ranks
    checkpoint: Checkpoint | None
    clock: Clock
    stop: Callable[[], bool] | None = None

    def run(
        self,
        name: str,
        widths: Mapping[str, int],
        preprocess: Preprocess,
        see: Callable[[Batch, Walk], Mapping[str, Tensor]],
        make: Mapping[str, Callable[[], Mergeable]] | None = None,
    ) -> tuple[Walk, Tensor]:
        """One pass; on the first rank, the walk with all vectors, and which images could be read, bool (images,).

        Args:
            name: of the pass.
            widths: the width of each kind of vector.
            preprocess: makes a tensor of an image.
            see: a batch → the vectors of its images, by kind.
            make: further statistics, which ``see`` updates.

        Raises:
            KeyboardInterrupt: ``stop`` returned True; the pass is saved first.
        """
        count = len(self.files)
        vectors = {kind: ImageVectors(count, width) for kind, width in {**widths, _READ: 1}.items()}
        walk = Walk(
            name, {_UNREADABLE: Unreadable, **(make or {})}, vectors, -(-count // self.size), self.size, self.ranks, self.checkpoint
        )
        mine = walk.mine()
        done = count - sum(min(self.size, count - number * self.size) for number in mine)
        self.clock.start(name, done, count)
        try:
            for number, batch in zip(mine, self.files.batches(preprocess, self.size, self.workers, mine), strict=True):
                if self.stop is not None and self.stop():
                    raise KeyboardInterrupt
                with walk.showing(number):
                    walk.statistic(_UNREADABLE, Unreadable).update(batch.unreadable)
                    if batch.names:
                        for kind, found in see(batch, walk).items():
                            vectors[kind].vectors[batch.indices] = found.float().cpu()
                        vectors[_READ].vectors[batch.indices] = 1.0
                done += batch.files
                self.clock.tell(done)
        except KeyboardInterrupt:
            walk.interrupted()
            raise
        walk.merge()
        self.clock.finish()
        return walk, vectors[_READ].vectors[:, 0] > 0

    def names(self, kept: Tensor) -> list[str]:
        """The names of some images, bool (images,)."""
        return [self.files.name(path) for path, keep in zip(self.files.paths, kept.tolist(), strict=True) if keep]


def check_labeler(labeler: Any) -> Any:
    """The labeler.

    Raises:
        ValueError: it is none.
    """
    if isinstance(labeler, nn.Module) and callable(getattr(labeler, "preprocess", None)):
        return labeler
    raise ValueError(
        f"the labeler must be a module with preprocess and encode_text, or SoftLabels; got {type(labeler).__name__}. "
        "load_encoder() loads one by name."
    )


def label_images(
    labeler: Any,
    concepts: Concepts,
    templates: Sequence[str] | Mapping[str, Sequence[str]] | None,
    images: ImagePass,
) -> SoftLabels:
    """Soft labels of the images that can be read: the cosines of their embeddings and those of the concepts.

    Raises:
        ValueError: an embedding is not finite, or has another width; the message names the image or the concept.
        DatasetError: no image can be read.
    """
    texts, used = embed_concepts(labeler, concepts, templates)
    device = device_of(labeler)

    def see(batch: Batch, walk: Walk) -> dict[str, Tensor]:
        with torch.no_grad():
            found = labeler(batch.pixels.to(device))
        if not isinstance(found, Tensor) or found.shape != (len(batch.names), texts.shape[1]):
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the labeler gives {given} for {len(batch.names)} images; expected ({len(batch.names)}, {texts.shape[1]})")
        return {"embeddings": found}

    with eval_mode(labeler):
        walk, read = images.run("labeler", {"embeddings": texts.shape[1]}, labeler.preprocess, see)

    def labels() -> SoftLabels:
        if not bool(read.any()):
            raise _no_image(images, walk)
        found = walk.vectors["embeddings"].vectors[read]
        return SoftLabels.from_embeddings(found, texts, concepts, images.names(read), labeler_name(labeler), {"templates": used})

    return images.ranks.on_first(labels)


@dataclass
class ImageScores:
    """The activations of layers for all image files: float32 (files, units), of which those in ``read`` were read. On the first rank.

    ``names`` of all files; ``density``: layer → how often its latents are active.
    """

    scores: dict[str, Tensor]
    read: Tensor
    names: Sequence[str]
    density: dict[str, Density]
    unreadable: list[list[str]]

    def of(self, layer: str, labels: SoftLabels) -> tuple[Tensor, list[str]]:
        """The activations (units, images) of a layer for the images that both networks could read, and the names of these images.

        Raises:
            ValueError: an activation is not finite; the message names the layer and the image.
            DatasetError: no image was read by both.
        """
        labeled = set(self.names if labels.images is None else labels.images)
        kept = [i for i, (name, read) in enumerate(zip(self.names, self.read.tolist(), strict=True)) if read and name in labeled]
        if not kept:
            raise DatasetError("no image could be read by both the model and the labeler")
        scores, names = self.scores.pop(layer)[kept], [self.names[i] for i in kept]
        if not bool((sound := scores.isfinite()).all()):
            row, unit = divmod(int(sound.flatten().int().argmin()), scores.shape[1])
            raise ValueError(f"layer {layer!r} gives {float(scores[row, unit])} in unit {unit} for image {names[row]}")
        return scores.T.contiguous(), names


def read_layers(reader: LayerReader, sites: Mapping[str, Site], preprocess: Preprocess, pooling: str, images: ImagePass) -> ImageScores:
    """One activation of each unit for each image; and, for latents, how often they are active."""
    layers = list(sites)
    make = {f"{i}/density": partial(Density, site.units) for i, site in enumerate(sites.values()) if isinstance(site.basis, SparseBasis)}

    def see(batch: Batch, walk: Walk) -> dict[str, Tensor]:
        activations = reader.activations(batch.pixels.to(reader.device))
        found = {}
        for i, (layer, site) in enumerate(sites.items()):
            density = walk.statistic(f"{i}/density", Density) if f"{i}/density" in make else None
            found[str(i)] = _scores(site, activations.pop(layer)[0], len(batch.names), pooling, density)
        return found

    walk, read = images.run("words", {str(i): site.units for i, site in enumerate(sites.values())}, preprocess, see, make)
    missing, reasons = images.names(~read), walk.statistic(_UNREADABLE, Unreadable).reasons
    return ImageScores(
        {layer: walk.vectors[str(i)].vectors for i, layer in enumerate(layers)},
        read,
        images.names(torch.ones_like(read)),
        {layer: walk.statistic(f"{i}/density", Density) for i, layer in enumerate(layers) if f"{i}/density" in make},
        [[name, reasons.get(name, "")] for name in missing],
    )


def _scores(site: Site, x: Tensor, images: int, pooling: str, density: Density | None) -> Tensor:
    """One activation for each image and unit. Maps of latents are made for a few images at a time: they may be many times those of x."""
    if density is None:
        return pooled(site.read(x, images), pooling).float()
    each = 4 * site.units * (x.numel() // (images * site.features))  # bytes of the latents of an image
    step = max(1, MAPS // each)
    parts = []
    for start in range(0, images, step):
        part = x.narrow(site.layout.batch_dim, start, min(step, images - start))
        latents = site.read(part, part.shape[site.layout.batch_dim])
        density.update(latents)
        parts.append(pooled(latents, pooling).float())
    return torch.cat(parts)


def _no_image(images: ImagePass, walk: Walk) -> DatasetError:
    first = [f"{name} ({why})" for name, why in walk.statistic(_UNREADABLE, Unreadable).reasons.items()]
    return DatasetError(f"none of the {len(images.files)} images can be read: {listing(first, 3)}")
