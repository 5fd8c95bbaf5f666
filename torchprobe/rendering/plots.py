"""The pictures, as matplotlib figures without pyplot's global state, and as SVG to be put inline in a page."""

from __future__ import annotations

import functools
import html
import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.common.files import replacing
from torchprobe.rendering.tables import Row, printable
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#1c2127", "#5d6874", "#dfe3e8", "#fdfdfc"
ACCENT, WARM, BAND = "#1a6f8f", "#b8501f", "#8d99a6"
"""The colours of a figure on white. :func:`svg` writes them as CSS variables: a page can give others in the dark."""

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    SURFACE: "surface",
    ACCENT: "accent",
    WARM: "warm",
    BAND: "band",
}

POOLED_RELU = (5.4, 9.0)
"""Vector kurtosis of pooled rectified features without any outlier: 5.4 for ReLU of a Gaussian, up to 9 in networks."""


def depth_profile(
    rows: Sequence[Row],
    *,
    field: str = "vector_kurtosis",
    band: Sequence[Sequence[Row]] = (),
    label: str | None = None,
    band_label: str = "baseline",
    width: float = 9.0,
) -> Figure:
    """A field of each layer, in the order of ``rows``. For the vector kurtosis also its median, and what Gaussian features would give.

    Args:
        rows: one mapping per layer, as ``Recording.rows()`` gives them.
        field: which number.
        band: rows of other networks with the same layers, drawn as their range and their average.
        label: what the line of ``rows`` is called; default: "mean over vectors" for the vector kurtosis, else the name of the field.
        band_label: what the band is called.
        width: inches.

    >>> rows = [{"layer": str(i), "features": 8, "vector_kurtosis": 2.0 + i} for i in range(3)]
    >>> len(depth_profile(rows).axes)
    1
    """
    figure, (axes,) = _figure(width, 3.8)
    x = np.arange(len(rows))
    kurtosis = field == "vector_kurtosis"
    label = label or ("mean over vectors" if kurtosis else field.replace("_", " "))
    others = np.array([_aligned(rows, other, field) for other in band]).reshape(len(band), len(rows))
    if len(band):
        low, high = _nan_range(others)
        axes.fill_between(x, low, high, color=BAND, alpha=0.35, linewidth=0, label=f"{_plain(band_label)}: range")
        axes.plot(
            x,
            _nan_mean(others),
            color=BAND,
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=f"{_plain(band_label)}: mean",
        )
    shown = [_column(rows, field), others.ravel()]
    if kurtosis:
        null = [gaussian_kurtosis(int(row["features"])) if row.get("features") else math.nan for row in rows]
        median = _column(rows, "vector_kurtosis_median")
        axes.plot(x, null, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="Gaussian features")
        axes.plot(x, median, color=ACCENT, linewidth=1, linestyle=(0, (4, 2)), label="median over vectors")
        shown += [median, np.array(null)]
    axes.plot(x, _column(rows, field), color=ACCENT, linewidth=1.8, marker="o", markersize=4, label=_plain(label))
    if kurtosis:
        _log_scale(axes, "y", np.concatenate(shown))
    _name_layers(axes, [str(row.get("layer", "")) for row in rows], width)
    axes.set_ylabel(_plain(field.replace("_", " ")))
    _legend(axes, width)
    return figure


