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
from torchprobe.common.files import replacing

FORMAT = 3

Labels = Mapping[str, str | int]
"""The input of a figure, such as its type and width."""
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One number.

    Args:
        name: what was measured.
        value: in ``unit``, which stands behind it: "%", "µs", "MB" …
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

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} {dict(self.case)}: {self.value} is not a number")

    def as_json(self) -> dict[str, Any]:
        timing = self.timing and {"rounds": len(self.timing.seconds), "quartiles": self.timing.quartiles, "interval": self.timing.interval}
        target = self.target and {**vars(self.target), "verdict": self.target.verdict}
        return {**vars(self), "case": dict(self.case), "timing": timing, "target": target}


def time(name: str, timing: Timing, case: Labels, target: Target | None = None, note: str = "") -> Figure:
    """The median, in microseconds."""
    return Figure(name, 1e6 * timing.median, "µs", case, timing, target, note)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def document(device: Json, versions: Json) -> dict[str, Any]:
    """A file without parts."""
    return {"format": FORMAT, "date": now(), "device": dict(device), "versions": dict(versions), "parts": {}}


def part(title: str, seconds: float, figures: Sequence[Figure], error: str | None) -> dict[str, Any]:
    """The figures of one part of the benchmark, and the error that stopped it, or None."""
    return {"title": title, "date": now(), "seconds": round(seconds, 1), "figures": [f.as_json() for f in figures], "error": error}


def resume(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the parts of the file at ``path``, if its device and versions are the same."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return new
    same = isinstance(old, dict) and all(old.get(key) == new[key] for key in ("format", "device", "versions"))
    return {**new, "parts": dict(old["parts"])} if same else new


def write(path: Path, content: Json) -> None:
    """The JSON file, and the page next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in ((path, json.dumps(content, indent=1, ensure_ascii=False) + "\n"), (path.with_suffix(".md"), markdown(content))):
        with replacing(file) as new:
            new.write_text(text, encoding="utf-8")


def markdown(content: Json) -> str:
    """The whole page."""
    facts = [[name, str(value)] for name, value in {**content["device"], **content["versions"]}.items() if value]
    sections = [f"# {content['device']['name']}", table(["", ""], facts)]
    for each in content["parts"].values():
        sections.append(f"## {each['title']}")
        sections.append(f"{each['date']}, {each['seconds']:.0f} s." + (f" **Stopped: {each['error']}**" if each["error"] else ""))
        sections.append(table(["figure", "", "quartiles, µs", "aim", "limit", "", ""], map(_cells, each["figures"]), right=(1, 2, 3, 4)))
    return "\n\n".join(sections) + "\n"


def _cells(figure: Json) -> list[str]:
    case, target, timing = ", ".join(map(str, figure["case"].values())), figure["target"] or {}, figure["timing"] or {}
    sign = "≥" if target.get("at_least") else "≤"
    bounds = ["" if target.get(key) is None else f"{sign} {target[key]:g}" for key in ("bound", "limit")]
    quartiles = " … ".join(f"{1e6 * seconds:.4g}" for seconds in timing.get("quartiles", ()))
    value = f"{figure['value']:.4g} {figure['unit']}".rstrip()
    return [figure["name"] + (f" ({case})" if case else ""), value, quartiles, *bounds, target.get("verdict", ""), figure["note"]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table. A bar within a cell is escaped, so it does not end the cell."""
    rule = ["---"] * len(head)
    for column in right:
        rule[column] = "---:"
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [head, rule, *rows]]
    return "\n".join(f"| {line} |" for line in lines)
