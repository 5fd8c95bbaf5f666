"""The accuracy without some features, compared with the accuracy without equally many random other features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.directions import feature_indices
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.inputs import HeadLike, Vectors, blocks, representations
from torchprobe.analysis.outliers import OutlierFeatures
from torchprobe.analysis.resampling import DRAWS, band

Features = Tensor | Sequence[int] | OutlierFeatures
"""Indices of features, each once, or the result of :func:`torchprobe.analysis.outlier_features`."""

HOW = ("mean", "zero")


@dataclass(frozen=True)
class Ablation:
    """Accuracies, as shares of the images.

    Attributes:
        accuracy: with all features.
        ablated: without the given features.
        random: without equally many random other features, float64 (repeats,).
        random_mean: mean of ``random``.
        random_band: the range of ``random`` that holds one more draw with the probability ``random_level``; see
            :func:`torchprobe.analysis.resampling.band`.
        random_level: 95 % for 39 draws or more, less for fewer.
        features: the given features, int64 (k,).
        how: what replaced them, "mean" or "zero".
        n: number of images evaluated.
    """

    accuracy: float
    ablated: float
    random: Tensor
    random_mean: float
    random_band: tuple[float, float]
    random_level: float
    features: Tensor
    how: str
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {**vars(self), "random": self.random.tolist(), "random_band": list(self.random_band), "features": self.features.tolist()}


def ablate(h: Vectors, features: Features, how: str = "zero", reference: Vectors | None = None) -> Tensor:
    """A copy (n, d) of the representations, of the same type, with some features replaced.

    Args:
        h: (n, d).
        features: the features to replace.
        how: "zero", or "mean": the mean of the feature over the vectors of ``reference`` without nan or inf. Features that are large in
            every image are far from zero. For them, zero also moves the representation to a place where it never lies.
        reference: the mean is taken over these, preferably of other images; default: ``h`` itself.

    Raises:
        ValueError: h is not (n, d) or does not have the features; ``how`` is another word; ``reference`` has another width, or no
            finite vector.

    >>> ablate(torch.tensor([[1.0, 5.0], [2.0, 7.0]]), [1], how="mean")
    tensor([[1., 6.],
            [2., 6.]])
    """
    whole = representations(h)
    index = feature_indices(features, whole.shape[1])
    return _replaced(whole, index, _replacements(whole, index, how, reference))


def ablation(
    head: HeadLike,
    embeddings: Embeddings,
    features: Features,
    how: str = "mean",
    repeats: int = DRAWS,
    seed: int = 0,
    reference: Vectors | None = None,
    classes: Iterable[int] | None = None,
) -> Ablation:
    """Does the head need these features more than others? Accuracy without them, and without equally many random other features.

    A head that normalizes does so after the ablation.

    Args:
        head: a linear layer or its weight.
        embeddings: with labels.
        features: the features to ablate. An empty list is allowed and changes nothing.
        how, reference: as in :func:`ablate`; the random features are replaced in the same way.
        repeats: number of draws of other features, without replacement within a draw.
        seed: of the draws.
        classes: the rows of the head to choose from, as in :func:`torchprobe.analysis.evaluate`.

    Raises:
        ValueError: ``repeats`` is below 1, there are too few other features to draw from, or as :func:`ablate` and ``evaluate``.

    >>> h = torch.eye(4).repeat(5, 1)
    >>> e = Embeddings(h, torch.arange(4).repeat(5), [str(i) for i in range(20)])
    >>> found = ablation(torch.eye(4), e, [3], how="zero")
    >>> found.accuracy, found.ablated
    (1.0, 0.75)
    """
    d = embeddings.features
    index = feature_indices(features, d)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    others = torch.ones(d, dtype=torch.bool).index_fill(0, index, False).nonzero().flatten()
    if len(others) < len(index):
        raise ValueError(f"there are only {len(others)} features other than the {len(index)} to ablate, too few to draw as many at random")
    replacements = _replacements(embeddings.h, torch.arange(d), how, reference)

    def accuracy(some: Tensor) -> float:
        h = _replaced(embeddings.h, some, replacements[some])
        without = Embeddings(h, embeddings.y, embeddings.ids, classes=embeddings.classes, groups=embeddings.groups)
        return evaluate(head, without, classes).accuracy

    whole = evaluate(head, embeddings, classes)
    generator = torch.Generator().manual_seed(seed)
    draws = [others[torch.randperm(len(others), generator=generator)[: len(index)]] for _ in range(repeats)]
    random = torch.tensor([accuracy(draw) for draw in draws], dtype=torch.float64)
    low, high, level = band(random.numpy())
    return Ablation(
        accuracy=whole.accuracy,
        ablated=accuracy(index),
        random=random,
        random_mean=float(random.mean()),
        random_band=(float(low), float(high)),
        random_level=level,
        features=index,
        how=how,
        n=whole.n,
    )


def _replacements(h: Tensor, index: Tensor, how: str, reference: Vectors | None) -> Tensor:
    """The values that replace some features, float64 (k,)."""
    if how not in HOW:
        raise ValueError(f'features are replaced by their "mean" or by "zero", got how={how!r}')
    if how == "zero":
        return torch.zeros(len(index), dtype=torch.float64)
    source = h if reference is None else representations(reference)
    if source.shape[1] != h.shape[1]:
        raise ValueError(f"the reference has {source.shape[1]} features, the representations have {h.shape[1]}")
    total, count = torch.zeros(len(index), dtype=torch.float64), 0
    for block in blocks(source):
        finite = block[block.isfinite().all(1)].cpu()
        total += finite[:, index].sum(0)
        count += len(finite)
    if not count and len(index):
        raise ValueError(f"no vector to take the mean of: of the {len(source)} vectors of the reference, none is finite")
    return total / max(1, count)


def _replaced(h: Tensor, index: Tensor, replacements: Tensor) -> Tensor:
    h = h.clone()
    h[:, index.to(h.device)] = replacements.to(h)
    return h
