"""Adding the results of two parts of the images."""

from __future__ import annotations

import torch

from torchprobe.dissection.layer_tables import LayerTables, same
from torchprobe.dissection.overlap import Counts
from torchprobe.statistics.top_inputs import ranked


def add_images(mine: LayerTables, other: LayerTables) -> None:
    """Adds to ``mine``, in place, what ``other`` counted on other images; see :meth:`torchprobe.dissection.scores.LayerScores.merge`."""
    _require_alike(mine, other)
    if mine.counts is not None and other.counts is not None:
        mine.counts = Counts(*(a + b for a, b in zip(mine.counts, other.counts, strict=True)))
        mine.outside = None if mine.outside is None or other.outside is None else mine.outside + other.outside
        mine.level = None  # the thresholds are those of one part, or of neither
    if mine.ranking is not None and other.ranking is not None and mine.scores is not None and other.scores is not None:
        mine.rank(mine.ranking.joined(other.ranking), torch.cat([mine.scores, other.scores], 1), keep=True)
    if mine.top is not None and other.top is not None:
        k = mine.top[0].shape[1]
        scores, ids = ranked(torch.cat([mine.top[1], other.top[1]], 1), torch.cat([mine.top[0], other.top[0]], 1))
        mine.top, mine.top_maps = (ids[:, :k], scores[:, :k]), None
    if mine.density is not None and other.density is not None:
        mine.density.merge(other.density)
    mine.images = torch.cat([mine.images, other.images])


def _require_alike(mine: LayerTables, other: LayerTables) -> None:
    for name in ("layer", "units"):
        if getattr(mine, name) != getattr(other, name):
            raise ValueError(f"cannot merge the {name} {getattr(mine, name)!r} and {getattr(other, name)!r}")
    if tuple(mine.labels) != tuple(other.labels) or not torch.equal(mine.category, other.category):
        raise ValueError(f"layer {mine.layer!r}: the labels differ")
    if mine.iou_null is not None or other.iou_null is not None:
        raise ValueError(
            f"layer {mine.layer!r}: permutations of parts cannot be added: dissect all images with iou_permutations, or without"
        )
    for name in ("thresholds", "counts", "average_precision", "top", "density"):
        if (getattr(mine, name) is None) != (getattr(other, name) is None):
            raise ValueError(f"layer {mine.layer!r}: only one of the two has {name}")
    if mine.counts is not None and not same(mine.thresholds, other.thresholds):
        raise ValueError(f"layer {mine.layer!r} was counted with other thresholds: give dissect() the same thresholds= for all parts")
    for name in ("mode", "pooling", "sign", "negatives", "minimum_area", "weights"):
        if (ours := mine.metadata.get(name)) != (theirs := other.metadata.get(name)):
            raise ValueError(f"layer {mine.layer!r} was dissected with {name} {ours!r} and {theirs!r}")
    modules = [part.metadata.get("modules") for part in (mine, other)]
    if None not in modules and modules[0] != modules[1]:  # earlier versions do not say it
        raise ValueError(f"layer {mine.layer!r} was dissected with networks of the same weights and other modules")
    if mine.average_precision is not None and (mine.scores is None or other.scores is None):
        raise ValueError(f"layer {mine.layer!r}: merging average precision needs the scores of the images: dissect with keep_scores=True")
    if mine.top is not None and other.top is not None and mine.top[0].shape != other.top[0].shape:
        raise ValueError(f"layer {mine.layer!r}: {mine.top[0].shape[1]} and {other.top[0].shape[1]} top images were kept")
    if bool(torch.isin(mine.images, other.images).any()):
        raise ValueError(f"layer {mine.layer!r}: both contain some of the same images, which would count twice")
