"""Where the layers of a model are read for a dissection: their activations as maps with positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from einops import rearrange
from torch import Tensor

from torchprobe.dissection.bases import check_basis, project
from torchprobe.ops.positions import vectors_of
from torchprobe.recording.reader import LayerReader, Layout, map_sizes

POSITIONS = ("patch", "class", "all")


def as_maps(x: Tensor, grid: tuple[int, int] | None = None, feature_dim: int | None = None) -> Tensor:
    """An activation as (images, units, h, w), a view.

    Args:
        x: maps (images, units, h, w), or tokens (images, tokens, units).
        grid: h and w of the tokens that are patches, from the patch embedding. Default: a square. Tokens before the patches – the class
            token, registers – are left out.
        feature_dim: the dimension of the units. Default: 1 for maps, the last for tokens.

    Raises:
        ValueError: a pooled vector, which has no positions, or tokens that do not fit the grid.

    >>> import torch
    >>> as_maps(torch.zeros(2, 1 + 49, 768)).shape
    torch.Size([2, 768, 7, 7])
    """
    if x.dim() == 4:
        return x.movedim(1 if feature_dim is None else feature_dim, 1)
    if x.dim() != 3:
        raise ValueError(
            f"an activation of shape {tuple(x.shape)} has no positions, so no overlap with label maps; score it by average precision "
            '(score="ap"), or choose a layer before the pooling'
        )
    tokens = x.movedim(-1 if feature_dim is None else feature_dim, 2)
    count = tokens.shape[1]
    h, w = grid if grid is not None else (math.isqrt(count), math.isqrt(count))
    if h * w > count or h * w == 0 or (grid is None and count - h * w > 1):
        expected = "a square and a class token" if grid is None else f"{h} × {w} patches"
        raise ValueError(f"{count} tokens are not {expected}: give the grid of the patches")
    maps: Tensor = rearrange(tokens[:, count - h * w :], "images (h w) units -> images units h w", h=h, w=w)
    return maps


@dataclass(frozen=True, eq=False)
class Site:
    """How to read the activation of one layer.

    ``layout`` of the activation; ``features``: how many it has; ``grid``: rows and columns of the patches among tokens; ``basis``
    (k, features) or None for the units themselves.
    """

    layer: str
    layout: Layout
    features: int
    grid: tuple[int, int] | None = None
    positions: str = "patch"
    basis: Tensor | None = None

    @property
    def units(self) -> int:
        """Units or directions."""
        return self.features if self.basis is None else len(self.basis)

    @property
    def has_map(self) -> bool:
        """Whether the units have positions on a plane. Pooled vectors and the class token do not."""
        return self.layout.dims == 4 or (self.layout.dims == 3 and self.positions == "patch")

    def in_basis(self, basis: Tensor | None) -> Site:
        """The same layer in directions (k, features); None: in its units.

        Raises:
            ValueError: the directions do not fit the layer, or are nonfinite or zero.
        """
        return self if basis is None else replace(self, basis=check_basis(basis, self.features, self.layer))

    def read(self, x: Tensor, images: int) -> Tensor:
        """The activation as (images, units, h, w), or (images, units) or (images, units, positions) if it has no plane.

        Raises:
            ValueError: it is of another kind than for the first image.
        """
        dims, batch_dim, feature_dim = self.layout
        if x.dim() != dims or x.shape[feature_dim] != self.features or x.shape[batch_dim] != images:
            expected = f"{dims} dimensions, {images} images and {self.features} features"
            raise ValueError(f"layer {self.layer!r} gave shape {tuple(x.shape)}; expected {expected}, as for the first image")
        x = self.layout.images_first(x)
        if dims == 3 and self.positions != "all":
            tokens = rearrange(x, "images features tokens -> images tokens features")
            x = vectors_of(tokens, "class", -1)[:, 0] if self.positions == "class" else self._maps(tokens)
        return x if self.basis is None else project(x, self.basis)

    def _maps(self, tokens: Tensor) -> Tensor:
        try:
            return as_maps(tokens, self.grid)
        except ValueError as error:
            raise ValueError(f'layer {self.layer!r}: {error}, or score all of them by average precision (positions="all")') from error


def find_sites(reader: LayerReader, image: Tensor, positions: str = "patch") -> dict[str, Site]:
    """How to read each layer, from a forward pass of one image (1, …), where the dimension of the images is easy to see.

    The grid of tokens is that of the patch embedding: of all outputs of convolutions, the largest that fits into the tokens.

    Args:
        reader: of the layers; entered.
        image: as the network takes it.
        positions: which tokens, see :func:`torchprobe.dissection.dissect`.

    Raises:
        ValueError: a layer that gives neither maps, nor tokens, nor vectors.

    >>> import torch
    >>> from torch import nn
    >>> from torchprobe.recording import select_layers
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    >>> with LayerReader(model, select_layers(model, "1")) as reader:
    ...     find_sites(reader, torch.zeros(1, 3, 8, 8))["1"].units
    4
    """
    with map_sizes(reader.model) as grids:
        activations = reader.activations(image)
    return {name: _site(name, x, layout, grids, positions) for name, (x, layout) in activations.items()}


def _site(name: str, x: Tensor, layout: Layout, grids: list[tuple[int, int]], positions: str) -> Site:
    if layout.dims not in (2, 3, 4):
        raise ValueError(f"layer {name!r} gives shape {tuple(x.shape)}: neither maps, nor tokens, nor one vector for each image")
    grid = None
    if layout.dims == 3 and positions == "patch":
        tokens = layout.images_first(x).shape[2]
        fitting = [(h, w) for h, w in grids if h * w <= tokens < h * w + max(64, h * w // 4)]
        grid = max(fitting, key=lambda size: size[0] * size[1], default=None)
    return Site(name, layout, x.shape[layout.feature_dim], grid, positions)
