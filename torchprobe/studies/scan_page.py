"""The page and the lines of a scan: what was seen, beside what it is read against. No verdict."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch

from torchprobe.analysis.intervals import LEVEL
from torchprobe.analysis.outliers import FEATURE_COLUMNS
from torchprobe.rendering import plots
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import LAYER_COLUMNS, Column, Row, number
from torchprobe.studies.scan import DEFINITIONS, Scan

SHOWN_FEATURES = 20
NAMED_FEATURES = 6

PER_IMAGE = Column("vectors_per_image", "per image", "vectors each image gives: 1 for a pooled vector, else tokens or map positions")
VECTOR = Column("vector", "one vector", "what one vector is: an image, one of its tokens, or one position of its map", "text")
UNREADABLE = (Column("file", "file", "name within the folder", "text"), Column("reason", "reason", "why it could not be read", "text"))


def layer_columns(extra: Column = PER_IMAGE) -> list[Column]:
    """The columns of the layer table of a scan: the usual ones, and what one vector is."""
    columns = list(LAYER_COLUMNS)
    columns.insert(1 + [c.key for c in columns].index("vectors"), extra)
    return columns


def with_vectors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a scan with ``vector``: what one vector is, in words."""
    named = []
    for row in rows:
        unit = "position" if row["feature_dim"] == 1 else "token"
        many = row["vectors_per_image"]
        named.append({**row, "vector": "image" if many == 1 else f"1 of {number(many)} {unit}s"})
    return named


def scan_page(scan: Scan) -> Page:
    """The page of a scan."""
    return Page(
        kind="scan",
        title=scan.model,
        summary=f"{number(scan.images)} images, one look at each layer: is the activation spread over the features, or do a few carry it?",
        notice=f"Partial: stopped after {scan.images} of {scan.total} images. Everything below is about those." if scan.partial else "",
        facts=facts(scan),
        sections=[representation(scan), outlier_features(scan), depth(scan), *unreadable(scan), reading(scan)],
        footer=footer(scan),
    )


def facts(scan: Scan) -> list[Fact]:
    """The numbers at the head."""
    r = scan.summary()["representation"]
    low, high = r["interval"]
    missing = f"{len(scan.unreadable)} could not be read" if scan.unreadable else "all could be read"
    return [
        Fact(
            "Vector kurtosis",
            number(r["vector_kurtosis"], 3),
            f"{LEVEL:.0%} interval {number(low, 3)} … {number(high, 3)}, median {number(r['vector_kurtosis_median'], 3)}",
        ),
        Fact("Gaussian features", number(r["gaussian"]), f"± {number(r['gaussian_std'], 2)} from vector to vector"),
        Fact("Ceiling", number(r["ceiling"], 3), f"for {number(r['features'])} features"),
        Fact("max|h| / mean|h|", number(r["peak"], 3), "mean over images"),
        Fact("Images", number(scan.images), missing),
    ]


def representation(scan: Scan) -> Section:
    """Where the vector kurtosis of the images lies."""
    d, interval = scan.representation.features, scan.interval()
    return Section(
        "The representation",
        [
            f"Each image gives one vector of {number(d)} features, the one a head would see, before normalisation. The "
            "histogram is its kurtosis image by image. Independent Gaussian features would fall into the grey range; the "
            "dashed line is the most that so many features can reach.",
            relu_note(scan),
        ],
        [
            Picture(
                lambda width: plots.kurtosis_histogram(scan.kurtosis, d, interval=interval, width=width),
                f"Histogram of the vector kurtosis of {scan.images} images",
            )
        ],
    )


def relu_note(scan: Scan) -> str:
    """What rectification alone does to the number, and whether this representation looks rectified."""
    low, high = plots.POOLED_RELU
    note = (
        f"pooled features behind a ReLU can have a kurtosis of {low:g} to {high:g} without any outlier, because their "
        "distribution is skewed. Compare like with like."
    )
    if bool((scan.representation.min >= 0).all()):
        return f"No value of this representation is negative, as after a ReLU; {note}"
    return f"This representation has negative values, so it does not come from a ReLU; {note}"


