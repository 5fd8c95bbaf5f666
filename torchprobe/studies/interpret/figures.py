"""The figures of an interpretation, drawn from what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchprobe.analysis.concepts import DIRECTIONS, ROTATION, SHUFFLED, UNITS
from torchprobe.rendering import plots
from torchprobe.rendering.curves import Series, curves
from torchprobe.studies.interpret.measures import SEEDS

ORDERS = {"importance": "by importance", "sigma": "by singular value", "random": f"at random, {SEEDS} seeds"}


def histogram(values: Sequence[float], features: int, interval: tuple[float, float], width: float) -> Any:
    return plots.kurtosis_histogram(values, features, interval=interval, width=width)


def spectrum(rows: Sequence[dict[str, Any]], width: float) -> Any:
    ordered = sorted(rows, key=lambda row: row["importance_rank"])
    index = list(range(1, len(ordered) + 1))
    sigma, importance = (_relative([row[key] for row in ordered]) for key in ("singular_value", "importance"))
    series = [Series("importance", index, importance), Series("singular value", index, sigma)]
    return curves(
        series, "direction, by falling importance", "relative to the largest", markers=len(index) <= 60, log=True, width=width, height=3.0
    )


def alignment(rows: Sequence[dict[str, Any]], chance: float, width: float) -> Any:
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


def pruning(orders: Mapping[str, Any], what: str, width: float) -> Any:
    by = 100.0 if what == "accuracy" else 1.0
    series = [
        Series(
            ORDERS[order],
            _scaled(curve["keep"], 100.0),
            _scaled(curve[what], by),
            _scaled(curve["low"], by) if "low" in curve else None,
            _scaled(curve["high"], by) if "high" in curve else None,
        )
        for order, curve in orders.items()
    ]
    unit = "accuracy, %" if what == "accuracy" else "effective robustness, points"
    return curves(series, "directions kept, % of the rank", unit, levels=[] if what == "accuracy" else [("on the line", 0.0)], width=width)


def sweep(sweep: dict[str, Any], key: str, label: str, width: float) -> Any:
    names = [name for name in (UNITS, DIRECTIONS, ROTATION, SHUFFLED) if name in sweep]
    series = [Series(name, [row["threshold"] for row in sweep[name]], [row[key] for row in sweep[name]]) for name in names]
    return curves(series, "threshold of average precision", label, width=width, height=3.0)


def _scaled(values: Sequence[float | None], by: float) -> list[float]:
    return [nan(value) * by for value in values]


def _relative(values: Sequence[float]) -> list[float]:
    largest = max(values, default=1.0) or 1.0
    return [value / largest for value in values]


def nan(value: float | None) -> float:
    return float("nan") if value is None else value
