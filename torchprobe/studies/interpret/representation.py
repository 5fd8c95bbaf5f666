"""Three sections of an interpretation: vector kurtosis, outlier features with their ablation, and the layers.

Each section is a record of numbers, with a function that measures it and one that writes it for the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch

from torchprobe.analysis.ablation import ablation
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.kurtosis import summarize
from torchprobe.analysis.outlier_rule import CORE
from torchprobe.analysis.outliers import Rule, llm_int8_outliers, massive_activations, outlier_columns, outlier_features, rms_kurtosis
from torchprobe.analysis.resampling import bootstrap_interval
from torchprobe.analysis.vectors import image_means, images_of
from torchprobe.common.messages import counted
from torchprobe.common.records import Key, Record, decode
from torchprobe.encoders import Head
from torchprobe.rendering import plots
from torchprobe.rendering.page import Picture, Section, Table
from torchprobe.rendering.tables import Column, number, percent
from torchprobe.studies.scan_report import VECTOR, layer_columns, with_vectors

SHOWN = 20
"""Rows of a table of features or directions."""


# -- kurtosis ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rotation(Record):
    """The mean vector kurtosis under random rotations; see :class:`torchprobe.analysis.RotationControl`."""

    mean: float
    std: float
    means: Annotated[list[float], Key("values")]


@dataclass(frozen=True, eq=False, kw_only=True)
class Kurtosis(Record):
    """Vector kurtosis and its controls; see :class:`torchprobe.analysis.KurtosisSummary`.

    ``per_image`` and ``peaks`` are the values of each image. They are in the file of the stage and in ``kurtosis.csv``, but not in
    ``results.json``.
    """

    mean: float
    median: float
    std: float
    interval: tuple[float, float]
    gaussian: float
    gaussian_std: float
    ceiling: float
    rotation: Rotation
    centered: Annotated[float, Key("centred")]
    peak: float
    nonnegative: bool
    features: int
    vectors: int
    constant_vectors: int
    invalid_vectors: int
    interval_level: float
    rms_kurtosis: float
    massive_activations: int
    per_image: Annotated[list[float] | None, Key("values")] = None
    peaks: list[float] | None = None


def measure_kurtosis(images: Embeddings, seed: int) -> Kurtosis:
    """Vector kurtosis with its controls. If an image has several vectors, its kurtosis is their mean, so that intervals are over images."""
    summary = summarize(images.h, seed=seed)
    if (owners := images_of(images.ids, images.provenance)) is not None:
        per_image, peaks = (image_means(each, owners)[0] for each in (summary.per_vector, summary.peaks))
        known = per_image[per_image.isfinite()]
        summary = replace(
            summary,
            mean=float(known.mean()),
            median=float(np.median(known.numpy())) if len(known) else math.nan,
            std=float(known.std(correction=0)),
            interval=bootstrap_interval(per_image.numpy(), seed),
            peak=float(peaks.nanmean()),
            vectors=len(known),
            per_vector=per_image,
            peaks=peaks,
        )
    plain = {
        **summary.as_dict(),
        "rms_kurtosis": rms_kurtosis(images.h),
        "massive_activations": len(massive_activations(images.h).values),
        "values": summary.per_vector.tolist(),
        "peaks": summary.peaks.tolist(),
    }
    return decode(Kurtosis, plain)


def kurtosis_section(found: Kurtosis, per_image: Sequence[float]) -> Section:
    """Vector kurtosis, image by image, and its controls."""
    rows = [
        {"what": "mean over images", "value": found.mean, "note": "the number of the model"},
        {"what": "median over images", "value": found.median, "note": "far below the mean if a few images have a very large value"},
        {"what": "random rotations", "value": found.rotation.mean, "note": f"{len(found.rotation.means)} rotations, which change the axes"},
        {"what": "mean image subtracted", "value": found.centered, "note": "without features that are large in every image"},
        {"what": "Gaussian features", "value": found.gaussian, "note": f"± {number(found.gaussian_std, 2)} from vector to vector"},
        {"what": "ceiling", "value": found.ceiling, "note": "all but one feature equal"},
        {"what": "max|h| / mean|h|", "value": found.peak, "note": "mean over images"},
        {"what": "kurtosis of the features' RMS", "value": found.rms_kurtosis, "note": "He et al. 2024; 1 if all features have one size"},
        {
            "what": "massive activations",
            "value": found.massive_activations,
            "note": "Sun et al. 2024: |h| > 100 and 1000 × the median",
        },
    ]
    if left_out := found.constant_vectors + found.invalid_vectors:
        note = f"{found.constant_vectors} with all features equal, {found.invalid_vectors} with nan or inf"
        rows.append({"what": "images without a kurtosis", "value": left_out, "note": note})
    columns = (
        Column("what", "vector kurtosis", "which value", "text"),
        Column("value", "", "value"),
        Column("note", "meaning", "how to read it", "text"),
    )
    return Section(
        "The representation",
        [
            "The kurtosis across the features of each vector, before it is scaled to length 1. Independent "
            "Gaussian features fall into the gray range. The ceiling is the largest value that so many features can have.",
            "No feature is ever negative here, as after a ReLU. There 5 to 9 is usual without an outlier: compare like with like."
            if found.nonnegative
            else "If random rotations lower the value to the Gaussian one, the kurtosis depends on the axes: some features stand out.",
        ],
        [
            Picture(
                lambda width: plots.kurtosis_histogram(per_image, found.features, interval=found.interval, width=width),
                f"Histogram of the vector kurtosis of {counted(found.vectors, 'image')}",
                "kurtosis",
            )
        ],
        [Table(rows, columns, "The number with its controls")],
    )


# -- outlier features ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Feature(Record):
    """One feature of the representation; see :func:`torchprobe.analysis.outliers.outlier_columns`.

    ``outlier_share`` is by the classical rule; results of earlier versions have no ``robust_share``.
    """

    feature: int
    outlier_share: float
    relative_size: float
    energy_share: float
    extreme_share: float
    mean: float
    std: float
    peak: float
    robust_share: float = math.nan


@dataclass(frozen=True, eq=False)
class Outliers(Record):
    """The outlier features by index, and all features; see :class:`torchprobe.analysis.OutlierFeatures`.

    ``indices`` are by ``rule``; ``classical`` and ``llm_int8`` are those of other rules, for comparison. LLM.int8() asks for |h_i| ≥ 6 at
    6 % of the positions, here the images, so it depends on the scale of h. Results of earlier versions are by the classical rule, and do
    not name it.
    """

    indices: list[int]
    features: int
    sigma: float
    frequency: float
    energy_share: float
    rows: list[Feature]
    rule: Rule = "classical"
    classical: list[int] = field(default_factory=list)
    llm_int8: list[int] = field(default_factory=list)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of :attr:`rows`."""
        return outlier_columns(self.sigma)

    @property
    def definition(self) -> str:
        """What an outlier feature is by the rule of these results, as the end of a sentence."""
        bulk = "the mean of the bulk of their vector" if self.rule == "robust" else "the mean of their vector"
        return f"more than {self.sigma:g} standard deviations from {bulk} in at least {percent(self.frequency)} of the images"