def outlier_features(scan: Scan) -> Section:
    """Which features stand out, by index."""
    m, rows = scan.representation, scan.features()
    named = [row["feature"] for row in rows[:NAMED_FEATURES] if row["outlier_share"] > 0]
    return Section(
        "Features by index",
        [
            "Above: how large each feature is on average beside the others. Below: in what share of the images it lies "
            "more than 6 standard deviations from the mean of its vector. " + outlier_sentence(scan),
        ],
        [
            Picture(
                lambda width: plots.feature_profile(m.mean_abs.cpu(), m.outlier_frequency.cpu(), named=named, width=width),
                f"Relative size and outlier share of {m.features} features",
            )
        ],
        [
            Table(
                rows[:SHOWN_FEATURES],
                FEATURE_COLUMNS,
                f"The {min(SHOWN_FEATURES, len(rows))} features that stand out most; all are in features.csv",
            )
        ],
    )


def outlier_sentence(scan: Scan) -> str:
    """How many features are outliers, in words."""
    m = scan.representation
    if bool(m.outlier_frequency.isnan().all()):
        return f"With {m.features} features none can lie that far out, so the share is not defined."
    outliers = scan.outliers()
    if not outliers:
        return "No feature is an outlier in any image."
    often = sum(row["outlier_share"] >= 0.5 for row in outliers)
    return (
        f"{number(len(outliers))} of {number(m.features)} features are outliers in at least one image, "
        f"{number(often)} in at least half of them."
    )


def depth(scan: Scan, band: Sequence[Sequence[Row]] = (), band_label: str = "", label: str = "mean over vectors") -> Section:
    """The layers, in the order in which they ran."""
    rows = scan.layers()
    return Section(
        "Over depth",
        [
            "Kurtosis across the features of one vector, mean and median over all vectors of a layer. What one vector is "
            "differs between layers (in the table: the image, one of its tokens, or one position of its map), and "
            "decides the value: compare a layer with the same layer of another network rather than with its neighbour.",
            "A mean far above the median means that few vectors, such as single tokens, carry the kurtosis.",
        ],
        [
            Picture(
                lambda width: plots.depth_profile(rows, band=band, label=label, band_label=band_label, width=width),
                f"Vector kurtosis of {len(rows)} layers",
            )
        ],
        [Table(with_vectors(rows), layer_columns(VECTOR), "All recorded layers; a click on a head sorts")],
    )


def unreadable(scan: Scan) -> list[Section]:
    """The files that are not in the numbers, if any."""
    if not scan.unreadable:
        return []
    rows = [{"file": file, "reason": reason} for file, reason in scan.unreadable]
    return [
        Section(
            f"Left out: {len(rows)} files", ["These could not be read and are in none of the numbers."], tables=[Table(rows, UNREADABLE)]
        )
    ]


def reading(scan: Scan) -> Section:
    """Definitions, choices, and what the numbers do not say."""
    terms = [
        *DEFINITIONS.items(),
        (
            "vector",
            "in the representation, the encoder's output for one image; in a layer, the features of one position along “dim”, "
            "taken at every position of every image.",
        ),
        (
            "choices of ours",
            "6 standard deviations for an outlier; all positions of a layer with equal weight; the mean as headline beside the "
            "median; the interval over images; preprocessing as the weights ask for.",
        ),
        (
            "what it does not say",
            "a high value describes how activation is spread over the features of this encoder on these images. It goes along "
            "with other properties in some families of encoders; it does not show that it causes them, and there is no threshold.",
        ),
    ]
    return Section("How to read this", terms=terms)


def footer(scan: Scan) -> list[str]:
    """Versions and settings."""
    import torchprobe

    settings = ", ".join(f"{key} {value}" for key, value in scan.settings.items() if value is not None)
    return [
        f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        f"Settings: {settings}.",
    ]
