"""What the argument ``basis`` of a dissection stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchprobe.common.storage import digest
from torchprobe.dissection.sparse import MAPS, SparseBasis
from torchprobe.dissection.taps import Site, random_rotation

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


def same_basis(metadata: Mapping[str, Any], layer: str, features: int, basis: Basis = None) -> Tensor | SparseBasis | None:
    """The basis of one layer of a dissection, checked; a random rotation is made again.

    Args:
        metadata: of the dissection.
        layer, features: of the layer.
        basis: that of the dissection, if it was given there.

    Raises:
        ValueError: it is another one, or it is needed. Metadata that do not say which one it was accept any.
    """
    noted, seed = metadata.get("basis"), int(metadata.get("seed", 0))
    if "basis" not in metadata:
        return basis_of(basis, layer, features, seed)
    if basis is None and isinstance(noted, str) and noted == digest([rotation := random_rotation(features, seed)]):
        return rotation
    found = basis_of(basis, layer, features, seed)
    described = json.loads(json.dumps(describe_basis(found)))  # as it comes out of a file
    if described != json.loads(json.dumps(noted)):
        given = "give the same basis=" if found is None else "another basis was given" if noted else "no basis belongs to it"
        raise ValueError(f"layer {layer!r} was dissected {'along directions or latents' if noted else 'in its units'}: {given}")
    return found


def fitting_batch_size(sites: Iterable[Site], batch_size: int) -> int:
    """The number of images in a batch, ``batch_size`` or fewer, for which the maps of latents of a layer fit into :data:`MAPS` bytes.

    >>> from torchprobe.recording.reader import Layout
    >>> site = Site("blocks.9", Layout(3, 0, 2), 768, basis=SparseBasis(nn.Linear(768, 16384)), places=196)
    >>> fitting_batch_size([site], 64), fitting_batch_size([], 64)
    (20, 64)
    """
    for site in sites:
        if isinstance(site.basis, SparseBasis):
            batch_size = min(batch_size, max(1, MAPS // (4 * site.units * site.places)))
    return batch_size
