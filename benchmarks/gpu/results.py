"""The figures of one device in one JSON file. A part that is measured again replaces itself and leaves the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.report import Target
from benchmarks.timing import Timing

FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """One number.

    Args:
        name: of what.
        value: in ``unit``: "s", "B", "B/s", "share" (1 is the whole), or a word for what is counted.
        case: what it was measured on, such as the type and the width.
        timing: of one call, from which ``value`` follows.
        target: what ``value`` should be.
        note: how it was come by.
    """

    name: str
    value: float
    unit: str
    case: Mapping[str, str | int] = field(default_factory=dict)
    timing: Timing | None = None
    target: Target | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} {dict(self.case)}: {self.value} is no figure")
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "case": dict(self.case),
            "timing": None if self.timing is None else _timing(self.timing),
            "target": None if self.target is None else {**vars(self.target), "verdict": self.target.verdict},
            "note": self.note,
        }


def time(name: str, timing: Timing, target: Target | None = None, note: str = "", **case: str | int) -> Figure:
    """The median, in seconds."""
    return Figure(name, timing.median, "s", case, timing, target, note)


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "rounds": len(timing.seconds),
        "median": timing.median,
        "quartiles": list(timing.quartiles),
        "interval_of_median": list(timing.interval),
        "minimum": None if timing.difference else timing.minimum,
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def document(device: Mapping[str, Any], versions: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """A file without any part; ``quick`` figures are of small inputs and mean little."""
    return {"format": FORMAT, "date": now(), "quick": quick, "device": dict(device), "versions": dict(versions), "parts": {}}


def part(title: str, seconds: float, figures: list[Figure], error: str | None) -> dict[str, Any]:
    """What one part of the benchmark found, and what stopped it, if anything did."""
    return {"title": title, "date": now(), "seconds": round(seconds, 1), "figures": [f.as_json() for f in figures], "error": error}


def resume(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the parts of the file at ``path``, if that is of the same device and the same versions."""
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return new
    same = isinstance(old, dict) and all(old.get(key) == new[key] for key in ("format", "quick", "device", "versions"))
    return {**new, "parts": dict(old["parts"])} if same else new


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
