"""The null of IoU: what a unit overlaps when the labels of the images are exchanged.

**The hypothesis.** The regions in which a unit is active have nothing to do with the labels of the same image: within each batch, every
assignment of the label maps to the images is equally probable. So the label maps of a batch are permuted, each as a whole with all its
labels and annotations, and everything is counted anew. Where units and labels tend to be in the picture, how large the regions are, and
which labels occur together stays as it is. So a unit that is active at the bottom of every picture is no detector of grass.

**The p-values** are those of a permutation test: valid for any number of permutations B, and at least 1 / (1 + B). B random permutations
stand for all of them, so a p-value has a standard error of √(p (1 − p) / B) about that of all permutations. For all pairs together, the
largest statistic of any tested pair is compared in each permutation (single-step maxT; Westfall & Young 1993). The statistic of a pair is
its excess IoU − chance, divided by the scale of its label: the largest excess of any unit for this label, mean over permutations. Without
the scale the rarest labels would decide for all, because a label of five images overlaps some unit by chance. The least scale is the
lower quartile of all labels. Chance and scale of a permutation are means over the others, so all permutations, and what was observed, are
treated alike. A pair needs an IoU of chance + margin, where the margin is a multiple of the scale of the label. Labels of fewer than
``minimum_positives`` images are not tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchprobe.dissection.batches import LabelBatch
from torchprobe.dissection.overlap import Counts, Overlap

MINIMUM_POSITIVES = 5
"""Images that show a label that is tested. The labels of Broden have twice as many at least."""

_COUNTS = ("intersection", "activation", "truth")
_EQUAL = 1e-12


class IoUNull(NamedTuple):
    """IoU against its null, for U units, L labels and B permutations.

    ``chance`` float64 (U, L): the mean IoU over the permutations. ``p`` float64 (U, L): the probability of at least this IoU, for each pair
    alone. ``adjusted`` float64 (U, L): the probability that any pair exceeds its chance by as much as this one does, in units of the scale
    of its label. ``scale`` float64 (L,): the largest excess over chance of any unit, mean over the permutations. All but ``chance`` are nan
    for labels that were not tested. ``largest`` float64 (B,): the largest excess of any pair in each permutation, in units of the scale.
    """

    chance: Tensor
    p: Tensor
    adjusted: Tensor
    scale: Tensor
    largest: Tensor

    def margin(self, alpha: float = 0.05) -> Tensor:
        """An IoU more than this above chance is significant at ``alpha`` among all pairs: float64 (L,). inf: too few permutations.

        ``chance + margin(alpha)`` is a threshold of IoU for each unit and label.

        >>> null = IoUNull(*torch.zeros(3, 1, 2), torch.tensor([0.01, 0.02]), torch.arange(19.0))
        >>> null.margin(0.05), null.margin(0.01)
        (tensor([0.1800, 0.3600]), tensor([inf, inf]))
        """
        allowed = math.floor(alpha * (1 + len(self.largest)) + 1e-9)  # of all, what was observed among them, may reach it
        if allowed < 1:
            return torch.full_like(self.scale, math.inf).where(~self.scale.isnan(), torch.nan)
        return self.scale * self.largest.sort(descending=True).values[allowed - 1]


class ShuffledOverlap:
    """Counts, as :class:`Overlap` does, how units overlap labels that were exchanged among the images of a batch, B times.

    It takes B times the time of :class:`Overlap`, and 8 · B · U · L bytes. Order and partition of the batches do not matter, but a batch
    must hold the same images in the same order: they are exchanged with one another. Images in random order give the most power; a batch in
    which all images show the same says nothing about it.

    Args:
        thresholds, category, categories, mode: see :class:`Overlap`.
        permutations: B.
        seed: of the permutations.

    >>> maps, plane = torch.tensor([[[[1.0]]], [[[0.0]]]] * 8), torch.ones(1, 1, dtype=torch.int64)
    >>> labels = LabelBatch.pack([[("object", plane)], [("object", plane * 0)]] * 8, [(1, 1)] * 16)
    >>> arguments = (torch.tensor([0.5]), torch.tensor([-1, 0]), 1)
    >>> observed, null = Overlap(*arguments), ShuffledOverlap(*arguments)
    >>> observed.update(maps, labels), null.update(maps, labels, ids=range(16))
    (None, None)
    >>> null.test(observed.counts(), minimum_positives=5).adjusted
    tensor([[   nan, 0.0100]], dtype=torch.float64)
    """

    def __init__(
        self, thresholds: Tensor, category: Tensor, categories: int, mode: str = "default", permutations: int = 99, seed: int = 0
    ) -> None:
        if permutations < 1:
            raise ValueError(f"permutations must be at least 1, got {permutations}")
        self.seed = seed
        self.drawn = [Overlap(thresholds, category, categories, mode) for _ in range(permutations)]
        self.shown = torch.zeros(len(category), dtype=torch.int64)

    def update(self, maps: Tensor, labels: LabelBatch, input_size: tuple[int, int] | None = None, ids: Sequence[int] = (0,)) -> None:
        """Adds a batch; arguments as for :meth:`Overlap.update`. ``ids``: of the images; the first and the seed choose the permutations.

        Raises:
            ValueError: the arguments do not fit together; nothing is added.
        """
        for overlap, order in zip(self.drawn, self.orders(len(labels.sizes), int(ids[0])), strict=True):
            overlap.update(maps, exchanged(labels, order), input_size)
        self.shown += images_with(labels, len(self.shown))

    def orders(self, images: int, first: int) -> Tensor:
        """The permutations of a batch: int64 (B, images); image i gets the labels of image ``orders[b, i]``."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + first) % 2**63)
        return torch.stack([torch.randperm(images, generator=generator) for _ in self.drawn])

    def test(self, observed: Counts, numbers: Tensor | None = None, minimum_positives: int = MINIMUM_POSITIVES) -> IoUNull:
        """The p-values of what was observed.

        Args:
            observed: the counts of the same images with their own labels.
            numbers: int64, the labels that the columns of ``observed`` stand for; default: all.
            minimum_positives: labels that fewer images show are not tested.
        """
        iou = observed.iou().cpu()
        columns = torch.arange(len(self.shown)) if numbers is None else numbers
        tested = (self.shown[columns] >= minimum_positives) & (columns > 0)
        total, reached = torch.zeros_like(iou), torch.ones_like(iou)
        for drawn in self._draws(columns):
            total += drawn
            reached += drawn >= iou
        draws = len(self.drawn)
        mean, others = (total + iou) / (1 + draws), (1 + draws) / draws  # (x − mean) · others is x − the mean of the others
        excess = (iou - mean) * others
        highest = torch.stack([_highest(excess), *(_highest((drawn - mean) * others) for drawn in self._draws(columns))])[:, tested]
        scale = (highest.sum(0) - highest) / draws
        scale = scale.clamp(min=_quartile(highest.mean(0)))
        largest = _ratio(highest, scale)[1:].amax(1) if bool(tested.any()) else torch.zeros(draws, dtype=torch.float64)
        own = torch.full((len(columns),), torch.nan, dtype=torch.float64)
        own[tested] = scale[0]
        below = torch.searchsorted(largest.sort().values, (_ratio(excess, own) - _EQUAL).contiguous())
        p, adjusted = (count.double() / (1 + draws) for count in (reached, 1 + draws - below))
        return IoUNull(total / draws, p.where(tested, torch.nan), adjusted.where(tested, torch.nan), own, largest)

    def _draws(self, columns: Tensor) -> Any:
        """The IoU of each permutation, one after the other, float64 (U, labels)."""
        return (Counts(*(part[..., columns.to(part.device)] for part in overlap.counts())).iou().cpu() for overlap in self.drawn)

    def merge(self, other: ShuffledOverlap) -> ShuffledOverlap:
        """Adds the counts of ``other``, which has seen other batches, in place; returns self.

        Raises:
            TypeError: ``other`` is not a :class:`ShuffledOverlap`.
            ValueError: thresholds, labels, mode, permutations or seed differ.
        """
        if not isinstance(other, ShuffledOverlap):
            raise TypeError(f"cannot merge ShuffledOverlap with {type(other).__name__}")
        self._require_same(other.seed, len(other.drawn))
        for mine, theirs in zip(self.drawn, other.drawn, strict=True):
            mine.merge(theirs)
        self.shown += other.shown
        return self

    def reset(self) -> None:
        """Forgets all images."""
        for overlap in self.drawn:
            overlap.reset()
        self.shown.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The counts of all permutations, stacked; and thresholds and categories, cloned."""
        state = self.drawn[0].state_dict()
        stacked = {name: torch.stack([getattr(overlap, name) for overlap in self.drawn]) for name in _COUNTS}
        return {**state, **stacked, "shown": self.shown.clone(), "seed": self.seed, "permutations": len(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`.

        Raises:
            ValueError: thresholds, labels, mode, permutations or seed differ, or the state is incomplete; nothing is changed.
        """
        if missing := sorted({*self.drawn[0].state_dict(), "shown", "seed", "permutations"} - state.keys()):
            raise ValueError(f"the saved permutations lack {', '.join(missing)}")
        self._require_same(state["seed"], state["permutations"])
        shown = state["shown"]
        if not isinstance(shown, Tensor) or shown.shape != self.shown.shape or shown.dtype != torch.int64:
            raise ValueError("shown of the saved permutations does not fit the labels")
        if wrong := [name for name in _COUNTS if len(state[name]) != len(self.drawn)]:
            raise ValueError(f"{wrong[0]} of the saved permutations has {len(state[wrong[0]])} parts, expected {len(self.drawn)}")
        for b, overlap in enumerate(self.drawn):  # all have the same shapes, so the first one refuses what does not fit
            overlap.load_state_dict({**state, **{name: state[name][b] for name in _COUNTS}})
        self.shown.copy_(shown)

    def _require_same(self, seed: Any, permutations: Any) -> None:
        if (seed, permutations) != (self.seed, len(self.drawn)):
            raise ValueError(
                f"the other permutations are {permutations} with seed {seed}, but this object has {len(self.drawn)} with seed {self.seed}"
            )

    def __repr__(self) -> str:
        return f"ShuffledOverlap({len(self.drawn)} permutations of {self.drawn[0]!r})"


