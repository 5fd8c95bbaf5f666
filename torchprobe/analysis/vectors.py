"""The rows of embeddings that one batch gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torchprobe.analysis.embeddings_file import Part
from torchprobe.analysis.positions import LayerEncoder
from torchprobe.datasets.images import Batch


def part_of(encoder: nn.Module, place: torch.device, batch: Batch, labels: list[int]) -> Part:
    """The representations of a batch, one row for each image; of a layer with several vectors for an image, one for each of them.

    Raises:
        ValueError: the encoder does not give one floating point vector for each image.
    """
    if not batch.names:
        return Part(skipped=batch.unreadable)
    if isinstance(encoder, LayerEncoder) and encoder.several:
        h, at = encoder.rows(batch.pixels.to(place))
        names = [vector_name(batch.names[i], k) for i, k in at]
        return Part(h.float().cpu().contiguous(), [labels[i] for i, _ in at], names, batch.unreadable, inputs=len(batch.names))
    h = encoder(batch.pixels.to(place))
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
