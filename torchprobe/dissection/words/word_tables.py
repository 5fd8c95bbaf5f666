"""The tables of one layer: its units against words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from torchprobe.dissection.layer_tables import same
from torchprobe.dissection.sparse import Density
from torchprobe.dissection.summaries import first_best
from torchprobe.dissection.words.concepts import Concepts


@dataclass(frozen=True, slots=True)
class UnitWord:
    """A unit and the concept with its best score.

    ``unit`` counts from 0. ``index`` is the column of the concept, −1 if the measure is undefined for the unit; then ``concept`` and
    ``kind`` are empty and the numbers are None. ``p`` is for this pair alone, ``adjusted`` for all units and concepts together.
    """

    unit: int
    concept: str
    kind: str
    index: int
    score: float | None
    p: float | None
    adjusted: float | None


@dataclass(eq=False)
class WordTables:
    """The units U of one layer against concepts C, over N images.

    Attributes:
        layer: the name of the layer.
        concepts: the columns of the tables.
        images: the names of the images that were read.
        score: float64 (U, C), the measure; nan where it is undefined.
        p_values: float64 (U, C), for each pair alone.
        adjusted: float64 (U, C), for all pairs together: the probability that any unrelated pair does as well.
        top: the images with the highest activations: their positions in ``images``, int64 (U, k), and their activations, float32 (U, k); −1
            if there are fewer than k images. None if they were not kept.
        density: where the units are active, if they are those of a sparse autoencoder.
        scores: float32 (U, N), the activations, if they were kept; and with them ``labels``, float32 (N, C), the soft labels.
        metadata: model, images, labeler and settings, and the caveat of soft labels: plain values.
    """

    layer: str
    concepts: Concepts
    images: Sequence[str]
    score: Tensor
    p_values: Tensor
    adjusted: Tensor
    top: tuple[Tensor, Tensor] | None = None
    density: Density | None = None
    scores: Tensor | None = None
    labels: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Units, directions or latents."""
        return len(self.score)

    # -- units and concepts --------------------------------------------------------------------------------------------

    def best(self) -> list[UnitWord]:
        """The best concept of every unit: the most significant units first, of these those with the higher score. Of equal concepts the
        first."""
        score, index = first_best(self._defined())
        index = index.where(~self.score.isnan().all(1), -1)
        at = torch.arange(self.units), index.clamp(min=0)
        adjusted = self.adjusted[at].nan_to_num(nan=2.0)
        order = score.argsort(descending=True, stable=True)
        order = order[adjusted[order].argsort(stable=True)]
        columns = (index, self.score[at], self.p_values[at], self.adjusted[at])
        rows = []
        for unit, i, value, p, together in zip(order.tolist(), *(column[order].tolist() for column in columns), strict=True):
            if i < 0:
                rows.append(UnitWord(unit, "", "", -1, None, None, None))
            else:
                rows.append(UnitWord(unit, self.concepts.names[i], self.concepts.kinds[i], i, value, p, together))
        return rows

    def ranked(self, count: int) -> tuple[Tensor, Tensor]:
        """The scores and columns of the ``count`` best concepts of each unit, best first, (U, count); −inf where the measure is undefined.
        Of equal scores the first concept."""
        values, index = self._defined().sort(dim=1, descending=True, stable=True)
        return values[:, :count], index[:, :count]

    def _defined(self) -> Tensor:
        """The scores, with −∞ in place of nan."""
        return self.score.where(~self.score.isnan(), -torch.inf)

    def matched(self, alpha: float = 0.05) -> Tensor:
        """Which pairs of unit and concept agree more than by chance, bool (U, C): significant at ``alpha`` for all pairs together."""
        return self.adjusted <= alpha

    def units_of(self, concept: str, alpha: float = 0.05) -> list[int]:
        """The units that match a concept, best first; see :meth:`matched`.

        Raises:
            ValueError: no concept has this name.
        """
        if concept not in self.concepts.names:
            raise ValueError(f"{concept!r} is not one of the {len(self.concepts)} concepts")
        column = list(self.concepts.names).index(concept)
        units = self.matched(alpha)[:, column].nonzero().squeeze(1)
        return [int(unit) for unit in units[self.score[units, column].argsort(descending=True, stable=True)]]

    def named(self, alpha: float = 0.05) -> dict[str, list[int]]:
        """Concept → the units whose best concept it is, significantly; the concept with most units first."""
        found: dict[str, list[int]] = {}
        for row in self.best():
            if row.adjusted is not None and row.adjusted <= alpha:
                found.setdefault(row.concept, []).append(row.unit)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def rows(self) -> list[dict[str, Any]]:
        """:meth:`best` as dicts, with the density of each unit if it is known."""
        kept = [f.name for f in fields(UnitWord)]
        rows = [{name: getattr(row, name) for name in kept} for row in self.best()]
        if self.density is not None:
            shares = self.density.rows()
            rows = [{**row, **shares[row["unit"]]} for row in rows]
        return rows

    def summary(self, alpha: float = 0.05) -> dict[str, Any]:
        """The layer as plain numbers: ``matched_units`` have a best concept that is significant for all pairs together, and
        ``matched_concepts`` are those concepts; ``undefined_units`` have no score, since their activations are equal for all images."""
        named = self.named(alpha)
        found = {
            "layer": self.layer,
            "units": self.units,
            "images": len(self.images),
            "concepts": len(self.concepts),
            "alpha": alpha,
            "matched_units": sum(map(len, named.values())),
            "matched_concepts": len(named),
            "undefined_units": int(self.score.isnan().all(1).sum()),
            "best": self.rows()[:20],
            "metadata": self.metadata,
        }
        return found if self.density is None else {**found, "density": self.density.summary()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WordTables):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        measure = self.metadata.get("measure", {}).get("name", "")
        size = f"{self.units} units, {len(self.concepts)} concepts, {len(self.images)} images"
        return f"{type(self).__name__}({self.layer!r}: {size}, {measure})"
