"""The fingerprint of a transform."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = ((97, 64), (61, 113), (128, 128))


class RandomTransformError(ValueError):
    """Two runs of a transform on one picture differ."""


UNKNOWN = "unknown"
"""The fingerprint of a transform that fails on pictures of noise."""


def fingerprint(transform: Callable[[Image], Tensor], size: tuple[int, int] | None = None) -> str:
    """What a transform does, as a short text: a digest of the tensors that it makes of three fixed pictures.

    The name of a function says nothing about what it does: two closures may share their names and differ in a number. Transforms that
    differ only on other pictures have the same fingerprint.

    Args:
        transform: PIL image → tensor.
        size: width and height of pictures to take if the transform fails on those. If it fails again, its fingerprint is "unknown".

    Raises:
        RandomTransformError: two runs differ, so the transform is random.

    >>> from torchvision.transforms import v2
    >>> fingerprint(v2.PILToTensor()) == fingerprint(v2.ToImage())
    True
    """
    for sizes in (SIZES, *([(size,)] if size else [])):
        try:
            first, second = (_digest(transform, sizes) for _ in range(2))
        except _FailsError:
            continue
        if first != second:
            raise RandomTransformError(
                "preprocess is random: two runs on one picture differ. Leave out random steps, or fix their seed in each call"
            )
        return first
    return UNKNOWN


class _FailsError(Exception):
    """The transform does not take a test picture."""


def _digest(transform: Callable[[Image], Tensor], sizes: Sequence[tuple[int, int]]) -> str:
    from PIL import Image

    found = hashlib.sha256()
    for number, (width, height) in enumerate(sizes):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse).astype(int) + generator.integers(-20, 21, (height, width, 3))
        try:
            tensor = transform(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
        except Exception as error:
            raise _FailsError from error
        if not isinstance(tensor, Tensor):
            raise TypeError(f"preprocess must return a tensor (3, H, W), got {type(tensor).__name__}")
        array = tensor.detach().cpu().contiguous()
        found.update(f"{array.dtype} {tuple(array.shape)}".encode())
        found.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
