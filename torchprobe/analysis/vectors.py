"""The rows of embeddings that one batch gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.analysis.embeddings_file import Part
from torchprobe.analysis.positions import SEVERAL, LayerEncoder
from torchprobe.datasets.images import Batch

Around = Callable[[Batch, Tensor], contextlib.AbstractContextManager[object]]
"""A batch and its inputs on the device → the context in which the encoder runs over them."""


def part_of(encoder: nn.Module, place: torch.device, read: tuple[Batch, list[int]], around: Around | None = None) -> Part:
    """The representations of a batch with its labels: one row for each image; of a layer with several vectors for an image, one for each.

    Raises:
        ValueError: the encoder does not give one floating point vector for each image.
    """
    batch, labels = read
    if not batch.names:
        return Part(skipped=batch.unreadable)
    inputs = batch.pixels.to(place)
    with contextlib.nullcontext() if around is None else around(batch, inputs):
        several = encoder.rows(inputs) if isinstance(encoder, LayerEncoder) and encoder.several else None
        h = encoder(inputs) if several is None else several[0]
    if several is not None:
        h, at = several
        names = [vector_name(batch.names[i], k) for i, k in at]
        return Part(h.float().cpu().contiguous(), [labels[i] for i, _ in at], names, batch.unreadable, inputs=len(batch.names))
    if not isinstance(h, Tensor) or h.dim() != 2 or len(h) != len(batch.names) or not h.is_floating_point():
        given = f"{h.dtype} {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"the encoder returned {given} for {len(batch.names)} images; expected one floating point vector each, (N, d)")
    return Part(h.float().cpu().contiguous(), labels, batch.names, batch.unreadable)


def vector_name(image: str, position: int) -> str:
    """The id of one of the vectors of an image.

    >>> vector_name("cat.jpg", 5), image_of("cat.jpg@5")
    ('cat.jpg@5', 'cat.jpg')
    """
    return f"{image}@{position}"


def image_of(name: str) -> str:
    """The image of :func:`vector_name`."""
    return name.rpartition("@")[0]


def images_of(ids: Sequence[str], provenance: Mapping[str, Any]) -> list[str] | None:
    """The image of each row of embeddings; None if each row is an image of its own.

    >>> images_of(["a@0", "a@1", "b@0"], {"layer": "blocks.0", "position": "all"}), images_of(["a", "b"], {})
    (['a', 'a', 'b'], None)
    """
    return [image_of(name) for name in ids] if provenance.get("position") in SEVERAL else None


def image_means(values: Tensor, images: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The mean of the values of each image, nan left out, and the images in the order in which they come.

    >>> image_means(torch.tensor([1.0, 3.0, 5.0]), ["a", "a", "b"])
    (tensor([2., 5.]), ['a', 'b'])
    """
    number: dict[str, int] = {}
    at = torch.tensor([number.setdefault(image, len(number)) for image in images], dtype=torch.int64)
    known = ~values.isnan()
    sums = values.new_zeros(len(number)).index_add_(0, at[known], values[known])
    return sums / torch.bincount(at[known], minlength=len(number)), list(number)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the length of the block. Afterwards each part has its own mode again."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
