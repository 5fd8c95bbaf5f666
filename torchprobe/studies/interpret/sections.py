"""The sections of the page of an interpretation: each figure with what it shows and how to read it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchprobe.analysis.intervals import LEVEL
from torchprobe.analysis.outliers import PEAK, feature_columns
from torchprobe.rendering import plots
from torchprobe.rendering.page import Picture, Section, Table
from torchprobe.rendering.tables import Column, number
from torchprobe.studies.interpret import figures
from torchprobe.studies.interpret.columns import (
    ABLATION_COLUMNS,
    ACCURACY_COLUMNS,
    BEST_COLUMNS,
    CONCEPT_COLUMNS,
    DIRECTION_COLUMNS,
    ROBUSTNESS_COLUMNS,
)
from torchprobe.studies.interpret.result import Interpretation
from torchprobe.studies.scan_report import VECTOR, layer_columns, with_vectors

SHOWN = 20
"""Rows of a table of features or directions."""


def representation(found: Interpretation) -> list[Section]:
    """Vector kurtosis, image by image, and its controls."""
    k = found.results["kurtosis"]
    low, high = map(figures.nan, k["interval"])
    rows = [
        {"what": "mean over images", "value": k["mean"], "note": "the number of the model"},
        {"what": "median over images", "value": k["median"], "note": "where it is far below the mean, few images carry that"},
        {"what": "random rotations", "value": k["rotation"]["mean"], "note": f"{len(k['rotation']['values'])} of them: the axes forgotten"},
        {"what": "mean image subtracted", "value": k["centred"], "note": "without what is large in every image alike"},
        {"what": "Gaussian features", "value": k["gaussian"], "note": f"± {number(k['gaussian_std'], 2)} from vector to vector"},
        {"what": "ceiling", "value": k["ceiling"], "note": "all but one feature equal"},
        {"what": "max|h| / mean|h|", "value": k["peak"], "note": "mean over images"},
        {"what": "kurtosis of the features' RMS", "value": k["rms_kurtosis"], "note": "He et al. 2024; 1 when all features are alike"},
        {
            "what": "massive activations",
            "value": k["massive_activations"],
            "note": "Sun et al. 2024: |h| > 100 and 1000 × the median",
        },
    ]
    if not_counted := k["constant_vectors"] + k["invalid_vectors"]:
        note = f"{k['constant_vectors']} with all features equal, {k['invalid_vectors']} with nan or inf"
        rows.append({"what": "images without a kurtosis", "value": not_counted, "note": note})
    columns = (
        Column("what", "vector kurtosis", "which", "text"),
        Column("value", "", "value"),
        Column("note", "read it as", "what it says", "text"),
    )
    return [
        Section(
            "The representation",
            [
                "The kurtosis across the features of each image's vector, the one the head sees, before normalisation. Independent "
                "Gaussian features would fall into the grey range; the ceiling is the most that so many features can reach.",
                "No feature is ever negative here, as after a ReLU, where 5 to 9 needs no outlier: compare like with like."
                if k["nonnegative"]
                else "A value that falls to the Gaussian one under random rotations owes itself to the axes: some of them stand out.",
            ],
            [
                Picture(
                    partial(figures.histogram, found.kurtosis, found.results["features"], (low, high)),
                    f"Histogram of the vector kurtosis of {images(k['vectors'])}",
                )
            ],
            [Table(rows, columns, "The number beside its controls")],
        )
    ]


def outlier_features(r: dict[str, Any]) -> list[Section]:
    """Which features stand out."""
    o = r["outliers"]
    by_index = sorted(o["rows"], key=lambda row: row["feature"])
    named = o["indices"][:6]
    many = len(o["indices"])
    sentence = (
        f"Among {number(o['features'])} features none can be {o['sigma']:g} standard deviations from the mean of its vector, so "
        "there is no outlier feature by this definition."
        if all(row["outlier_share"] is None for row in o["rows"])
        else f"{number(many)} of {number(o['features'])} features lie more than {o['sigma']:g} standard deviations from the mean of their "
        f"vector in at least {per_cent(o['frequency'])} of the images; they hold {per_cent(o['energy_share'])} of the energy Σ h²."
    )
    return [
        Section(
            "Outlier features",
            ["Above: how large each feature is beside the others. Below: in what share of the images it is an outlier. " + sentence],
            [
                Picture(
                    lambda width: plots.feature_profile(
                        [figures.nan(row["relative_size"]) for row in by_index],
                        [figures.nan(row["outlier_share"]) for row in by_index],
                        named=named,
                        width=width,
                    ),
                    f"Relative size and outlier share of {len(by_index)} features",
                )
            ],
            [Table(o["rows"][:SHOWN], (*feature_columns(o["sigma"]), PEAK), "The features that stand out most; all are in features.csv")],
        )
    ]


def depth(r: dict[str, Any]) -> list[Section]:
    """The layers."""
    if "layers" not in r:
        return []
    rows = r["layers"]["rows"]
    return [
        Section(
            "Over depth",
            [
                f"Kurtosis across the features of one vector in each layer, over {images(r['layers']['images'])}. What one vector "
                "is – an image, a token, a position of a map – differs between layers and decides the value: compare a layer with the same "
                "layer of another network."
            ],
            [Picture(lambda width: plots.depth_profile(rows, width=width), f"Vector kurtosis of {len(rows)} layers")],
            [Table(with_vectors(rows), layer_columns(VECTOR), "All recorded layers; a click on a head sorts")],
            [("not as expected", remark) for remark in r["layers"]["remarks"]],
        )
    ]


def accuracy(r: dict[str, Any]) -> list[Section]:
    """What the head gets right."""
    if "accuracy" not in r:
        return []
    text = (
        "The share of images whose class the head ranks first, with an interval over images. A shift that has a part of the classes is "
        "evaluated among these, and the accuracy on the unshifted images among the same classes stands in a row of its own."
    )
    return [Section("Accuracy", [text], tables=[Table(accuracy_rows(r), ACCURACY_COLUMNS)])]


def accuracy_rows(r: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each set."""
    return [{"set": name, **one, "low": one["interval"][0], "high": one["interval"][1]} for name, one in r["accuracy"].items()]


