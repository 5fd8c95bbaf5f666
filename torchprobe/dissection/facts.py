"""What a dissection depends on beside its metadata, as facts of its checkpoint: see :mod:`torchprobe.common.facts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

import torchprobe
from torchprobe.common.facts import UNIDENTIFIED, digest_of, told
from torchprobe.common.messages import stable_repr
from torchprobe.common.networks import modules_fact, modules_without
from torchprobe.datasets.geometry import UNKNOWN, fingerprint
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.taps import Site
from torchprobe.recording.layers import named_layers


def run_facts(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Any]:
    """The modules of the network and of its bases, of which the weights are known from the metadata; and the version of this library."""
    bases = {name: stable_repr(site.basis.encoder) for name, site in sites.items() if isinstance(site.basis, SparseBasis)}
    return {"modules": digest_of([modules_fact(model), bases]), "torchprobe": torchprobe.__version__}


def own_modules(model: nn.Module) -> str:
    """The modules of a network and their settings, without what it is wrapped in, and without a transform that is a module: another one may
    be given. The metadata of every result hold it."""
    return modules_without(named_layers(model)[""].module, "preprocess")


def transform_fact(transform: Callable[[Any], Tensor], size: tuple[int, int] | None = None) -> str:
    """What a transform says of itself, or else a digest of what it does to fixed pictures; ``size``: width and height of a picture that it
    takes.

    Raises:
        RandomTransformError: two runs of the transform differ.
    """
    if (own := told(transform)) is not None:
        return digest_of(["told", own])
    found = fingerprint(transform, size)
    return UNIDENTIFIED if found == UNKNOWN else found
