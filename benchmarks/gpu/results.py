"""The figures of one device: one JSON file, and the same as tables in Markdown.

A part that is measured again replaces its old figures; the other parts stay. The tables are made from the JSON alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.report import Target
from benchmarks.timing import Timing

FORMAT = 1

Labels = Mapping[str, str | int]
"""The input of a figure, such as its type and width."""


@dataclass(frozen=True)
class Figure:
    """One number.

    Args:
        name: what was measured.
        value: in ``unit``: "s", "B", "B/s", "share" (1 is the whole), or a word for the things that are counted.
        case: the input.
        timing: of one call; ``value`` follows from it.
        target: what ``value`` should be.
        note: how it was measured.
    """

    name: str
    value: float
    unit: str
    case: Labels = field(default_factory=dict)
    timing: Timing | None = None
    target: Target | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} {dict(self.case)}: {self.value} is not a number")
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "case": dict(self.case),
            "timing": None if self.timing is None else _timing(self.timing),
            "target": None if self.target is None else {**vars(self.target), "verdict": self.target.verdict},
            "note": self.note,
        }


def time(name: str, timing: Timing, case: Labels, target: Target | None = None, note: str = "") -> Figure:
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
    """A file without parts. ``quick``: its figures are of small inputs and mean little."""
    return {"format": FORMAT, "date": now(), "quick": quick, "device": dict(device), "versions": dict(versions), "parts": {}}


def part(title: str, seconds: float, figures: list[Figure], error: str | None) -> dict[str, Any]:
    """The figures of one part of the benchmark, and the error that stopped it, or None."""
    return {"title": title, "date": now(), "seconds": round(seconds, 1), "figures": [f.as_json() for f in figures], "error": error}


def resume(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the parts of the file at ``path``, if its device and versions are the same."""
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return new
    same = isinstance(old, dict) and all(old.get(key) == new[key] for key in ("format", "quick", "device", "versions"))
    return {**new, "parts": dict(old["parts"])} if same else new


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


# -- tables in Markdown ----------------------------------------------------------------------------------------------------

Json = Mapping[str, Any]

GRID = ("observe_", "observe_, x in L2")
"""The figures of the part ``bandwidth`` that form a grid of sizes and widths."""


def markdown(document: Json) -> str:
    """The whole page."""
    device, versions, parts = document["device"], document["versions"], document["parts"]
    sections = [f"# {device['name']}", _about(device, versions)]
    if document["quick"]:
        sections.append("**A quick run of small inputs: these figures only show that everything runs.**")
    sections.append(_limits(parts))
    for part in parts.values():
        sections.append(f"## {part['title']}")
        sections.append(f"{part['date']}, {part['seconds']:.0f} s." + (f" **Stopped: {part['error']}**" if part["error"] else ""))
        sections += _grids(part["figures"])
        sections.append(
            _figures([figure for figure in part["figures"] if not _in_grid(figure) and (figure["timing"] or not figure["target"])])
        )
    return "\n\n".join(filter(None, sections)) + "\n"


def _about(device: Json, versions: Json) -> str:
    facts = [
        ("compute capability", device["capability"]),
        ("multiprocessors", device["multiprocessors"]),
        ("memory", device["memory"] and quantity(device["memory"], "B")),
        ("L2 cache", device["l2"] and quantity(device["l2"], "B")),
        ("highest clock", device["clock"] and quantity(device["clock"], "Hz")),
        ("driver", device["driver"]),
        *versions.items(),
    ]
    return table(["", ""], [[name, str(value)] for name, value in facts if value])


def _limits(parts: Mapping[str, Json]) -> str:
    rows = []
    for part in parts.values():
        for figure in part["figures"]:
            if target := figure["target"]:
                what, sign = target["what"], "≥" if target["at_least"] else "≤"
                limit = "" if target["limit"] is None else f"{sign} {target['limit']:g}"
                measured = f"{target['measured']:.3g} {what}"
                rows.append([_label(figure), measured, f"{sign} {target['bound']:g}", limit, target["verdict"], figure["note"]])
    return table(["figure", "measured", "aim", "limit", "", "where"], rows, right=(1, 2, 3)) if rows else ""


def _grids(figures: Iterable[Json]) -> list[str]:
    """One table for each type and layout: widths down, sizes across."""
    cells: dict[tuple[str, str], dict[tuple[int, int], dict[str, float]]] = {}
    for figure in figures:
        case = figure["case"]
        if _in_grid(figure):
            grid = cells.setdefault((case["dtype"], case["layout"]), {})
            grid.setdefault((case["width"], case["size"]), {})[figure["name"]] = figure["value"]
    if not cells:
        return []
    out = ["`observe_` in percent of the copy bandwidth, by width and size. `x` is read from memory; in brackets, from the L2 cache."]
    for (dtype, layout), grid in sorted(cells.items(), key=lambda item: item[0][1], reverse=True):
        widths, sizes = sorted({width for width, _ in grid}), sorted({size for _, size in grid})
        rows = [[f"{width:,}", *(_cell(grid.get((width, size), {})) for size in sizes)] for width in widths]
        head = [f"{dtype}, {layout}", *(quantity(size, "B") for size in sizes)]
        out.append(table(head, rows, right=range(len(head))))
    return out


def _in_grid(figure: Json) -> bool:
    return figure["name"] in GRID and "layout" in figure["case"]


def _cell(shares: Mapping[str, float]) -> str:
    cold, hot = (shares.get(name) for name in GRID)
    return "" if cold is None else f"{100 * cold:.0f}" + ("" if hot is None else f" ({100 * hot:.0f})")


def _figures(figures: Sequence[Json]) -> str:
    rows = []
    for figure in figures:
        timing = figure["timing"] or {}
        quartiles = " … ".join(quantity(seconds, "s") for seconds in timing.get("quartiles", ()))
        value = quantity(figure["value"], figure["unit"])
        rows.append([_label(figure), value, quartiles, str(timing.get("rounds", "")), figure["note"]])
    return table(["figure", "", "quartiles", "rounds", ""], rows, right=(1, 2, 3)) if rows else ""


def _label(figure: Json) -> str:
    case = ", ".join(quantity(value, "B") if key in ("size", "nbytes") else f"{value}" for key, value in figure["case"].items())
    return figure["name"] + (f" ({case})" if case else "")


def quantity(value: float, unit: str) -> str:
    """A number of three digits with its unit, such as "1.55 ms". Bytes are scaled by powers of two, everything else by powers of ten."""
    if unit == "share":
        return f"{_digits(100 * value)} %"
    if unit == "B":
        return _scaled(value, unit, [(1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")])
    if unit in ("B/s", "Hz"):
        return _scaled(value, unit, [(1e12, "T"), (1e9, "G"), (1e6, "M")])
    if unit == "s":
        return _scaled(value, unit, [(1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")])
    return f"{_digits(value)} {unit}".rstrip()


def _scaled(value: float, unit: str, prefixes: Sequence[tuple[float, str]]) -> str:
    for size, prefix in prefixes:
        if abs(value) >= size:
            return f"{_digits(value / size)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three significant digits."""
    size = abs(value)
    if value == round(value) and size < 1e6:
        return f"{value:.0f}"
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}" if 0.095 <= size < 1e6 else f"{value:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table. A bar within a cell is escaped, so it does not end the cell."""
    rule = ["---"] * len(head)
    for column in right:
        rule[column] = "---:"
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [head, rule, *rows]]
    return "\n".join(f"| {line} |" for line in lines)
