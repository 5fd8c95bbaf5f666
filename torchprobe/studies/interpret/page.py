"""The page of an interpretation: each figure with what it shows and how to read it; no verdict."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from typing import Any

from torchprobe.analysis.concepts import DIRECTIONS, ROTATION, SHUFFLED, UNITS
from torchprobe.analysis.intervals import LEVEL
from torchprobe.analysis.outliers import PEAK, feature_columns
from torchprobe.rendering import plots
from torchprobe.rendering.curves import Series, curves
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import Column, number
from torchprobe.studies.interpret.measures import IMAGENET, SEEDS
from torchprobe.studies.interpret.result import Interpretation
from torchprobe.studies.scan_page import VECTOR, layer_columns, with_vectors

SHOWN = 20

ORDERS = {"importance": "by importance", "sigma": "by singular value", "random": f"at random, {SEEDS} seeds"}

ACCURACY_COLUMNS = (
    Column("set", "images", "which images; “imagenet” are the unshifted ones, whatever they are", "text"),
    Column("accuracy", "accuracy", "share of the images whose class has the largest logit", "share"),
    Column("low", "from", f"{LEVEL:.0%} interval over images: lower end", "share"),
    Column("high", "to", f"{LEVEL:.0%} interval over images: upper end", "share"),
    Column("top5", "top 5", "share of the images whose class is among the five largest logits", "share"),
    Column("images", "n", "labelled images", "count"),
    Column("classes", "classes", "rows of the head that compete", "count"),
)

ROBUSTNESS_COLUMNS = (
    Column("shift", "shift", "the shifted images; “mean”: of the mean accuracy over the five ImageNet shifts", "text"),
    Column("accuracy", "accuracy %", "accuracy under the shift, per cent"),
    Column("imagenet", "unshifted %", "accuracy on the unshifted images, per cent: the x axis of the fit"),
    Column("predicted", "expected %", "what a standard model of that unshifted accuracy has under the shift"),
    Column("effective_robustness", "ER", "accuracy − expected, percentage points"),
    Column("low", "from", f"{LEVEL:.0%} prediction interval of one more standard model, lower end of ER"),
    Column("high", "to", "its upper end"),
    Column("note", "note", "extrapolated beyond the standard models; a poor fit", "text"),
)

DIRECTION_COLUMNS = (
    Column("direction", "direction", "index, by falling singular value", "index"),
    Column("singular_value", "σ", "singular value of the head"),
    Column("importance", "importance", "σ · mean |cos(v, h)| over images"),
    Column("alignment", "alignment", "Σ v_j² over the outlier features: how far the direction lies along them", "share"),
    Column("gap", "gap", "distance to the nearest other σ, in units of the largest; near 1e-7 the direction itself is not determined"),
)

ABLATION_COLUMNS = (
    Column("how", "replaced by", "zero, or the mean of the feature over the other half of the images", "text"),
    Column("features", "features", "how many", "count"),
    Column("accuracy", "whole", "accuracy with all features", "share"),
    Column("ablated", "outliers ablated", "accuracy without the outlier features", "share"),
    Column("random_mean", "random ablated", "accuracy without equally many other features, mean over draws", "share"),
    Column("random_low", "from", f"{LEVEL:.0%} of the draws: lower end", "share"),
    Column("random_high", "to", f"{LEVEL:.0%} of the draws: upper end", "share"),
)

CONCEPT_COLUMNS = (
    Column("basis", "basis", "the axes, the directions of the head, and the controls", "text"),
    Column("unique", "unique concepts", "concepts that some direction encodes", "count"),
    Column("encoding", "encoding", "directions with at least one concept", "count"),
    Column("polysemanticity", "concepts per direction", "mean over all directions"),
    Column("polysemanticity_encoding", "per encoding one", "mean over the directions with at least one concept"),
)

BEST_COLUMNS = (
    Column("basis", "basis", "axes, or directions of the head", "text"),
    Column("unit", "index", "of the unit or direction", "index"),
    Column("label", "concept", "the one with the largest gain", "text"),
    Column("category", "category", "of the concept", "text"),
    Column("average_precision", "AP", "average precision"),
    Column("prevalence", "prevalence", "share of the annotated images that show it: what chance gives, about", "share"),
    Column("gain", "gain", "(AP − prevalence) / (1 − prevalence)"),
    Column("p_value", "p", "of this pair by itself, uncorrected"),
)

SKIPPED_COLUMNS = (Column("section", "section", "what is missing", "text"), Column("why", "why", "the input that was not there", "text"))


def interpretation_page(found: Interpretation) -> Page:
    """Everything in one page."""
    r = found.results
    about = ", ".join(str(r["about"][key]) for key in ("role", "backbone", "pretraining") if r["about"].get(key))
    return Page(
        kind="interpret",
        title=found.name,
        summary=f"{about + ': ' if about else ''}{number(r['data'][IMAGENET]['images'])} images through the encoder; outlier features, "
        "privileged directions, concepts and robustness, each beside what it is read against.",
        facts=facts(r),
        sections=[
            *representation(found),
            *outlier_features(r),
            *depth(r),
            *accuracy(r),
            *robustness(r),
            *directions(r),
            *pruning(r),
            *ablation(r),
            *concepts(r),
            *left_out(r),
            reading(r),
        ],
        footer=footer(r),
    )


def facts(r: dict[str, Any]) -> list[Fact]:
    """The numbers at the head."""
    k = r["kurtosis"]
    low, high = k["interval"]
    heads = [
        Fact(
            "Vector kurtosis",
            number(k["mean"], 3),
            f"{LEVEL:.0%} interval {number(low, 3)} … {number(high, 3)}; Gaussian {number(k['gaussian'], 3)}",
        ),
        Fact("Outlier features", number(len(r["outliers"]["indices"])), f"of {number(r['features'])}"),
    ]
    if "accuracy" in r:
        one = r["accuracy"][IMAGENET]
        heads.append(Fact("Accuracy", _per_cent(one["accuracy"]), f"{number(one['images'])} images, {number(one['classes'])} classes"))
    if "robustness" in r:
        rows = r["robustness"]["rows"]
        value = r["robustness"]["mean_effective_robustness"]
        value = sum(row["effective_robustness"] or 0 for row in rows) / len(rows) if value is None else value
        heads.append(Fact("Effective robustness", f"{value:+.1f}", f"percentage points, mean over {len(_shifts(rows))} shifts"))
    if "concepts" in r:
        c = r["concepts"]
        headline = next(row for row in c["sweep"][UNITS] if row["threshold"] == c["threshold"])
        null = next(row for row in c["sweep"][SHUFFLED] if row["threshold"] == c["threshold"])
        heads.append(
            Fact(
                "Unique concepts",
                number(headline["unique"]),
                f"AP ≥ {c['threshold']:g}, beyond chance; {null['unique']} with shuffled labels",
            )
        )
    return heads


def representation(found: Interpretation) -> list[Section]:
    """Vector kurtosis, image by image, and its controls."""
    k = found.results["kurtosis"]
    low, high = map(_nan, k["interval"])
    rows = [
        {"what": "mean over images", "value": k["mean"], "note": "the number of the model"},
        {"what": "median over images", "value": k["median"], "note": "where it is far below the mean, few images carry that"},
        {"what": "random rotations", "value": k["rotation"]["mean"], "note": f"{len(k['rotation']['values'])} of them: the axes forgotten"},
        {"what": "mean image subtracted", "value": k["centred"], "note": "without what is large in every image alike"},
        {"what": "Gaussian features", "value": k["gaussian"], "note": f"± {number(k['gaussian_std'], 2)} from vector to vector"},
        {"what": "ceiling", "value": k["ceiling"], "note": "all but one feature equal"},
        {"what": "max|h| / mean|h|", "value": k["peak"], "note": "mean over images"},
        {"what": "kurtosis of the features' RMS", "value": k["rms_kurtosis"], "note": "He et al. 2024; 1 when all features are alike"},
    ]
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
                "Gaussian features would fall into the grey range; the dashed line is the most that so many features can reach.",
                "No feature is ever negative here, as after a ReLU, where 5 to 9 needs no outlier: compare like with like."
                if k["nonnegative"]
                else "A value that falls to the Gaussian one under random rotations owes itself to the axes: some of them stand out.",
            ],
            [
                Picture(
                    partial(_histogram, found.kurtosis, found.results["features"], (low, high)),
                    f"Histogram of the vector kurtosis of {len(found.kurtosis)} images",
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
        f"{number(many)} of {number(o['features'])} features lie more than {o['sigma']:g} standard deviations from the mean of their "
        f"vector in at least {_per_cent(o['frequency'])} of the images; they hold {_per_cent(o['energy_share'])} of the energy Σ h²."
    )
    return [
        Section(
            "Outlier features",
            ["Above: how large each feature is beside the others. Below: in what share of the images it is an outlier. " + sentence],
            [
                Picture(
                    lambda width: plots.feature_profile(
                        [_nan(row["relative_size"]) for row in by_index],
                        [_nan(row["outlier_share"]) for row in by_index],
                        labelled=named,
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
                f"Kurtosis across the features of one vector in each layer, over {number(r['layers']['images'])} images. What one vector "
                "is – an image, a token, a position of a map – differs between layers and decides the value: compare a layer with the same "
                "layer of another network."
            ],
            [Picture(lambda width: plots.depth_profile(rows, width=width), f"Vector kurtosis of {len(rows)} layers")],
            [Table(with_vectors(rows), layer_columns(VECTOR), "All recorded layers; a click on a head sorts")],
        )
    ]


def accuracy(r: dict[str, Any]) -> list[Section]:
    """What the head gets right."""
    if "accuracy" not in r:
        return []
    text = (
        "The share of images whose class the head ranks first, with an interval over images. A shift that has a part of the classes is "
        "evaluated among these, and the accuracy on the unshifted images among the same classes stands beside it."
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
                f"that line ({r['robustness']['baseline']}), and where a model lies beyond the standard ones the line is only continued."
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
    pictures = []
    for name, title in (("head", "of the head"), ("centred", "of the head without the mean over classes")):
        pictures.append(Picture(partial(_spectrum, d[name]), f"Singular values and importance of the directions {title}"))
    pictures.append(
        Picture(partial(_alignment, d["head"], d["alignment_by_chance"]), "How far each direction lies along the outlier features")
    )
    best = sorted(d["head"], key=lambda row: row["importance_rank"])[:SHOWN]
    return [
        Section(
            "Privileged directions",
            [
                "The head reads the representation along its singular directions. Importance is the singular value times the mean |cosine| "
                f"between the direction and the representations of {number(d['images'])} images that nothing else here is evaluated on.",
                "The first figure is for the head as it is, the second for the head without what it says of all classes alike, which no "
                "decision depends on. The third shows how far each direction lies along the outlier features; the dotted line is chance.",
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
        Picture(partial(_pruning, orders, "accuracy"), f"Accuracy on {name} against the share of directions kept")
        for name, orders in p["curves"].items()
    ]
    pictures += [
        Picture(
            partial(
                _pruning, {o: {**p["curves"][IMAGENET][o], "accuracy": values} for o, values in orders.items()}, "effective robustness"
            ),
            f"Effective robustness under {name} against the share of directions kept",
        )
        for name, orders in p["robustness"].items()
    ]
    order = ", ".join(p["curves"])
    return [
        Section(
            "Pruning directions",
            [
                "What the head still gets right when it keeps only part of its directions: the most important ones, those of largest "
                f"singular value, or as many at random (mean and {LEVEL:.0%} band). In this order: accuracy on {order}"
                + (f"; then effective robustness under {', '.join(p['robustness'])}." if p["robustness"] else "."),
                "A curve that stays flat says that the pruned directions were not needed on these images. On the unshifted images it is "
                "evaluated on the half that importance was not measured on.",
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
                f"Every unit, and every direction of the head, ranks {number(c['images'])} images; it encodes a concept when the average "
                "precision of that ranking is above the threshold and significant after correction for all pairs and both signs. The "
                "figures show how many distinct concepts are encoded, and how many one direction shares, as the threshold rises.",
                "A random rotation of the units says what the axes have of their own; shuffled labels say what chance gives. In the paper "
                "the count goes along with language supervision, and is no indicator of robustness.",
            ],
            [
                Picture(
                    partial(_sweep, c["sweep"], "unique", "unique concepts"), "Unique concepts against the threshold of average precision"
                ),
                Picture(
                    partial(_sweep, c["sweep"], "polysemanticity", "concepts per direction"), "Concepts per direction against the threshold"
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


def left_out(r: dict[str, Any]) -> list[Section]:
    """Sections without their input, and images that could not be read."""
    sections = []
    if r["skipped"]:
        rows = [{"section": name, "why": why} for name, why in r["skipped"].items()]
        sections.append(Section("Not computed", ["These parts were left out."], tables=[Table(rows, SKIPPED_COLUMNS)]))
    unreadable = [
        {"section": f"{name}: {one['file']}", "why": one["reason"]} for name, data in r["data"].items() for one in data["skipped"]
    ]
    if unreadable:
        shown = unreadable[: 10 * SHOWN]
        more = f" The first {len(shown)} are listed." if len(shown) < len(unreadable) else ""
        columns = (Column("section", "file", "set and name", "text"), Column("why", "reason", "why it could not be read", "text"))
        text = f"{number(len(unreadable))} images could not be read and are in none of the numbers.{more}"
        sections.append(Section(f"Left out: {number(len(unreadable))} images", [text], tables=[Table(shown, columns)]))
    return sections


def reading(r: dict[str, Any]) -> Section:
    """Definitions and choices."""
    o = r["outliers"]
    return Section(
        "How to read this",
        terms=[
            (
                "vector kurtosis",
                "κ(h) = mean((h − mean h)⁴) / mean((h − mean h)²)² over the features of one vector; Pearson's, Gaussian = 3.",
            ),
            ("importance", "σ_i · mean_n |cos(v_i, h_n)| for the head W = Σ σ_i u_i v_iᵀ."),
            (
                "effective robustness",
                "accuracy − logit⁻¹(slope · logit(unshifted accuracy) + intercept), percentage points (Taori et al. 2020).",
            ),
            (
                "choices of ours",
                f"an outlier feature lies {o['sigma']:g} standard deviations out in {_per_cent(o['frequency'])} of the images; the share "
                "kept in pruning is of the rank of the head; a concept is encoded from AP 0.9, significant at 0.05 after Holm's "
                "correction; negatives are the images annotated for the concept's category; both signs are tried everywhere; half of the "
                "images, chosen by their names, measure importance and the other half evaluates.",
            ),
            (
                "what it does not say",
                "these numbers describe one encoder on these images. That two of them go along with each other across encoders does not "
                "show that one causes the other.",
            ),
        ],
    )


def footer(r: dict[str, Any]) -> list[str]:
    """Versions and settings."""
    settings = ", ".join(f"{key} {value}" for key, value in r["settings"].items())
    return [f"torchprobe {r['torchprobe']}, torch {r['torch']}, Python {platform.python_version()}.", f"Settings: {settings}."]


# -- figures ---------------------------------------------------------------------------------------------------------------


def _histogram(values: Sequence[float], features: int, interval: tuple[float, float], width: float) -> Any:
    return plots.kurtosis_histogram(values, features, interval=interval, width=width)


def _spectrum(rows: Sequence[dict[str, Any]], width: float) -> Any:
    ordered = sorted(rows, key=lambda row: row["importance_rank"])
    index = list(range(1, len(ordered) + 1))
    sigma, importance = (_relative([row[key] for row in ordered]) for key in ("singular_value", "importance"))
    series = [Series("importance", index, importance), Series("singular value", index, sigma)]
    return curves(
        series, "direction, by falling importance", "relative to the largest", markers=len(index) <= 60, log=True, width=width, height=3.0
    )


def _alignment(rows: Sequence[dict[str, Any]], chance: float, width: float) -> Any:
    ordered = sorted(rows, key=lambda row: row["importance_rank"])
    index = list(range(1, len(ordered) + 1))
    series = [Series("", index, [row["alignment"] for row in ordered])]
    return curves(
        series,
        "direction, by falling importance",
        "share along outlier features",
        levels=[("chance", chance)],
        limits=(-0.02, 1.02),
        markers=len(index) <= 60,
        width=width,
        height=2.6,
    )


def _pruning(orders: dict[str, Any], what: str, width: float) -> Any:
    percent = 100.0 if what == "accuracy" else 1.0
    series = []
    for order, curve in orders.items():
        band = (_scaled(curve["low"], percent), _scaled(curve["high"], percent)) if what == "accuracy" and "low" in curve else (None, None)
        series.append(Series(ORDERS[order], _scaled(curve["keep"], 100.0), _scaled(curve["accuracy"], percent), *band))
    unit = "accuracy, %" if what == "accuracy" else "effective robustness, points"
    return curves(series, "directions kept, % of the rank", unit, levels=[] if what == "accuracy" else [("on the line", 0.0)], width=width)


def _sweep(sweep: dict[str, Any], key: str, label: str, width: float) -> Any:
    names = [name for name in (UNITS, DIRECTIONS, ROTATION, SHUFFLED) if name in sweep]
    series = [Series(name, [row["threshold"] for row in sweep[name]], [row[key] for row in sweep[name]]) for name in names]
    return curves(series, "threshold of average precision", label, width=width, height=3.0)


def _scaled(values: Sequence[float | None], by: float) -> list[float]:
    return [_nan(value) * by for value in values]


def _relative(values: Sequence[float]) -> list[float]:
    largest = max(values, default=1.0) or 1.0
    return [value / largest for value in values]


def _shifts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["shift"] != "mean"]


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _per_cent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share, 3)} %"
