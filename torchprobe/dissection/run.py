"""The stages of a dissection: two passes over the images, then the tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock, RunOptions
from torchprobe.dissection.activity import Level, explanation
from torchprobe.dissection.average_precision import NEGATIVES, SIGNS, pooled
from torchprobe.dissection.batches import Batch, Batches
from torchprobe.dissection.dissection import Dissection
from torchprobe.dissection.overlap import MODES, Counts, Overlap
from torchprobe.dissection.ranking import Ranking, top_images
from torchprobe.dissection.scores import SCORES
from torchprobe.dissection.taps import POSITIONS, Site
from torchprobe.dissection.walk import Checkpoint, ImageVectors, Mergeable, Walk
from torchprobe.recording.reader import LayerReader
from torchprobe.statistics import Quantile, TopInputs

_CHOICES = {"mode": MODES, "positions": POSITIONS, "pooling": ("max", "mean"), "sign": SIGNS, "negatives": NEGATIVES}

See = Callable[[int, Tensor, Batch], None]
"""Called with the number of a layer, its maps, and the batch that they belong to."""


@dataclass(frozen=True)
class Settings:
    """The arguments of a dissection that its result depends on. They are part of the metadata of every result."""

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


@dataclass
class Run:
    """One dissection.

    Attributes:
        reader: of the layers; entered.
        sites: layer → how to read it.
        batches: the images.
        settings: what the result depends on.
        options: how the run is carried out.
        facts: the metadata that all layers share.
        ranks: the processes that share the run; entered.
        checkpoint: where the passes are saved.
        thresholds: layer → given thresholds; None: they are computed.
        keep_scores: whether the results keep the scores of the images.
    """

    reader: LayerReader
    sites: Mapping[str, Site]
    batches: Batches
    settings: Settings
    options: RunOptions
    facts: Mapping[str, Any]
    ranks: Ranks
    checkpoint: Checkpoint | None = None
    thresholds: Mapping[str, Tensor] | None = None
    keep_scores: bool = False
    errors: dict[str, float] = field(default_factory=dict, init=False)  # of computed thresholds
    levels: dict[str, Level] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.broden, self.device = self.batches.broden, self.reader.device
        self.ap, self.iou = "ap" in self.settings.score, "iou" in self.settings.score
        self.first_pass = self.ap or bool(self.settings.top) or self.thresholds is None
        self.clock = Clock(self.options.progress, int(self.first_pass) + int(self.iou))

    def result(self) -> dict[str, Dissection]:
        """Runs all stages; every rank gets the same result.

        Raises:
            KeyboardInterrupt: ``stop`` returned True; the pass is saved first.
        """
        first = self.look() if self.first_pass else None
        thresholds = dict(self.thresholds or {})
        if self.iou and first is not None and self.thresholds is None:
            quantiles = {layer: first.statistic(f"{i}/quantile", Quantile) for i, layer in enumerate(self.sites)}
            method = "hazen" if self.settings.mode == "netdissect" else "inverted_cdf"  # the original interpolates
            thresholds = self.ranks.from_first({layer: quantile.value(method=method).cpu() for layer, quantile in quantiles.items()})
            self.levels = {layer: Level(q.count.cpu(), *(s.cpu() for s in q.shares(thresholds[layer]))) for layer, q in quantiles.items()}
            self.errors = {layer: float(quantile.error().amax()) for layer, quantile in quantiles.items()}
        second = self.count(thresholds) if self.iou else None
        results = self.assemble(first, second, thresholds) if self.ranks.first else None
        found: dict[str, Dissection] = self.ranks.from_first(results)
        return found

    # -- the two passes ------------------------------------------------------------------------------------------------

    def look(self) -> Walk:
        """The first pass: thresholds, scores, top images."""
        settings = self.settings
        make: dict[str, Callable[[], Mergeable]] = {}
        vectors: dict[str, ImageVectors] = {}
        for i, site in enumerate(self.sites.values()):
            if self.iou and self.thresholds is None:
                seed = settings.seed + self.ranks.rank
                make[f"{i}/quantile"] = partial(Quantile, site.units, Fraction(settings.quantile), self.device, settings.memory, seed)
            if settings.top and not self.ap:  # with scores the top images follow from them
                make[f"{i}/top"] = partial(TopInputs, site.units, settings.top, "cpu", settings.pooling)
            if self.ap:
                vectors[str(i)] = ImageVectors(len(self.batches.rows), site.units)
        walk = Walk("thresholds", make, vectors, len(self.batches), self.batches.size, self.ranks, self.checkpoint)

        def see(i: int, maps: Tensor, batch: Batch) -> None:
            if f"{i}/quantile" in make:
                walk.statistic(f"{i}/quantile", Quantile).update(maps, feature_dim=1)
            if not self.ap and not settings.top:
                return
            scores = pooled(maps, settings.pooling).float().cpu()
            if self.ap and bool(scores.isnan().any()):
                row = self.broden.rows[batch.rows[int(scores.isnan().any(1).int().argmax())]]
                raise ValueError(f"layer {list(self.sites)[i]!r} gives nan for image {row.image}, so its images cannot be ranked")
            if f"{i}/top" in make:
                walk.statistic(f"{i}/top", TopInputs).update(scores, ids=batch.rows)
            if self.ap:
                vectors[str(i)].put(batch.number * self.batches.size, scores)

        self.walk(walk, see, labels=False)
        return walk

    def count(self, thresholds: Mapping[str, Tensor]) -> Walk:
        """The second pass: pixels of units and labels."""
        categories = len(self.broden.categories)
        make = {
            str(i): partial(Overlap, thresholds[layer].to(self.device), self.broden.primary, categories, self.settings.mode)
            for i, layer in enumerate(self.sites)
        }
        walk = Walk("overlap", make, {}, len(self.batches), self.batches.size, self.ranks, self.checkpoint)

        def see(i: int, maps: Tensor, batch: Batch) -> None:
            assert batch.labels is not None
            height, width = batch.images.shape[-2:]
            walk.statistic(str(i), Overlap).update(maps, batch.labels, (height, width))

        self.walk(walk, see, labels=True)
        return walk

    def walk(self, walk: Walk, see: See, labels: bool) -> None:
        """Shows every batch of this rank to every layer."""
        mine = walk.mine()
        total = len(self.batches.rows)
        done = total - sum(len(self.batches.rows_of(batch)) for batch in mine)
        self.clock.start(walk.name, done, total)
        try:
            for batch in self.batches.read(mine, labels):
                self.stop_if_asked()
                activations = self.reader.activations(batch.images.to(self.device))
                for i, (layer, site) in enumerate(self.sites.items()):
                    see(i, site.read(activations.pop(layer)[0], len(batch.rows)), batch)
                walk.finished(batch.number)
                done += len(batch.rows)
                self.clock.tell(done)
        except KeyboardInterrupt:
            if self.checkpoint is not None:
                walk.save()
            raise
        walk.merge()
        self.clock.finish()

    def stop_if_asked(self) -> None:
        if self.options.stop is not None and self.options.stop():
            raise KeyboardInterrupt

    # -- the results ---------------------------------------------------------------------------------------------------

    def assemble(self, first: Walk | None, second: Walk | None, thresholds: Mapping[str, Tensor]) -> dict[str, Dissection]:
        """The results, on the first rank."""
        numbers = torch.tensor([label.number for label in self.broden.labels], dtype=torch.int64)
        category = self.broden.primary[numbers]
        ranking = self.ranking(category) if self.ap else None
        results = {}
        for i, (layer, site) in enumerate(self.sites.items()):
            counts = None
            if second is not None:
                counts = Counts(*(part.cpu()[..., numbers] for part in second.statistic(str(i), Overlap).counts()))
            own = {"layer": layer, "basis": self.facts["sites"][layer]["basis"], "threshold_error": self.errors.get(layer)}
            dissection = Dissection(
                layer=layer,
                labels=self.broden.labels,
                categories=self.broden.categories,
                category=category,
                units=site.units,
                images=torch.tensor(self.batches.rows),
                thresholds=thresholds[layer].cpu() if self.iou else None,
                level=self.levels.get(layer),
                counts=counts,
                metadata={**self.facts, **own},
            )
            if first is not None and ranking is not None:
                scores = first.vectors.pop(str(i)).vectors.T
                dissection.rank(ranking, scores, keep=self.keep_scores)
                dissection.top = top_images(scores, dissection.images, self.settings.top) if self.settings.top else None
            elif first is not None and self.settings.top:
                top = first.statistic(f"{i}/top", TopInputs)
                dissection.top = top.ids, top.scores.float()
            results[layer] = dissection
            if layer in self.levels and (message := explanation(layer, dissection.silence(), dissection.quantile)):
                warnings.warn(message, stacklevel=4)
        return results

    def ranking(self, category: Tensor) -> Ranking:
        """Which image shows which concept."""
        chosen = [self.batches.labels_of(row) for row in self.batches.rows]
        read = sorted(set(chosen))
        self.clock.start("labels", 0, len(read))

        def tell(done: int, total: int) -> None:
            self.clock.tell(done)
            self.stop_if_asked()

        cache = None if self.checkpoint is None else self.checkpoint.folder / "presence.safetensors"
        presence = self.broden.presence(cache, self.options.workers, tell, read)
        numbers = [label.number for label in self.broden.labels]
        place = {row: at for at, row in enumerate(read)}
        settings = self.settings
        return Ranking.of(
            presence, [place[row] for row in chosen], numbers, category, settings.sign, settings.negatives, settings.minimum_area
        )
