"""Rows of timings, as tables on a terminal and as JSON; and what every command of the benchmarks shares."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import click
import torch
from rich.console import Console
from rich.table import Table

import torchprobe
from benchmarks.timing import Timing, malloc_is_tuned, restart_with_tuned_malloc
from torchprobe.rendering.tables import plain_table, text


@dataclass(frozen=True)
class Target:
    """What a figure should be. ``bound`` is the aim, ``limit`` must be kept; ``interval`` is the 95 % interval of the figure."""

    what: str
    measured: float
    bound: float
    limit: float | None = None
    at_least: bool = False
    interval: tuple[float, float] | None = None

    def within(self, bound: float) -> bool:
        return self.measured >= bound if self.at_least else self.measured <= bound

    @property
    def verdict(self) -> str:
        if self.interval and self.interval[0] <= self.bound <= self.interval[1]:
            return "not resolved"
        if self.within(self.bound):
            return "met"
        return "missed" if self.limit is None else "within limit" if self.within(self.limit) else "over limit"

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.what}{limit}"


@dataclass(frozen=True)
class Row:
    """One contestant on one input; ``ratio`` and ``ratio_of_minima`` are against the baseline of that input."""

    case: str
    contestant: str
    timing: Timing
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None  # 95 %
    ratio_of_minima: float | None = None
    gigabytes_per_second: float | None = None
    megabytes: float | None = None  # peak
    computes: str = ""
    target: Target | None = None
    extrapolated: str = ""  # to a whole data set


@dataclass(frozen=True)
class Section:
    """One table. ``scale`` converts seconds to ``unit``; ``note`` is printed below."""

    name: str
    title: str
    rows: Sequence[Row]
    note: str = ""
    unit: str = "ms"
    scale: float = 1e3
    ratio: str = "ratio"
    page_faults: bool = False


def verdict(row: Row) -> str:
    """The verdict on its target, with a question mark if other processes disturbed the measurement."""
    if row.target is None:
        return ""
    return row.target.verdict + (" ?" if row.timing.disturbed > 0.1 else "")


def _disturbance(rows: Sequence[Row]) -> str:
    worst = max(row.timing.disturbed for row in rows)
    return (
        "" if worst <= 0.1 else f"?: in up to {worst:.0%} of the calls a thread had to wait for a core, so these figures are not reliable."
    )


class Ratios(TypedDict):
    ratio: float
    ratio_of_minima: float


def versus(timing: Timing, baseline: Timing) -> Ratios:
    """Both ratios of a :class:`Row`."""
    return {"ratio": timing.median / baseline.median, "ratio_of_minima": timing.minimum / baseline.minimum}


def table(section: Section, width: int = 160) -> Table:
    """For a terminal of ``width`` columns, without empty columns; a narrow terminal gets fewer columns."""
    unit, scale = section.unit, section.scale
    columns: dict[str, Callable[[Row], str]] = {
        "input": lambda row: row.case,
        "contestant": lambda row: row.contestant,
        "computes": lambda row: row.computes,
        unit: lambda row: _digits(row.timing.median * scale),
        "quartiles": lambda row: " … ".join(_digits(q * scale) for q in row.timing.quartiles),
        "min": lambda row: "" if row.timing.difference else _digits(row.timing.minimum * scale),
        "GB/s": lambda row: _digits(row.gigabytes_per_second),
        section.ratio: lambda row: _digits(row.ratio),
        "95 %": lambda row: " … ".join(map(_digits, row.ratio_interval or ())),
        "of minima": lambda row: _digits(row.ratio_of_minima),
        "peak MB": lambda row: f"{row.megabytes:,.0f}" if row.megabytes is not None else "",
        "page faults": lambda row: f"{row.timing.page_faults:,.0f}" if section.page_faults else "",
        "all of Broden": lambda row: row.extrapolated,
        "target": lambda row: str(row.target or ""),
        "measured": lambda row: _digits(row.target.measured if row.target else None),
        "": lambda row: verdict(row),
    }
    left_out = {"quartiles", "min", "of minima", "page faults"} if width < 140 else set()
    shown = {head: cell for head, cell in columns.items() if head not in left_out and any(cell(row) for row in section.rows)}
    out = plain_table(*shown, right=shown.keys() - {"input", "contestant", "computes", "all of Broden", "target", ""})
    out.title, out.title_justify = text(section.title, "bold"), "left"
    out.caption, out.caption_justify = text(" ".join(filter(None, (section.note, _disturbance(section.rows))))), "left"
    for i, row in enumerate(section.rows):
        last = i + 1 == len(section.rows) or section.rows[i + 1].case != row.case
        first = i == 0 or section.rows[i - 1].case != row.case
        cells = [cell(row) if head != "input" or first else "" for head, cell in shown.items()]
        out.add_row(*map(text, cells), end_section=last)
    return out


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """Everything, times in seconds."""
    return {
        "machine": machine(),
        "sections": [{"name": s.name, "title": s.title, "rows": [_plain(row) for row in s.rows]} for s in sections],
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "torchprobe": torchprobe.__version__,
        "kernels": {device: status.partition(",")[0] for device, status in torchprobe.ops.kernels().items()},
        "allocator": "tuned" if malloc_is_tuned() else "as the system has it",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(row: Row) -> dict[str, Any]:
    timing, target = row.timing, row.target
    return {
        "input": row.case,
        "contestant": row.contestant,
        "computes": row.computes,
        "extrapolated": row.extrapolated,
        "rounds": len(timing.seconds),
        "median": timing.median,
        "quartiles": timing.quartiles,
        "interval_of_median": timing.interval,
        "min": None if timing.difference else timing.minimum,
        "page_faults": None if timing.difference else timing.page_faults,
        "disturbed": timing.disturbed,
        "ratio": row.ratio,
        "ratio_interval": row.ratio_interval,
        "ratio_of_minima": row.ratio_of_minima,
        "megabytes": row.megabytes,
        "gigabytes_per_second": row.gigabytes_per_second,
        "target": target and {**vars(target), "verdict": target.verdict},
    }


def _digits(value: float | None) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return ""
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


# -- the commands ----------------------------------------------------------------------------------------------------------

HELP = {"help_option_names": ["-h", "--help"]}
json_option = click.option(
    "--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure to FILE, in seconds and bytes."
)


class Report:
    """What a command prints and saves: the machine, then each section as it is measured.

    ``tune_malloc`` restarts the process, so create the report before any other work.
    """

    def __init__(self, tune_malloc: bool = True) -> None:
        if tune_malloc:
            restart_with_tuned_malloc()
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 200
        self.machine = machine()
        self.sections: list[Section] = []
        self.console.print(
            "{processor}, {threads} threads; torch {torch}; CPU kernels {cpu}; malloc {allocator}; load average {load_average:.1f}".format(
                **self.machine, cpu=self.machine["kernels"]["cpu"]
            ),
            highlight=False,
        )

    def add(self, section: Section) -> None:
        self.sections.append(section)
        self.console.print(table(section, self.console.width), "")

    def save(self, path: Path | None, **more: object) -> None:
        """Writes every figure as JSON; nothing without a path."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text(**more), encoding="utf-8")

    def text(self, **more: object) -> str:
        """Every figure as JSON."""
        return json.dumps({**as_json(self.sections), "machine": self.machine, **more}, indent=1) + "\n"