def kurtosis_histogram(kurtosis: ArrayLike, features: int, *, interval: tuple[float, float] | None = None, width: float = 9.0) -> Figure:
    """Distribution of the vector kurtosis over images, with the Gaussian range and the ceiling of that width.

    Args:
        kurtosis: one value per image, shape (images,); nan is left out.
        features: the length d of the vectors.
        interval: an interval of the mean, shaded.
        width: inches.
    """
    from matplotlib.ticker import MaxNLocator

    values = _finite(kurtosis)
    figure, (axes,) = _figure(width, 3.0)
    null, spread = gaussian_kurtosis(features), gaussian_kurtosis_std(features)
    if math.isfinite(spread):
        axes.axvspan(
            max(1.0, null - 2 * spread),
            null + 2 * spread,
            color=MUTED,
            alpha=0.18,
            linewidth=0,
            label="Gaussian features, ± 2 std",
        )
    axes.axvline(null, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    if features > 1:
        axes.axvline(kurtosis_ceiling(features), color=INK, linewidth=1, linestyle=(0, (4, 2)), label="ceiling of this width")
    axes.plot(
        POOLED_RELU,
        [0.98, 0.98],
        color=BAND,
        linewidth=5,
        solid_capstyle="butt",
        transform=axes.get_xaxis_transform(),
        label="pooled ReLU, no outlier",
    )
    if values.size:
        low, high = min(float(values.min()), null) * 0.9, max(float(values.max()), null) * 1.1
        bins = np.geomspace(low, high, max(12, min(60, int(2 * math.sqrt(values.size)) + 10)))
        axes.hist(values, bins=bins.tolist(), color=ACCENT, alpha=0.75, label="images")
        if interval is not None and all(map(math.isfinite, interval)):
            axes.axvspan(*interval, color=WARM, alpha=0.25, linewidth=0, label="95 % interval of the mean")
        axes.axvline(float(values.mean()), color=WARM, linewidth=1.8, label="mean")
    _log_scale(axes, "x", np.concatenate([values, [1.0, null, kurtosis_ceiling(features) if features > 1 else null]]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("vector kurtosis of an image")
    axes.set_ylabel("images")
    _legend(axes, width)
    return figure


def feature_profile(mean_abs: ArrayLike, outlier_frequency: ArrayLike, *, labelled: Iterable[int] = (), width: float = 9.0) -> Figure:
    """How large each feature is beside the others, and in what share of the vectors it is an outlier.

    Args:
        mean_abs: mean absolute value per feature, shape (features,).
        outlier_frequency: share of vectors in which the feature is an outlier, shape (features,); nan: cannot be.
        labelled: features to name by index, the first of two that are too close to name both.
        width: inches.
    """
    size, share = np.asarray(mean_abs, dtype=float), np.asarray(outlier_frequency, dtype=float)
    figure, (above, below) = _figure(width, 3.8, panels=2)
    relative = size / np.nanmean(size) if np.isfinite(size).any() and np.nanmean(size) > 0 else np.full_like(size, math.nan)
    index = np.arange(size.size)
    often = np.nan_to_num(share) > 0
    for axes, values in ((above, relative), (below, 100 * share)):
        for chosen, colour, thickness in ((~often, ACCENT, 0.8), (often, WARM, 1.6)):
            axes.plot(*_stems(index[chosen], values[chosen]), color=colour, linewidth=thickness)
    above.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    above.set_ylabel("mean |h| / average")
    below.set_ylabel("outlier in % of vectors")
    below.set_xlabel("feature index")
    below.set_ylim(0, max(5.0, 112 * float(np.nanmax(share, initial=0.0))) if np.isfinite(share).any() else 1.0)
    above.set_ylim(0, 1.18 * float(np.nanmax(relative, initial=1.0)) if np.isfinite(relative).any() else 1.0)
    if not np.isfinite(share).any():
        below.text(
            0.5,
            0.5,
            "too few features for any to be an outlier",
            transform=below.transAxes,
            ha="center",
            va="center",
            color=MUTED,
        )
    for i in _apart(labelled, size.size * 0.3 / width):
        for axes, value in ((above, relative[i]), (below, 100 * share[i])):
            if math.isfinite(value) and value > 0:
                axes.annotate(str(i), (i, value), xytext=(0, 2), textcoords="offset points", ha="center", color=WARM, fontsize=8)
    above.set_xlim(-0.01 * size.size - 0.5, 1.01 * size.size - 0.5)
    return figure


def svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element for HTML: no links, no scripts, text as text, colours as CSS variables.

    Args:
        figure: a figure of this module.
        description: what it shows, for people who do not see it.

    Returns:
        markup in which every text of the figure is escaped.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    # The salt makes the ids of two figures on one page differ, and one figure always the same text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{printable(description)} {figure.get_size_inches()}"}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the font of the page
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # HTML knows SVG by itself
    text = re.sub(r' d="[^"]*"', _rounded, text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    size = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {size[0] if size else ""} role="img"><title>{html.escape(printable(description))}</title>'
    return head + text[text.index(">") + 1 :].strip()


def _rounded(path: re.Match[str]) -> str:
    """A path in hundredths of a pixel: thousands of cells are half as long then. Cells get crisp edges: no light between them."""
    text = re.sub(r"\.(\d\d)\d+", r".\1", path[0].replace("\n", ""))
    cells = text.endswith('z"') and text.count("L") <= 4 * text.count("M") and "C" not in text
    return f'{text} shape-rendering="crispEdges"' if cells else text


def write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes the figure to ``path``, at once, and returns the path; its ending decides the format."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=150)
    return path


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=SURFACE)
    panel = figure.add_subplot(panels, 1, 1)
    axes = [panel, *(figure.add_subplot(panels, 1, i + 1, sharex=panel) for i in range(1, panels))]
    for panel in axes:
        panel.set_facecolor("none")
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(MUTED)
        panel.grid(True, axis="y", color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(length=3, width=0.6, color=MUTED, labelcolor=MUTED, labelsize=8)
        panel.xaxis.label.set(color=INK, fontsize=9)
        panel.yaxis.label.set(color=INK, fontsize=9)
        panel.label_outer()
    figure.__dict__["_repr_png_"] = functools.partial(_png, figure)  # notebooks know figures only once pyplot is imported
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _legend(axes: Axes, width: float) -> None:
    """Above the axes, in as many columns as the names leave room for: wider ones would leave none for the axes."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=max(1, min(int(width / 2), int((width - 0.6) / (0.4 + 0.065 * longest)))),  # inches, at 8 points
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        borderaxespad=0.2,
        handlelength=1.6,
    )


def _log_scale(axes: Axes, which: Literal["x", "y"], values: ArrayLike) -> None:
    """A logarithmic axis around ``values`` whose ticks are a few readable numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    positive = _finite(values)
    positive = positive[positive > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 10.0)
    low, high = low / 1.15, high * 1.25
    ratio = high / low
    steps = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 12 else (1, 2, 5) if ratio < 200 else (1, 3) if ratio < 5000 else (1,)
    ticks = [step * 10.0**exponent for exponent in range(-3, 13) for step in steps if low <= step * 10.0**exponent <= high]
    if len(ticks) < 3:  # within a factor of two a logarithmic axis is nearly a linear one
        ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _stems(x: NDArray[Any], height: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vertical lines from 0 as one broken line: thousands of them are then one element of the picture."""
    gap = np.full(x.shape, math.nan)
    return np.stack([x, x, gap], -1).ravel(), np.stack([np.zeros_like(height), height, gap], -1).ravel()


def _apart(indices: Iterable[int], distance: float) -> list[int]:
    kept: list[int] = []
    for index in indices:
        if all(abs(index - other) >= distance for other in kept):
            kept.append(index)
    return kept


def _name_layers(axes: Axes, names: Sequence[str], width: float) -> None:
    """Names below the axis, without the part that all share, thinned out where there is no room for all."""
    shared = _shared_prefix([name for name in names if name])
    short = [name[len(shared) :] if name else "output" for name in names]
    short = [printable(name) for name in short]
    short = [name if len(name) <= 22 else f"{name[:8]}…{name[-13:]}" for name in short]
    long = max(map(len, short), default=0) > 3
    ticks = range(0, len(names), max(1, math.ceil(len(names) / (width * 4))))
    axes.set_xticks(
        ticks,
        [_plain(short[i]) for i in ticks],
        rotation=45 if long else 0,
        rotation_mode="anchor",
        ha="right" if long else "center",
    )
    axes.set_xlim(-0.5, max(len(names) - 0.5, 0.5))
    axes.set_xlabel(_plain(f"{shared}*" if shared else "layer, in the order in which they ran"))


def _plain(text: str) -> str:
    """A name as matplotlib must be given it: printable, not endless, and no mathematics between dollars."""
    text = printable(text)
    text = text if len(text) <= 48 else f"{text[:23]}…{text[-24:]}"
    return text.replace("$", r"\$")


def _shared_prefix(names: Sequence[str]) -> str:
    """The leading components, with their dots, that all of several names share."""
    if len(names) < 2:
        return ""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)  # as long as the shortest
    return "".join(f"{parts[0]}." for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))


def _column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    return np.array([math.nan if row.get(key) is None else float(row[key]) for row in rows], dtype=np.float64)


def _aligned(rows: Sequence[Row], other: Sequence[Row], field: str) -> list[float]:
    by_name = {row["layer"]: row.get(field, math.nan) for row in other}
    return [float(by_name.get(row["layer"], math.nan)) for row in rows]


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def _nan_range(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = np.where(np.isnan(values), np.inf, values).min(0), np.where(np.isnan(values), -np.inf, values).max(0)
    return np.where(np.isinf(low), math.nan, low), np.where(np.isinf(high), math.nan, high)


def _nan_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    seen = ~np.isnan(values)
    mean: NDArray[np.float64] = np.where(seen, values, 0).sum(0) / np.where(seen.any(0), seen.sum(0), math.nan)
    return mean
