"""Where the layers of a model are read for a dissection: their activations as maps with positions, in their units or along directions.

Directions in activation space are the rows of a matrix (k, d). They are dissected like units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from torchprobe.dissection.sparse import SparseBasis
from torchprobe.ops.positions import vectors_of
from torchprobe.recording.reader import LayerReader, Layout, map_sizes

POSITIONS = ("patch", "class", "all")

# -- directions ------------------------------------------------------------------------------------------------------------


class SingularVectors(NamedTuple):
    """``directions`` (k, d), float32, orthonormal rows, in descending order of ``values`` (k,)."""

    directions: Tensor
    values: Tensor


def singular_vectors(head: nn.Linear | Tensor, k: int | None = None) -> SingularVectors:
    """The right singular vectors of a head: the directions that its logits depend on. They depend most on the first.

    The sign of a singular vector has no meaning. Here the entry of largest size is positive. Score these directions with ``sign="both"``.

    Args:
        head: a linear layer, or its weight (classes, d).
        k: the number of directions; default: the rank of the head.

    Raises:
        ValueError: not a matrix, nonfinite entries, or a rank below ``k``.

    >>> singular_vectors(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])).directions
    tensor([[0., 1., 0.],
            [1., 0., 0.]])
    """
    weight = (head.weight if isinstance(head, nn.Linear) else head).detach()
    if weight.dim() != 2 or not bool(weight.isfinite().all()):
        raise ValueError(f"a head is a finite matrix (classes, features), got a tensor of shape {tuple(weight.shape)}")
    _, values, rows = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = int((values > values.amax() * max(weight.shape) * torch.finfo(weight.dtype).eps).sum())
    if k is not None and not 1 <= k <= rank:
        raise ValueError(f"this head has rank {rank}; k = {k} directions cannot be taken from it")
    rows, values = rows[: k or rank], values[: k or rank]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return SingularVectors((rows * largest.sign()).float(), values.float())


def random_rotation(features: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix (d, d), float32, uniform (Haar). It is the control for the axes of a layer.

    The Q of a Gaussian matrix, multiplied by the signs of the diagonal of R (Mezzadri, Notices of the AMS, 2007).

    >>> q = random_rotation(64, seed=1)
    >>> torch.allclose(q @ q.T, torch.eye(64), atol=1e-6)
    True
    """
    q, r = torch.linalg.qr(_gaussian(features, seed))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation.float()


class RandomRotation:
    """:func:`random_rotation` of vectors, without the matrix: half the work of the matrix alone, and its numbers up to float32 rounding.

    The factorization is that of LAPACK in float32: Q is a product of reflections, which are applied to the vectors.

    Args:
        features: d.
        seed: as of :func:`random_rotation`.
        device: of the vectors.

    >>> x = torch.randn(5, 64)
    >>> torch.allclose(RandomRotation(64, seed=1)(x), x @ random_rotation(64, seed=1), atol=1e-4)
    True
    """

    def __init__(self, features: int, seed: int = 0, device: torch.device | None = None) -> None:
        factors, scales = torch.geqrf(_gaussian(features, seed).float())
        self._factors, self._scales, self._signs = (each.to(device) for each in (factors, scales, factors.diagonal().sign()))

    def __call__(self, x: Tensor) -> Tensor:
        """Vectors (n, d), float32 → the rotated vectors (n, d)."""
        turned: Tensor = torch.ormqr(self._factors, self._scales, x, left=False)
        return turned.mul_(self._signs)


def _gaussian(features: int, seed: int) -> Tensor:
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    return torch.randn(features, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_basis(basis: Tensor, features: int, layer: str) -> Tensor:
    """The directions as float32 (k, d).

    Raises:
        ValueError: they do not fit the layer, or are nonfinite or zero; the message names the layer and the row.
    """
    if basis.dim() != 2 or basis.shape[1] != features or basis.shape[0] == 0:
        raise ValueError(f"the basis for layer {layer!r} must be (directions, {features}), got {tuple(basis.shape)}")
    basis = basis.detach().float()
    usable = basis.isfinite().all(1) & (basis != 0).any(1)
    if not bool(usable.all()):
        raise ValueError(f"row {int(usable.int().argmin())} of the basis for layer {layer!r} is zero or not finite")
    return basis


def project(maps: Tensor, basis: Tensor) -> Tensor:
    """Maps (images, d, …) in the directions of a basis (k, d): (images, k, …), float32.

    >>> project(torch.ones(1, 2, 3, 3), torch.tensor([[1.0, 1.0]])).shape
    torch.Size([1, 1, 3, 3])
    """
    flat = basis.to(maps.device) @ maps.flatten(2).float() if maps.dim() > 2 else maps.float() @ basis.to(maps.device).T
    return flat.unflatten(2, maps.shape[2:]) if maps.dim() > 2 else flat


# -- layers ----------------------------------------------------------------------------------------------------------------


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

    ``layout`` of the activation; ``features``: how many it has; ``grid``: rows and columns of the patches among tokens; ``basis``:
    directions (k, features), the encoder of latents, or None for the units themselves; ``places``: positions of an image, those of other
    tokens included; ``size``: rows and columns of a map.
    """

    layer: str
    layout: Layout
    features: int
    grid: tuple[int, int] | None = None
    positions: str = "patch"
    basis: Tensor | SparseBasis | None = None
    places: int = 1
    size: tuple[int, int] = (1, 1)

    @property
    def units(self) -> int:
        """Units, directions or latents."""
        if isinstance(self.basis, SparseBasis):
            return self.basis.units(self.features, self.layer)
        return self.features if self.basis is None else len(self.basis)

    @property
    def has_map(self) -> bool:
        """Whether the units have positions on a plane. Pooled vectors and the class token do not."""
        return self.layout.dims == 4 or (self.layout.dims == 3 and self.positions == "patch")

    def in_basis(self, basis: Tensor | SparseBasis | None) -> Site:
        """The same layer in directions (k, features) or in latents; None: in its units.

        Raises:
            ValueError: the directions or the encoder do not fit the layer, or directions are nonfinite or zero.
        """
        if isinstance(basis, SparseBasis):
            basis.units(self.features, self.layer)
            return replace(self, basis=basis)
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
        if isinstance(self.basis, SparseBasis):
            return self.basis.encode(x)
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
    places = x.numel() // max(x.shape[layout.batch_dim] * x.shape[layout.feature_dim], 1)
    site = Site(name, layout, x.shape[layout.feature_dim], grid, positions, places=places)
    if not site.has_map:
        return site
    shape = site.read(x, x.shape[layout.batch_dim]).shape
    return replace(site, size=(shape[2], shape[3]))
