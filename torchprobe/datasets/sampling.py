"""Random samples of a set of images or texts, and other orders of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from torchprobe.datasets.protocol import ImageSet

Set = TypeVar("Set", bound=ImageSet)


def sample(images: Set, count: int, seed: int) -> Set:
    """Some of the images, chosen at random, in their order; all if there are not more.

    >>> from pathlib import Path
    >>> from torchprobe.datasets import Images
    >>> [path.name for path in sample(Images([Path("a"), Path("b"), Path("c")]), 2, seed=0).paths]
    ['a', 'c']
    """
    if count >= len(images):
        return images
    return taken(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist())


def shuffled(images: Set) -> Set:
    """The images in an order in which the first ones, however many, are a random sample. It is the same in every run.

    >>> from pathlib import Path
    >>> from torchprobe.datasets import Images
    >>> [path.name for path in shuffled(Images([Path("a"), Path("b"), Path("c")])).paths]
    ['c', 'a', 'b']
    """
    return taken(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist())


def taken(images: Set, numbers: Sequence[int]) -> Set:
    """The images with these numbers, in this order, with their labels.

    >>> from pathlib import Path
    >>> from torchprobe.datasets import Images
    >>> [path.name for path in taken(Images([Path("a"), Path("b"), Path("c")]), [2, 0]).paths]
    ['c', 'a']
    """
    return images.take(numbers)
