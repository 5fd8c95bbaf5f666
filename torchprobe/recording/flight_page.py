"""The page of an alarm: which tensor was the first, what went in, the weights, and the last steps of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from torchprobe.common.version import VERSION
from torchprobe.recording.nonfinite import TensorFacts
from torchprobe.recording.verdicts import UNCOUNTED, Event, Report
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table, write
from torchprobe.rendering.tables import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TENSORS = (
    Column("name", "tensor", "its name", "text"),
    Column("shape", "shape", "on this rank", "text"),
    Column("dtype", "type", "its type", "text"),
    Column("nonfinite", "nonfinite", "how many values are nan or infinite", "count"),
    Column("nan", "nan", "how many values are nan", "count"),
    Column("inf", "+inf", "how many values are +inf", "count"),
    Column("minus_inf", "−inf", "how many values are −inf", "count"),
    Column("low", "min", "the smallest finite value"),
    Column("high", "max", "the largest finite value"),
    Column("rows", "rows", "the first rows along dimension 0 with such a value", "text"),
)
_EVENTS = (
    Column("order", "order", "in the order of the run", "index"),
    Column("layer", "layer", "its name; “(output)” is the model itself", "text"),
    Column("kind", "what", "activation or gradient", "text"),
    Column("verdict", "verdict", "whether it came in or was made here", "text"),
    Column("because", "because", "by what that is known", "text"),
)
_LAST = (
    Column("layer", "layer", "its name", "text"),
    Column("rms_first", "rms, first", "root mean square in the first step shown"),
    Column("rms", "rms, last", "root mean square in the last step"),
    Column("abs_max", "max |x|", "the largest |x| of the window, at the last step"),
    Column("nonfinite", "nonfinite", "nonfinite values of the window, at the last step", "count"),
)


def write_page(
    path: Path, report: Report, steps: Sequence[int], layers: Sequence[str], fields: Sequence[str], numbers: NDArray[Any]
) -> None:
    """Writes the page.

    Args:
        path: of the file.
        report: the alarm.
        steps, layers, fields, numbers: the last steps, (steps, layers, fields).

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing.
    """
    event = report.first
    sections = [
        Section("What went in and came out", [event.because], tables=[Table(_tensor_rows(event), _TENSORS)]),
        Section("In the order of the run", tables=[Table([_event_row(one) for one in report.events], _EVENTS, _followed(report))]),
    ]
    if event.parameters:
        rows = sorted((_row(found, found.name) for found in event.parameters), key=lambda row: -row["nonfinite"])
        sections.insert(1, Section("Its parameters and buffers", tables=[Table(rows, _TENSORS)]))
    if len(steps):
        sections.append(_last(steps, layers, fields, numbers))
    page = Page(
        "guard",
        f"First nonfinite {event.kind}: {event.title}",
        f"{event.verdict[0].upper()}{event.verdict[1:]}. {event.because[0].upper()}{event.because[1:]}.",
        [
            Fact("step", "–", UNCOUNTED) if event.step is None else Fact("step", str(event.step)),
            Fact("call of the layer", str(event.call) if event.call >= 0 else "–"),
            Fact("rank", str(event.rank)),
            Fact("rows", ", ".join(map(str, event.rows)) or "–", "the first ones, along dimension 0"),
        ],
        sections,
        footer=[f"torchprobe {VERSION}", *report.notes],
    )
    write(page, path)


def _tensor_rows(event: Event) -> list[dict[str, Any]]:
    what = "gradient" if "gradient" in event.kind else "output"
    return [_row(found, f"{what} {found.name}") for found in event.outputs] + [_row(found, f"input {found.name}") for found in event.inputs]


def _row(found: TensorFacts, name: str) -> dict[str, Any]:
    shape = " × ".join(map(str, found.shape)) or "a number"
    rows = ", ".join(map(str, found.rows)) + (", …" if found.bad_rows > len(found.rows) else "")
    keys = ("dtype", "nonfinite", "nan", "inf", "minus_inf", "low", "high")
    return {"name": name.strip(), "shape": shape, "rows": rows, **{key: getattr(found, key) for key in keys}}


def _event_row(event: Event) -> dict[str, Any]:
    name = f"{event.layer}: {event.name}" if event.name else event.layer
    return {"order": event.order, "layer": name, "kind": event.kind, "verdict": event.verdict, "because": event.because}


def _followed(report: Report) -> str:
    more = len(dict.fromkeys(report.followed))
    return f"and {more} more layers" if more else ""


def _last(steps: Sequence[int], layers: Sequence[str], fields: Sequence[str], numbers: NDArray[Any]) -> Section:
    at = {field: index for index, field in enumerate(fields)}
    rows = [
        {
            "layer": layer,
            "rms_first": float(numbers[0, column, at["rms"]]),
            **{key: float(numbers[-1, column, at[key]]) for key in ("rms", "abs_max", "nonfinite")},
        }
        for column, layer in enumerate(layers)
    ]

    def draw(width: float) -> Figure:
        from torchprobe.rendering.heatmap import history_map

        return history_map(numbers[:, :, at["rms"]], list(steps), list(layers), "root mean square", width=width)

    picture = [Picture(draw, "the root mean square of every layer in the last steps")] if len(steps) > 1 else []
    return Section(f"The last {len(steps)} steps", ["Of the finite values."], pictures=picture, tables=[Table(rows, _LAST)])
