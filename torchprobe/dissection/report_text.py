"""The words of a report: what was chosen, how to read it, and what it does not say. Correlational throughout."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import torchprobe
from torchprobe.common.messages import counted
from torchprobe.dissection import activity, report_images
from torchprobe.dissection.report_sparse import ACTIVE, kind_of
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
    Column("beyond", "beyond chance", "those of them whose IoU is significant after correction", "count"),
    Column("concepts", "concepts", "distinct best labels of these units", "count"),
    Column("paper", "paper's rule", "distinct labels above the threshold, counted within each category and added up", "count"),
    Column("median", "median IoU", "median over units of their best IoU"),
    Column("highest", "highest IoU", "highest over units of their best IoU"),
    Column(
        "encoded", "encoded", "concepts with an AP and a gain that reach their thresholds and are significant after correction", "count"
    ),
    Column("never_active", "never active", "units without any pixel above their threshold", "count", optional=True),
)


@dataclass(frozen=True)
class Limits:
    """``iou``: the smallest IoU of a detector. ``ap``, ``gain``, ``alpha``: the smallest average precision and gain over prevalence, and
    the level of significance, with which a unit encodes a concept."""

    iou: float = THRESHOLD
    ap: float = 0.9
    alpha: float = 0.05
    gain: float = 0.8

    @property
    def rule(self) -> str:
        """When a unit encodes a concept, in a few words."""
        gain = f", gain ≥ {self.gain:g}" if self.gain > -math.inf else ""
        return f"AP ≥ {self.ap:g}{gain}, significant at {self.alpha:g} after Holm's correction for all units and concepts"


def dataset(d: LayerScores) -> str:
    """Name of the data set, and its labels."""
    name = d.metadata.get("dataset", {}).get("name", "")
    categories = "1 category" if len(d.categories) == 1 else f"{len(d.categories)} categories"
    return f"{name + ': ' if name else ''}{number(len(d.labels))} label{'' if len(d.labels) == 1 else 's'} in {categories}"


def notice(d: LayerScores) -> str:
    """A warning that the page shows first: that this is a null, and that labels lie where the network did not look."""
    if d.metadata.get("shuffle_labels") is not None:
        null = "A null: the labels of the images were shuffled. Everything that is found here is found by chance."
        return " ".join(filter(None, [null, report_images.outside(d)]))
    return report_images.outside(d)


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


def nulls_section(comparison: Sequence[Row] | None, tested: bool = False) -> Section:
    """The layer next to its nulls, if there are any. ``tested``: each IoU was tested on this page."""
    paragraphs = [
        "Large concepts overlap with everything, and among many units and labels some pairs coincide by chance. A count alone says little."
    ]
    if tested:
        paragraphs.append("Each IoU was compared with those of exchanged labels: see the columns “chance IoU” and “p of IoU”.")
    if comparison is None:
        paragraphs.append(
            f"No {'other ' if tested else ''}null was computed for this page. Dissect the same layer with random weights (batch norms "
            "recalibrated, several seeds) and with shuffled labels, and compare."
        )
        return Section("Compared with chance", paragraphs)
    return Section("Compared with chance", paragraphs, tables=[Table(comparison, COMPARISON, "The same layer and images")])


def reading_section(d: LayerScores, limits: Limits) -> Section:
    """Choices and definitions."""
    m = d.metadata
    terms: list[tuple[str, str]] = []
    if d.counts is not None:
        terms += [
            ("active", f"The map of the unit exceeds its threshold. {_threshold(d)}{_silence(d)}"),
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
    if d.iou_null is not None:
        terms.append(("chance IoU", _exchanged(d, limits)))
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
                f"{limits.rule}. The null is a random ranking. Without ties it depends only on the numbers of images and positives.",
            ),
            (
                "gain",
                "Average precision above chance: (AP − π) / (1 − π), where the prevalence π is the share of these images that show the "
                "concept. Among many images a weak relation to a frequent concept is significant and has a high AP, but a low gain. The "
                "default is the gain that the smallest AP has at π = ½, so it decides for concepts that more than half of the images show.",
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


def _silence(d: LayerScores) -> str:
    """The units that are never active, and those that are active on less than they should be."""
    text = ""
    if message := activity.explanation(d.layer, d.silence(), d.quantile):
        text = f" {message.partition(': ')[2]}. They do not count in shares of units."
    never = d.never_active
    if d.level is not None and never is not None:
        held = int(activity.held_back(d.level, never, d.quantile).sum())
        if held:
            text += f" {counted(held, 'unit')} {'is' if held == 1 else 'are'} active on less than half of that share, because many values "
            text += "equal the threshold, as where an activation function clips."
    return text


def _exchanged(d: LayerScores, limits: Limits) -> str:
    """The null of IoU."""
    assert d.iou_null is not None
    draws, margin = len(d.iou_null.largest), d.iou_null.margin(limits.alpha)
    known = margin[~margin.isnan()]
    text = (
        "The mean IoU when the labels of the images of a batch are exchanged, each image's labels as a whole. The null is that the active "
    )
    text += "regions have nothing to do with the labels of the same image; where both tend to be in a picture is part of it. The p-value "
    text += f"is that of {draws} permutations, at least 1/{draws + 1}, and corrected for all units and labels by the largest excess over "
    text += "chance of any pair. "
    if not len(known):
        return text + "No label was tested: all are shown by few images."
    if bool(known.isinf().all()):
        return text + f"That is too few permutations to be significant at {limits.alpha:g}."
    text += f"An IoU of {number(float(known.amin()), 2)} to {number(float(known.amax()), 2)} above chance, depending on the label, is "
    return text + f"significant at {limits.alpha:g}. Labels that only a few images show were not tested."


def silent(cause: str, threshold: float) -> str:
    """Why a unit is never active.

    >>> silent("clipped", 6.0)
    'never active: 6 is its largest value, and too many values equal it'
    """
    level = number(float(f"{threshold:.4g}"))
    level = level.rstrip("0").rstrip(".") if "." in level and "e" not in level else level
    return "never active: " + {
        "clipped": f"{level} is its largest value, and too many values equal it",
        "constant": f"it is constant, {level}",
        "too few values": "too few values for the quantile",
    }.get(cause, "no value in the images that count exceeds its threshold")


def concepts_note(limits: Limits, ap: bool, iou: bool) -> str:
    """What the table of concepts shows."""
    parts = ["Concepts that some unit encodes or detects, with these units, best first; the others are below."]
    if ap:
        parts.append(f"Encodes: {limits.rule}.")
    if iou:
        parts.append(f"Detects: the best label of the unit, with an IoU of {limits.iou:g} or more.")
    return " ".join(parts)


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
    if kind_of(m.get("basis")) == "latents":
        return f"Latents of the encoder {m['basis'].get('name', '')}; {ACTIVE}"
    return "Directions of a given basis or of a random rotation" if m.get("basis") else "Coordinates of the output of the layer"


def footer(d: LayerScores) -> list[str]:
    """Versions, images and settings."""
    keys = ("score", "mode", "quantile", "positions", "pooling", "sign", "negatives", "minimum_area", "batch_size", "seed")
    settings = [f"{key} {_plain(d.metadata[key])}" for key in (*keys, "shuffle_labels") if d.metadata.get(key) is not None]
    lines = [f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}."]
    lines += report_images.images(d)
    return [*lines, f"Settings: {', '.join(settings)}."] if settings else lines


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)
