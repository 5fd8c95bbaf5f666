"""The concepts that a representation encodes: in its own axes, in the directions of its head, and what chance gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.datasets.broden import Broden
from torchprobe.dissection import Dissection, dissect, random_rotation
from torchprobe.dissection.bases import check_basis, project
from torchprobe.dissection.ranking import Ranking

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Average precision from which a concept counts as encoded; the headline is 0.9 (a choice of ours, so the sweep is reported)."""

UNITS, DIRECTIONS, ROTATION, SHUFFLED = "units", "directions", "random rotation", "units, shuffled labels"
"""The bases of :func:`concepts`: the axes; the singular directions of the head; the axes turned at random, which is the control for both;
and the axes against the labels of other images, which is what chance gives."""


def concepts(
    encoder: nn.Module, broden: Broden, directions: Tensor | None = None, *, layer: str = "", seed: int = 0, **options: Any
) -> dict[str, Dissection]:
    """Scores units and directions of a representation as detectors of concepts, by average precision.

    The images pass the network once: what a direction says of an image is a sum of what the units say. Every basis is scored in both signs
    and the better one counts, since the sign of a singular vector means nothing; corrections count both.

    Args:
        encoder: images → representations (N, features), or any module with such a layer.
        broden: the images and their labels.
        directions: rows (k, features), such as ``privileged_directions(head, h).directions``.
        layer: one vector per image is taken from it; default: the output.
        seed: of the rotation and of the shuffled labels.
        options: for :func:`torchprobe.dissection.dissect`, such as ``checkpoint``, ``minimum_area`` and ``negatives``.

    Returns:
        {"units": …, "directions": …, "random rotation": …, "units, shuffled labels": …}; no "directions" where none are given.

    Raises:
        ValueError: directions of another width; and whatever ``dissect`` refuses.

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
    """The same images in other directions: what each direction (k, units) ranks them by.

    Raises:
        ValueError: the scores were not kept (``keep_scores=True``), or directions of another width.
    """
    if units.scores is None or units.ranking is None:
        raise ValueError("the scores of the images were not kept: dissect with keep_scores=True")
    directions = check_basis(directions, units.units, units.layer)
    turned = replace(units, units=len(directions), thresholds=None, counts=None, top=None)
    turned.rank(units.ranking, project(units.scores.T, directions).T.contiguous(), keep=True)
    return turned


def concept_sweep(
    dissection: Dissection, thresholds: Sequence[float] = THRESHOLDS, alpha: float = 0.05, minimum_positives: int = 1
) -> list[dict[str, Any]]:
    """How many concepts are encoded at each threshold of average precision, and how many a direction shares.

    Returns:
        one row per threshold: ``threshold``; ``unique``, the size of the union over directions; ``encoding``, directions with at least one
        concept; ``polysemanticity``, concepts per direction, mean over all; ``polysemanticity_encoding``, over those with at least one
        (nan where there is none); ``distribution``, how many directions encode 0, 1, 2, … concepts.
    """
    rows = []
    for threshold in thresholds:
        pairs = dissection.encoded(threshold, alpha, minimum_positives=minimum_positives)
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


def concept_names(dissection: Dissection, threshold: float = 0.9, alpha: float = 0.05) -> list[str]:
    """The names of the concepts that some direction encodes, in the order of the labels."""
    return [label.name for label in dissection.unique_concepts(threshold, alpha)]


def concept_overlap(models: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """For each pair of models the concepts both encode, and those of one only.

    Args:
        models: name → concepts, from the same data set with the same threshold.

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
    """Every image gets the labels of another, all of them together, so that what occurs together still does."""
    order = torch.randperm(ranking.images, generator=torch.Generator().manual_seed(seed))
    lengths = ranking.crow.diff()[order]
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    entry = torch.arange(int(crow[-1])) + (ranking.crow[:-1][order] - crow[:-1]).repeat_interleave(lengths)
    return replace(ranking, crow=crow, column=ranking.column[entry], annotated=ranking.annotated[order])
