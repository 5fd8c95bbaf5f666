"""The words of a report: what was chosen, how to read it, and what it does not say. Correlational throughout."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import torchprobe
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.summaries import THRESHOLD
from torchprobe.rendering.page import Section, Table
from torchprobe.rendering.tables import Column, Row, number

SUMMARY = (
    "Which annotated concepts does the activation of each unit coincide with, over the images of a labeled data set? The label of a unit "
    "is the one it coincides with most in these images. It does not say that the unit stands for the concept, or that the network uses it."
)

OWN = "this layer"
COMPARISON = (
    Column("layer", "", "which network and labels", "text"),
    Column("detectors", "detectors", "units whose best IoU reaches the threshold", "count"),
    Column("concepts", "concepts", "distinct best labels of these units", "count"),
    Column("paper", "paper's rule", "distinct labels above the threshold, counted within each category and added up", "count"),
    Column("median", "median IoU", "median over units of their best IoU"),
    Column("highest", "highest IoU", "highest over units of their best IoU"),
    Column("encoded", "encoded", "concepts with an AP that reaches its threshold and is significant after correction", "count"),
)


@dataclass(frozen=True)
class Limits:
    """``iou``: the smallest IoU of a detector. ``ap``, ``alpha``: the smallest average precision, and the level of significance, with which
    a unit encodes a concept."""

    iou: float = THRESHOLD
    ap: float = 0.9
    alpha: float = 0.05


def dataset(d: LayerScores) -> str:
    """Name of the data set, and its labels."""
    name = d.metadata.get("dataset", {}).get("name", "")
    return f"{name + ': ' if name else ''}{number(len(d.labels))} labels in {len(d.categories)} categories"


def notice(d: LayerScores) -> str:
    """A warning that the page shows first."""
    if d.metadata.get("shuffle_labels") is not None:
        return "A null: the labels of the images were shuffled. Everything that is found here is found by chance."
    return ""


def bars_note(score: str, limits: Limits) -> str:
    """What the bars count."""
    rest = "A bar shows the number of units; a click lists them."
    if score == "iou":
        return f"Each unit whose best IoU is {limits.iou:g} or more, counted once, with its best label. {rest}"
    return f"Each unit that encodes its best concept (by AP above chance), counted once, with that concept. {rest}"


def units_note(pictures: bool, regions: bool, evidence: bool) -> str:
    """What the table of units shows: top images, outlines of active regions, and evidence, or only some of them."""
    note = "All units, best first; click on a column head to sort. A number in the search field is the index of a unit."
    if not pictures:
        return note + " The page was made without pictures."
    note += " The pictures are the images with the highest scores of the unit."
    if regions:
        note += " The line encloses the region where the map of the unit, resized to the label grid, exceeds its threshold."
    else:
        note += " The page was made without the network, so it does not show where a unit is active."
    note += " In the picture next to it, only the area of the label is bright."
    if evidence:
        note += " The third picture is the evidence by integrated gradients: warm pixels raise the score of the unit, cold pixels lower it."
    return note


def nulls_section(comparison: Sequence[Row] | None) -> Section:
    """The layer next to its nulls, if there are any."""
    paragraphs = [
        "Large concepts overlap with everything, and among many units and labels some pairs coincide by chance. A count alone says little."
    ]
    if comparison is None:
        paragraphs.append(
            "No null was computed for this page. Dissect the same layer with random weights (batch norms recalibrated, several seeds) and "
            "with shuffled labels, and compare."
        )
        return Section("Compared with chance", paragraphs)
    return Section("Compared with chance", paragraphs, tables=[Table(comparison, COMPARISON, "The same layer and images")])


def reading_section(d: LayerScores, limits: Limits) -> Section:
    """Choices and definitions."""
    m = d.metadata
    terms: list[tuple[str, str]] = []
    if d.counts is not None:
        terms += [
            ("active", f"The map of the unit exceeds its threshold. {_threshold(d)}"),
            (
                "IoU",
                "Intersection over union, over all images: pixels that are active and have the label, divided by pixels that are active or "
                f"have the label. {_mode(m.get('mode'))}",
            ),
            (
                "detector",
                f"A unit whose best IoU is {limits.iou:g} or more, as in the report of the original. The paper counts, within each "
                f"category, distinct labels above {limits.iou:g}, and adds up the categories. The threshold is a convention.",
            ),
        ]
    if d.average_precision is not None:
        among = "annotated for the category of the concept" if m.get("negatives") == "category" else "of the data set"
        area = f" over at least {m['minimum_area']:.1%} of their area" if m.get("minimum_area") else ""
        signs = {"both": " High or low scores come first, whichever is better.", "negative": " Low scores come first."}
        pooling = "mean" if m.get("pooling") == "mean" else "largest value"
        terms += [
            (
                "AP",
                f"Average precision. The images {among} are ranked by the score of the unit, the {pooling} of its map. The ranking is good "
                f"if the images that show the concept{area} come first. Equal scores are one step.{signs.get(str(m.get('sign')), '')}",
            ),
            (
                "encodes",
                f"AP ≥ {limits.ap:g}, and significant at {limits.alpha:g} after Holm's correction for all units and concepts. The null is "
                "a random ranking. Without ties it depends only on the numbers of images and positives.",
            ),
        ]
    terms += [
        ("units", f"{_units(m)}; positions: {m.get('positions', 'all')}."),
        (
            "limits",
            "The page does not say that a unit causes anything, that nothing else represents a concept, or that concepts without a label "
            "are absent. Images from one source are not independent. Compare only layers of the same width.",
        ),
    ]
    return Section("How to read this", terms=terms)


def _threshold(d: LayerScores) -> str:
    m = d.metadata
    if m.get("sites", {}).get(d.layer, {}).get("thresholds"):
        return "The thresholds, one for each unit, were given; they were not computed from these images."
    level = f"Each unit has one threshold, the level that a share of {m.get('quantile', '0.005')} of its values exceeds, "
    level += "over all positions of all images."
    if error := m.get("threshold_error"):
        level += f" It is estimated, because the values did not fit into memory: the share may be off by {error:.2g} (standard deviation)."
    return level


def _mode(name: Any) -> str:
    """What a mode of counting means."""
    return {
        "netdissect": "Counted as in the original: on its anchored grid, activation in images that show a label of the label's primary "
        "category, or whose maps of it are empty.",
        "global": "Activation is counted in all images, whether or not they are annotated for the label's category.",
    }.get(
        str(name),
        "Activation is counted in images annotated for the label's primary category, after bilinear upsampling to the label grid.",
    )


def _units(m: dict[str, Any]) -> str:
    return "Directions of a given basis or of a random rotation" if m.get("basis") else "Coordinates of the output of the layer"


def footer(d: LayerScores) -> list[str]:
    """Versions and settings."""
    keys = ("score", "mode", "quantile", "positions", "pooling", "sign", "negatives", "minimum_area", "batch_size", "seed")
    settings = [f"{key} {_plain(d.metadata[key])}" for key in (*keys, "shuffle_labels") if d.metadata.get(key) is not None]
    lines = [f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}."]
    return [*lines, f"Settings: {', '.join(settings)}."] if settings else lines


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)
