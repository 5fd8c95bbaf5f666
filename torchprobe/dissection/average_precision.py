"""Units as detectors of concepts: the average precision of their ranking of images, its inputs, and the prevalence to compare it with."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.ops import average_precision as _operator
from torchprobe.ops.average_precision import MOST_CONCEPTS, MOST_GROUPS

SIGNS = ("positive", "negative", "both")
NEGATIVES = ("all", "category")


def average_precision(
    scores: Tensor,
    labels: Tensor,
    *,
    sign: str = "positive",
    negatives: str = "all",
    category: Tensor | None = None,
    annotated: Tensor | None = None,
) -> Tensor:
    """How well the score of each unit ranks the images that show a concept before the other images.

    AP = Σ (R_n − R_{n−1}) P_n with images of equal score as one step, as in ``sklearn.metrics.average_precision_score``. Each unit is
    sorted once for all concepts.

    Args:
        scores: (units, images), floating point; one number for each image, see :func:`pool`. No nan.
        labels: (images, concepts), dense bool or ``torch.sparse_csr``: the image shows the concept.
        sign: "positive": a unit detects by high scores; "negative": by low scores; "both": the better of the two, for directions whose sign
            has no meaning.
        negatives: "all": a concept is ranked among all images. "category": only among images annotated for its category; in the other
            images it is unknown whether the concept is absent.
        category: for "category": int (concepts,), the category of each concept.
        annotated: for "category": bool (images, categories). By default an image is annotated for a category when it shows some concept of
            it. A concept in an image that is not annotated for it is left out.

    Returns:
        float64 (units, concepts); nan for a concept that no image shows.

    Raises:
        ValueError: nan among the scores, arguments that do not fit, more than 2²² concepts or 2²⁰ categories; the message says which.

    >>> scores = torch.tensor([[0.9, 0.1, 0.8, 0.0]])
    >>> labels = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    >>> average_precision(scores, labels)
    tensor([[1.0000, 0.3333]], dtype=torch.float64)
    >>> average_precision(scores, labels, negatives="category", category=torch.tensor([0, 1]))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    crow, col, concepts = rows_of(labels, scores)
    eligible, group = None, None
    if (eligibility := _eligibility(labels, negatives, category, annotated)) is not None:
        eligible, group = eligibility
    if sign == "negative":
        scores = -scores
    result = _operator(scores.detach(), crow, col, concepts, eligible, group, sign == "both")
    return result.amax(0) if sign == "both" else result


class Support(NamedTuple):
    """Among which images a concept is ranked: ``images`` and ``positives`` int64 (concepts,); −1: unknown."""

    images: Tensor
    positives: Tensor

    @property
    def prevalence(self) -> Tensor:
        """positives / images, float64: about the average precision of a random ranking; nan for 0 images."""
        return (self.positives.double() / self.images).where(self.images > 0, torch.nan)


