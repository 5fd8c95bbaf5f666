"""The tables of one layer: its units against the labels of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from torchprobe.datasets.broden import Label
from torchprobe.dissection import activity, nulls
from torchprobe.dissection.average_precision import Support, gain
from torchprobe.dissection.iou_null import IoUNull
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking
from torchprobe.dissection.sparse import Density

SCORES = ("iou", "ap")
"""What a dissection computes."""

TABLES = (*SCORES, "gain")
"""The tables by which units can be ordered; gain follows from ap."""


@dataclass
class LayerTables:
    """The units (or directions) U of one layer against the labels L of a data set: the tables themselves.

    Attributes:
        layer: the name of the layer.
        units: the number of units.
        labels: ``labels[i]`` is the label of column i in every table.
        categories: names, in the order of the data set.
        category: int64 (L,), the primary category of each label.
        images: int64 (N,), the rows of the data set that were read.
        thresholds: float32 (U,), the level that an active pixel exceeds, or None.
        level: where the thresholds lie among the values of the units, or None; None too for given thresholds.
        counts: pixels, see :class:`Counts`, or None.
        outside: int64 (L,), pixels of label maps that the network was not shown: they are in no other number. None: unknown.
        iou_null: IoU against its null, see :class:`IoUNull`, or None.
        average_precision: float64 (U, L), nan for a label that no image shows, or None.
        support: among how many images each label was ranked, and how many of them show it, or None.
        p_values: float64 (U, L), of average precision, for each pair alone; see :meth:`adjusted_p_values`.
        top: the images with the highest scores: their rows in the data set, int64 (U, k), and their scores, float32 (U, k); −1 if there are
            fewer than k images. None if they were not kept.
        density: how often the units are active, if they are the latents of an encoder, or None.
        top_maps: the maps of the units on their top images, float32 (U, k, h, w), and where they lie on the pictures, float64 (U, k, 4),
            as in :class:`torchprobe.dissection.top_maps.TopMaps`. None if they were not kept.
        scores: float32 (U, N) if they were kept, else None; and with them ``ranking``.
        metadata: model, data set and settings: plain values. ``threshold_error``: by how much the share of values above a threshold may be
            off, the largest standard deviation over units (:meth:`torchprobe.statistics.Quantile.error`). It is 0 for exact thresholds and
            None for given ones.
    """

    layer: str
    labels: Sequence[Label]
    categories: Sequence[str]
    category: Tensor
    units: int
    images: Tensor
    thresholds: Tensor | None = None
    level: activity.Level | None = None
    counts: Counts | None = None
    outside: Tensor | None = None
    iou_null: IoUNull | None = None
    average_precision: Tensor | None = None
    support: Support | None = None
    p_values: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    density: Density | None = None
    top_maps: tuple[Tensor, Tensor] | None = None
    scores: Tensor | None = None
    ranking: Ranking | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def rank(self, ranking: Ranking, scores: Tensor, keep: bool = False) -> None:
        """Computes average precision, support and p-values from scores (U, N); ``keep``: keeps the scores too."""
        self.average_precision, self.support = ranking.average_precision(scores), ranking.support()
        self.p_values = nulls.p_values(self.average_precision, self.support)
        self.scores, self.ranking = (scores, ranking) if keep else (None, None)

    # -- tables --------------------------------------------------------------------------------------------------------

    @property
    def iou(self) -> Tensor | None:
        """Intersection over union, float64 (U, L), or None."""
        return None if self.counts is None else self.counts.iou()

    @property
    def prevalence(self) -> Tensor | None:
        """Share of the ranked images that show each label, float64 (L,): about the average precision of a random ranking."""
        return None if self.support is None else self.support.prevalence

    @property
    def gain(self) -> Tensor | None:
        """(AP − π) / (1 − π) with the prevalence π, float64 (U, L): 0 for a random ranking, 1 for a perfect one."""
        if self.average_precision is None or self.prevalence is None:
            return None
        return gain(self.average_precision, self.prevalence)

    def table(self, score: str) -> Tensor:
        """The table of a score, (U, L).

        Args:
            score: "iou", "ap" or "gain".

        Raises:
            ValueError: it was not computed; the message says how to get it.
        """
        if score not in TABLES:
            raise ValueError(f"score must be one of {', '.join(TABLES)}, got {score!r}")
        table = {"iou": self.iou, "ap": self.average_precision, "gain": self.gain}[score]
        if table is None:
            needed = "iou" if score == "iou" else "ap"
            raise ValueError(f'layer {self.layer!r} was dissected without this score; it needs dissect(…, score="{needed}")')
        return table

    def adjusted_p_values(self, method: str = "holm") -> Tensor:
        """p-values corrected for all pairs, and for both signs if both were tried; see :func:`correct`.

        Raises:
            ValueError: average precision was not computed.
        """
        self.table("ap")
        assert self.p_values is not None
        return nulls.correct(self.p_values, method, 2 if self.metadata.get("sign") == "both" else 1)

    @property
    def never_active(self) -> Tensor | None:
        """The units without an active pixel in any image that counts, bool (U,), or None if IoU was not computed."""
        return None if self.counts is None else activity.never_active(self.counts)

    def silence(self) -> list[str]:
        """Why each unit is never active, "" for a unit that is; see :func:`torchprobe.dissection.activity.causes`. Empty without IoU."""
        never = self.never_active
        return [] if never is None else activity.causes(never, self.level, self.quantile)

    @property
    def quantile(self) -> Fraction:
        """The share of its values that the threshold of a unit was to leave active."""
        return Fraction(str(self.metadata.get("quantile", "0.005")))

    def __repr__(self) -> str:
        found = [name for name in ("counts", "average_precision", "top", "scores") if getattr(self, name) is not None]
        size = f"{self.units} units, {len(self.labels)} labels, {len(self.images)} images"
        return f"{type(self).__name__}({self.layer!r}: {size}, {', '.join(found)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerTables) or type(other) is not type(self):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


def same(a: Any, b: Any) -> bool:
    """Equal, tensors by value; nan equals nan."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
    if isinstance(a, Ranking) and isinstance(b, Ranking):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