def measure_outliers(images: Embeddings, rule: Rule = "robust") -> Outliers:
    """The outlier features by index, and the table of all features."""
    found = outlier_features(images.h, rule=rule)
    rows = [Feature(**row) for row in found.rows()]
    return Outliers(
        indices=found.indices.tolist(),
        features=found.features,
        sigma=found.sigma,
        frequency=found.frequency,
        energy_share=found.energy_share,
        rows=rows,
        rule=found.rule,
        classical=found.classical.tolist(),
        llm_int8=llm_int8_outliers([images.h]).indices.tolist(),
    )


def outlier_section(found: Outliers) -> Section:
    """Which features stand out."""
    by_index = sorted(found.rows, key=lambda row: row.feature)
    if found.rule == "robust" and math.ceil(CORE * found.features) == found.features:
        sentence = f"{found.features} features are too few for one of them to stand out."
    elif found.rule == "classical" and all(math.isnan(row.outlier_share) for row in found.rows):
        sentence = (
            f"None of {number(found.features)} features can be {found.sigma:g} standard deviations from the mean of its vector, so no "
            "feature is an outlier feature."
        )
    else:
        sentence = (
            f"{number(len(found.indices))} of {number(found.features)} features lie {found.definition}. "
            f"They hold {percent(found.energy_share)} of the energy Σ h²."
        )
    if found.rule == "robust":
        sentence += (
            f" The bulk is the vector without its outliers, so that they do not hide each other. By the classical rule, with the standard "
            f"deviation of the whole vector, in half of the images, there are {number(len(found.classical))}; by that of LLM.int8(), "
            f"|h| ≥ 6 in 6 % of the images, {number(len(found.llm_int8))}."
        )
    profile = partial(
        plots.feature_profile,
        [row.relative_size for row in by_index],
        [row.robust_share if found.rule == "robust" else row.outlier_share for row in by_index],
        named=found.indices[:6],
        marked=found.indices,
    )
    return Section(
        "Outlier features",
        ["Above: the size of each feature compared with the others. Below: the share of the images in which it is an outlier. " + sentence],
        [Picture(lambda width: profile(width=width), f"Relative size and outlier share of {len(by_index)} features", "features")],
        [Table(found.rows[:SHOWN], found.columns, "The features that stand out most; all are in features.csv")],
    )


