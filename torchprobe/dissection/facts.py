"""What a dissection depends on, as facts (see :mod:`torchprobe.common.facts`), and whether a network and a data set are still those."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.common.facts import UNIDENTIFIED, digest_of, told
from torchprobe.common.messages import stable_repr
from torchprobe.common.networks import modules_fact, modules_without
from torchprobe.common.storage import digest
from torchprobe.datasets.geometry import UNKNOWN, fingerprint
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.taps import Site
from torchprobe.recording.layers import named_layers

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden

MOST_APART = 0.1
"""By how much of the largest score of its unit the score of a picture may differ from that of the dissection, as batches, devices and
precisions differ. Our choice: a top image that was replaced nearly always falls by more."""


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


def index_fact(broden: Broden, rows: Sequence[int]) -> str:
    """A digest of the index of a data set, of what was chosen of it and of the rows that are used. The metadata of every result hold it."""
    data = hashlib.sha256((broden.root / broden.index).read_bytes())
    data.update(repr((broden.split, broden.categories, [*rows])).encode())
    return data.hexdigest()


def require_same_network(metadata: Mapping[str, Any], layer: str, model: nn.Module, needed: bool = True) -> None:
    """That a network is the one of a dissection, by its weights, its modules and their settings.

    Args:
        metadata: of the dissection.
        layer: its name, for messages.
        model: the network.
        needed: whether a dissection that does not say of which network it is is refused. Otherwise a warning says so.

    Raises:
        ValueError: it is another network.
    """
    expected = metadata.get("weights")
    if expected is None and needed:
        raise ValueError(f"the dissection of {layer!r} does not say of which network it is: dissect again")
    if expected is None:
        warnings.warn(f"the dissection of {layer!r} does not say of which network it is, so the one given was not compared", stacklevel=3)
    elif digest([*model.parameters(), *model.buffers()]) != expected:
        name = metadata.get("model", "a network")
        raise ValueError(
            f"this is another network than that of the dissection, which is {name}: the weights differ. Its units need not detect "
            "the same concepts. Load the network with the weights and in the precision of the dissection, or dissect this one"
        )
    elif metadata.get("modules", now := own_modules(model)) != now:  # earlier versions do not say it
        raise ValueError(
            "this is another network than that of the dissection: the weights are the same, and its modules or their settings differ, such "
            "as an activation function or a stride. Make it as it was, or dissect this one"
        )


def require_same_data(metadata: Mapping[str, Any], images: Tensor, broden: Broden) -> None:
    """That the rows of a dissection are those of a data set, as far as its index tells. The pictures themselves are not read; see
    :func:`require_same_pictures`.

    Args:
        metadata: of the dissection.
        images: its rows.
        broden: the data set.

    Raises:
        ValueError: it is another data set.
    """
    made = metadata.get("dataset", {})
    for name, now in (("split", broden.split), ("categories", [*broden.categories])):
        if name in made and made[name] != now:
            raise ValueError(f"the dissection was made with {name} {made[name]!r}, the data set given has {now!r}: give the same data set")
    if len(images) and (last := int(images.max())) >= len(broden):
        raise ValueError(f"the dissection has row {last}, the data set given only {len(broden)} rows: give the same data set")
    count = made.get("images", len(images))  # of merged dissections the metadata are those of the first part, whose rows come first
    if "digest" not in made:
        warnings.warn("the dissection does not say of which data set it is, so the one given was not compared", stacklevel=3)
    elif index_fact(broden, images[:count].tolist()) != made["digest"]:
        name = made.get("name", "unknown")
        raise ValueError(
            f"this is another data set than that of the dissection, which is {name}: {broden.index} of {broden.root} lists other images or "
            "labels; give the same data set"
        )


def require_same_pictures(dissection: LayerScores, broden: Broden, row: int, now: Mapping[int, float]) -> None:
    """That a top image of units still has the scores that it had.

    Args:
        dissection: with top images.
        broden: its data set.
        row: of the image.
        now: unit → the score that its network gives the image now; the units have it among their top images.

    Raises:
        ValueError: a score is another one: the picture was replaced, or is shown to the network in another way.
    """
    assert dissection.top is not None
    ids, scores = dissection.top
    units = [*now]
    own = scores[units].double()
    largest = own.abs().nan_to_num(0).amax(1).clamp(min=1e-3 * float(scores.abs().nan_to_num(0).max()))
    then = own[torch.arange(len(units)), (ids[units] == row).int().argmax(1)]
    apart = (torch.tensor([*now.values()], dtype=torch.float64) - then).abs()
    if len(other := (apart > MOST_APART * largest).nonzero()):
        i = int(other[0])
        raise ValueError(
            f"{broden.rows[row].image} is not the picture that it was: unit {units[i]} of {dissection.layer!r} has the score "
            f"{now[units[i]]:.4g} on it, and in the dissection it had {float(then[i]):.4g}. The file or its preprocessing changed: "
            "dissect again"
        )
