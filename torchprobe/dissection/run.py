"""The stages of a dissection: a pass through the network, the labels, then the tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from torchprobe.dissection.iou_null import ShuffledOverlap
from torchprobe.dissection.layer_tables import SCORES
from torchprobe.dissection.overlap import MODES, Counts, Overlap
from torchprobe.dissection.ranking import Ranking, top_images
from torchprobe.dissection.shown import ShownLabels
from torchprobe.dissection.sparse import Density, SparseBasis
from torchprobe.dissection.spool import Spool, remove_maps, worthwhile
from torchprobe.dissection.taps import POSITIONS, Site
from torchprobe.dissection.top_maps import MOST, TopMaps
from torchprobe.dissection.walk import Checkpoint, ImageVectors, Mergeable, Walk
from torchprobe.recording.reader import LayerReader
from torchprobe.statistics import Quantile, TopInputs
from torchprobe.statistics.quantile import memory_for

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
    iou_permutations: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not self.score or set(self.score) - set(SCORES):
            raise ValueError(f"score must be some of {', '.join(SCORES)}, got {', '.join(self.score)!r}")
        if not 0 <= self.minimum_area <= 1:
            raise ValueError(f"minimum_area is a share between 0 and 1, got {self.minimum_area}")
        if self.iou_permutations < 0 or (self.iou_permutations and "iou" not in self.score):
            raise ValueError(f'iou_permutations={self.iou_permutations}: expected 0 or more, and the score "iou"')
        if self.top < 0:
            raise ValueError(f"top must be at least 0, got {self.top}")


def estimates(sites: Mapping[str, Site], settings: Settings, images: int, given: bool = False) -> bool:
    """Whether thresholds are estimated, because their memory is too small for so many images. Then they depend on the number of ranks and
    on which image each of them saw, in which order. ``given``: whether the thresholds are given."""
    quantile = Fraction(settings.quantile)
    needed = (memory_for(site.units, images * site.places, quantile) for site in sites.values())
    return "iou" in settings.score and not given and any(settings.memory < memory for memory in needed)


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
        input_size: rows and columns of the network's input.
        disk: gigabytes for maps that wait for their thresholds, of all layers together.
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
    input_size: tuple[int, int] = (0, 0)
    disk: float = 8.0
    errors: dict[str, float] = field(default_factory=dict, init=False)  # of computed thresholds
    levels: dict[str, Level] = field(default_factory=dict, init=False)
    again: list[int] = field(default_factory=list, init=False)  # the layers that pass the network a second time

    def __post_init__(self) -> None:
        self.nan = set[str]()  # layers that gave nan
        self.broden, self.device = self.batches.broden, self.reader.device
        self.ap, self.iou = "ap" in self.settings.score, "iou" in self.settings.score
        self.sparse = any(isinstance(site.basis, SparseBasis) for site in self.sites.values())  # their density is counted
        self.first_pass = self.ap or bool(self.settings.top) or self.thresholds is None or self.sparse
        self.clock = Clock(self.options.progress, int(self.first_pass) + 1)
        self.spools = self._spools() if self.iou and self.first_pass else {}

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
        boxes = None if first is None else self.ranks.from_first(first.vectors["boxes"].vectors)
        tops = {} if first is None or not self.settings.top else self.ranks.from_first(self.tops(first) if self.ranks.first else None)
        second = self.count(thresholds, boxes, tops)
        results = self.assemble(first, second, thresholds, tops) if self.ranks.first else None
        found: dict[str, Dissection] = self.ranks.from_first(results)
        for spool in self.spools.values():
            spool.give_up()
        if self.checkpoint is not None and self.ranks.first:
            remove_maps(self.checkpoint.folder)
        return found

    def close(self) -> None:
        """Removes temporary files, also of a run that was stopped."""
        for spool in self.spools.values():
            spool.close()

    def _spools(self) -> dict[str, Spool]:
        """Where the maps of each layer wait for the thresholds; none for layers whose maps would not fit."""
        folder, run = (None, "") if self.checkpoint is None else (self.checkpoint.folder, self.checkpoint.run)
        budget = int(self.disk * 1e9) // (len(self.sites) * self.ranks.size)
        images, quantile, found = len(self.batches.rows), Fraction(self.settings.quantile), {}
        for i, (layer, site) in enumerate(self.sites.items()):
            if self.thresholds is not None or worthwhile(images // self.ranks.size, site.units, site.places, quantile, budget):
                found[layer] = Spool(str(i), folder, budget, run)
        return found

    # -- the passes ----------------------------------------------------------------------------------------------------

    def look(self) -> Walk:
        """The pass through the network: thresholds, scores, top images; and maps that may exceed a threshold go to the disk."""
        settings, total = self.settings, len(self.batches.rows)
        make: dict[str, Callable[[], Mergeable]] = {}
        vectors = {"boxes": ImageVectors(total, 4, torch.float64)}
        quantile = Fraction(settings.quantile)
        for i, site in enumerate(self.sites.values()):
            if self.iou and self.thresholds is None:
                seed = settings.seed + self.ranks.rank
                # With no more memory than needed, the bound below which values are dropped is close to the threshold.
                memory = min(settings.memory, memory_for(site.units, total * site.places, quantile))
                make[f"{i}/quantile"] = partial(Quantile, site.units, quantile, self.device, memory, seed)
            if settings.top and not self.ap:  # with scores the top images follow from them
                make[f"{i}/top"] = partial(TopInputs, site.units, settings.top, "cpu", settings.pooling)
            if isinstance(site.basis, SparseBasis):
                make[f"{i}/density"] = partial(Density, site.units)
            if self.ap:
                vectors[str(i)] = ImageVectors(total, site.units)
        batches, ordered = len(self.batches), estimates(self.sites, settings, total, self.thresholds is not None)
        walk = Walk("thresholds", make, vectors, batches, self.batches.size, self.ranks, self.checkpoint, self.spools, ordered)
        if self.ranks.first:
            done = walk.before.nonzero().flatten().tolist()
            for spool in self.spools.values():
                spool.adopt(done)
                if not spool.holds(done):
                    spool.give_up()
        self.ranks.barrier()  # the other ranks write nothing until the first has taken over the maps

        def see(i: int, maps: Tensor, batch: Batch) -> None:
            layer = list(self.sites)[i]
            if f"{i}/quantile" in make:
                walk.statistic(f"{i}/quantile", Quantile).update(maps, feature_dim=1)
            if f"{i}/density" in make:
                walk.statistic(f"{i}/density", Density).update(maps)
            if layer in self.spools:
                known = self.thresholds
                bound = walk.statistic(f"{i}/quantile", Quantile).bound if known is None else known[layer]
                self.spools[layer].put(batch.number, maps, bound)
            if not self.ap and not settings.top:
                return
            scores = pooled(maps, settings.pooling).float().cpu()
            if self.ap and bool(scores.isnan().any()):
                row = self.broden.rows[batch.rows[int(scores.isnan().any(1).int().argmax())]]
                raise ValueError(f"layer {layer!r} gives nan for image {row.image}, so its images cannot be ranked")
            if f"{i}/top" in make:
                walk.statistic(f"{i}/top", TopInputs).update(scores, ids=batch.rows)
            if self.ap:
                vectors[str(i)].put(batch.number * self.batches.size, scores)

        self.walk(walk, see, range(len(self.sites)), labels=False)
        return walk

    def tops(self, first: Walk) -> dict[str, tuple[Tensor, Tensor]]:
        """The top images of each layer and their scores."""
        found = {}
        for i, layer in enumerate(self.sites):
            if self.ap:
                found[layer] = top_images(first.vectors[str(i)].vectors.T, torch.tensor(self.batches.rows), self.settings.top)
            else:
                top = first.statistic(f"{i}/top", TopInputs)
                found[layer] = top.ids, top.scores.float()
        return found

    def count(self, thresholds: Mapping[str, Tensor], boxes: Tensor | None, tops: Mapping[str, tuple[Tensor, Tensor]]) -> Walk:
        """The labels: which image shows which, and the pixels that they share with units. Layers whose maps were kept are read from the
        disk; the others pass the network again."""
        total, categories = len(self.batches.rows), len(self.broden.categories)
        make: dict[str, Callable[[], Mergeable]] = {"shown": partial(ShownLabels, total, self.broden.label_size)}
        for i, layer in enumerate(self.sites):
            if self.iou:
                at = thresholds[layer].to(self.device)
                make[str(i)] = partial(Overlap, at, self.broden.primary, categories, self.settings.mode)
                size = self.sites[layer].size
                if layer in tops and tops[layer][0].numel() * size[0] * size[1] * 4 <= MOST:
                    make[f"{i}/maps"] = partial(TopMaps, tops[layer][0], thresholds[layer].cpu(), size)
                if self.settings.iou_permutations:
                    given = (at, self.broden.primary, categories, self.settings.mode, self.settings.iou_permutations, self.settings.seed)
                    make[f"{i}/null"] = partial(ShuffledOverlap, *given)
        walk = Walk("overlap", make, {}, len(self.batches), self.batches.size, self.ranks, self.checkpoint)
        kept = self._kept(walk.mine(), thresholds)
        self.again = [i for i, layer in enumerate(self.sites) if self.iou and layer not in kept]

        def see(i: int, maps: Tensor, batch: Batch) -> None:
            assert batch.labels is not None
            walk.statistic(str(i), Overlap).update(maps, batch.labels, self.input_size)
            if f"{i}/maps" in make:
                walk.statistic(f"{i}/maps", TopMaps).update(batch.rows, maps, self._boxes(batch))
            if f"{i}/null" in make:
                walk.statistic(f"{i}/null", ShuffledOverlap).update(maps, batch.labels, self.input_size, batch.rows)

        def note(batch: Batch) -> None:
            assert batch.areas is not None and batch.outside is not None
            first = batch.number * self.batches.size
            walk.statistic("shown", ShownLabels).update(range(first, first + len(batch.rows)), batch.areas, batch.outside)
            for i, layer in enumerate(self.sites):
                if layer in kept:
                    see(i, self.spools[layer].get(batch.number, thresholds[layer]).to(self.device), batch)

        self.walk(walk, see, self.again, labels=True, boxes=boxes, note=note)
        return walk

    def _kept(self, batches: list[int], thresholds: Mapping[str, Tensor]) -> set[str]:
        """The layers of which every rank has all its maps on the disk."""
        for spool in self.spools.values():
            spool.find()  # of a resumed run, other ranks may have computed them
        here = {layer for layer, spool in self.spools.items() if spool.holds(batches) and spool.serves(thresholds[layer])}
        for theirs in self.ranks.to_first(here):
            here &= theirs
        found: set[str] = self.ranks.from_first(here)
        return found

    def walk(
        self,
        walk: Walk,
        see: See,
        layers: Sequence[int],
        labels: bool,
        boxes: Tensor | None = None,
        note: Callable[[Batch], object] = lambda batch: None,
    ) -> None:
        """Shows every batch of this rank to some layers. Without layers, and with known boxes, no image is read."""
        mine, total = walk.mine(), len(self.batches.rows)
        done = total - sum(len(self.batches.rows_of(batch)) for batch in mine)
        stage = walk.name if walk.name == "thresholds" or self.iou else "labels"
        self.clock.start("second pass" if self.again else stage, done, total)
        try:
            for batch in self.batches.read(mine, labels, None if layers else boxes):
                if self.options.stop is not None and self.options.stop():
                    raise KeyboardInterrupt
                with walk.showing(batch.number):
                    self._show(walk, batch, see, layers)
                    note(batch)
                done += len(batch.rows)
                self.clock.tell(done)
        except KeyboardInterrupt:
            walk.interrupted()
            raise
        walk.merge()
        self.clock.finish()

    def _show(self, walk: Walk, batch: Batch, see: See, layers: Sequence[int]) -> None:
        names, box = list(self.sites), self._boxes(batch)
        if "boxes" in walk.vectors:
            walk.vectors["boxes"].put(batch.number * self.batches.size, box)
        if layers:
            activations = self.reader.activations(batch.images)
            for i in layers:
                maps = self.sites[names[i]].read(activations.pop(names[i])[0], len(batch.rows))
                self._tell_nan(names[i], maps, batch)
                see(i, maps, batch)

    def _tell_nan(self, layer: str, maps: Tensor, batch: Batch) -> None:
        """Without average precision, for which nan is an error, nan would be taken for positions where a unit is silent."""
        if not self.ap and layer not in self.nan and bool((bad := maps.isnan().flatten(1).any(1)).any()):
            self.nan.add(layer)
            row = self.broden.rows[batch.rows[int(bad.int().argmax())]]
            warnings.warn(f"layer {layer!r} gives nan, first for image {row.image}: such positions count as not active", stacklevel=5)

    def _boxes(self, batch: Batch) -> Tensor:
        if self.settings.mode == "netdissect" and not all(box.whole for box in batch.boxes):
            raise ValueError(
                'mode="netdissect" counts on the grid of the whole picture, but the preprocessing shows a part of it: leave preprocess out'
            )
        return torch.tensor(batch.boxes, dtype=torch.float64)

    # -- the results ---------------------------------------------------------------------------------------------------

    def assemble(
        self, first: Walk | None, second: Walk, thresholds: Mapping[str, Tensor], tops: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Dissection]:
        """The results, on the first rank."""
        numbers = torch.tensor([label.number for label in self.broden.labels], dtype=torch.int64)
        category = self.broden.primary[numbers]
        shown = second.statistic("shown", ShownLabels)
        ranking = self.ranking(category, shown) if self.ap else None
        results = {}
        for i, (layer, site) in enumerate(self.sites.items()):
            counts, null = None, None
            if self.iou:
                counts = Counts(*(part.cpu()[..., numbers] for part in second.statistic(str(i), Overlap).counts()))
                if self.settings.iou_permutations:
                    null = second.statistic(f"{i}/null", ShuffledOverlap).test(counts, numbers)
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
                outside=shown.outside[numbers],
                density=first.statistic(f"{i}/density", Density) if first is not None and isinstance(site.basis, SparseBasis) else None,
                iou_null=null,
                metadata={**self.facts, **own},
            )
            if first is not None and ranking is not None:
                scores = first.vectors.pop(str(i)).vectors.T
                dissection.rank(ranking, scores, keep=self.keep_scores)
            dissection.top = tops.get(layer)
            if f"{i}/maps" in second.statistics:
                kept = second.statistic(f"{i}/maps", TopMaps)
                dissection.top_maps = kept.maps, kept.boxes
            results[layer] = dissection
            if layer in self.levels and (message := explanation(layer, dissection.silence(), dissection.quantile)):
                warnings.warn(message, stacklevel=5)
        return results

    def ranking(self, category: Tensor, shown: ShownLabels) -> Ranking:
        """Which image shows which concept, where the network looked."""
        annotated = self.broden.annotated()[[self.batches.labels_of(row) for row in self.batches.rows]]
        presence = replace(shown.presence(), annotated=annotated)
        numbers = [label.number for label in self.broden.labels]
        settings = self.settings
        return Ranking.of(presence, range(len(presence)), numbers, category, settings.sign, settings.negatives, settings.minimum_area)
