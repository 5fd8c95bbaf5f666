"""Depth profile, histogram and feature profile as matplotlib figures; a figure as inline SVG or as a file."""

from __future__ import annotations

import html
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike, NDArray

from torchprobe.common.files import replacing
from torchprobe.rendering.axes import (
    ACCENT,
    BAND,
    DASHED,
    DOTTED,
    GRID,
    INK,
    MUTED,
    SURFACE,
    WARM,
    draw_legend,
    finite_values,
    new_figure,
    safe_text,
    set_log_scale,
    short_names,
    ticks_that_fit,
)
from torchprobe.rendering.style import styled
from torchprobe.rendering.tables import Row, printable
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", ACCENT: "accent", WARM: "warm", BAND: "band"}
"""The CSS variable of each color."""

_NO_DATE: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}

POOLED_RELU = (5.4, 9.0)
"""Vector kurtosis of pooled rectified features without an outlier: 5.4 for the ReLU of a Gaussian, up to 9 in networks."""


def depth_profile(
    rows: Sequence[Row],
    *,
    field: str = "vector_kurtosis",
    band: Sequence[Sequence[Row]] = (),
    label: str | None = None,
    band_label: str = "baseline",
    width: float = 9.0,
) -> Figure:
    """One field of each layer, in the order of ``rows``. For the vector kurtosis also its median, and the value of Gaussian features.

    Args:
        rows: one mapping per layer, as ``Recording.rows()`` returns them.
        field: the key of the field.
        band: rows of other networks with the same layers; their range is drawn as a band, their mean as a line.
        label: name of the line of ``rows``; None: "mean over vectors" for the vector kurtosis, else the name of the field.
        band_label: name of the band.
        width: inches.

    >>> rows = [{"layer": str(i), "features": 8, "vector_kurtosis": 2.0 + i} for i in range(3)]
    >>> len(depth_profile(rows).axes)
    1
    """
    figure, (axes,) = new_figure(width, 3.8)
    x = np.arange(len(rows))
    kurtosis = field == "vector_kurtosis"
    label = label or ("mean over vectors" if kurtosis else field.replace("_", " "))
    others = np.array([_aligned(rows, other, field) for other in band]).reshape(len(band), len(rows))
    if len(band):
        low, high = _nan_range(others)
        axes.fill_between(x, low, high, color=BAND, alpha=0.35, linewidth=0, label=f"{safe_text(band_label)}: range")
        axes.plot(x, _nan_mean(others), color=BAND, linewidth=1.6, marker="o", markersize=3, label=f"{safe_text(band_label)}: mean")
    line = _column(rows, field)
    if kurtosis:
        gaussian = [gaussian_kurtosis(int(row["features"])) if row.get("features") else math.nan for row in rows]
        median = _column(rows, "vector_kurtosis_median")
        axes.plot(x, gaussian, color=MUTED, linewidth=1, linestyle=DOTTED, label="Gaussian features")
        axes.plot(x, median, color=ACCENT, linewidth=1, linestyle=DASHED, label="median over vectors")
        set_log_scale(axes, "y", np.concatenate([line, median, gaussian, others.ravel()]))
    axes.plot(x, line, color=ACCENT, linewidth=1.8, marker="o", markersize=4, label=safe_text(label))
    _name_layers(axes, [str(row.get("layer", "")) for row in rows], width)
    axes.set_ylabel(safe_text(field.replace("_", " ")))
    draw_legend(axes, width)
    return figure


