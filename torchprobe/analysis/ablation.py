"""What becomes of the accuracy when some features are taken out, against equally many others at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.blocks import blocks, representations
from torchprobe.analysis.directions import feature_indices
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.heads import HeadLike
from torchprobe.analysis.intervals import band
from torchprobe.analysis.outliers import OutlierFeatures

Features = Tensor | Sequence[int] | OutlierFeatures
"""Indices of features, each once, or what :func:`torchprobe.analysis.outliers.outlier_features` found."""

HOW = ("mean", "zero")


@dataclass(frozen=True)
class Ablation:
    """Accuracies, as shares of the images.

    Attributes:
        accuracy: with all features.
        ablated: without those in question.
        random: without equally many others, float64 (repeats,).
        random_mean: over the repeats.
        random_band: the 95 % band of the repeats, from the 2.5 to the 97.5 % quantile.
        features: those in question, int64 (k,).
        how: what took their place, "mean" or "zero".
        n: images evaluated.
    """

    accuracy: float
    ablated: float
    random: Tensor
    random_mean: float
    random_band: tuple[float, float]
    features: Tensor
    how: str
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {**vars(self), "random": self.random.tolist(), "random_band": list(self.random_band), "features": self.features.tolist()}


def ablate(h: Tensor, features: Features, how: str = "zero", reference: Tensor | Embeddings | None = None) -> Tensor:
    """The representations with some features replaced, as a copy (n, d) of the same type.

    Args:
        h: (n, d).
        features: which.
        how: "zero", or "mean": the mean of the feature over the vectors of ``reference`` without nan or inf. Features that are large in
            every image alike are far from zero, so zero also moves the representation to where it never is.
        reference: where the mean is taken, best of other images; default: ``h`` itself.

    Raises:
        ValueError: h is not (n, d), features it does not have, another word, or a reference of another width or without a vector to take
            the mean of.

    >>> ablate(torch.tensor([[1.0, 5.0], [2.0, 7.0]]), [1], how="mean")
    tensor([[1., 6.],
            [2., 6.]])
    """
    whole = representations(h)
    index = feature_indices(features, whole.shape[1])
    return _replaced(whole, index, _values(whole, index, how, reference))


def ablation(
    head: HeadLike,
    embeddings: Embeddings,
    features: Features,
    how: str = "mean",
    repeats: int = 20,
    seed: int = 0,
    reference: Tensor | Embeddings | None = None,
    classes: Iterable[int] | None = None,
) -> Ablation:
    """Does the head need these features more than others? Accuracy without them, and without equally many random other ones.

    Where the head normalises, it does so after the ablation.

    Args:
        head: a linear layer or its weight.
        embeddings: labelled.
        features: which; none is allowed, and changes nothing.
        how, reference: as in :func:`ablate`; the same for the random ones.
        repeats: draws of other features, without replacement within a draw.
        seed: of the draws.
        classes: the rows of the head to choose from, as in :func:`torchprobe.analysis.evaluate`.

    Raises:
        ValueError: ``repeats`` below 1, fewer other features than there are to draw, and whatever :func:`ablate` and ``evaluate`` refuse.

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
        raise ValueError(f"there are {len(others)} features beside the {len(index)} to ablate, too few to draw as many")
    means = _values(embeddings.h, torch.arange(d), how, reference)

    def accuracy(some: Tensor) -> float:
        h = _replaced(embeddings.h, some, means[some])
        less = Embeddings(h, embeddings.y, embeddings.ids, classes=embeddings.classes, groups=embeddings.groups)
        return evaluate(head, less, classes).accuracy

    whole = evaluate(head, embeddings, classes)
    generator = torch.Generator().manual_seed(seed)
    draws = [others[torch.randperm(len(others), generator=generator)[: len(index)]] for _ in range(repeats)]
    random = torch.tensor([accuracy(draw) for draw in draws], dtype=torch.float64)
    low, high = band(random.numpy())
    return Ablation(
        accuracy=whole.accuracy,
        ablated=accuracy(index),
        random=random,
        random_mean=float(random.mean()),
        random_band=(float(low), float(high)),
        features=index,
        how=how,
        n=whole.n,
    )


def _values(h: Tensor, index: Tensor, how: str, reference: Tensor | Embeddings | None) -> Tensor:
    """What takes the place of some features, float64 (k,)."""
    if how not in HOW:
        raise ValueError(f'features are replaced by their "mean" or by "zero", got {how!r}')
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
        raise ValueError(f"no vector to take the mean of: of the {len(source)} of the reference none is without nan or inf")
    return total / max(1, count)


def _replaced(h: Tensor, index: Tensor, values: Tensor) -> Tensor:
    h = h.clone()
    h[:, index.to(h.device)] = values.to(h)
    return h
