"""What a network must be shown so that its units mean what they meant in a dissection."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from torchprobe.common.messages import stable_repr
from torchprobe.common.storage import digest
from torchprobe.datasets.geometry import WholePicture, fingerprint, whole_picture
from torchprobe.dissection.bases import Basis, basis_of, describe_basis
from torchprobe.dissection.batches import PREPROCESSING, Preprocess
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.taps import random_rotation


def same_preprocess(dissection: LayerScores, model: nn.Module, preprocess: Preprocess | str | None = None) -> Preprocess:
    """The preprocessing of a dissection, found again or checked.

    Args:
        dissection: its metadata has the fingerprint.
        model: the network; its transform is ``model.preprocess``.
        preprocess: as it was given to the dissection; default: found among what the network offers.

    Raises:
        ValueError: it is another one, or it is needed because the dissection had a function of its own.
    """
    noted = dissection.metadata.get("preprocessing")
    if preprocess is not None and preprocess not in PREPROCESSING and not callable(preprocess):
        raise ValueError(f"preprocess must be a function or one of {', '.join(PREPROCESSING)}, got {preprocess!r}")
    own: Preprocess | None = getattr(model, "preprocess", None)
    if own is None and not callable(preprocess):
        raise ValueError("the network does not say how a picture becomes a tensor: give preprocess=, as to the dissection")
    if not isinstance(noted, dict):
        if preprocess is None:
            raise ValueError("the dissection does not say how its images were prepared: give preprocess=, or dissect again")
        return _named(own, preprocess)
    for candidate in (preprocess,) if preprocess is not None else PREPROCESSING:
        try:
            found = _named(own, candidate)
        except (ValueError, TypeError):  # this network cannot be shown the whole picture with its own colors
            if preprocess is not None:
                raise
            continue
        # Pillow may resize a little differently in another version, but such a transform is known by what it is.
        if (isinstance(found, WholePicture) and repr(found) == noted.get("transform")) or fingerprint(found) == noted.get("fingerprint"):
            return found
    shown = " ".join(str(noted.get("transform", "unknown")).split())[:200]
    what = "none of the network's" if preprocess is None else f"not {stable_repr(preprocess)[:200]}"
    raise ValueError(f"the images of the dissection were prepared by {shown}, which is {what}: give preprocess=, as to the dissection")


def _named(own: Preprocess | None, preprocess: Preprocess | str) -> Preprocess:
    if not isinstance(preprocess, str):
        return preprocess
    assert own is not None
    return own if preprocess == "encoder" else whole_picture(own)


def same_basis(dissection: LayerScores, features: int, basis: Basis = None) -> Tensor | SparseBasis | None:
    """The basis of a dissection, checked; a random rotation is made again.

    Raises:
        ValueError: it is another one, or it is needed.
    """
    noted, seed = dissection.metadata.get("basis"), int(dissection.metadata.get("seed", 0))
    if basis is None and isinstance(noted, str) and noted == digest([rotation := random_rotation(features, seed)]):
        return rotation
    found = basis_of(basis, dissection.layer, features, seed)
    if _plain(describe_basis(found)) != _plain(noted):
        given = "give the same basis=" if found is None else "another basis was given" if noted else "no basis belongs to it"
        raise ValueError(f"layer {dissection.layer!r} was dissected {'along directions or latents' if noted else 'in its units'}: {given}")
    return found


def _plain(value: Any) -> Any:
    """As it comes out of a file."""
    return json.loads(json.dumps(value))
