"""Intersection over union of units and labels: counts of pixels over a whole data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchprobe.dissection.batches import LabelBatch
from torchprobe.ops.overlap import overlap_tally_
from torchprobe.statistics.saved import count_problem

MODES = ("default", "netdissect", "global")
MOST_PIXELS = 1 << 53
"""The most that a count can hold, since shares of counts are computed in float64."""


class Counts(NamedTuple):
    """Pixels over a whole data set, int64, for U units and labels 0 … L − 1. Label 0 means unlabeled and is always empty.

    ``intersection`` (U, L): the unit is active and the label is present. ``activation`` (U, L): the unit is active, in the images in which
    the label is compared. ``truth`` (L,): the label is present. −1: unknown, see :class:`torchprobe.dissection.result_file.ResultFile`.
    """

    intersection: Tensor
    activation: Tensor
    truth: Tensor

    def iou(self) -> Tensor:
        """Intersection over union, float64 (U, L); 0 without activation and label, nan for unknown counts.

        >>> Counts(torch.tensor([[2]]), torch.tensor([[4]]), torch.tensor([6])).iou()
        tensor([[0.2500]], dtype=torch.float64)
        """
        union = self.activation + self.truth - self.intersection
        return (self.intersection.double() / union.clamp(min=1)).where(self.intersection >= 0, torch.nan)


class Overlap:
    """Counts, over the images of a data set, how the activated region of each unit overlaps each label. Exact, and mergeable.

    The map of a unit is resized to the label grid of an image. The unit is active where the map exceeds the unit's threshold; for the exact
    definition see :func:`torchprobe.ops.overlap_tally_`. A label is compared with the activation only in images annotated for
    its category; in other images we do not know whether the label is there. As in the original, a label belongs to its *primary* category.
    An image is annotated for the primary categories of the labels that it shows, and for those that :attr:`LabelBatch.whole` names.

    Args:
        thresholds: (units,), the level that an active pixel exceeds; rounded to float32. The maps must be on the same device.
        category: int64 (labels,), the primary category of each label, 0 … categories − 1; negative for none. The entry of label 0 is
            ignored.
        categories: the number of categories.
        mode: "default"; "netdissect", the grid of the original (Bau et al., Network Dissection, CVPR 2017), where a label that several
            planes give to one pixel counts several times; "global", which counts activation over all images, annotated or not.

    The state: ``intersection`` (U, L), ``activation`` (U, categories + 1; the last column counts all images), ``truth`` (L,), ``images``.

    >>> overlap = Overlap(torch.tensor([0.5]), torch.tensor([-1, 0, 1]), categories=2)
    >>> labels = LabelBatch.pack([[("object", torch.tensor([[1, 1], [0, 0]]))]], [(2, 2)])
    >>> overlap.update(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]), labels)
    >>> overlap.counts().iou()
    tensor([[0.0000, 0.3333, 0.0000]], dtype=torch.float64)
    """

    def __init__(self, thresholds: Tensor, category: Tensor, categories: int, mode: str = "default") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if thresholds.dim() != 1 or category.dim() != 1 or category.is_floating_point() or len(category) == 0:
            shapes = f"{tuple(thresholds.shape)} and {category.dtype} {tuple(category.shape)}"
            raise ValueError(f"thresholds must be (units,) and category integers (labels,), got {shapes}")
        if int(category.amax()) >= categories:
            raise ValueError(f"category holds {int(category.amax())}, but there are {categories} categories")
        self.thresholds = thresholds.detach().to(torch.float32, copy=True)
        self.category = category.detach().to("cpu", torch.int64, copy=True).clamp(min=-1)
        self.category[0] = -1
        self.categories = int(categories)
        self.mode = mode
        units, labels, device = len(thresholds), len(category), thresholds.device
        self.intersection = torch.zeros(units, labels, dtype=torch.int64, device=device)
        self.activation = torch.zeros(units, categories + 1, dtype=torch.int64, device=device)
        self.truth = torch.zeros(labels, dtype=torch.int64, device=device)
        self.images = 0

    def update(self, maps: Tensor, labels: LabelBatch, input_size: tuple[int, int] | None = None) -> None:
        """Adds a batch of images.

        Args:
            maps: (images, units, h, w), any floating-point type.
            labels: of the same images, in the same order.
            input_size: height and width of the network's input; only "netdissect" needs it.

        Raises:
            ValueError: the arguments do not fit together; nothing is added.
        """
        anchored = self.mode == "netdissect"
        if anchored and input_size is None:
            raise ValueError('mode="netdissect" needs input_size, the height and width of the network\'s input')
        height, width = input_size if anchored and input_size is not None else (0, 0)
        overlap_tally_(
            self.intersection, self.activation, self.truth, maps, self.thresholds, self.category, labels.planes, labels.sizes, labels.whole,
            "anchored" if anchored else "half_pixel", height, width, per_plane=anchored, boxes=labels.boxes,
        )  # fmt: skip
        self.images += maps.shape[0]

    def counts(self) -> Counts:
        """The counts so far, with the activation of each label restricted to the images in which it is compared."""
        category = self.category.to(self.activation.device)
        column = torch.full_like(category, self.categories) if self.mode == "global" else category.clamp(min=0)
        known = torch.ones_like(category, dtype=torch.bool) if self.mode == "global" else category >= 0
        return Counts(self.intersection.clone(), self.activation[:, column] * known, self.truth.clone())

    def merge(self, other: Overlap) -> Overlap:
        """Adds the counts of ``other`` in place; returns self. Order and partition of the images do not matter.

        Raises:
            TypeError: ``other`` is not an :class:`Overlap`.
            ValueError: thresholds, labels or mode differ.
        """
        if not isinstance(other, Overlap):
            raise TypeError(f"cannot merge Overlap with {type(other).__name__}")
        self._require_same(other.state_dict())
        for name in ("intersection", "activation", "truth"):
            getattr(self, name).add_(getattr(other, name).to(self.truth.device))
        self.images += other.images
        return self

    def reset(self) -> None:
        """Forgets all images."""
        for part in (self.intersection, self.activation, self.truth):
            part.zero_()
        self.images = 0

    def state_dict(self) -> dict[str, Any]:
        """Counts, thresholds and categories, cloned."""
        parts = ("intersection", "activation", "truth", "thresholds", "category")
        return {name: getattr(self, name).clone() for name in parts} | {
            "categories": self.categories,
            "mode": self.mode,
            "images": self.images,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`.

        Raises:
            ValueError: thresholds, labels or mode differ, or the state is incomplete; nothing is changed.
        """
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"the saved counts lack {', '.join(missing)}")
        self._require_same(state)
        for name in ("intersection", "activation", "truth"):
            if state[name].shape != getattr(self, name).shape or state[name].dtype != torch.int64:
                raise ValueError(f"{name} of the saved counts is {state[name].dtype} of shape {tuple(state[name].shape)}")
        most = {"truth": MOST_PIXELS, "activation": MOST_PIXELS, "intersection": state["truth"]}
        for name, limit in most.items():
            if problem := count_problem(name, state[name], limit):
                raise ValueError(f"{name} of the saved counts {problem[1]}")
        for name in ("intersection", "activation", "truth"):
            getattr(self, name).copy_(state[name])
        self.images = int(state["images"])

    def _require_same(self, state: Mapping[str, Any]) -> None:
        """Counts that differ in one of these cannot be added."""
        for name in ("mode", "categories"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the other counts have {name}={state[name]!r}, but this object has {name}={getattr(self, name)!r}")
        for name in ("thresholds", "category"):
            mine, others = getattr(self, name), state[name].to(getattr(self, name).device)
            if mine.shape != others.shape or not torch.equal(mine.nan_to_num(), others.nan_to_num()):
                raise ValueError(f"the other counts have other {name}: of shape {tuple(others.shape)}, here {tuple(mine.shape)}")

    def __repr__(self) -> str:
        units, labels = self.intersection.shape
        return f"Overlap({units} units, {labels - 1} labels in {self.categories} categories, mode={self.mode!r}, {self.images} images)"
