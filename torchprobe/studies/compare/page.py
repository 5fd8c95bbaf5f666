"""The page of a comparison."""

from __future__ import annotations

import math
import platform
from functools import partial
from typing import Any

from torchprobe.analysis.intervals import LEVEL
from torchprobe.rendering.curves import Mark, Series, curves, scatter
from torchprobe.rendering.heatmap import heat_map
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import Column, number
from torchprobe.studies.compare.comparison import Comparison
from torchprobe.studies.interpret.measures import HEADLINE, IMAGENET

MODEL_COLUMNS = (
    Column("model", "encoder", "as the suite calls it", "text"),
    Column("role", "role", "what it is in the comparison", "text"),
    Column("backbone", "backbone", "architecture: differences are taken within one", "text"),
    Column("features", "d", "width of the representation", "count"),
    Column("kurtosis", "vector κ", "vector kurtosis, mean over images"),
    Column("kurtosis_low", "from", f"{LEVEL:.0%} interval over images: lower end"),
    Column("kurtosis_high", "to", "its upper end"),
    Column("outlier_features", "outliers", "outlier features", "count"),
    Column("accuracy", "accuracy", "on the unshifted images", "share"),
    Column("robustness", "ER", "effective robustness, percentage points, mean over the shifts there are"),
    Column(
        "robustness_note",
        "ER from",
        "accuracies measured or published; how many shifts; whether beyond the standard models",
        "text",
        optional=True,
    ),
    Column("concepts", "concepts", "unique concepts that units encode", "count"),
    Column("polysemanticity", "per unit", "concepts per unit"),
)

PAIR_COLUMNS = (
    Column("pair", "difference", "the first minus the second; same backbone", "text"),
    Column("kurtosis", "Δ vector κ", "mean over the images both have seen"),
    Column("kurtosis_low", "from", f"{LEVEL:.0%} bootstrap interval over these images: lower end"),
    Column("kurtosis_high", "to", "its upper end"),
    Column("images", "images", "that both have seen", "count"),
    Column("accuracy", "Δ accuracy", "on the unshifted images", "share"),
    Column("accuracy_low", "from", f"{LEVEL:.0%} bootstrap interval over the images both have seen: lower end", "share"),
    Column("accuracy_high", "to", "its upper end", "share"),
    Column("robustness", "Δ ER", "effective robustness, percentage points, mean over the shifts that both have"),
    Column("concepts", "Δ concepts", "unique concepts", "count"),
    Column("shared_concepts", "shared", "concepts that both encode", "count"),
    Column("cka", "CKA", "linear CKA of the two representations over these images"),
)

CORRELATION_COLUMNS = (
    Column("models", "encoders", "all, or those of one role", "text"),
    Column("x", "x", "one number", "text"),
    Column("y", "y", "the other", "text"),
    Column("rho", "Spearman ρ", "rank correlation"),
    Column("p_value", "p", "two-sided, by permutation; takes encoders to be independent, which variants of one are not"),
    Column("n", "n", "encoders with both numbers", "count"),
)

OVERLAP_COLUMNS = (
    Column("a", "one", "encoder", "text"),
    Column("b", "other", "encoder", "text"),
    Column("shared", "shared", "concepts that both encode", "count"),
    Column("only_a", "only one", "concepts that only the first encodes", "count"),
    Column("only_b", "only other", "concepts that only the second encodes", "count"),
    Column("jaccard", "Jaccard", "shared, as a share of all that either encodes", "share"),
)

SKIPPED_COLUMNS = (Column("model", "encoder", "of the suite", "text"), Column("why", "why", "what was missing", "text"))

MOST = 10
"""Curves in one figure."""

_PARTS = {"cka": "CKA"}

_LABELS = {
    "kurtosis": "vector kurtosis",
    "robustness": "effective robustness, points",
    "concepts": "unique concepts",
    "polysemanticity": "concepts per unit",
    "accuracy": "accuracy",
}