def _highest(excess: Tensor) -> Tensor:
    """The highest of each label, (L,); 0 if none is above chance."""
    return torch.cat([excess, excess.new_zeros(1, excess.shape[1])]).amax(0)


def _quartile(values: Tensor) -> float:
    return float(values.quantile(0.25)) if len(values) else 0.0


def _ratio(excess: Tensor, scale: Tensor) -> Tensor:
    """Of an excess and its scale; 0 / 0 is 0."""
    return (excess / scale).where(excess != 0, 0)


def exchanged(labels: LabelBatch, order: Tensor) -> LabelBatch:
    """The labels of the same images in another order, each with where a map lies on its grid.

    >>> labels = LabelBatch.pack([[("a", [1, 2])], [("a", [3])]], [(1, 1), (2, 2)])
    >>> exchanged(labels, torch.tensor([1, 0])).whole
    tensor([3, 1, 2])
    """
    planes, whole = _parts(labels)
    chosen = order.tolist()
    return labels._replace(
        planes=torch.cat([labels.planes[:0], *(planes[i] for i in chosen)]),
        sizes=labels.sizes[order],
        whole=torch.cat([labels.whole[:0], *(whole[i] for i in chosen)]),
        boxes=None if labels.boxes is None else labels.boxes[order],
    )


def images_with(labels: LabelBatch, count: int) -> Tensor:
    """How many images show each label, int64 (count,); label 0, unlabeled, counts for none."""
    shown = torch.zeros(count, dtype=torch.int64)
    for planes, whole in zip(*_parts(labels), strict=True):
        seen = torch.bincount(planes.cpu().long(), minlength=count)
        seen.index_add_(0, whole.cpu()[whole.cpu() > 0], torch.ones_like(whole.cpu()[whole.cpu() > 0]))
        shown += seen > 0
    shown[0] = 0
    return shown


def _parts(labels: LabelBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Planes and whole-image labels of each image."""
    planes, rows, columns, whole = labels.sizes.unbind(1)
    return labels.planes.split((planes * rows * columns).tolist()), labels.whole.split(whole.tolist())