def kurtosis_histogram(kurtosis: ArrayLike, features: int, *, interval: tuple[float, float] | None = None, width: float = 9.0) -> Figure:
    """Histogram of the vector kurtosis over images, with the Gaussian range and the ceiling for that width.

    Args:
        kurtosis: one value per image, shape (images,); nan is left out.
        features: the length d of the vectors.
        interval: an interval of the mean, shaded.
        width: inches.

    >>> len(kurtosis_histogram([2.9, 3.1, 7.0], features=64).axes)
    1
    """
    from matplotlib.ticker import MaxNLocator

    values = finite_values(kurtosis)
    figure, (axes,) = new_figure(width, 3.0)
    gaussian, spread = gaussian_kurtosis(features), gaussian_kurtosis_std(features)
    if math.isfinite(spread):
        low, high = max(1.0, gaussian - 2 * spread), gaussian + 2 * spread
        axes.axvspan(low, high, color=MUTED, alpha=0.18, linewidth=0, label="Gaussian features, ± 2 std")
    axes.axvline(gaussian, color=MUTED, linewidth=1, linestyle=DOTTED)
    if features > 1:
        axes.axvline(kurtosis_ceiling(features), color=INK, linewidth=1, linestyle=DASHED, label="ceiling of this width")
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
        low, high = min(float(values.min()), gaussian) * 0.9, max(float(values.max()), gaussian) * 1.1
        bins = np.geomspace(low, high, max(12, min(60, int(2 * math.sqrt(values.size)) + 10)))
        axes.hist(values, bins=bins.tolist(), color=ACCENT, alpha=0.75, label="images")
        if interval is not None and all(map(math.isfinite, interval)):
            axes.axvspan(*interval, color=WARM, alpha=0.25, linewidth=0, label="95 % interval of the mean")
        axes.axvline(float(values.mean()), color=WARM, linewidth=1.8, label="mean")
    set_log_scale(axes, "x", np.concatenate([values, [1.0, gaussian, kurtosis_ceiling(features) if features > 1 else gaussian]]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("vector kurtosis of an image")
    axes.set_ylabel("images")
    draw_legend(axes, width)
    return figure


def feature_profile(
    mean_abs: ArrayLike, outlier_frequency: ArrayLike, *, named: Iterable[int] = (), marked: Iterable[int] | None = None, width: float = 9.0
) -> Figure:
    """The size of each feature compared with the others, and the share of the vectors in which it is an outlier.

    Args:
        mean_abs: mean absolute value per feature, shape (features,).
        outlier_frequency: share of the vectors in which the feature is an outlier, shape (features,); nan if undefined.
        named: features whose index is written. Of two that are too close together, only the first is named.
        marked: features drawn in the other color, the outlier features; None: those with a share above 0.
        width: inches.

    >>> len(feature_profile([1.0, 9.0, 1.0], [0.0, 1.0, 0.0], named=[1]).axes)
    2
    """
    size, share = np.asarray(mean_abs, dtype=float), np.asarray(outlier_frequency, dtype=float)
    figure, (above, below) = new_figure(width, 3.8, panels=2)
    relative = size / np.nanmean(size) if np.isfinite(size).any() and np.nanmean(size) > 0 else np.full_like(size, math.nan)
    index = np.arange(size.size)
    often = np.nan_to_num(share) > 0 if marked is None else np.isin(index, list(marked))
    for axes, values in ((above, relative), (below, 100 * share)):
        for chosen, color, thickness in ((~often, ACCENT, 0.8), (often, WARM, 1.6)):
            axes.plot(*_stems(index[chosen], values[chosen]), color=color, linewidth=thickness)
    above.axhline(1, color=MUTED, linewidth=1, linestyle=DOTTED)
    above.set_ylabel("mean |h| / average")
    below.set_ylabel("outlier in % of vectors")
    below.set_xlabel("feature index")
    below.set_ylim(0, max(5.0, 112 * float(np.nanmax(share, initial=0.0))) if np.isfinite(share).any() else 1.0)
    above.set_ylim(0, 1.18 * float(np.nanmax(relative, initial=1.0)) if np.isfinite(relative).any() else 1.0)
    if not np.isfinite(share).any():
        reason = "too few features: none can be an outlier"
        below.text(0.5, 0.5, reason, transform=below.transAxes, ha="center", va="center", color=MUTED)
    for i in _apart(named, size.size * 0.3 / width):
        for axes, values in ((above, relative), (below, 100 * share)):
            if math.isfinite(values[i]) and values[i] > 0:
                side, offset = _side(values, i, max(1, int(size.size * 0.3 / width)))
                axes.annotate(str(i), (i, values[i]), xytext=offset, textcoords="offset points", ha=side, color=WARM, fontsize=8)
    above.set_xlim(-0.01 * size.size - 0.5, 1.01 * size.size - 0.5)
    return figure


def svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element for HTML: no links, no scripts, text as text, colors as CSS variables.

    Args:
        figure: a figure of this package.
        description: what it shows, for people who cannot see it.

    Returns:
        markup in which every text of the figure is escaped.

    >>> svg(depth_profile([]), "an empty profile").startswith("<svg")
    True
    """
    buffer = io.StringIO()
    no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    # With this salt two figures on one page have different ids, and the same figure always becomes the same text.
    with styled(svg_hashsalt=f"{printable(description)} {figure.get_size_inches()}"):
        figure.savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # use the font of the page
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # not needed within HTML
    text = re.sub(r' d="[^"]*"', _rounded, text)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    size = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {size[0] if size else ""} role="img"><title>{html.escape(printable(description))}</title>'
    return head + text[text.index(">") + 1 :].strip()


def _rounded(path: re.Match[str]) -> str:
    """A path in hundredths of a pixel, which halves the size of a heat map. Rectangles get crisp edges, so no light shows between them."""
    text = re.sub(r"\.(\d\d)\d+", r".\1", path[0].replace("\n", ""))
    rectangles = text.endswith('z"') and text.count("L") <= 4 * text.count("M") and "C" not in text
    return f'{text} shape-rendering="crispEdges"' if rectangles else text


def write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes the figure to ``path`` and returns the path. A file of that name is replaced as a whole.

    The ending decides the format. Text in PDF (fonts of type 42) and SVG stays text; PNG has 300 dots per inch. The same figure always
    becomes the same file: no date, and no random name is in it.
    """
    path = Path(path)
    suffix = path.suffix[1:].lower() or "png"
    content = io.BytesIO()  # on a full disk, the writer of PDF would raise something else
    with styled(svg_hashsalt="torchprobe"):
        figure.savefig(content, format=suffix, metadata=_NO_DATE.get(suffix))
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())
    return path


def _stems(x: NDArray[Any], height: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vertical lines from 0 as one broken line, so that thousands of them are one element of the figure."""
    gap = np.full(x.shape, math.nan)
    return _interleaved(x, x, gap), _interleaved(np.zeros_like(height), height, gap)


def _interleaved(*columns: NDArray[Any]) -> NDArray[np.float64]:
    points: NDArray[np.float64] = rearrange(np.stack(columns), "column line -> (line column)")
    return points


def _side(values: NDArray[np.float64], index: int, near: int) -> tuple[str, tuple[float, float]]:
    """Where the name of a stem goes: above it, or beside its end, away from a longer stem that the name would cross."""
    left, right = (
        bool((part > values[index]).any()) for part in (values[max(0, index - near) : index], values[index + 1 : index + near + 1])
    )
    if left == right:
        return "center", (0, 2)
    return ("left", (3, -4)) if left else ("right", (-3, -4))


def _apart(indices: Iterable[int], distance: float) -> list[int]:
    kept: list[int] = []
    for index in indices:
        if all(abs(index - other) >= distance for other in kept):
            kept.append(index)
    return kept


def _name_layers(axes: Axes, names: Sequence[str], width: float) -> None:
    """Writes layer names below the axis: the shared part once, and only as many names as fit."""
    shared, short = short_names(names)
    slanted = max(map(len, short), default=0) > 3
    ticks = ticks_that_fit(len(names), room=width, each=0.25)
    axes.set_xticks(
        ticks,
        [safe_text(short[i]) for i in ticks],
        rotation=45 if slanted else 0,
        rotation_mode="anchor",
        ha="right" if slanted else "center",
    )
    axes.set_xlim(-0.5, max(len(names) - 0.5, 0.5))
    axes.set_xlabel(safe_text(f"{shared}*" if shared else "layer, in the order of execution"))


def _column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    return np.array([math.nan if row.get(key) is None else float(row[key]) for row in rows], dtype=np.float64)


def _aligned(rows: Sequence[Row], other: Sequence[Row], field: str) -> list[float]:
    by_name = {row["layer"]: row.get(field, math.nan) for row in other}
    return [float(by_name.get(row["layer"], math.nan)) for row in rows]


def _nan_range(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = np.where(np.isnan(values), np.inf, values).min(0), np.where(np.isnan(values), -np.inf, values).max(0)
    return np.where(np.isinf(low), math.nan, low), np.where(np.isinf(high), math.nan, high)


def _nan_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    seen = ~np.isnan(values)
    mean: NDArray[np.float64] = np.where(seen, values, 0).sum(0) / np.where(seen.any(0), seen.sum(0), math.nan)
    return mean
