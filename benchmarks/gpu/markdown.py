"""The figures as tables in Markdown: from the JSON alone, so a table can be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

GRID = ("observe_", "observe_, x in L2")
"""The figures of the part ``bandwidth`` that make a grid of sizes and widths."""


def markdown(document: Json) -> str:
    """The whole page."""
    device, versions, parts = document["device"], document["versions"], document["parts"]
    sections = [f"# {device['name']}", _about(device, versions)]
    if document["quick"]:
        sections.append("**A quick run of small inputs: these figures show that everything runs, no more.**")
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
    out = ["`observe_` in per cent of the copy bandwidth, `x` read from memory, by width and size; in brackets with `x` in the L2 cache."]
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
    """A number with its unit, three digits: bytes in powers of two, everything else in powers of ten.

    ``quantity(1.55e-3, "s")`` is ``"1.55 ms"``.
    """
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
    """Three of them."""
    size = abs(value)
    if value == round(value) and size < 1e6:
        return f"{value:.0f}"
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}" if 0.095 <= size < 1e6 else f"{value:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table of cells that are data: a bar in one does not end it."""
    rule = ["---"] * len(head)
    for column in right:
        rule[column] = "---:"
    cells: Callable[[Sequence[str]], str] = lambda row: "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"  # noqa: E731
    return "\n".join(cells(row) for row in [head, rule, *rows])
