"""The words of a report: what was chosen, how to read it, and what it does not say. Correlational throughout."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from torchprobe.rendering.page import Section, Table
from torchprobe.rendering.tables import Column, number

if TYPE_CHECKING:
    from torchprobe.dissection.dissection import Dissection
    from torchprobe.dissection.report import Report
    from torchprobe.dissection.report_pictures import Pictures

SUMMARY = (
    "Which annotated concepts does the activation of each unit go along with, over the images of a labelled data set? A label beside a "
    "unit says that it coincides with this one most, in these images; it says neither that the unit stands for the concept nor that the "
    "network uses it."
)

OWN = "this layer"
COMPARISON = (
    Column("layer", "", "which network and labels", "text"),
    Column("detectors", "detectors", "units whose best IoU reaches the threshold", "count"),
    Column("concepts", "concepts", "distinct best labels among them", "count"),
    Column("paper", "paper's rule", "distinct labels above the threshold, counted within each category and added up", "count"),
    Column("median", "median IoU", "of the units' best IoU, the median"),
    Column("highest", "highest IoU", "of the units' best IoU, the highest"),
    Column("encoded", "encoded", "concepts with an AP that reaches its threshold and is significant after correction", "count"),
)


def dataset(d: Dissection) -> str:
    """Name of the data set and what it is annotated with."""
    name = d.metadata.get("dataset", {}).get("name", "")
    return f"{name + ': ' if name else ''}{number(len(d.labels))} labels in {len(d.categories)} categories"


def notice(d: Dissection) -> str:
    """What must not be overlooked."""
    if d.metadata.get("shuffle_labels") is not None:
        return "A null: the images were given each other's labels at random. What is found here is found by chance."
    return ""


def bars_note(report: Report) -> str:
    """What the bars count."""
    if report.score == "iou":
        return (
            f"Each unit whose best IoU is {report.threshold:g} or more, counted once, by its best label. A bar is the number of units; a "
            "click shows them."
        )
    return (
        "Each unit that encodes the concept it ranks best (by AP above chance), counted once, by that concept. A bar is the number of "
        "units; a click shows them."
    )


def units_note(pictures: Pictures | None) -> str:
    """What stands beside each unit."""
    note = "All units, best first; a click on a head sorts. A number in the search is the index of a unit."
    if pictures is None:
        return note + " The page was made without pictures."
    if pictures.regions:
        note += (
            " The images with the unit's highest scores: the line encloses where its map, brought to the label grid, exceeds its threshold."
        )
    else:
        note += (
            " The images with the unit's highest scores. The page was made without the network, so it does not show where a unit is active."
        )
    note += " Beside it, what carries the label is left bright."
    if pictures.evidence:
        note += " The third panel is a unit's evidence by integrated gradients: warm pixels speak for its score, cold ones against it."
    return note


def beside_nulls(report: Report) -> Section:
    """The layer beside what chance gives."""
    paragraphs = [
        "Large concepts overlap with anything, and with many units and labels some pairs coincide by chance: a count says little by itself."
    ]
    if not report.nulls:
        paragraphs.append(
            "No null was computed for this page. Dissect the same layer at random initialisation (batch norms recalibrated, several "
            "seeds) and with shuffled labels, and compare."
        )
        return Section("Read against", paragraphs)
    return Section("Read against", paragraphs, tables=[Table(report.comparison(), COMPARISON, "The same layer and images")])


def reading(report: Report) -> Section:
    """Choices and definitions."""
    d, m = report.dissection, report.dissection.metadata
    terms: list[tuple[str, str]] = []
    if d.counts is not None:
        given = any(site.get("thresholds") for site in [m.get("sites", {}).get(d.layer, {})])
        how = (
            "given, not computed from these images"
            if given
            else f"the level that a share of {m.get('quantile', '0.005')} of its values exceeds"
        )
        if error := m.get("threshold_error"):
            how += f" (estimated, as the values did not fit the memory: that share may be off by {error:.2g}, one standard deviation)"
        terms += [
            ("active", f"where the unit's map exceeds its threshold: {how}, over all positions of all images, one threshold a unit."),
            (
                "IoU",
                "over all images: pixels that are active and carry the label, over pixels that are active or carry it. "
                + mode(m.get("mode")),
            ),
            (
                "detector",
                f"a unit whose best IoU is {report.threshold:g} or more, as in the report of the original; its paper counts, within each "
                f"category, distinct labels above {report.threshold:g}, and adds the categories up. The threshold is a convention.",
            ),
        ]
    if d.average_precision is not None:
        among = "annotated for the concept's category" if m.get("negatives") == "category" else "of the data set"
        area = f" over at least {m['minimum_area']:.1%} of their area" if m.get("minimum_area") else ""
        sign = {"both": " A unit may rank by high or by low scores, whichever is better.", "negative": " Units rank by low scores."}
        pooling = "mean" if m.get("pooling") == "mean" else "largest value"
        terms += [
            (
                "AP",
                f"average precision of ranking the images {among} by the unit's score, the {pooling} of its map; images "
                f"that show the concept{area} should come first; equal scores are one step." + sign.get(str(m.get("sign")), ""),
            ),
            (
                "encodes",
                f"AP ≥ {report.ap_threshold:g}, and significant at {report.alpha:g} after Holm's correction for all units and concepts; "
                "the null is a random ranking, which without ties depends on the numbers of images and positives only.",
            ),
        ]
    terms += [
        ("units", units(m)),
        (
            "what it does not say",
            "that a unit causes anything, that a concept has no other carrier, or that what the labels do not name is not there. Images "
            "of one source are not independent of one another. Compare layers of the same width.",
        ),
    ]
    return Section("How to read this", terms=terms)


def mode(name: Any) -> str:
    """What a mode of counting means."""
    return {
        "netdissect": "Counted as the original does: its anchored grid, activation in images annotated for the label's primary category.",
        "global": "Activation is counted over all images, whether they are annotated for the label's category or not.",
    }.get(
        str(name),
        "Activation is counted in images annotated for the label's primary category, after bilinear upsampling to the label grid.",
    )


def units(m: dict[str, Any]) -> str:
    """What is dissected."""
    what = (
        "directions of a basis that was given, or a random rotation"
        if m.get("basis")
        else "the coordinates of the layer's output, one by one"
    )
    return f"{what}; positions: {m.get('positions', 'all')}."


def footer(d: Dissection) -> list[str]:
    """Versions and settings."""
    import torchprobe

    keys = (
        "score",
        "mode",
        "quantile",
        "positions",
        "pooling",
        "sign",
        "negatives",
        "minimum_area",
        "batch_size",
        "seed",
        "shuffle_labels",
    )
    settings = [f"{key} {_plain(d.metadata[key])}" for key in keys if d.metadata.get(key) is not None]
    lines = [f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}."]
    return [*lines, f"Settings: {', '.join(settings)}."] if settings else lines


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)
