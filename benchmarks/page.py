"""The figures of a run as one self-contained HTML page: ratios to the floor and to each peer, and growth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quiet import sentence
from torchprobe.rendering import page
from torchprobe.rendering.axes import ACCENT, DASHED, INK, MUTED, WARM, draw_legend, new_figure, safe_text, set_log_scale
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR, OURS = ("x.sum()",), ("observe_", "torchprobe")
"""How the names of the floor and of our own contestants begin."""

RATIOS = (
    Column("input", "input", "what is read", "text"),
    Column("contestant", "contestant", "what takes its turn", "text"),
    Column("ms", "ms", "median, milliseconds"),
    Column("floor", "× floor", "median ÷ that of x.sum() on the same input in the same run"),
    Column("ours", "× ours", "median ÷ that of torchprobe on the same input in the same run"),
    Column("least", "× ours, minima", "the same for the smallest times"),
    Column("target", "aim", "what this figure should be", "text", optional=True),
    Column("verdict", "", "whether it is", "text", optional=True),
    Column("disturbed", "disturbed", "share of the calls in which a thread had to wait for a core", "share", optional=True),
)
GROWTH = (
    Column("axis", "grows", "what grows", "text"),
    Column("what", "work", "what is measured", "text"),
    Column("slope", "slope", "of the line of least squares through log time over log size; smallest times"),
    Column("last_slope", "last slope", "between the two largest sizes"),
    Column("expected", "if nothing else cost", "the slope if all the time were spent on what grows"),
    Column("sizes", "sizes", "that were measured", "text"),
    Column("milliseconds", "ms", "smallest time at each size", "text"),
    Column("missing", "", "why there is no figure", "text", optional=True),
)


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a section with their ratios to the floor and to ours; None where the input has none.

    Contestants are compared with those of the same input and type: what comes after a comma in their names.

    >>> found = compared([
    ...     {"input": "a", "contestant": "x.sum()", "median": 1.0, "min": 1.0},
    ...     {"input": "a", "contestant": "observe_", "median": 2.0, "min": 1.5},
    ...     {"input": "a", "contestant": "eager", "median": 8.0, "min": 6.0},
    ... ])
    >>> [(row["floor"], row["ours"], row["least"]) for row in found]
    [(1.0, 0.5, 0.6666666666666666), (2.0, 1.0, 1.0), (8.0, 4.0, 4.0)]
    """
    found = []
    for row in rows:
        same = [one for one in rows if one["input"] == row["input"] and _kind(one) == _kind(row)]
        floor, ours = _first(same, FLOOR), _first(same, OURS)
        target = row.get("target")
        found.append({
            "input": row["input"], "contestant": row["contestant"], "ms": row["median"] * 1e3,
            "floor": _ratio(row, floor, "median"), "ours": _ratio(row, ours, "median"), "least": _ratio(row, ours, "min"),
            "target": _aim(target), "verdict": _verdict(row, target), "disturbed": row.get("disturbed"),
        })  # fmt: skip
    return found


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["contestant"]).partition(", ")[2]


