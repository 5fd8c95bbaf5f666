"""What each part of an interpretation finds, as plain values: the measures of :mod:`torchprobe.analysis`, none of its own."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from torchprobe.analysis.ablation import ablation
from torchprobe.analysis.baseline import SHIFTS, SUBSETS, Baseline, X
from torchprobe.analysis.concepts import DIRECTIONS, UNITS, concept_names, concept_sweep
from torchprobe.analysis.directions import Directions, centred, privileged_directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.intervals import band, bootstrap_interval
from torchprobe.analysis.kurtosis import peaks, summarise, vector_kurtosis
from torchprobe.analysis.outliers import SIGMA, massive_activations, outlier_features, rms_kurtosis
from torchprobe.analysis.pruning import FRACTIONS, kept_directions, pruning_bands, pruning_curve
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


def representation(images: Embeddings, seed: int) -> Plain:
    """Vector kurtosis with its controls; image by image it is under ``values``."""
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
        "rows": found.rows(),
    }


def accuracies(head: Head, sets: Mapping[str, Embeddings], seed: int) -> Plain:
    """Top-1 and top-5 on every set, with an interval over images; and on the unshifted images the accuracy on the classes of each shift.

    ``right`` is whether the head is right on each unshifted image.
    """
    images = sets[IMAGENET]
    found: Plain = {name: _accuracy(head, embeddings, seed) for name, embeddings in sets.items()}
    found["right"] = right(head, images)
    for name, embeddings in sets.items():
        if (subset := on_classes_of(images, embeddings)) is not None and name != IMAGENET:
            found[SUBSETS.get(name, f"{IMAGENET}_on_{name}_classes")] = _accuracy(head, subset, seed)
    return found


def right(head: Head, images: Embeddings) -> list[bool | None]:
    """Whether the head is right, image by image; None where the class is not known."""
    result = evaluate(head, images)
    each: list[bool | None] = [None] * len(images)
    for i, correct in zip(result.rows.tolist(), result.correct.tolist(), strict=True):
        each[i] = correct
    return each


def on_classes_of(images: Embeddings, shifted: Embeddings) -> Embeddings | None:
    """The unshifted images with the choice of classes that a shift has: the same rows compete, and those that stand for one class under
    the shift, as in ObjectNet, do so here. None if the shift has all classes, or no image is of one of its."""
    if shifted.classes is None or not bool(torch.isin(images.y, torch.tensor(shifted.classes)).any()):
        return None
    return replace(images, classes=shifted.classes, groups=shifted.groups)


def _accuracy(head: Head, embeddings: Embeddings, seed: int) -> Plain:
    result = evaluate(head, embeddings)
    return {
        "accuracy": result.accuracy,
        "top5": result.top5,
        "interval": list(bootstrap_interval(result.correct.double(), seed)),
        "images": result.n,
        "classes": len(result.classes),
        "unlabelled": result.unlabelled,
        "outside": result.outside,
        "nonfinite": result.nonfinite,
    }


def robust(accuracies: Mapping[str, float], shifts: Sequence[str], x: X, baseline: Baseline | None, source: str) -> Plain:
    """Effective robustness of accuracies in per cent, in percentage points.

    Args:
        accuracies: by set.
        shifts: which of them are under a shift.
        x, baseline: see :func:`torchprobe.analysis.robustness`.
        source: where the accuracies are from, in a word.

    Returns:
        ``left_out`` says why a shift has none: the standard models were not measured on it, or the x axis is missing.
    """
    left_out: dict[str, str] = {}
    for shift in shifts:
        if shift not in (SHIFTS if baseline is None else baseline.shifts):
            left_out[shift] = "there are no standard models that were measured on it (--baseline)"
        elif why := _refused({name: value for name, value in accuracies.items() if name == shift or name not in shifts}, x, baseline):
            left_out[shift] = why
    rows, mean = [], math.nan
    if len(left_out) < len(shifts):
        with _near_chance():
            table = robustness({name: value for name, value in accuracies.items() if name not in left_out}, x=x, baseline=baseline)
        rows, mean = table.rows(), table.mean_effective_robustness
    return {
        "rows": rows,
        "mean_effective_robustness": mean,
        "x": x,
        "accuracies": source,
        "baseline": "the published fits to the standard models of the ImageNet testbed" if baseline is None else baseline.source,
        "left_out": left_out,
    }


def mean_robustness(found: Mapping[str, Any]) -> tuple[float | None, int]:
    """The mean of the effective robustnesses there are, in percentage points, and of how many shifts; of what :func:`robust` found."""
    values = [row["effective_robustness"] for row in found["rows"] if row["shift"] != "mean" and row["effective_robustness"] is not None]
    return (math.fsum(values) / len(values) if values else None), len(values)


def _refused(accuracies: Mapping[str, float], x: X, baseline: Baseline | None) -> str | None:
    try:
        with _near_chance():
            robustness(accuracies, x=x, baseline=baseline)
    except ValueError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _near_chance() -> Iterator[None]:
    """Accuracies near chance among 1000 classes are below 1 %, and need no warning that they look like fractions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no accuracy is above 1")
        yield


