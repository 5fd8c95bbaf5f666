"""The headline numbers of an interpretation, for its page and for a notebook."""

from __future__ import annotations

import math

from torchprobe.analysis.baseline import IMAGENET
from torchprobe.analysis.concepts import SHUFFLED, UNITS
from torchprobe.analysis.resampling import FEWEST, LEVEL
from torchprobe.common.messages import counted
from torchprobe.rendering.page import Fact
from torchprobe.rendering.tables import Column, number, percent
from torchprobe.studies.interpret.results import Results

MISSING_COLUMNS = (Column("section", "section", "the missing section", "text"), Column("why", "why", "the missing input", "text"))


def facts(r: Results) -> list[Fact]:
    """The headline numbers."""
    interval = f"{interval_text(r.kurtosis.interval, r.kurtosis.vectors)}; Gaussian {number(r.kurtosis.gaussian, 3)}"
    heads = [
        Fact("Vector kurtosis", number(r.kurtosis.mean, 3), interval),
        Fact("Outlier features", number(len(r.outliers.indices)), f"of {number(r.features)}"),
    ]
    if r.accuracy:
        one = r.accuracy[IMAGENET]
        heads.append(Fact("Accuracy", percent(one.accuracy), f"{number(one.images)} images, {number(one.classes)} classes"))
    if r.robustness:
        mean, shifts = r.robustness.mean()
        extrapolated = ", extrapolated" if r.robustness.extrapolated else ""
        rows = [row for row in r.robustness.rows if row.shift in r.robustness.by_shift()]
        ends = (rows[0].low, rows[0].high) if len(rows) == 1 else r.robustness.mean_interval
        over = rows[0].shift if len(rows) == 1 else f"mean over {counted(shifts, 'shift')}"
        note = f"percentage points, {over}{extrapolated}"
        if rows and all(row.images for row in rows):  # results of earlier versions have no numbers of images
            note += f"; {interval_text(ends, min(min(row.images, row.imagenet_images) for row in rows))}"
        heads.append(Fact("Effective robustness", "–" if math.isnan(mean) else f"{mean:+.1f}", note))
    if r.concepts:
        unique, null = (r.concepts.headline(basis).unique for basis in (UNITS, SHUFFLED))
        note = f"AP ≥ {r.concepts.threshold:g}, beyond chance; {null} with shuffled labels"
        heads.append(Fact("Unique concepts", number(unique), note))
    return heads


def measured(r: Results) -> str:
    """What was measured, in words."""
    images = r.data[IMAGENET].images
    return f"{counted(images, 'given representation')}" if r.given else f"{counted(images, 'image')} through the encoder"


def interval_text(interval: tuple[float, float], images: int) -> str:
    """An interval over images in words, or why there is none."""
    if any(map(math.isnan, interval)):
        return f"no interval: {images} images" if images < FEWEST else "no interval: the values hardly differ"
    low, high = (number(end, 3) for end in interval)
    return f"{LEVEL:.0%} interval {low} … {high}"