def comparison_page(found: Comparison) -> Page:
    """All encoders, pairs, correlations, and what was computed with two networks at hand."""
    return Page(
        kind="compare",
        title=f"{len(found.models)} encoders",
        summary="Outlier features, concepts and robustness of several encoders beside each other, and differences within each backbone.",
        notice=" ".join(found.remarks),
        facts=_facts(found),
        sections=[
            _models(found),
            *_pairs(found),
            *_correlations(found),
            *_pruning(found),
            *_extras(found),
            *_overlaps(found),
            *_skipped(found),
            _reading(),
        ],
        footer=_footer(found),
    )


def _facts(found: Comparison) -> list[Fact]:
    facts = [Fact("Encoders", number(len(found.models)), f"{len(found.skipped)} left out" if found.skipped else "none left out")]
    facts.append(Fact("Pairs within a backbone", number(len(found.pairs))))
    for x, y in (("kurtosis", "robustness"), ("concepts", "robustness")):
        row = next((r for r in found.correlations if (r["models"], r["x"], r["y"]) == ("all", x, y)), None)
        if row is not None:
            facts.append(Fact(f"ρ of {_LABELS[x]} and ER", number(row["rho"], 2), f"p = {number(row['p_value'], 2)}, {row['n']} encoders"))
    return facts


def _models(found: Comparison) -> Section:
    pictures = [
        Picture(partial(_scatter, found.models, x, "robustness"), f"{_LABELS[x]} against effective robustness, by encoder")
        for x in ("kurtosis", "concepts")
        if sum(row[x] is not None and row["robustness"] is not None for row in found.models) > 1
    ]
    if not pictures and sum(row["accuracy"] is not None for row in found.models) > 1:
        pictures.append(Picture(partial(_scatter, found.models, "kurtosis", "accuracy"), "Vector kurtosis against accuracy, by encoder"))
    return Section(
        "The encoders",
        [
            "Each point is an encoder; a line joins those of one backbone. The width of the representation decides how far kurtosis can "
            "rise and how many units there are to encode concepts, so compare along the lines rather than across them.",
        ],
        pictures,
        [Table(found.models, MODEL_COLUMNS, "All encoders; a click on a head sorts")],
    )


def _pairs(found: Comparison) -> list[Section]:
    if not found.pairs:
        return []
    text = (
        "Within a backbone, the zero-shot encoder minus its twin. "
        if all(row["backbone"] for row in found.pairs)
        else "The first minus the second. No backbone is told for some of them, and a difference means little between different ones. "
    )
    text += (
        "An interval that leaves out 0 says that the difference is larger than "
        "the choice of images; it says nothing about the choice of training runs, of which there is one each."
    )
    return [Section("Pairs within a backbone", [text], tables=[Table(found.pairs, PAIR_COLUMNS)])]


def _correlations(found: Comparison) -> list[Section]:
    if not found.correlations:
        return []
    text = (
        "Do two numbers rise together over encoders? A rank correlation does not ask for a line. Encoders that share data or architecture "
        "are not independent, so the p-values are too small; and that two numbers go along with each other does not show that one causes "
        "the other."
    )
    return [Section("Rank correlations", [text], tables=[Table(found.correlations, CORRELATION_COLUMNS)])]


def _pruning(found: Comparison) -> list[Section]:
    """The curves by importance, all encoders in one figure."""
    with_curves = [one for one in found.saved if "pruning" in one.results]
    if len(with_curves) < 2:
        return []
    series = []
    for one in with_curves[:MOST]:
        curve = one.results["pruning"]["curves"][IMAGENET]["importance"]
        series.append(Series(one.name, [100 * _nan(v) for v in curve["keep"]], [100 * _nan(v) for v in curve["accuracy"]]))
    text = (
        "Accuracy on the unshifted images when the head keeps only its most important directions. The further to the "
        "left a curve stays flat, the fewer directions its decisions need."
        + (f" Drawn are the first {MOST} of {len(with_curves)} encoders." if len(with_curves) > MOST else "")
    )
    draw = partial(curves, series, "directions kept, % of the rank", "accuracy, %")
    return [
        Section(
            "Pruning", [text], [Picture(lambda width: draw(width=width), "Accuracy of each encoder against the share of directions kept")]
        )
    ]