def support(labels: Tensor, *, negatives: str = "all", category: Tensor | None = None, annotated: Tensor | None = None) -> Support:
    """How many images each concept is ranked among, and how many of them show it; arguments as in :func:`average_precision`.

    >>> support(torch.tensor([[True, False], [False, True], [True, False]])).prevalence
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    crow, col, concepts = rows_of(labels)
    images = len(crow) - 1
    eligibility = _eligibility(labels, negatives, category, annotated)
    if eligibility is None:
        return Support(torch.full((concepts,), images, device=col.device), torch.bincount(col, minlength=concepts))
    eligible, group = eligibility
    image = torch.arange(images, device=col.device).repeat_interleave(crow.diff())
    counted = col[eligible[image, group[col]]]
    return Support(eligible.sum(0)[group], torch.bincount(counted, minlength=concepts))


def gain(ap: Tensor, prevalence: Tensor) -> Tensor:
    """(AP − π) / (1 − π): 0 for a random ranking, 1 for a perfect ranking, nan for a concept that all images show.

    >>> gain(torch.tensor([0.985, 1.0]), torch.tensor([0.985, 0.5]))
    tensor([0., 1.])
    """
    return (ap - prevalence) / (1 - prevalence).where(prevalence < 1, torch.nan)


def pool(maps: Tensor, how: str = "max") -> Tensor:
    """One score for each image and unit from maps (images, units, h, w): the largest value or the mean; (images, units).

    >>> pool(torch.tensor([[[[1.0, 3.0]]]]), "mean")
    tensor([[2.]])
    """
    if how not in ("max", "mean"):
        raise ValueError(f'a map becomes a score by "max" or "mean", got {how!r}')
    if maps.dim() < 3 or maps[0:1, 0:1].numel() == 0:
        raise ValueError(f"maps of shape {tuple(maps.shape)} have no positions to pool")
    positions = maps.flatten(2)
    return positions.amax(2) if how == "max" else positions.mean(2, dtype=torch.promote_types(maps.dtype, torch.float32))


def pooled(x: Tensor, how: str) -> Tensor:
    """One score for each image and unit, (images, units): :func:`pool` of maps or tokens (images, units, …); vectors stay as they are.

    >>> pooled(torch.tensor([[[1.0, 3.0]]]), "mean"), pooled(torch.ones(1, 2), "max")
    (tensor([[2.]]), tensor([[1., 1.]]))
    """
    return x if x.dim() == 2 else pool(x, how)


def concept_matrix(crow: Tensor, number: Tensor, concepts: int, area: Tensor | None = None, minimum_area: float = 0.0) -> Tensor:
    """Labels of images as ``torch.sparse_csr`` bool (images, concepts), for :func:`average_precision`.

    Args:
        crow: int64 (images + 1,), image i has the entries crow[i] … crow[i + 1], as :class:`torchprobe.datasets.broden.Presence`.
        number: (entries,), the concept of each entry.
        concepts: the number of concepts, including number 0 (unlabeled).
        area: (entries,), the share of the image that the concept covers.
        minimum_area: the smallest share with which an image counts as showing the concept.

    >>> concept_matrix(torch.tensor([0, 2, 3]), torch.tensor([1, 2, 2]), 3, torch.tensor([0.5, 0.01, 1.0]), minimum_area=0.1).to_dense()
    tensor([[False,  True, False],
            [False, False,  True]])
    """
    kept = torch.ones(len(number), dtype=torch.bool, device=number.device) if area is None else area >= minimum_area
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    size = (len(crow) - 1, concepts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(before[crow.long()], number[kept].long(), kept[kept], size, check_invariants=True)


def rows_of(labels: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """crow, col and number of concepts of a label matrix, dense bool or sparse CSR; stored zeros do not count.

    Raises:
        ValueError: it is neither of the two, has another number of images than the scores, or more concepts than the operator takes.
    """
    if labels.dim() != 2 or (labels.layout == torch.strided and labels.dtype != torch.bool):
        raise ValueError(f"labels must be (images, concepts), bool or sparse CSR; got {labels.dtype} of shape {tuple(labels.shape)}")
    images, concepts = labels.shape
    if concepts > MOST_CONCEPTS:  # a sparse matrix may name any number; what follows takes memory for each
        raise ValueError(f"labels have {concepts} concepts, more than {MOST_CONCEPTS}")
    if scores is not None and (scores.dim() != 2 or scores.shape[1] != images):
        raise ValueError(f"scores of shape {tuple(scores.shape)} do not fit labels of {images} images: expected (units, {images})")
    if labels.layout == torch.sparse_csr:
        crow, col, stored = labels.crow_indices(), labels.col_indices(), labels.values() != 0
        if bool(stored.all()):
            return crow, col, concepts
        before = torch.cat([crow.new_zeros(1), stored.cumsum(0, dtype=crow.dtype)])
        return before[crow.long()], col[stored], concepts
    if labels.layout != torch.strided:
        raise ValueError(f"labels must be dense or sparse CSR, got {labels.layout}: call .to_sparse_csr()")
    rows, col = labels.nonzero(as_tuple=True)
    return torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=images).cumsum(0)]), col, concepts


def _eligibility(labels: Tensor, negatives: str, category: Tensor | None, annotated: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Which images count for which category, and the category of each concept; None when all count."""
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}")
    if negatives == "all":
        return None
    images, concepts = labels.shape
    if category is None or tuple(category.shape) != (concepts,) or category.is_floating_point():
        given = "none" if category is None else f"{category.dtype} of shape {tuple(category.shape)}"
        raise ValueError(f'negatives="category" needs the category of each concept, integers of shape ({concepts},); got {given}')
    # A concept without a category is annotated nowhere: it gets an extra column, which stays empty.
    last = int(category.amax()) + 1 if concepts else 0
    last = last if annotated is None else max(last, annotated.shape[1])
    if last >= MOST_GROUPS:
        raise ValueError(f"categories are numbered up to {last - 1}, but there can be {MOST_GROUPS - 1}: number them 0, 1, 2, …")
    group = category.to(labels.device, torch.int64).where(category.to(labels.device) >= 0, last)
    eligible = torch.zeros(images, last + 1, dtype=torch.bool, device=labels.device)
    if annotated is not None:
        if annotated.dtype != torch.bool or annotated.dim() != 2 or annotated.shape[0] != images:
            raise ValueError(f"annotated must be bool ({images}, categories), got {annotated.dtype} of shape {tuple(annotated.shape)}")
        eligible[:, : annotated.shape[1]] = annotated.to(labels.device)
    else:
        crow, col, _ = rows_of(labels)
        eligible[torch.arange(images, device=labels.device).repeat_interleave(crow.diff()), group[col]] = True
        eligible[:, last] = False
    return eligible, group
