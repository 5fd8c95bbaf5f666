"""Images ranked by the units of a layer, against the concepts they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchprobe.datasets.broden import Presence
from torchprobe.dissection.average_precision import Support, average_precision, concept_matrix, support
from torchprobe.dissection.nulls import Permutation, permutation_test
from torchprobe.statistics.top_inputs import ranked

_UNITS = 512  # units whose scores are copied at a time


def top_images(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids and scores (units, k) of the images with the highest scores; of equal scores the smaller id. With fewer than k images the rest is
    −1 and −inf. The same as in :class:`torchprobe.statistics.TopInputs`.

    Args:
        scores: (units, images), no nan.
        ids: int64 (images,), ascending.

    >>> top_images(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([4, 5, 6]), 2)
    (tensor([[5, 4]]), tensor([[2., 0.]]))
    """
    found_ids = torch.full((len(scores), k), -1)
    found = torch.full((len(scores), k), -torch.inf)
    count = min(k, scores.shape[1])
    for start in range(0, len(scores), _UNITS):
        part = scores[start : start + _UNITS].contiguous()
        index = part.topk(count, dim=1).indices
        # topk takes any of equal scores: where it left some out, sort.
        least = part.gather(1, index).amin(1, keepdim=True)
        unclear = ((part >= least).sum(1) > count).nonzero().flatten()
        index[unclear] = part[unclear].argsort(dim=1, descending=True, stable=True)[:, :count]
        values, order = ranked(part.gather(1, index), ids[index])
        found[start : start + _UNITS, :count], found_ids[start : start + _UNITS, :count] = values, order
    return found_ids, found


@dataclass(frozen=True, eq=False)
class Ranking:
    """Which image shows which concept, and the rules for average precision.

    ``crow`` int64 (images + 1,) and ``column`` int64 (entries,): the concepts of each image, as in a CSR matrix. ``annotated`` bool
    (images, categories): the image is annotated for the category, even if it shows no concept of it. ``category`` int64 (concepts,).
    ``sign`` and ``negatives``: see :func:`average_precision`.
    """

    crow: Tensor
    column: Tensor
    annotated: Tensor
    category: Tensor
    sign: str = "positive"
    negatives: str = "category"

    @classmethod
    def of(
        cls,
        presence: Presence,
        rows: Sequence[int],
        numbers: Sequence[int],
        category: Tensor,
        sign: str = "positive",
        negatives: str = "category",
        minimum_area: float = 0.0,
    ) -> Ranking:
        """From the labels of a data set.

        Args:
            presence: see :meth:`torchprobe.datasets.Broden.presence`.
            rows: the images, in the order of the scores.
            numbers: the label numbers, in the order of the concepts.
            category: int64 (concepts,).
            minimum_area: the share of an image that a concept must cover. Whether an image is annotated for a category does not depend
                on areas.

        >>> presence = Presence(torch.tensor([0, 2, 3]), torch.tensor([3, 7], dtype=torch.int32)[[0, 1, 1]], torch.tensor([0.1, 1.0, 0.5]))
        >>> Ranking.of(presence, [1, 0], [3, 7], torch.tensor([0, 1]), minimum_area=0.2).matrix().to_dense()
        tensor([[False,  True],
                [False,  True]])
        """
        chosen = presence.take(rows)
        image = torch.arange(len(chosen)).repeat_interleave(chosen.crow.diff())
        column_of = torch.full((max(numbers) + 1,), -1)
        column_of[torch.tensor(numbers)] = torch.arange(len(numbers))
        column = column_of[chosen.number.long()]
        annotated = torch.zeros(len(chosen), int(category.amax()) + 1, dtype=torch.bool)
        annotated[image, category[column]] = True
        if chosen.annotated is not None:
            annotated |= chosen.annotated[:, : annotated.shape[1]]
        large = chosen.area >= minimum_area
        counts = torch.bincount(image[large], minlength=len(chosen))
        return cls(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), column[large], annotated, category, sign, negatives)

    @property
    def images(self) -> int:
        return len(self.crow) - 1

    def matrix(self) -> Tensor:
        """``torch.sparse_csr`` bool (images, concepts)."""
        return concept_matrix(self.crow, self.column, len(self.category))

    def support(self) -> Support:
        """Among how many images each concept is ranked, and how many of them show it."""
        return support(self.matrix(), negatives=self.negatives, category=self.category, annotated=self.annotated)

    def average_precision(self, scores: Tensor) -> Tensor:
        """Scores (units, images) → float64 (units, concepts)."""
        matrix = self.matrix()
        parts = [
            average_precision(
                part.contiguous(), matrix, sign=self.sign, negatives=self.negatives, category=self.category, annotated=self.annotated
            )
            for part in scores.split(_UNITS)
        ]
        return torch.cat(parts)

    def permutation_test(self, scores: Tensor, permutations: int, seed: int) -> Permutation:
        """See :func:`torchprobe.dissection.permutation_test`."""
        return permutation_test(
            scores, self.matrix(), permutations=permutations, seed=seed,
            sign=self.sign, negatives=self.negatives, category=self.category, annotated=self.annotated,
        )  # fmt: skip

    def joined(self, other: Ranking) -> Ranking:
        """The images of both, first those of this one.

        Raises:
            ValueError: the rules or the concepts differ.
        """
        if (self.sign, self.negatives) != (other.sign, other.negatives) or not torch.equal(self.category, other.category):
            raise ValueError("the average precision of the two differs in concepts, sign or negatives")
        crow = torch.cat([self.crow, other.crow[1:] + self.crow[-1]])
        column, annotated = torch.cat([self.column, other.column]), torch.cat([self.annotated, other.annotated])
        return replace(self, crow=crow, column=column, annotated=annotated)
