"""What the argument ``basis`` of a dissection stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchprobe.common.storage import digest
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.taps import random_rotation

OneBasis = Tensor | SparseBasis | nn.Module
"""Directions (k, features); or what makes latents of features."""

Basis = OneBasis | Mapping[str, OneBasis] | str | None
"""One for all layers, or by layer; "rotation"; None for the units themselves."""


def basis_of(basis: Basis, layer: str, features: int, seed: int) -> Tensor | SparseBasis | None:
    """The basis of one layer.

    Raises:
        ValueError: a word other than "rotation".

    >>> import torch
    >>> basis_of("rotation", "fc", 4, seed=0).shape, basis_of(nn.Linear(4, 9), "fc", 4, seed=0).name
    (torch.Size([4, 4]), 'Linear')
    """
    if isinstance(basis, Mapping):
        basis = basis.get(layer)
    if isinstance(basis, str):
        if basis != "rotation":
            raise ValueError(f'basis must be a tensor, an encoder, {{layer: basis}} or "rotation", got {basis!r}')
        return random_rotation(features, seed)
    return SparseBasis(basis, type(basis).__name__) if isinstance(basis, nn.Module) else basis


def check_layers(basis: Basis, layers: Iterable[str]) -> None:
    """Raises:
    ValueError: a basis is given for a layer that is not dissected.
    """
    if isinstance(basis, Mapping) and (unknown := sorted(basis.keys() - set(layers))):
        raise ValueError(f"basis has directions for layer {unknown[0]!r}, which is not dissected")


def describe_basis(basis: Tensor | SparseBasis | None) -> Any:
    """What tells a basis from others, for metadata: None; a digest of directions; or the name and the facts of an encoder."""
    if isinstance(basis, SparseBasis):
        return {"name": basis.name, **basis.facts, "digest": basis.digest()}
    return None if basis is None else digest([basis])
