"""The figures of a comparison that one puts into a paper, and the table that they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torchprobe.analysis.resampling import LEVEL
from torchprobe.rendering.curves import Mark, scatter
from torchprobe.rendering.differences import MOST, Estimate, differences
from torchprobe.rendering.page import Picture
from torchprobe.rendering.tables import Column
from torchprobe.studies.compare.pairs import Difference
from torchprobe.studies.compare.saved import Saved, Summary
from torchprobe.studies.interpret.accuracy import ROBUSTNESS_COLUMNS
from torchprobe.studies.interpret.figures import Robust, robustness_pictures

LABELS = {
    "kurtosis": "vector kurtosis",
    "robustness": "effective robustness, points",
    "concepts": "unique concepts",
    "polysemanticity": "concepts per unit",
    "accuracy": "accuracy",
}
"""Number of an encoder → its name on an axis."""

SHIFT_COLUMNS = (Column("model", "encoder", "its name in the suite", "text"), *ROBUSTNESS_COLUMNS)


def shift_rows(saved: Sequence[Saved]) -> list[dict[str, Any]]:
    """Each encoder under each shift."""
    found = [(one.name, one.results.robustness) for one in saved]
    return [{"model": name, **row} for name, robust in found if robust for row in robust.rows]


def shift_pictures(saved: Sequence[Saved]) -> list[Picture]:
    """All encoders with the standard models, and vector kurtosis against effective robustness, for each shift."""
    named = [Robust(one.name, one.about("role"), one.results.robustness) for one in saved if one.results.robustness]
    pictures = robustness_pictures(named)
    rows = shift_rows(saved)
    shifts = list(dict.fromkeys(row["shift"] for row in rows))
    summaries = {one.name: one.summary() for one in saved}
    for shift in shifts if len(shifts) > 1 else ():
        marks = [kurtosis_mark(summaries[row["model"]], row) for row in rows if row["shift"] == shift]
        if len(marks) > 1:
            draw = partial(scatter, marks, LABELS["kurtosis"], f"effective robustness, points: {shift}", log_x=True)
            text = f"Vector kurtosis against effective robustness under {shift}, by encoder"
            pictures.append(Picture(partial(_drawn, draw), text, f"kurtosis-robustness-{shift}", paper=True))
    return pictures


def kurtosis_mark(model: Summary, row: dict[str, Any]) -> Mark:
    """Vector kurtosis and effective robustness of one encoder under one shift, with their intervals."""
    low, high = (math.nan if row[end] is None else float(row[end]) for end in ("line_low", "line_high"))
    robustness = math.nan if row["effective_robustness"] is None else float(row["effective_robustness"])
    ends = {"x_low": model.kurtosis_low, "x_high": model.kurtosis_high, "y_low": low, "y_high": high}
    return Mark(model.model, model.kurtosis, robustness, model.role, model.backbone, **ends)


def model_pictures(models: Sequence[Summary]) -> list[Picture]:
    """One number of all encoders against another, with their intervals."""

    def known(*names: str) -> int:
        return sum(all(row[name] is not None for name in names) for row in models)

    pictures = [
        Picture(
            partial(_scatter, models, x, "robustness"),
            f"{LABELS[x]} against effective robustness, by encoder",
            f"{x}-robustness",
            paper=True,
        )
        for x in ("kurtosis", "concepts")
        if known(x, "robustness") > 1
    ]
    if not pictures and known("accuracy") > 1:
        text = "Vector kurtosis against accuracy, by encoder"
        pictures.append(Picture(partial(_scatter, models, "kurtosis", "accuracy"), text, "kurtosis-accuracy", paper=True))
    return pictures


def model_mark(row: Summary, x: str, y: str) -> Mark:
    """Two numbers of one encoder, with the intervals that they have."""
    ends = {f"{axis}_{end}": _number(row.get(f"{name}_{end}")) for axis, name in (("x", x), ("y", y)) for end in ("low", "high")}
    return Mark(row.model, _number(row[x]), _number(row[y]), row.role, row.backbone, **ends)


def pair_pictures(pairs: Sequence[Difference]) -> list[Picture]:
    """The differences within pairs with their intervals."""
    panels = pair_estimates(pairs[:MOST])
    text = f"Differences of each pair with their {LEVEL:.0%} intervals"
    return [Picture(partial(_drawn, partial(differences, panels)), text, "pairs", paper=True)] if panels else []


def pair_estimates(pairs: Sequence[Difference]) -> dict[str, list[Estimate]]:
    """Measure → its difference in each pair, in percent and percentage points; without measures that no pair has."""
    measures = {
        "kurtosis": ("Δ vector kurtosis", 1),
        "accuracy": ("Δ accuracy, points", 100),
        "robustness": ("Δ effective robustness, points", 1),
    }
    found = {}
    for name, (label, scale) in measures.items():
        each = [Estimate(row.pair, *(scale * _number(row[f"{name}{end}"]) for end in ("", "_low", "_high"))) for row in pairs]
        if any(not math.isnan(one.value) for one in each):
            found[label] = each
    return found


def _scatter(models: Sequence[Summary], x: str, y: str, width: float) -> Any:
    return scatter([model_mark(row, x, y) for row in models], LABELS[x], LABELS[y], log_x=x == "kurtosis", width=width)


def _drawn(draw: Any, width: float) -> Any:
    return draw(width=width)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
