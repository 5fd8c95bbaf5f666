"""What each part of an interpretation finds, as plain values: the measures of :mod:`torchprobe.analysis`, none of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchprobe.analysis.ablation import ablation
from torchprobe.analysis.baseline import SUBSETS, Baseline, X
from torchprobe.analysis.concepts import DIRECTIONS, UNITS, concept_names, concept_sweep
from torchprobe.analysis.directions import Directions, centred, privileged_directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.intervals import bootstrap_interval
from torchprobe.analysis.kurtosis import peaks, summarise, vector_kurtosis
from torchprobe.analysis.outliers import massive_activations, outlier_features, rms_kurtosis
from torchprobe.analysis.pruning import FRACTIONS, pruning_bands, pruning_curve
from torchprobe.analysis.robustness import effective_robustness, robustness
from torchprobe.dissection import Dissection
from torchprobe.encoders import Head
from torchprobe.studies.interpret.stages import Plain

IMAGENET = "imagenet"
"""What the unshifted images are called, ImageNet or not: the x axis of effective robustness."""

SEEDS = 5
"""Random orders of a pruning curve, for its band."""

HEADLINE = 0.9
"""Threshold of average precision of the numbers at the head of the page (a choice of ours)."""

_FEATURES_KEPT = 4096
"""Rows of the feature table that results.json holds at most; features.csv has all."""


def representation(images: Embeddings, seed: int) -> Plain:
    """Vector kurtosis with its controls; the values image by image are under ``values``."""
    return {
        **summarise(images.h, seed=seed).as_dict(),
        "rms_kurtosis": float(rms_kurtosis(images.h)),
        "massive_activations": len(massive_activations(images.h).values),
        "values": vector_kurtosis(images.h).tolist(),
        "peaks": peaks(images.h).tolist(),
    }


def outliers(images: Embeddings) -> Plain:
    """The outlier features by index, and the table of all features."""
    found = outlier_features(images.h)
    return {
        "indices": found.indices.tolist(),
        "features": found.features,
        "sigma": found.sigma,
        "frequency": found.frequency,
        "energy_share": found.energy_share,
        "rows": found.rows()[:_FEATURES_KEPT],
    }


def accuracies(head: Head, sets: Mapping[str, Embeddings], seed: int) -> Plain:
    """Top-1 and top-5 on every set, with an interval over images; and on the unshifted images the accuracy on the classes of each shift."""
    images = sets[IMAGENET]
    found: Plain = {name: _accuracy(head, embeddings, embeddings.classes, seed) for name, embeddings in sets.items()}
    for name, embeddings in sets.items():
        if name != IMAGENET and embeddings.classes is not None and bool(torch.isin(images.y, torch.tensor(embeddings.classes)).any()):
            subset = SUBSETS.get(name, f"{IMAGENET}_on_{name}_classes")
            found[subset] = _accuracy(head, images, embeddings.classes, seed)
    return found


def _accuracy(head: Head, embeddings: Embeddings, classes: Sequence[int] | None, seed: int) -> Plain:
    result = evaluate(head, embeddings, classes)
    return {
        "accuracy": result.accuracy,
        "top5": result.top5,
        "interval": list(bootstrap_interval(result.correct.double(), seed)),
        "images": result.n,
        "classes": len(classes) if classes is not None else head.out_features,
    }


def robust(accuracies: Mapping[str, float], x: X, baseline: Baseline | None, source: str) -> Plain:
    """Effective robustness of accuracies in per cent, in percentage points; ``source`` says where they are from."""
    table = robustness(accuracies, x=x, baseline=baseline)
    return {
        "rows": table.rows(),
        "mean_effective_robustness": table.mean_effective_robustness,
        "x": x,
        "accuracies": source,
        "baseline": "the published fits to the standard models of the ImageNet testbed" if baseline is None else baseline.source,
    }


def directions(head: Head, images: Embeddings, features: Sequence[int]) -> tuple[Directions, Plain]:
    """The singular directions of the head, their importance on ``images``, and how far they lie along the outlier features."""
    found = privileged_directions(head, images.h)
    without_mean = privileged_directions(centred(head), images.h) if head.out_features > 1 else found
    chance = len(features) / head.in_features
    parts: Plain = {"rank": found.rank, "images": found.vectors, "alignment_by_chance": chance, "outlier_features": len(features)}
    for name, one in (("head", found), ("centred", without_mean)):
        alignment, gaps = one.alignment(list(features)), one.gaps()
        order = one.order("importance").tolist()
        parts[name] = [
            {
                "direction": i,
                "singular_value": float(one.singular_values[i]),
                "importance": float(one.importance[i]),
                "alignment": float(alignment[i]),
                "gap": float(gaps[i]),
                "importance_rank": order.index(i),
            }
            for i in range(one.rank)
        ]
    return found, parts


def ablations(head: Head, images: Embeddings, reference: Embeddings, features: Sequence[int], seed: int) -> Plain:
    """Accuracy without the outlier features, zeroed and replaced by their mean, against equally many random ones."""
    index = torch.tensor(list(features), dtype=torch.int64)
    rows = []
    for how in ("zero", "mean"):
        one = ablation(head, images, index, how=how, reference=reference, seed=seed)
        rows.append(
            {
                "how": how,
                "features": len(features),
                "accuracy": one.accuracy,
                "ablated": one.ablated,
                "random_mean": one.random_mean,
                "random_low": one.random_band[0],
                "random_high": one.random_band[1],
            }
        )
    return {"rows": rows}


def pruning(head: Head, found: Directions, sets: Mapping[str, Embeddings], x: X, baseline: Baseline | None, seed: int) -> Plain:
    """Accuracy against the share of directions kept, in three orders, on every set; and effective robustness where there are shifts."""
    curves: Plain = {}
    for name, embeddings in sets.items():
        mine: Plain = {}
        for order in ("importance", "sigma"):
            curve = pruning_curve(head, found, embeddings, FRACTIONS, order=order)
            mine[order] = {"keep": curve.keep.tolist(), "kept": curve.kept.tolist(), "accuracy": curve.accuracy.tolist()}
        bands = pruning_bands(head, found, embeddings, range(seed, seed + SEEDS), FRACTIONS)
        mine["random"] = {
            "keep": bands.keep.tolist(), "kept": bands.kept.tolist(), "accuracy": bands.mean.tolist(),
            "low": bands.low.tolist(), "high": bands.high.tolist(),
        }  # fmt: skip
        curves[name] = mine
    return {"curves": curves, "robustness": _robustness_along(curves, baseline), "fractions": list(FRACTIONS), "seeds": SEEDS, "x": x}


def _robustness_along(curves: Mapping[str, Any], baseline: Baseline | None) -> Plain:
    """Effective robustness at every point of the curves; nan where the unshifted accuracy has no logit."""
    along: Plain = {}
    for name, mine in curves.items():
        if name == IMAGENET:
            continue
        along[name] = {}
        for order, curve in mine.items():
            base = curves[IMAGENET][order]["accuracy"]
            values = []
            for shifted, accuracy in zip(curve["accuracy"], base, strict=True):
                usable = 0 < accuracy < 1
                values.append(_robustness(100 * shifted, 100 * accuracy, name, baseline) if usable else math.nan)
            if any(not math.isnan(value) for value in values):
                along[name][order] = values
    return {name: orders for name, orders in along.items() if orders}


def _robustness(shifted: float, accuracy: float, shift: str, baseline: Baseline | None) -> float:
    try:
        return effective_robustness(shifted, accuracy, shift=shift, baseline=baseline)
    except ValueError:  # a set that the baseline does not know
        return math.nan


def concept_summary(found: Mapping[str, Dissection]) -> Plain:
    """How many concepts each basis encodes over a sweep of thresholds; the names at the headline threshold."""
    units = found[UNITS]
    return {
        "images": len(units.images),
        "labels": len(units.labels),
        "threshold": HEADLINE,
        "sweep": {name: concept_sweep(one) for name, one in found.items()},
        "names": {name: concept_names(one, HEADLINE) for name, one in found.items() if name in (UNITS, DIRECTIONS)},
        "best": {
            name: [
                {
                    "unit": row.unit, "label": row.label, "category": row.category, "average_precision": row.average_precision,
                    "prevalence": row.prevalence, "gain": row.score, "p_value": row.p_value,
                }
                for row in one.best("gain")[:20]
            ]
            for name, one in found.items()
            if name in (UNITS, DIRECTIONS)
        },
    }  # fmt: skip