@dataclass(frozen=True, eq=False)
class AblationRow(Record):
    """The accuracy without the outlier features; see :class:`torchprobe.analysis.Ablation`."""

    how: str
    features: int
    accuracy: float
    ablated: float
    random_mean: float
    random_low: float
    random_high: float
    random_level: float = math.nan


@dataclass(frozen=True, eq=False)
class Ablation(Record):
    """The accuracy without the outlier features, one row for each way to replace them."""

    rows: list[AblationRow]


ABLATION_COLUMNS = (
    Column("how", "replaced by", "zero, or the mean of the feature over the other half of the images", "text"),
    Column("features", "features", "number of outlier features", "count"),
    Column("accuracy", "whole", "accuracy with all features", "share"),
    Column("ablated", "outliers ablated", "accuracy without the outlier features", "share"),
    Column("random_mean", "random ablated", "accuracy without equally many other features, mean over draws", "share"),
    Column("random_low", "from", "range of the draws that holds one more draw with the probability on the right: lower end", "share"),
    Column("random_high", "to", "its upper end", "share"),
    Column("random_level", "holds", "the probability that one more draw of random features lies within the range", "share"),
)


def why_no_ablation(found: Outliers) -> str | None:
    """Why the outlier features cannot be compared with equally many others, or None."""
    width = found.features
    if not found.indices and found.rule == "classical" and (width - 1) / math.sqrt(width) <= found.sigma:
        return f"there are no outlier features to ablate: none of {width} features can be {found.sigma:g} standard deviations from the mean"
    if not found.indices and found.rule == "robust" and math.ceil(CORE * width) == width:
        return f"there are no outlier features to ablate: {width} features are too few for one of them to stand out"
    if not found.indices:
        return "there are no outlier features to ablate"
    return "half of the features or more are outlier features" if 2 * len(found.indices) >= width else None


def measure_ablation(head: Head, images: Embeddings, reference: Embeddings, features: Sequence[int], seed: int) -> Ablation:
    """Accuracy without the outlier features, replaced by zero and by their mean, compared with equally many random features."""
    index = torch.tensor(list(features), dtype=torch.int64)
    rows = []
    for how in ("zero", "mean"):
        one = ablation(head, images, index, how=how, reference=reference, seed=seed)
        rows.append(AblationRow(how, len(features), one.accuracy, one.ablated, one.random_mean, *one.random_band, one.random_level))
    return Ablation(rows)


def ablation_section(found: Ablation) -> Section:
    """The accuracy without the outlier features."""
    text = (
        "Accuracy with the outlier features replaced by zero or by their mean, compared with equally many random other features. A loss "
        "outside the band coincides with these features in particular. It does not say why they exist."
    )
    return Section("Without the outlier features", [text], tables=[Table(found.rows, ABLATION_COLUMNS)])


# -- layers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layers(Record):
    """The layers of the encoder, as in a scan.

    Attributes:
        rows: one row per layer, see :meth:`torchprobe.studies.scan.Scan.layers`.
        images: number of images.
        skipped: number of images that could not be read.
        remarks: warnings of the recording.
        hidden: the outlier features, massive activations and those of LLM.int8() in words; results of earlier versions have none.
    """

    rows: list[dict[str, Any]]
    images: int
    skipped: int
    remarks: list[str]
    hidden: str | None = None


def layers_section(found: Layers) -> Section:
    """Kurtosis over depth."""
    text = (
        f"Kurtosis across the features of one vector in each layer, over {counted(found.images, 'image')}. One vector is an image, a token "
        "or a position of a map. This differs between layers and decides the value, so compare a layer with the same layer of another "
        "network."
    )
    return Section(
        "Over depth",
        [text, found.hidden] if found.hidden else [text],
        [Picture(lambda width: plots.depth_profile(found.rows, width=width), f"Vector kurtosis of {len(found.rows)} layers", "layers")],
        [Table(with_vectors(found.rows), layer_columns(VECTOR), "All recorded layers; a click on a column head sorts")],
        [("unexpected", remark) for remark in found.remarks],
    )
