"""What all figures share: colors, axes, legends, logarithmic scales, and names that fit and are safe to draw."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.rendering.style import styled
from torchprobe.rendering.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#1c2127", "#5d6874", "#dfe3e8", "#fdfdfc"
ACCENT, WARM, BAND = "#1a6f8f", "#b8501f", "#8d99a6"
"""The colors of a figure on white. :func:`torchprobe.rendering.plots.svg` writes them as CSS variables, so a page can change them."""

DOTTED, DASHED = (0, (1, 2)), (0, (4, 2))
"""Line styles of matplotlib."""

LONGEST_NAME = 48
"""Characters of a name in a figure; longer names are cut in the middle."""

LONGEST_TICK = 22
"""Characters of a name below or next to an axis."""


def new_figure(width: float, height: float, panels: int = 1, *, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure in the style of the library, without pyplot's global state.

    Args:
        width, height: inches.
        panels: axes below each other.
        shared: whether they share the horizontal axis.

    >>> figure, axes = new_figure(9, 3, panels=2)
    >>> len(axes)
    2
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        first = figure.add_subplot(panels, 1, 1)
        axes = [first, *(figure.add_subplot(panels, 1, i + 1, sharex=first if shared else None) for i in range(1, panels))]
        for panel in axes:
            # matplotlib makes ticks later, outside of the style, so they are told here
            panel.tick_params(length=3, width=0.6, color=MUTED, labelcolor=MUTED, labelsize=8)
            if shared:
                panel.label_outer()
    figure.__dict__["_repr_png_"] = functools.partial(_png, figure)  # without pyplot, notebooks do not show a figure by themselves
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=figure.dpi)
    return buffer.getvalue()


def draw_legend(axes: Axes, width: float) -> None:
    """A legend above the axes. ``width`` of the figure, in inches, and the longest name decide the number of columns."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=max(1, min(max(2, int(width / 2)), int((width - 0.6) / (0.4 + 0.065 * longest)))),  # inches, at 8 points
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        borderaxespad=0.2,
        handlelength=1.6,
    )


def set_log_scale(axes: Axes, which: Literal["x", "y"], values: ArrayLike) -> None:
    """Makes an axis logarithmic, with limits around the positive ``values`` and a few readable ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    positive = finite_values(values)
    positive = positive[positive > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 10.0)
    low, high = low / 1.15, high * 1.25
    ratio = high / low
    steps = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 12 else (1, 2, 5) if ratio < 200 else (1, 3) if ratio < 5000 else (1,)
    ticks = [step * 10.0**exponent for exponent in range(-15, 13) for step in steps if low <= step * 10.0**exponent <= high]
    if len(ticks) < 3:  # within a factor of two a logarithmic axis is nearly linear
        ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def finite_values(values: ArrayLike) -> NDArray[np.float64]:
    """The finite values, float64, in one dimension.

    >>> finite_values([[1.0, math.nan], [math.inf, 2.0]])
    array([1., 2.])
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def safe_text(text: str) -> str:
    r"""A text for matplotlib: printable, at most :data:`LONGEST_NAME` characters, and without mathematics between dollar signs.

    >>> safe_text("$x$\n")
    '\\$x\\$\\n'
    """
    text = printable(text)
    text = text if len(text) <= LONGEST_NAME else f"{text[:23]}…{text[-24:]}"
    return text.replace("$", r"\$")


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """The leading components that all layer names share, and the rest of each name, short and printable.

    The empty name, which is the model itself, becomes "output".

    >>> short_names(["visual.blocks.0", "visual.blocks.1", ""])
    ('visual.blocks.', ['0', '1', 'output'])
    """
    shared = shared_prefix([name for name in names if name])
    short = [printable(name[len(shared) :]) if name else "output" for name in names]
    return shared, [name if len(name) <= LONGEST_TICK else f"{name[:8]}…{name[-13:]}" for name in short]


def shared_prefix(names: Sequence[str]) -> str:
    """The leading components, with their dots, that all of several names share.

    >>> shared_prefix(["blocks.0.attn", "blocks.0.mlp"])
    'blocks.0.'
    """
    if len(names) < 2:
        return ""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)  # as long as the shortest name
    return "".join(f"{parts[0]}." for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))


def ticks_that_fit(count: int, room: float, each: float) -> range:
    """The indices of the names that fit along an axis: all ``count``, or every second, third, …

    Args:
        count: number of names.
        room: length of the axis in inches.
        each: length that a name needs in inches.

    >>> list(ticks_that_fit(10, room=1, each=0.25))
    [0, 3, 6, 9]
    """
    return range(0, count, max(1, math.ceil(count * each / room)))
