"""Units matched with concepts by a measure, with p-values from permutations of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.common.messages import did_you_mean
from torchprobe.dissection.words.measures import BLOCK, MEASURES, AnyMeasure, Matcher, TopPrecision, check_inputs

_TOLERANCE = 1e-9  # relative: a permutation that gives the same number up to rounding reaches it


class Match(NamedTuple):
    """``score``: the measure. ``p``: probability under the null of at least this score, for each pair alone. ``adjusted``: for all pairs
    together. All float64 (units, concepts), nan where the measure is undefined."""

    score: Tensor
    p: Tensor
    adjusted: Tensor


def match(
    scores: Tensor,
    labels: Tensor,
    measure: str | AnyMeasure = "soft_wpmi",
    *,
    permutations: int = 99,
    seed: int = 0,
    tell: Callable[[int], object] = lambda done: None,
) -> Match:
    """Compares every unit with every concept.

    The null is a unit that is unrelated to the concepts: its scores are permuted over the images. All units are permuted alike, so
    dependence among units and among concepts, and ties, stay as they are. For all pairs together the largest statistic of each permutation
    is compared (single-step maxT, Westfall & Young 1993). This controls the probability of one or more false pairs. No p-value is below
    1 / (1 + permutations). For "average_precision" see :class:`TopPrecision`.

    Args:
        scores: floating (units, images): one score of each unit for each image.
        labels: floating (images, concepts): soft labels, such as cosines.
        measure: "soft_wpmi", "wpmi", "cosine_cubed", "rank_reorder" or "average_precision"; or one of :data:`MEASURES` with other numbers.
        permutations: the number of permutations.
        seed: of the permutations.
        tell: called with the permutations done.

    Raises:
        ValueError: the shapes do not fit together, a value is not finite, or an argument is out of range.

    >>> labels = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> found = match(labels.T[[2, 0]] * 5 + 1, labels, "cosine_cubed", permutations=19)
    >>> found.score.argmax(1), float(found.adjusted[0, 2])
    (tensor([2, 0]), 0.05)
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    scores, labels = check_inputs(scores, labels)
    chosen = find_measure(measure)
    if isinstance(chosen, TopPrecision):
        return Match(*chosen.exact(scores, labels))
    matcher = chosen.of(scores, labels)
    observed = torch.cat([matcher.statistic(block, torch.arange(scores.shape[1])) for block in _blocks(len(scores))])
    level = observed - _TOLERANCE * (1 + observed.abs())
    reached, larger = torch.ones_like(observed, dtype=torch.int32), torch.ones_like(observed, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for done in range(1, permutations + 1):
        largest = _permuted(matcher, torch.randperm(scores.shape[1], generator=generator), level, reached)
        larger += largest >= level
        tell(done)
    defined = ~observed.isnan()
    p, adjusted = ((count.double() / (1 + permutations)).where(defined, torch.nan) for count in (reached, larger))
    return Match(matcher.score(), p, adjusted)


def find_measure(measure: str | AnyMeasure) -> AnyMeasure:
    """A measure by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(measure, str):
        return measure
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}{did_you_mean(measure, MEASURES)}")
    return MEASURES[measure]


def _permuted(matcher: Matcher, order: Tensor, level: Tensor, reached: Tensor) -> float:
    """Counts, in place, which pairs reach their level in this permutation; the largest statistic of all pairs."""
    largest = -torch.inf
    for block in _blocks(len(level)):
        drawn = matcher.statistic(block, order)
        reached[block] += drawn >= level[block]
        largest = max(largest, float(drawn.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax()))
    return largest


def _blocks(units: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, units)) for start in range(0, units, BLOCK))