def _first(rows: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> Mapping[str, Any] | None:
    return next((row for row in rows if str(row["contestant"]).startswith(names)), None)


def _ratio(row: Mapping[str, Any], to: Mapping[str, Any] | None, key: str) -> float | None:
    return row[key] / to[key] if to is not None and row.get(key) is not None and to.get(key) else None


def _verdict(row: Mapping[str, Any], target: Mapping[str, Any] | None) -> str:
    """With a question mark if other processes disturbed the measurement, as on the terminal."""
    return "" if not target else f"{target['verdict']}{' ?' if (row.get('disturbed') or 0) > 0.1 else ''}"


def _aim(target: Mapping[str, Any] | None) -> str:
    return "" if not target else f"{'≥' if target['at_least'] else '≤'} {target['bound']:g} {target['what']}"


# -- figures -----------------------------------------------------------------------------------------------------------------


def draw_ratios(rows: Sequence[Mapping[str, Any]], key: str, label: str, width: float) -> Figure:
    """A dot for each contestant on a logarithmic axis, with a line at 1."""
    shown = [row for row in rows if row[key] is not None and row[key] > 0]
    figure, (axes,) = new_figure(width, 0.6 + 0.24 * len(shown), shared=False)
    values = [row[key] for row in shown]
    places = range(len(shown), 0, -1)
    mine = [str(row["contestant"]).startswith(OURS) for row in shown]
    axes.hlines(places, [min(1.0, value) for value in values], [max(1.0, value) for value in values], color=MUTED, linewidth=0.8)
    axes.scatter(values, places, color=[ACCENT if one else INK for one in mine], s=22, zorder=3)
    axes.axvline(1.0, color=WARM, linewidth=0.9, linestyle=DASHED)
    set_log_scale(axes, "x", [*values, 1.0])
    axes.set_yticks([*places], [safe_text(f"{row['contestant']}  {row['input']}") for row in shown], fontsize=7 if width > 6 else 6)
    axes.set_xlabel(label, fontsize=8, color=MUTED)
    return figure


def draw_growth(growth: Mapping[str, Any], width: float) -> Figure:
    """Times over sizes on logarithmic axes, and the line that the expected slope gives from the largest size on."""
    figure, (axes,) = new_figure(width, 2.6)
    sizes, times = growth["sizes"], [one * 1e3 for one in growth["minima"]]
    axes.plot(sizes, times, marker="o", markersize=4, color=ACCENT, label=f"measured, slope {growth['slope']:.2f}")
    expected = [times[-1] * (size / sizes[-1]) ** growth["expected"] for size in sizes]
    axes.plot(sizes, expected, color=WARM, linewidth=0.9, linestyle=DASHED, label=f"slope {growth['expected']:g}")
    set_log_scale(axes, "x", sizes)
    set_log_scale(axes, "y", [*times, *expected])
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel(growth["axis"], fontsize=8, color=MUTED)
    axes.set_ylabel("milliseconds", fontsize=8, color=MUTED)
    draw_legend(axes, width)
    return figure


# -- the page ----------------------------------------------------------------------------------------------------------------


def contents(found: Mapping[str, Any]) -> Page:
    """The page of a run, from its JSON."""
    machine, growth = found["machine"], found.get("growth", [])
    sections = [*_ratio_sections(found["sections"])]
    if growth:
        drawn = [one for one in growth if one["slope"] is not None]
        rows = [
            {
                **one,
                "sizes": ", ".join(f"{size:,}" for size in one["sizes"]),
                "milliseconds": ", ".join(f"{time * 1e3:.3g}" for time in one["minima"]),
            }
            for one in growth
        ]
        pictures = [Picture(partial(draw_growth, one), f"{one['what']}: time over {one['axis']}", one["axis"]) for one in drawn]
        text = "Smallest times, since other programs only add. A slope of 1 means twice the time for twice as much, −1 half the time."
        sections.append(Section("Growth", [text], pictures, [Table(rows, GROWTH)]))
    quiet = found.get("quiet")
    facts = [
        Fact("Processor", str(machine["processor"]), f"{machine['cores']} cores, {machine['threads']} threads used"),
        Fact("Kernels", str(machine["kernels"]["cpu"])),
        Fact("torch", str(machine["torch"])),
    ]
    return Page(
        kind="benchmarks",
        title="What torchprobe costs",
        summary="Programs that do the same or similar work take turns in one process. Compare ratios, not times of different runs.",
        facts=facts,
        sections=sections,
        notice="" if quiet is None or quiet["quiet"] else sentence(quiet),
        footer=[
            "" if quiet is None else sentence(quiet),
            f"torchprobe {machine['torchprobe']}, torch {machine['torch']}, Python {machine['python']}; malloc {machine['allocator']}.",
        ],
    )


def _ratio_sections(sections: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    for section in sections:
        rows = compared(section["rows"])
        pictures = []
        for key, label in (("floor", "× x.sum(), the floor"), ("ours", "× torchprobe")):
            itself = FLOOR if key == "floor" else (*OURS, *FLOOR)  # ours against the floor is in the figure before
            others = [row for row in rows if row[key] is not None and not str(row["contestant"]).startswith(itself)]
            if others:
                pictures.append(
                    Picture(partial(draw_ratios, others, key, label), f"{section['title']}: {label}", f"{section['name']}-{key}")
                )
        yield Section(str(section["title"]), [], pictures, [Table(rows, RATIOS)])


def write(found: Mapping[str, Any], path: Path) -> Path:
    """Writes the page.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing.
    """
    return page.write(contents(found), path)