def robustness(r: dict[str, Any]) -> list[Section]:
    """Accuracy under shift beyond what the unshifted accuracy lets expect."""
    if "robustness" not in r:
        return []
    return [
        Section(
            "Effective robustness",
            [
                "Accuracy under a shift, minus what standard models of the same unshifted accuracy have; 0 is on their line. It depends on "
                f"that line ({r['robustness']['baseline']}), and where a model lies beyond the standard ones the line is only continued.",
                f"The accuracies are {r['robustness']['accuracies']}"
                + (", so they are not of the images of this page" if r["robustness"]["accuracies"] == "published" else " on the sets above")
                + "; the unshifted one is on "
                + ("the classes of the shift." if r["robustness"]["x"] == "subset" else "all classes."),
                *(f"No effective robustness under {name}: {why}." for name, why in r["robustness"]["left_out"].items()),
            ],
            tables=[Table(robustness_rows(r), ROBUSTNESS_COLUMNS)],
        )
    ]


def robustness_rows(r: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each shift."""
    return list(r["robustness"]["rows"])


def directions(r: dict[str, Any]) -> list[Section]:
    """The singular directions of the head."""
    if "directions" not in r:
        return []
    d = r["directions"]
    pictures = [
        Picture(partial(figures.spectrum, d[name]), f"Singular values and importance of the directions {title}")
        for name, title in (("head", "of the head"), ("centred", "of the head without the mean over classes"))
        if d[name]
    ]
    along = "There are no outlier features that a direction could lie along."
    if d["outlier_features"]:
        along = "The last figure shows how far each direction lies along the outlier features; the dotted line is chance."
        pictures.append(
            Picture(
                partial(figures.alignment, d["head"], d["alignment_by_chance"]), "How far each direction lies along the outlier features"
            )
        )
    best = sorted(d["head"], key=lambda row: row["importance_rank"])[:SHOWN]
    return [
        Section(
            "Privileged directions",
            [
                "The head reads the representation along its singular directions. Importance is the singular value times the mean |cosine| "
                f"between the direction and the representations of {images(d['images'])} on which pruning and ablation are not evaluated.",
                (
                    "The first figure is for the head as it is, the second for the head without what it says of all classes alike, which "
                    "no decision depends on. "
                    if d["centred"]
                    else "The head says the same of all classes, so nothing is left of it without the mean over classes. "
                )
                + along,
            ],
            pictures,
            [Table(best, DIRECTION_COLUMNS, "The most important directions of the head; all are in directions.csv")],
        )
    ]


def pruning(r: dict[str, Any]) -> list[Section]:
    """Accuracy, and effective robustness, along pruning."""
    if "pruning" not in r:
        return []
    p = r["pruning"]
    pictures = [
        Picture(partial(figures.pruning, orders, "accuracy"), f"Accuracy on {name} against the share of directions kept")
        for name, orders in p["curves"].items()
    ]
    pictures += [
        Picture(partial(figures.pruning, orders, "effective_robustness"), f"Effective robustness under {name} along pruning")
        for name, orders in p["robustness"].items()
    ]
    order = ", ".join(f"{name} ({images(p['images'][name])})" for name in p["curves"])
    robust = (
        "Effective robustness sets the accuracy of each pruned head beside the unshifted accuracy of the same pruned head; where that is "
        "far below the standard models, the line is only continued."
    )
    return [
        Section(
            "Pruning directions",
            [
                "What the head still gets right when it keeps only part of its directions: the most important ones, those of largest "
                f"singular value, or as many at random (mean and {LEVEL:.0%} band). In this order: accuracy on {order}"
                + (f"; then effective robustness under {', '.join(p['robustness'])}." if p["robustness"] else "."),
                "A curve that stays flat says that the pruned directions were not needed on these images. None of them, shifted or not, "
                "has measured importance, so the right end is not quite the accuracy of all images.",
                *([robust] if p["robustness"] else []),
            ],
            pictures,
        )
    ]


def ablation(r: dict[str, Any]) -> list[Section]:
    """The outlier features taken out."""
    if "ablation" not in r:
        return []
    return [
        Section(
            "Without the outlier features",
            [
                "Accuracy when the outlier features are replaced by zero or by their mean, beside the same for equally many other features "
                "drawn at random. A loss beyond the band goes along with these features in particular; it says nothing about why they are "
                "there."
            ],
            tables=[Table(r["ablation"]["rows"], ABLATION_COLUMNS)],
        )
    ]


def concepts(r: dict[str, Any]) -> list[Section]:
    """Unique concepts and polysemanticity, beside the nulls."""
    if "concepts" not in r:
        return []
    c = r["concepts"]
    best = [{"basis": name, **row} for name, found in c["best"].items() for row in found[:10]]
    return [
        Section(
            "Concepts",
            [
                f"Every unit, and every direction of the head, ranks {images(c['images'])}; it encodes a concept when the average "
                "precision of that ranking is above the threshold and significant after correction for all pairs and both signs. The "
                "figures show how many distinct concepts are encoded, and how many one direction encodes, as the threshold rises.",
                "A random rotation of the units says what the axes have of their own; shuffled labels say what chance gives. In the paper "
                "the count goes along with language supervision, and is no indicator of robustness.",
            ],
            [
                Picture(
                    partial(figures.sweep, c["sweep"], "unique", "unique concepts"),
                    "Unique concepts against the threshold",
                ),
                Picture(
                    partial(figures.sweep, c["sweep"], "polysemanticity", "concepts per direction"),
                    "Concepts per direction against the threshold",
                ),
            ],
            [
                Table(concept_rows(r), CONCEPT_COLUMNS, f"At AP ≥ {c['threshold']:g}; the sweep is in concepts.csv"),
                Table(best, BEST_COLUMNS, "The pairs with the largest gain"),
            ],
        )
    ]


def concept_rows(r: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each basis, at the headline threshold."""
    c = r["concepts"]
    return [{"basis": name, **next(row for row in sweep if row["threshold"] == c["threshold"])} for name, sweep in c["sweep"].items()]


def images(n: int) -> str:
    """So many images, in words."""
    return count(n, "image")


def count(n: int, what: str) -> str:
    return f"{number(n)} {what}" + ("" if n == 1 else "s")


def per_cent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share, 3)} %"
