"""One encoder through the whole analysis: a folder of results out, resumable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchprobe.analysis.baseline import Baseline, X
from torchprobe.analysis.concepts import concepts
from torchprobe.analysis.directions import Directions, privileged_directions, split
from torchprobe.analysis.embedding_run import by_first
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.datasets import Broden, Images, LabelledImages
from torchprobe.dissection import Dissection
from torchprobe.dissection.progress import Clock, Progress, Told
from torchprobe.dissection.ranks import Ranks
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.encoders import Encoder, Head
from torchprobe.ops.digest import digest
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret import measures
from torchprobe.studies.interpret.measures import IMAGENET
from torchprobe.studies.interpret.result import FORMAT, Interpretation
from torchprobe.studies.interpret.stages import Plain, Stages
from torchprobe.studies.interpret.write import write
from torchprobe.studies.scan import scan

__all__ = ["Interpretation", "Progress", "interpret"]

LAYER_IMAGES = 1024
"""Images over which the layers are recorded: a depth profile needs no more (a choice of ours)."""


def interpret(
    encoder: Encoder,
    images: Images,
    out: str | os.PathLike[str],
    *,
    head: Head | None = None,
    shifts: Mapping[str, Images] | None = None,
    broden: Broden | None = None,
    baseline: Baseline | None = None,
    x: X = "full",
    layers: str | Iterable[str] | None = None,
    layer_images: int = LAYER_IMAGES,
    about: Mapping[str, Any] | None = None,
    published: Mapping[str, float] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 2,
    seed: int = 0,
    resume: bool = False,
    progress: Told | None = None,
    stop: Callable[[], bool] | None = None,
) -> Interpretation:
    """Repeats the analysis of "Interpreting CLIP" on one encoder, and writes what it found into ``out``.

    The sections and what they need: outlier features and layers (images); accuracy, privileged directions, ablation and pruning (a head,
    and labels); effective robustness (shifts too); concepts (``broden``). What is not there is skipped, and the results say so.

    Directions are ordered by their importance on one half of the images; pruning and ablation are evaluated on the other half.

    Args:
        encoder: images → representations, before normalisation.
        images: the evaluation set, such as ImageNet's validation images; with labels for everything that needs a head.
        out: a folder; made if it is not there. ``results.json``, CSV tables, plots as PNG and SVG, ``index.html``, the representations.
        head: on top of the encoder; None: only what needs none.
        shifts: name → labelled images under a shift; the names are those of :data:`torchprobe.analysis.robustness.SHIFTS`, or columns of
            the baseline.
        broden: concepts.
        baseline: the models that effective robustness is relative to; None: the published fits.
        x: of effective robustness, see :func:`torchprobe.analysis.effective_robustness`.
        layers: to record over depth, see :func:`torchprobe.record`.
        layer_images: of so many images, chosen at random; 0 leaves the layers out.
        about: facts to keep with the results, such as ``role``, ``backbone`` and ``pretraining``.
        published: accuracies in per cent, ``"imagenet"`` and shifts, for effective robustness where no shifts are given.
        batch_size, device, workers: of the passes through the encoder.
        seed: of everything that is drawn.
        resume: go on with an interrupted run in ``out``; stages that were finished with the same inputs are not computed again.
        progress: is told a :class:`Progress` after every batch.
        stop: asked before every batch.

    Under ``torchrun`` the ranks share the passes; every rank returns the same, and the first writes.

    Raises:
        ValueError: a head of another width, or arguments that do not fit.
        DatasetError: no image could be read.
        KeyboardInterrupt: ``stop`` said so; what was done is kept for ``resume``.
    """
    folder, shifts = Path(out), dict(shifts or {})
    if head is not None and head.in_features != encoder.features:
        raise ValueError(f"the head takes {head.in_features} features, but the representation of {encoder.name} has {encoder.features}")
    if IMAGENET in shifts:
        raise ValueError(f"{IMAGENET!r} is the name of the unshifted images; call the shift something else")
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    sets = {IMAGENET: images, **shifts}
    clock = Clock(progress, len(sets) + (layer_images > 0) + (broden is not None))
    with Ranks() as ranks:
        run = _Run(encoder, head, folder, Stages(folder, resume), clock, batch_size, device, workers, seed, resume, stop, ranks)
        embedded = {name: run.embed(name, one) for name, one in sets.items()}
        found = run.directions(embedded[IMAGENET])
        dissections = {} if broden is None else run.concepts(broden, found, str(embedded[IMAGENET].made["weights"]))

        def rest() -> Interpretation:
            result = run.results(embedded, found, dissections, sets, baseline, x, layers, layer_images, broden, dict(published or {}))
            result.results |= {"about": dict(about or {})}
            write(result)
            return result

        return by_first(ranks, rest)


class _Run:
    """What the stages of one run share."""

    def __init__(
        self,
        encoder: Encoder,
        head: Head | None,
        folder: Path,
        stages: Stages,
        clock: Clock,
        batch_size: int,
        device: torch.device | str | None,
        workers: int,
        seed: int,
        resume: bool,
        stop: Callable[[], bool] | None,
        ranks: Ranks,
    ) -> None:
        self.encoder, self.head, self.folder, self.stages, self.clock = encoder, head, folder, stages, clock
        self.batch_size, self.device, self.workers, self.seed = batch_size, device, workers, seed
        self.resume, self.stop, self.ranks = resume, stop, ranks
        self.facts: Plain = {"seed": seed, "head": None if head is None else [digest(head.parameters()), getattr(head, "normalize", False)]}

    # -- passes through the encoder ------------------------------------------------------------------------------------

    def embed(self, name: str, images: Images) -> Embeddings:
        """The representations of one set, on disk."""
        self.clock.start(f"images: {name}", 0, len(images))
        embeddings = embed(
            self.encoder,
            images,
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            path=self.folder / "embeddings" / f"{file_names([name])[name]}.safetensors",
            resume=self.resume,
            progress=lambda done, total: self.clock.tell(done),
            stop=self.stop,
        )
        if embeddings.partial:
            raise KeyboardInterrupt
        self.clock.finish()
        return embeddings

    def concepts(self, broden: Broden, found: Directions | None, weights: str) -> dict[str, Dissection]:
        """Every basis against the concepts; on disk, and read from there when nothing has changed."""
        folder = self.folder / "concepts"
        directions = None if found is None else found.directions[: found.rank]
        made = {
            "weights": weights,
            "directions": None if directions is None else digest([directions]),
            "data": hashlib.sha256((broden.root / "index.csv").read_bytes() + repr((broden.split, broden.categories)).encode()).hexdigest(),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

        def tell(progress: Progress) -> None:
            if progress.stage != self.clock.stage:
                self.clock.start(progress.stage, 0, progress.total)
            self.clock.tell(progress.done)

        def compute() -> Plain:
            if self.ranks.first and not self.resume and (folder / "checkpoint").is_dir():
                clear_checkpoint(folder / "checkpoint")
            self.ranks.barrier()
            result = concepts(
                self.encoder,
                broden,
                directions,
                seed=self.seed,
                batch_size=self.batch_size,
                device=self.device,
                workers=self.workers,
                checkpoint=folder / "checkpoint",
                resume=True,
                progress=tell,
            )
            if self.ranks.first:
                for basis, name in file_names(result).items():
                    result[basis].save(folder / f"{name}.safetensors")
                clear_checkpoint(folder / "checkpoint")
            self.ranks.barrier()
            return {"files": file_names(result)}

        self.clock.start("concepts", 0, len(broden))
        files = self.stages.run("concepts-made", made, compute)["files"]
        self.clock.finish()
        return {basis: Dissection.load(folder / f"{name}.safetensors") for basis, name in files.items()}

    def layers(self, images: Images, layers: str | Iterable[str] | None, count: int) -> Plain:
        """Vector kurtosis over depth, as ``torchprobe scan`` has it."""
        chosen = sample(images, count, self.seed)
        self.clock.start("layers", 0, len(chosen))

        def compute() -> Plain:
            result = scan(
                self.encoder,
                chosen,
                layers,
                batch_size=self.batch_size,
                device=self.device or "cpu",
                workers=self.workers,
                seed=self.seed,
                progress=lambda done, total: self.clock.tell(done),
                stop=self.stop,
            )
            if result.partial:
                raise KeyboardInterrupt
            result.recording.save(self.folder / "recording.safetensors")
            return {"rows": result.layers(), "images": result.images}

        selected = layers if layers is None or isinstance(layers, str) else list(layers)
        facts = self.facts | {"encoder": self.encoder.name, "images": [chosen.name(path) for path in chosen.paths], "layers": selected}
        found = self.stages.run("layers", facts, compute)
        self.clock.finish()
        return found

    # -- what follows from the representations -------------------------------------------------------------------------

    def directions(self, images: Embeddings) -> Directions | None:
        """From the half of the images that nothing is evaluated on."""
        if self.head is None:
            return None
        first, _ = split(images, seed=self.seed)
        return privileged_directions(self.head, first.h)

    def results(
        self,
        sets: Mapping[str, Embeddings],
        found: Directions | None,
        dissections: dict[str, Dissection],
        sources: Mapping[str, Images],
        baseline: Baseline | None,
        x: X,
        layers: str | Iterable[str] | None,
        layer_images: int,
        broden: Broden | None,
        published: dict[str, float],
    ) -> Interpretation:
        """Every section that its inputs are there for."""
        images, facts, seed = sets[IMAGENET], self.facts | {"images": _identity(sets[IMAGENET])}, self.seed
        everything = self.facts | {name: _identity(one) for name, one in sets.items()} | {"x": x, "baseline": _baseline(baseline)}
        run = self.stages.run
        kurtosis = run("kurtosis", facts, lambda: measures.representation(images, seed))
        values, peak = ([float("nan") if value is None else value for value in kurtosis.pop(key)] for key in ("values", "peaks"))
        skipped: dict[str, str] = {}
        results: Plain = {"kurtosis": kurtosis, "outliers": run("outliers", facts, lambda: measures.outliers(images))}
        if layer_images:
            results["layers"] = self.layers(sources[IMAGENET], layers, layer_images)
        else:
            skipped.setdefault("layers", "no images were asked for (layer_images = 0)")
        labelled = bool((images.y >= 0).any())
        if self.head is None or found is None or not labelled:
            why = "no head was given" if self.head is None else "the images have no labels"
            for section in ("accuracy", "robustness", "ablation", "pruning", *(() if self.head is not None else ("directions",))):
                skipped.setdefault(section, why)
        if self.head is not None and found is not None:
            first, second = split(images, seed=seed)
            features = results["outliers"]["indices"]
            head = self.head
            results["directions"] = run("directions", facts, lambda: measures.directions(head, first, features)[1])
            if labelled:
                results["accuracy"] = run("accuracy", everything, lambda: measures.accuracies(head, sets, seed))
                if features and len(features) < head.in_features / 2:
                    results["ablation"] = run("ablation", facts, lambda: measures.ablations(head, second, first, features, seed))
                else:
                    few = "there are no outlier features to ablate" if not features else "half of the features are outlier features"
                    skipped.setdefault("ablation", few)
                evaluated = {**sets, IMAGENET: second}
                results["pruning"] = run("pruning", everything, lambda: measures.pruning(head, found, evaluated, x, baseline, seed))
        self._robustness(results, skipped, everything, x, baseline, published if len(sets) == 1 else {})
        if dissections:
            results["concepts"] = run("concepts", everything | {"broden": str(broden)}, lambda: measures.concept_summary(dissections))
        else:
            skipped.setdefault("concepts", "no concepts were given (--broden)")
        results["skipped"] = skipped
        results = self._described(sets) | results
        return Interpretation(results, values, peak, images.ids, self.folder, dissections)

    def _robustness(
        self, results: Plain, skipped: dict[str, str], facts: Plain, x: X, baseline: Baseline | None, published: dict[str, float]
    ) -> None:
        """From the accuracies that were measured, or else from published ones."""
        measured = {name: 100 * one["accuracy"] for name, one in results.get("accuracy", {}).items()}
        accuracies, source = (measured, "measured") if len(measured) > 1 else (published, "published")
        if len(accuracies) < 2:
            skipped.setdefault("robustness", "no shifted images were given (--shift)")
            return
        try:
            facts = facts | {"accuracies": accuracies}
            results["robustness"] = self.stages.run("robustness", facts, lambda: measures.robust(accuracies, x, baseline, source))
            skipped.pop("robustness", None)
        except ValueError as error:
            skipped.setdefault("robustness", str(error))

    def _described(self, sets: Mapping[str, Embeddings]) -> Plain:
        """What was run on what."""
        import torchprobe

        return {
            "format": FORMAT,
            "torchprobe": torchprobe.__version__,
            "torch": torch.__version__,
            "name": self.encoder.name,
            "features": self.encoder.features,
            "head": None if self.head is None else {"classes": self.head.out_features, "normalize": getattr(self.head, "normalize", False)},
            "data": {
                name: {
                    "images": len(one),
                    "labelled": int((one.y >= 0).sum()),
                    "skipped": [{"file": file, "reason": reason} for file, reason in one.skipped],
                    "classes": None if one.classes is None else len(one.classes),
                }
                for name, one in sets.items()
            },
            "settings": {"batch_size": self.batch_size, "device": str(self.device or "cpu"), "seed": self.seed},
        }


def sample(images: Images, count: int, seed: int) -> Images:
    """So many of the images, at random, in their order."""
    if count >= len(images):
        return images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    paths = [images.paths[i] for i in chosen]
    if isinstance(images, LabelledImages):
        return replace(images, paths=paths, labels=[images.labels[i] for i in chosen])
    return replace(images, paths=paths)


def _identity(embeddings: Embeddings) -> Plain:
    """What a stage that reads representations depends on."""
    return {**embeddings.made, "images": len(embeddings), "classes": embeddings.classes, "groups": repr(embeddings.groups)}


def _baseline(baseline: Baseline | None) -> Any:
    return None if baseline is None else {name: list(map(float, values)) for name, values in baseline.accuracies.items()}
