"""Two halves of the images: importance is measured on the first, and accuracy on the second."""

from __future__ import annotations

from typing import NamedTuple

from torchprobe.analysis.directions import Directions, privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.studies.interpret.given import GivenSubject
from torchprobe.studies.interpret.inputs import Subject


class Halves(NamedTuple):
    """Two halves of the images, and the directions of the head with their importance on the first half; or why they are missing."""

    directions: Directions | None
    first: Embeddings
    second: Embeddings
    why: str = ""


def halves_of(subject: Subject | GivenSubject, images: Embeddings, seed: int) -> Halves:
    """The halves, and the directions with their importance on the first one.

    Raises:
        ValueError: a chosen feature that the representation does not have.
    """
    head, choices = subject.head, subject.choices
    if head is None:
        return Halves(None, images, images, subject.why_no_head)
    if choices.features and max(choices.features) >= images.features:
        raise ValueError(f"there is no feature {max(choices.features)}: the representation has features 0 to {images.features - 1}")
    try:
        first, second = (images, images) if choices.same_images else split(images, seed=seed)
        return Halves(privileged_directions(head, first.h), first, second)
    except ValueError as error:  # too few images, a head of zeros, no finite representation
        return Halves(None, images, images, str(error))
