"""The tables of ``docs/scale.md``, between markers, from the constants in ``benchmarks/results/scale.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.scale.constants import Constant
from benchmarks.scale.scenarios import ASSUMED, SCENARIOS

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/scale.json", ROOT / "docs/scale.md"


def as_json(constants: Mapping[str, Constant], machine: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a measurement."""
    kept = ("processor", "cores", "threads", "torch", "torchprobe", "python")
    return {"machine": {key: machine[key] for key in kept}, "constants": {name: vars(one) for name, one in constants.items()}}


def read() -> tuple[dict[str, Constant], dict[str, Any]]:
    """The constants that are kept, and the machine."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {name: Constant(**one) for name, one in found["constants"].items()}, found["machine"]


def tables(constants: Mapping[str, Constant]) -> dict[str, str]:
    """Marker → the table there, in Markdown."""
    measured = ["| constant | measured | unit | how |", "|---|---|---|---|"]
    measured += [f"| `{name}` | {plain(one.value)} | {one.unit} | {one.how} |" for name, one in constants.items()]
    assumed = ["| name | assumed | unit | what | from |", "|---|---|---|---|---|"]
    assumed += [f"| `{name}` | {plain(one.value)} | {one.unit} | {one.what} | {one.source} |" for name, one in ASSUMED.items()]
    found = {"measured": "\n".join(measured), "assumed": "\n".join(assumed)}
    values = {name: one.value for name, one in constants.items()}
    for title, lines in SCENARIOS.items():
        rows = [f"| {line.what} | {line.amount} | {line.formula} |" for line in lines(values)]
        found[title] = "\n".join(["| | | how |", "|---|---|---|", *rows])
    return found


def written(page: str, constants: Mapping[str, Constant]) -> str:
    """The page with its tables.

    Raises:
        ValueError: a marker is missing.
    """
    for marker, table in tables(constants).items():
        pattern = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"{PAGE.name} has no place for the table {marker!r}")
        page = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page)
    return page


def plain(value: float) -> str:
    """Three digits, with a prefix of ten if needed.

    >>> plain(3.2e-05), plain(81.13), plain(2.32e9), plain(1024.0)
    ('3.20e-05', '81.1', '2.32e+09', '1,024')
    """
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if 0.01 <= abs(value) < 1e5 else f"{value:.2e}"
