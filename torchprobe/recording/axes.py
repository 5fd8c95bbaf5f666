"""Which dimension of an activation holds the features, and by what that is known.

A wrong dimension gives plausible numbers. So nothing is guessed. The evidence, the strongest first:

1. ``feature_dim=`` of the user.
2. What the layer says: its type (``Conv2d``, ``Linear`` …), or the width that it declares (``num_features``, the size of its parameters).
3. What the layers say that ran just before: the last one inside of a block, or the one before an activation function. The activation is
   the very tensor of that layer, or has its shape, or exactly one of its dimensions is as wide.
4. If several dimensions are as wide, the order of the numbers in memory, and blocks of the same class that were clear.
5. A second shape: the features are where the size stays.

If nothing decides, the answer is "unsure". The first dimension counts the inputs, and is never the features of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from torchprobe.recording.leaves import width

UNSURE = "unsure"


class Axis(NamedTuple):
    """The dimension of the features, ≥ 0, and by what it is known; None while nothing decides.

    ``open`` are the dimensions that a second shape can still decide between, and ``width`` is their size.
    """

    dim: int | None
    by: str
    open: tuple[int, ...] = ()
    width: int = 0
    sure: bool = True  # the width is declared: another one later is an exception, and not a sign that it was no width of features


def parameter_axis(module: nn.Module, shape: tuple[int, ...], name: str = "weight") -> Axis:
    """The dimension of a parameter that counts the features of the output, as those of an activation: rows of a linear layer's weight,
    columns of an embedding. Without a declared width it is the first.

    >>> parameter_axis(nn.Linear(3, 8), (8, 3)).dim, parameter_axis(nn.Embedding(100, 8), (100, 8)).dim
    (0, 1)
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and len(shape) == 2:
        return Axis(1, type(module).__name__)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and len(shape) > 2 and module.groups == 1:
        return Axis(1, type(module).__name__)
    size = width(module) if name == "weight" else None
    if size is None or not shape or shape[0] == size:
        return Axis(0, "the first of a parameter" if size is None else type(module).__name__)
    found = fits(shape, size, 0)
    return Axis(found[0], f"width {size}") if len(found) == 1 else Axis(0, "the first of a parameter")


def second_shape(axis: Axis, first: tuple[int, ...], shape: tuple[int, ...]) -> Axis:
    """What a second shape says where the first one left it open."""
    if shape == first or len(shape) != len(first) or not axis.open:
        return axis
    left = tuple(dim for dim in axis.open if shape[dim] == axis.width)
    moved = any(shape[dim] != first[dim] for dim in range(len(shape)) if dim not in left)
    if not left or left == (0,):
        return Axis(None, "its size changes with the batch, so it does not count features")
    if len(left) == 1 and moved:
        return Axis(left[0], f"width {axis.width} in two shapes", sure=axis.sure)
    return axis._replace(open=left)


def fits(shape: tuple[int, ...], size: int, start: int = 1) -> list[int]:
    """The dimensions of this size; the first dimension counts inputs."""
    return [dim for dim in range(start, len(shape)) if shape[dim] == size]


def square(axis: Axis, shape: tuple[int, ...]) -> Axis:
    """A square matrix may compare each input with each: only a second shape tells."""
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] > 1:
        return Axis(None, UNSURE, (0, 1), shape[1], sure=False)
    return axis
