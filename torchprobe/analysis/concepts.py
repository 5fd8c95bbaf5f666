"""The concepts that a representation encodes, along its axes and along the directions of its head, with controls and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.datasets.broden import Broden
from torchprobe.dissection import Dissection, dissect, random_rotation
from torchprobe.dissection.ranking import Ranking
from torchprobe.dissection.taps import check_basis, project

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Thresholds of average precision from which a concept counts as encoded. The headline is 0.9 (we chose it, so the sweep is reported)."""

UNITS, DIRECTIONS, ROTATION, SHUFFLED = "units", "directions", "random rotation", "units, shuffled labels"
"""The bases of :func:`concepts`: the axes; the singular directions of the head; the axes after a random rotation, the control for both; and
the axes with the labels of other images, which measures chance."""


def concepts(
    encoder: nn.Module, broden: Broden, directions: Tensor | None = None, *, layer: str = "", seed: int = 0, **options: Any
) -> dict[str, Dissection]:
    """Scores units and directions of a representation as detectors of concepts, by average precision.

    The images pass through the network once, because the score of a direction is a sum over the scores of the units. Every basis is scored
    with both signs and the better one counts, because the sign of a singular vector has no meaning. The corrections count both signs.

    Args:
        encoder: images → representations (N, features), or any module with such a layer.
        broden: the images and their labels.
        directions: rows (k, features), such as ``privileged_directions(head, h).directions``.
        layer: a layer that gives one vector per image; default: the output.
        seed: of the rotation and of the shuffled labels.
        options: for :func:`torchprobe.dissection.dissect`, such as ``checkpoint``, ``minimum_area`` and ``negatives``.

    Returns:
        {"units": …, "directions": …, "random rotation": …, "units, shuffled labels": …}; without "directions" if none are given.

    Raises:
        ValueError: directions of another width, or as ``dissect``.

    >>> import tempfile, numpy as np
    >>> from torchprobe.datasets import BrodenWriter
    >>> folder = tempfile.mkdtemp()
    >>> with BrodenWriter(folder, {"scene": ["day", "night"]}, size=8) as writer:
    ...     for i in range(8):
    ...         writer.add(f"mine/{i}", np.full((8, 8, 3), 30 * i, np.uint8), {"scene": "day" if i > 3 else "night"})
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    >>> found = concepts(net, Broden(folder), preprocess=lambda image: torch.tensor(np.array(image)).movedim(2, 0) / 255)
    >>> found["units"].average_precision.shape
    torch.Size([3, 2])
    """
    units = dissect(encoder, layer, broden, score="ap", sign="both", seed=seed, keep_scores=True, **options)[layer]
    assert units.scores is not None and units.ranking is not None
    if directions is not None:
        directions = check_basis(directions, units.units, layer)
    found = {UNITS: units}
    if directions is not None:
        found[DIRECTIONS] = in_basis(units, directions)
    found[ROTATION] = in_basis(units, random_rotation(units.units, seed))
    null = replace(units, metadata={**units.metadata, "shuffle_labels": seed})
    null.rank(_shuffled(units.ranking, seed), units.scores, keep=True)
    found[SHUFFLED] = null
    return found


def in_basis(units: Dissection, directions: Tensor) -> Dissection:
    """The same images, ranked along other directions (k, units).

    Raises:
        ValueError: the scores were not kept (``keep_scores=True``), or directions of another width.
    """
    if units.scores is None or units.ranking is None:
        raise ValueError("the scores of the images were not kept: dissect with keep_scores=True")
    directions = check_basis(directions, units.units, units.layer)
    rotated = replace(units, units=len(directions), thresholds=None, level=None, counts=None, iou_null=None, top=None)
    rotated.rank(units.ranking, project(units.scores.T, directions).T.contiguous(), keep=True)
    return rotated


def concept_sweep(
    dissection: Dissection,
    thresholds: Sequence[float] = THRESHOLDS,
    alpha: float = 0.05,
    minimum_positives: int = 1,
    gain_threshold: float | None = None,
) -> list[dict[str, Any]]:
    """The number of encoded concepts, and of concepts per direction, at each threshold of average precision.

    Args:
        gain_threshold: the smallest gain over prevalence; default: 2 · threshold − 1. See
            :meth:`torchprobe.dissection.scores.LayerScores.encoded`.

    Returns:
        One row per threshold: ``threshold``; ``unique``, the number of distinct concepts over all directions; ``encoding``, the number of
        directions with at least one concept; ``polysemanticity``, concepts per direction, mean over all directions;
        ``polysemanticity_encoding``, mean over the directions with at least one concept (nan without any); ``distribution``, the number of
        directions that encode 0, 1, 2, … concepts.
    """
    rows = []
    for threshold in thresholds:
        pairs = dissection.encoded(threshold, alpha, minimum_positives=minimum_positives, gain_threshold=gain_threshold)
        each = pairs.sum(1)
        encoding = each[each > 0].double()
        rows.append(
            {
                "threshold": threshold,
                "unique": int(pairs.any(0).sum()),
                "encoding": int((each > 0).sum()),
                "polysemanticity": float(each.double().mean()),
                "polysemanticity_encoding": float(encoding.mean()) if len(encoding) else float("nan"),
                "distribution": torch.bincount(each).tolist(),
            }
        )
    return rows


def concept_names(dissection: Dissection, threshold: float = 0.9, alpha: float = 0.05, gain_threshold: float | None = None) -> list[str]:
    """The names of the concepts that at least one direction encodes, in the order of the labels; see :func:`concept_sweep`."""
    return [label.name for label in dissection.unique_concepts(threshold, alpha, gain_threshold=gain_threshold)]


def concept_overlap(models: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """For each pair of models, the number of concepts that both encode and that only one encodes.

    Args:
        models: name → names of concepts, from the same data set with the same threshold.

    >>> concept_overlap({"a": ["sky", "sea"], "b": ["sea"]})
    [{'a': 'a', 'b': 'b', 'shared': 1, 'only_a': 1, 'only_b': 0, 'jaccard': 0.5}]
    """
    names = list(models)
    rows = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            mine, theirs = set(models[one]), set(models[other])
            union = len(mine | theirs)
            rows.append(
                {
                    "a": one,
                    "b": other,
                    "shared": len(mine & theirs),
                    "only_a": len(mine - theirs),
                    "only_b": len(theirs - mine),
                    "jaccard": len(mine & theirs) / union if union else float("nan"),
                }
            )
    return rows


def _shuffled(ranking: Ranking, seed: int) -> Ranking:
    """Every image gets all labels of another image, so that labels still occur together as before."""
    order = torch.randperm(ranking.images, generator=torch.Generator().manual_seed(seed))
    lengths = ranking.crow.diff()[order]
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    entry = torch.arange(int(crow[-1])) + (ranking.crow[:-1][order] - crow[:-1]).repeat_interleave(lengths)
    return replace(ranking, crow=crow, column=ranking.column[entry], annotated=ranking.annotated[order])