def directions(head: Head, found: Directions, images: Embeddings, features: Sequence[int]) -> Plain:
    """The singular directions of the head, their importance on ``images``, and how far they lie along the outlier features."""
    without_mean = centred(head)
    both = {"head": found}
    if bool(without_mean.weight.any()):  # else the head says the same of all classes
        both["centred"] = privileged_directions(without_mean, images.h)
    parts: Plain = {
        "rank": found.rank,
        "images": found.vectors,
        "zero_vectors": found.zero_vectors,
        "invalid_vectors": found.invalid_vectors,
        "alignment_by_chance": len(features) / head.in_features,
        "outlier_features": len(features),
        "centred": [],
    }
    for name, one in both.items():
        alignment, gaps = one.alignment(list(features)), one.gaps()
        rank_of = one.order("importance").argsort()
        parts[name] = [
            {
                "direction": i,
                "singular_value": float(one.singular_values[i]),
                "importance": float(one.importance[i]),
                "alignment": float(alignment[i]),
                "gap": float(gaps[i]),
                "importance_rank": int(rank_of[i]),
            }
            for i in range(one.rank)
        ]
    return parts


def not_to_ablate(features: Sequence[int], width: int) -> str | None:
    """Why the outlier features cannot be compared with as many others, or None."""
    if not features and (width - 1) / math.sqrt(width) <= SIGMA:
        return f"there are no outlier features to ablate: among {width} features none can be {SIGMA:g} standard deviations out"
    if not features:
        return "there are no outlier features to ablate"
    return "half of the features or more are outlier features" if 2 * len(features) >= width else None


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
    """Accuracy against the share of directions kept, in three orders, on every set; and effective robustness where there are shifts.

    The x axis of effective robustness is the unshifted accuracy of the same pruned head, on the classes of the shift where ``x`` is
    "subset". At random it is computed draw by draw.
    """
    curves = {name: _curves(head, found, embeddings, seed) for name, embeddings in sets.items()}
    along: Plain = {}
    for name, shifted in sets.items():
        if name == IMAGENET or name not in (SHIFTS if baseline is None else baseline.shifts):
            continue
        subset = on_classes_of(sets[IMAGENET], shifted) if x == "subset" and name in SUBSETS else None
        if x == "subset" and name in SUBSETS and subset is None:
            continue
        base = curves[IMAGENET] if subset is None else _curves(head, found, subset, seed)
        try:
            robust = {order: effective_robustness_along(100 * curves[name][order], 100 * base[order], name, x, baseline) for order in base}
        except ValueError:  # the baseline has no line for this shift and x; the section on effective robustness says so
            continue
        along[name] = {order: _points(found, "effective_robustness", values) for order, values in robust.items()}
    return {
        "curves": {name: {order: _points(found, "accuracy", values) for order, values in mine.items()} for name, mine in curves.items()},
        "robustness": along,
        "images": {name: int((one.y >= 0).sum()) for name, one in sets.items()},
        "seeds": SEEDS,
        "x": x,
    }


def _curves(head: Head, found: Directions, embeddings: Embeddings, seed: int) -> dict[str, NDArray[np.float64]]:
    """Order → accuracy, (points,), at random (draws, points)."""
    curves = {order: pruning_curve(head, found, embeddings, FRACTIONS, order=order).accuracy.numpy() for order in ("importance", "sigma")}
    curves["random"] = pruning_bands(head, found, embeddings, range(seed, seed + SEEDS), FRACTIONS).accuracy.numpy()
    return curves


def _points(found: Directions, what: str, values: NDArray[np.float64]) -> Plain:
    """The points of one order; of several draws their mean and band."""
    points: Plain = {"keep": list(FRACTIONS), "kept": [kept_directions(found, fraction) for fraction in FRACTIONS]}
    if values.ndim == 1:
        return points | {what: values.tolist()}
    low, high = band(values)
    return points | {what: values.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def effective_robustness_along(accuracy: ArrayLike, base: ArrayLike, shift: str, x: X, baseline: Baseline | None) -> NDArray[np.float64]:
    """Effective robustness point by point, of accuracies in per cent; nan where the unshifted one is 0 or 100, which has no logit."""
    base = np.asarray(base, dtype=np.float64)
    usable = np.where((base > 0) & (base < 100), base, math.nan)
    with _near_chance():
        return effective_robustness(np.asarray(accuracy, dtype=np.float64), usable, shift=shift, x=x, baseline=baseline)


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
