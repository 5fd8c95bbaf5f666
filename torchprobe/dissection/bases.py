"""Directions in activation space, which are dissected like units: rows of a matrix (k, d)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64, generator=generator))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation.float()


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
