"""Concepts of Broden for captum's TCAV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchprobe.common.distribution import install_hint

if TYPE_CHECKING:
    from captum.concept import Concept

    from torchprobe.datasets.broden.reader import Broden


class Pictures(Dataset[Tensor]):
    """The transformed pictures of some rows."""

    def __init__(self, broden: Broden, indices: list[int]) -> None:
        self.broden = broden
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image: Any = self.broden.image(self.indices[index])
        image = image if self.broden.transform is None else self.broden.transform(image)
        if not isinstance(image, Tensor):
            raise TypeError(f"a concept is made of tensors, got {type(image).__name__}: give Broden a transform that makes them")
        return image


def concept(broden: Broden, name: str | int, batch_size: int = 32, limit: int | None = None, minimum_area: float = 0.0) -> Concept:
    """The pictures of a concept as a ``captum.concept.Concept``: what ``captum.concept.TCAV.interpret`` takes.

    Args:
        broden: with a ``transform`` that gives tensors of one shape.
        name: see :meth:`Broden.label`. The label's number becomes the concept's id.
        batch_size: of the concept's ``data_iter``.
        limit: no more than so many pictures, the first of the index – whose order is that of a hash, so they are a random choice.
        minimum_area: see :meth:`Broden.concept_images`.

    Raises:
        ImportError: captum is not installed.
        KeyError: no such label.
        ValueError: no picture shows it.
    """
    try:
        from captum.concept import Concept
    except ImportError as error:
        raise ImportError(f"this needs captum: {install_hint('captum')}") from error

    label = broden.label(name)
    indices = broden.concept_images(label.number, minimum_area)[:limit]
    if not indices:
        raise ValueError(f"no picture of {broden!r} shows {label.name!r} over at least {minimum_area:g} of its area")
    return Concept(label.number, label.name, DataLoader(Pictures(broden, indices), batch_size))