def _extras(found: Comparison) -> list[Section]:
    sections = []
    for pair, extra in found.extras.items():
        pictures = []
        paragraphs = []
        if interpolation := extra.get("interpolation"):
            paragraphs.append(
                "Between the two networks, weights and heads mixed: θ = (1 − α) θ_first + α θ_second (WiSE-FT). First the accuracy on each "
                "set, then the vector kurtosis of the representation. Both heads are scaled to a weight of length 1, and batch norms are "
                "recalibrated on some of the unshifted images, without their labels (choices of ours)."
                + (f" Drawn are the first {MOST} of the sets." if len(interpolation["accuracy"]) > MOST else "")
            )
            pictures.append(Picture(partial(_interpolation, interpolation), f"Accuracy along the interpolation: {pair}"))
            pictures.append(Picture(partial(_kurtosis_along, interpolation), f"Vector kurtosis along the interpolation: {pair}"))
        if cka := extra.get("cka"):
            paragraphs.append(
                f"Linear CKA (unbiased, {number(cka['images'])} images in batches of {cka['batch_size']}; maps and tokens flattened) of "
                "every layer of one with every layer of the other: 1 where the representations agree up to rotation and scale. Features of "
                "large variance dominate it."
            )
            pictures.append(
                Picture(
                    lambda width, cka=cka: heat_map(  # type: ignore[misc]
                        [[_nan(v) for v in row] for row in cka["values"]],
                        cka["layers_a"],
                        cka["layers_b"],
                        "CKA",
                        row_label=cka["a"],
                        column_label=cka["b"],
                        limits=(0.0, 1.0),
                        width=width,
                    ),
                    f"CKA of the layers: {pair}",
                )
            )
        for name, why in extra.get("skipped", {}).items():
            paragraphs.append(f"No {_PARTS.get(name, name)}: {why}.")
        sections.append(Section(pair, paragraphs, pictures))
    return sections


def _overlaps(found: Comparison) -> list[Section]:
    if not found.overlaps:
        return []
    text = "Which concepts do two encoders share? Counted by name, among the concepts that units encode at the headline threshold."
    return [Section("Concepts in common", [text], tables=[Table(found.overlaps, OVERLAP_COLUMNS)])]


def _skipped(found: Comparison) -> list[Section]:
    if not found.skipped:
        return []
    return [Section("Left out", ["These encoders of the suite were not run."], tables=[Table(found.skipped, SKIPPED_COLUMNS)])]


def _reading() -> Section:
    return Section(
        "How to read this",
        terms=[
            ("vector kurtosis", "across the features of the representation of one image, mean over images; Gaussian features give 3."),
            ("ER", "accuracy under shift beyond what standard models of the same unshifted accuracy have, mean over the shifts there are."),
            (
                "unique concepts",
                f"distinct concepts that some unit ranks with an average precision of at least {HEADLINE:g}, significant after correction.",
            ),
            (
                "what it does not say",
                "encoders differ in data, objective and training at once. This shows what goes along with what, not what causes what.",
            ),
        ],
    )


def _footer(found: Comparison) -> list[str]:
    import torchprobe

    names = ", ".join(f"{one.name} ({one.folder.name})" for one in found.saved)
    return [f"torchprobe {torchprobe.__version__}, Python {platform.python_version()}.", f"From: {names}."]


# -- figures ---------------------------------------------------------------------------------------------------------------


def _scatter(models: list[dict[str, Any]], x: str, y: str, width: float) -> Any:
    marks = [Mark(row["model"], _nan(row[x]), _nan(row[y]), row["role"], row["backbone"]) for row in models]
    return scatter(marks, _LABELS[x], _LABELS[y], log_x=x == "kurtosis", width=width)


def _interpolation(found: dict[str, Any], width: float) -> Any:
    series = [Series(name, found["alphas"], [100 * _nan(v) for v in values]) for name, values in found["accuracy"].items()]
    return curves(series[:MOST], "α", "accuracy, %", width=width)


def _kurtosis_along(found: dict[str, Any], width: float) -> Any:
    return curves([Series("", found["alphas"], found["kurtosis"])], "α", "vector kurtosis", log=True, width=width, height=2.6)


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
