"""One encoder through the whole analysis: a folder of results out, resumable."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import torchprobe
from torchprobe.analysis.baseline import Baseline, X
from torchprobe.analysis.directions import Directions, privileged_directions, split
from torchprobe.analysis.embedding_run import by_first
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.common.progress import Clock, Progress, ProgressCallback
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import Broden, Images, LabeledImages
from torchprobe.encoders import Encoder, Head
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret import measures
from torchprobe.studies.interpret.measures import IMAGENET
from torchprobe.studies.interpret.passes import Passes, identity
from torchprobe.studies.interpret.result import FORMAT, Interpretation
from torchprobe.studies.interpret.stages import Plain, Stages
from torchprobe.studies.interpret.write import write

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
    progress: ProgressCallback | None = None,
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
    head = None if head is None else copy.deepcopy(head).cpu()  # where the representations are; that of the encoder moves with it
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    sets = {IMAGENET: images, **shifts}
    selected = layers if layers is None or isinstance(layers, str) else list(layers)
    clock = Clock(progress, len(sets) + (layer_images > 0) + (broden is not None))
    with Ranks() as ranks:
        run = _Run(encoder, head, folder, Stages(folder, resume), clock, batch_size, device, workers, seed, resume, stop, ranks)
        names = file_names(sets)
        embedded = {name: run.embed(name, one, folder / "embeddings" / f"{names[name]}.safetensors") for name, one in sets.items()}
        found, why = run.directions(embedded[IMAGENET])
        dissections, made = ({}, {}) if broden is None else run.concepts(broden, found, embedded[IMAGENET])

        def rest() -> Interpretation:
            result = run.results(embedded, found, why, sets, baseline, x, dict(published or {}))
            run.add_layers(result.results, embedded[IMAGENET], images, selected, layer_images)
            run.add_concepts(result.results, dissections, made)
            result.results |= {"about": dict(about or {})}
            write(result)
            return result

        result: Interpretation = by_first(ranks, rest)
    result.concepts = dissections  # not sent from rank to rank: every one has them
    return result


class _Run(Passes):
    """The stages of one run."""

    def directions(self, images: Embeddings) -> tuple[Directions | None, str]:
        """From the half of the images that nothing is evaluated on; where there are none, why."""
        if self.head is None:
            return None, "no head was given"
        try:
            return privileged_directions(self.head, split(images, seed=self.seed)[0].h), ""
        except ValueError as error:  # too few images, a head of zeros, no finite representation
            return None, str(error)

    def results(
        self,
        sets: Mapping[str, Embeddings],
        found: Directions | None,
        why: str,
        sources: Mapping[str, Images],
        baseline: Baseline | None,
        x: X,
        published: dict[str, float],
    ) -> Interpretation:
        """Every section that its inputs are there for, from the representations."""
        images, head, seed, run = sets[IMAGENET], self.head, self.seed, self.stages.run
        facts = self.facts | {"images": identity(images)}
        everything = self.facts | {"sets": {name: identity(one) for name, one in sets.items()}, "x": x, "baseline": _baseline(baseline)}
        kurtosis = run("kurtosis", facts, lambda: measures.representation(images, seed))
        values, peak = ([float("nan") if value is None else value for value in kurtosis.pop(key)] for key in ("values", "peaks"))
        results: Plain = {"kurtosis": kurtosis, "outliers": run("outliers", facts, lambda: measures.outliers(images))}
        skipped: dict[str, str] = {}
        right: list[bool | None] = []
        labelled = {name: one for name, one in sets.items() if bool((one.y >= 0).any())}
        unlabelled = "no head was given" if head is None else "the images have no labels"
        if head is None or IMAGENET not in labelled:
            skipped["accuracy"] = skipped["robustness"] = unlabelled
        else:
            results["accuracy"] = run("accuracy", everything, lambda: measures.accuracies(head, labelled, seed))
            right = results["accuracy"].pop("right")
        if head is None or found is None:
            skipped |= dict.fromkeys(("directions", "ablation", "pruning"), why)
        else:
            first, second = split(images, seed=seed)
            features = results["outliers"]["indices"]
            results["directions"] = run("directions", facts, lambda: measures.directions(head, found, first, features))
            if not bool((second.y >= 0).any()):
                in_half = "the half of the images that would be evaluated has no labels" if IMAGENET in labelled else unlabelled
                skipped |= dict.fromkeys(("ablation", "pruning"), in_half)
            else:
                if why_not := measures.not_to_ablate(features, images.features):
                    skipped["ablation"] = why_not
                else:
                    results["ablation"] = run("ablation", facts, lambda: measures.ablations(head, second, first, features, seed))
                evaluated = {IMAGENET: second} | {
                    name: rest for name, one in labelled.items() if name != IMAGENET and (rest := _without(one, first)) is not None
                }
                results["pruning"] = run("pruning", everything, lambda: measures.pruning(head, found, evaluated, x, baseline, seed))
        self._robustness(results, skipped, everything, [name for name in sets if name != IMAGENET], x, baseline, published)
        results["skipped"] = skipped
        results = self._described(sets, sources) | results
        return Interpretation(results, values, peak, images.ids, self.folder, right)

    def _robustness(
        self,
        results: Plain,
        skipped: dict[str, str],
        facts: Plain,
        shifts: list[str],
        x: X,
        baseline: Baseline | None,
        published: dict[str, float],
    ) -> None:
        """From the accuracies that were measured; where no shifts are given, from published ones."""
        if shifts:
            accuracies, source = {name: 100 * one["accuracy"] for name, one in results.get("accuracy", {}).items()}, "measured"
            if not accuracies:
                return  # no head or no labels, as was said
        else:
            accuracies, source, shifts = published, "published", [name for name in published if name != IMAGENET]
        if not shifts:
            skipped.setdefault("robustness", "no shifted images were given (--shift)")
            return
        facts = facts | {"accuracies": accuracies, "shifts": shifts}
        found = self.stages.run("robustness", facts, lambda: measures.robust(accuracies, shifts, x, baseline, source))
        if found["rows"]:
            results["robustness"] = found
            skipped.pop("robustness", None)
        else:
            skipped["robustness"] = "; ".join(f"{name}: {reason}" for name, reason in found["left_out"].items())

    def _described(self, sets: Mapping[str, Embeddings], sources: Mapping[str, Images]) -> Plain:
        """What was run on what."""
        return {
            "format": FORMAT,
            "torchprobe": torchprobe.__version__,
            "torch": torch.__version__,
            "name": self.encoder.name,
            "features": self.encoder.features,
            "head": None
            if self.head is None
            else {"classes": self.head.out_features, "normalize": self.head.normalize, "digest": self.facts["head"][0]},
            "data": {
                name: {
                    "images": len(one),
                    "labelled": int((one.y >= 0).sum()),
                    "skipped": [{"file": file, "reason": reason} for file, reason in one.skipped],
                    "classes": None if one.classes is None else len(one.classes),
                    "remarks": list(source.remarks) if isinstance(source := sources[name], LabeledImages) else [],
                }
                for name, one in sets.items()
            },
            "settings": {"batch_size": self.batch_size, "device": str(self.device or "cpu"), "seed": self.seed},
        }


def _without(shifted: Embeddings, first: Embeddings) -> Embeddings | None:
    """The shifted images whose unshifted selves, which have the same name, did not measure importance; None if no labelled one is left."""
    used = set(first.ids)
    rest = shifted.select([name not in used for name in shifted.ids])
    return rest if bool((rest.y >= 0).any()) else None


def _baseline(baseline: Baseline | None) -> Any:
    return None if baseline is None else {name: list(map(float, values)) for name, values in baseline.accuracies.items()}
