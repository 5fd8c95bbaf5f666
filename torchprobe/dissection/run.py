"""The stages of a dissection: two passes over the images, then the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.progress import Clock, ProgressCallback
from torchprobe.common.ranks import Ranks
from torchprobe.datasets.broden import Presence
from torchprobe.dissection.average_precision import NEGATIVES, SIGNS
from torchprobe.dissection.batches import Batches
from torchprobe.dissection.dissection import Dissection
from torchprobe.dissection.overlap import MODES, Counts, Overlap
from torchprobe.dissection.ranking import Ranking, pooled, top_images
from torchprobe.dissection.taps import POSITIONS, Site, Taps
from torchprobe.dissection.walk import Checkpoint, Rows, Walk
from torchprobe.statistics import Quantile, TopInputs

SCORES = ("iou", "ap")
_CHOICES = {"mode": MODES, "positions": POSITIONS, "pooling": ("max", "mean"), "sign": SIGNS, "negatives": NEGATIVES}


@dataclass(frozen=True)
class Settings:
    """What a dissection was asked for, as far as its result depends on it; goes into the metadata of every result."""

    score: tuple[str, ...]
    mode: str
    quantile: str
    positions: str
    pooling: str
    sign: str
    negatives: str
    minimum_area: float
    top: int
    batch_size: int
    memory: int
    seed: int
    shuffle_labels: int | None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not self.score or set(self.score) - set(SCORES):
            raise ValueError(f"score must be some of {', '.join(SCORES)}, got {', '.join(self.score)!r}")
        if not 0 <= self.minimum_area <= 1:
            raise ValueError(f"minimum_area is a share between 0 and 1, got {self.minimum_area}")
        if self.top < 0:
            raise ValueError(f"top must be at least 0, got {self.top}")


class Run:
    """One dissection, with everything that its stages share."""

    def __init__(
        self,
        taps: Taps,
        sites: Mapping[str, Site],
        batches: Batches,
        settings: Settings,
        labels_of: Mapping[int, int],
        facts: Mapping[str, Any],
        thresholds: Mapping[str, Tensor] | None,
        ranks: Ranks,
        checkpoint: Checkpoint | None,
        device: torch.device,
        progress: ProgressCallback | None,
        workers: int,
        keep_scores: bool,
    ) -> None:
        self.taps, self.sites, self.batches, self.settings, self.labels_of = taps, sites, batches, settings, labels_of
        self.facts, self.thresholds, self.ranks, self.checkpoint, self.device = facts, thresholds, ranks, checkpoint, device
        self.workers, self.keep_scores = workers, keep_scores
        self.broden, self.ap, self.iou = batches.broden, "ap" in settings.score, "iou" in settings.score
        self.first_pass = self.ap or bool(settings.top) or thresholds is None
        self.errors: dict[str, float] = {}  # of computed thresholds
        self.clock = Clock(progress, int(self.first_pass) + int(self.iou))

    def result(self) -> dict[str, Dissection]:
        first = self.look() if self.first_pass else None
        thresholds = dict(self.thresholds or {})
        if self.iou and not thresholds and first is not None:
            own: dict[str, Any] = {layer: first.statistics[f"{i}/quantile"] for i, layer in enumerate(self.sites)}
            thresholds = self.ranks.from_first({layer: statistic.value().cpu() for layer, statistic in own.items()})
            self.errors = {layer: float(statistic.error().amax()) for layer, statistic in own.items()}
        second = self.count(thresholds) if self.iou else None
        results = self.assemble(first, second, thresholds) if self.ranks.first else None
        found: dict[str, Dissection] = self.ranks.from_first(results)
        return found

    # -- the two passes ------------------------------------------------------------------------------------------------

    def look(self) -> Walk:
        """Thresholds, scores, top images."""
        make: dict[str, Callable[[], Any]] = {}
        rows = {}
        seed = self.settings.seed + self.ranks.rank
        for i, site in enumerate(self.sites.values()):
            if self.iou and self.thresholds is None:
                make[f"{i}/quantile"] = partial(
                    Quantile, site.units, Fraction(self.settings.quantile), self.device, self.settings.memory, seed
                )
            if self.settings.top and not self.ap:  # otherwise the scores tell
                make[f"{i}/top"] = partial(TopInputs, site.units, self.settings.top, "cpu", self.settings.pooling)
            if self.ap:
                rows[str(i)] = Rows(len(self.batches.ids), site.units)
        walk = Walk("thresholds", make, rows, len(self.batches), self.batches.size, self.ranks, self.checkpoint)

        def see(i: int, maps: Tensor, batch: Any) -> None:
            if f"{i}/quantile" in walk.statistics:
                walk.statistics[f"{i}/quantile"].update(maps, feature_dim=1)  # type: ignore[attr-defined]
            if not rows and not self.settings.top:
                return
            values = pooled(maps, self.settings.pooling).float().cpu()
            if self.ap and bool(values.isnan().any()):
                row = self.broden.rows[batch.ids[int(values.isnan().any(1).int().argmax())]]
                raise ValueError(f"layer {list(self.sites)[i]!r} gives nan for image {row.image}, which no ranking can hold")
            if f"{i}/top" in walk.statistics:
                walk.statistics[f"{i}/top"].update(values, ids=batch.ids)  # type: ignore[attr-defined]
            if self.ap:
                rows[str(i)].put(batch.number * self.batches.size, values)

        self.walk(walk, see, labels=False)
        return walk

    def count(self, thresholds: Mapping[str, Tensor]) -> Walk:
        """Pixels of units and labels."""
        categories = len(self.broden.categories)
        make = {
            str(i): partial(Overlap, thresholds[layer].to(self.device), self.broden.primary, categories, self.settings.mode)
            for i, layer in enumerate(self.sites)
        }
        walk = Walk("overlap", make, {}, len(self.batches), self.batches.size, self.ranks, self.checkpoint)

        def see(i: int, maps: Tensor, batch: Any) -> None:
            height, width = batch.images.shape[-2:]
            walk.statistics[str(i)].update(maps, batch.labels, (height, width))  # type: ignore[attr-defined]

        self.walk(walk, see, labels=True)
        return walk

    def walk(self, walk: Walk, see: Callable[[int, Tensor, Any], None], labels: bool) -> None:
        """Shows every batch of this rank to every layer."""
        mine = walk.mine()
        total = len(self.batches.ids)
        done = total - sum(len(self.batches.rows(batch)) for batch in mine)
        self.clock.start(walk.name, done, total)
        try:
            for batch in self.batches.read(mine, labels):
                activations = self.taps.run(batch.images.to(self.device))
                for i, (layer, site) in enumerate(self.sites.items()):
                    see(i, site.read(activations.pop(layer), len(batch.ids)), batch)
                walk.finished(batch.number)
                done += len(batch.ids)
                self.clock.tell(done)
        except KeyboardInterrupt:
            if self.checkpoint is not None:
                walk.save()
            raise
        walk.merge()
        self.clock.finish()

    # -- the results ---------------------------------------------------------------------------------------------------

    def assemble(self, first: Walk | None, second: Walk | None, thresholds: Mapping[str, Tensor]) -> dict[str, Dissection]:
        """On the first rank."""
        numbers = torch.tensor([label.number for label in self.broden.labels], dtype=torch.int64)
        category = self.broden.primary[numbers]
        ranking = self.ranking(category) if self.ap else None
        results = {}
        for i, (layer, site) in enumerate(self.sites.items()):
            counts = None
            if second is not None:
                raw = second.statistics[str(i)].counts()  # type: ignore[attr-defined]
                counts = Counts(*(part.cpu()[..., numbers] for part in raw))
            dissection = Dissection(
                layer=layer,
                labels=self.broden.labels,
                categories=self.broden.categories,
                category=category,
                units=site.units,
                images=torch.tensor(self.batches.ids),
                thresholds=thresholds[layer].cpu() if self.iou else None,
                counts=counts,
                metadata={
                    **self.facts,
                    "layer": layer,
                    "basis": self.facts["sites"][layer]["basis"],
                    "threshold_error": self.errors.get(layer),
                },
            )
            if ranking is not None and first is not None:
                scores = first.rows.pop(str(i)).values.T
                dissection.rank(ranking, scores, keep=self.keep_scores)
                dissection.top = top_images(scores, dissection.images, self.settings.top) if self.settings.top else None
            elif first is not None and self.settings.top:
                top: Any = first.statistics[f"{i}/top"]
                dissection.top = top.ids, top.scores.float()
            results[layer] = dissection
        return results

    def ranking(self, category: Tensor) -> Ranking:
        """Which image shows which concept."""
        self.clock.start("labels", 0, len(self.broden))
        cache = None if self.checkpoint is None else self.checkpoint.folder / "presence.safetensors"
        presence: Presence = self.broden.presence(cache, self.workers, lambda done, total: self.clock.tell(done))
        numbers = [label.number for label in self.broden.labels]
        chosen = [self.labels_of[row] for row in self.batches.ids]
        settings = self.settings
        return Ranking.of(presence, chosen, numbers, category, settings.sign, settings.negatives, settings.minimum_area)
