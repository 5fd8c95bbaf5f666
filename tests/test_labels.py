"""Names of points: none covers another name, a point or an interval, where there is room; and what else a figure owes to its readers."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from typing import Any

from PIL import Image

from torchprobe.rendering.axes import INK, SURFACE, new_figure
from torchprobe.rendering.curves import Mark, Series, curves, scatter
from torchprobe.rendering.heatmap import heat_map
from torchprobe.rendering.labels import Name, place_names
from torchprobe.rendering.logit import logit_scatter
from torchprobe.rendering.page import NARROW, WIDE
from torchprobe.rendering.plots import feature_profile
from torchprobe.rendering.style import COLUMN, TEXT
from torchprobe.rendering.tables import LAYER_COLUMNS, Column, shown_columns
from torchprobe.studies.interpret.directions import Curve


def boxes(figure: Any) -> list[Any]:
    """The extents of the names as they are drawn."""
    figure.draw_without_rendering()
    from matplotlib.text import Text

    return [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the line to its point


CLOSE = [
    Mark("tiny CLIP", 98.6, 50.6, "zero-shot", y_low=41.6, y_high=59.9),
    Mark("tiny CLIP, fine-tuned", 99.4, 51.4, "fine-tuned", y_low=40.3, y_high=63.4),
    Mark("supervised from scratch", 98.2, 49.8, "supervised", y_low=41.3, y_high=58.4),
]


@pytest.mark.parametrize("width", [WIDE, TEXT, NARROW, COLUMN])
def test_names_are_apart_and_inside(width: float) -> None:
    for figure in (
        logit_scatter(CLOSE, [(50.0, 30.0), (98.0, 57.0)], lambda x: 0.4 * x + 10, None, "x", "y", width=width),
        scatter(CLOSE, "x", "y", width=width),
        scatter([Mark(f"encoder {i}", 1 + i / 100, 2 + i % 2 / 100) for i in range(6)], "x", "y", log_x=True, width=width),
    ):
        found, page = boxes(figure), figure.bbox
        assert len(found) in (3, 6)
        for one, other in itertools.combinations(found, 2):
            assert not one.shrunk(0.95, 0.7).overlaps(other.shrunk(0.95, 0.7))
        for one in found:
            assert page.x0 - 1 <= one.x0 and one.x1 <= page.x1 + 1 and page.y0 <= one.y0 and one.y1 <= page.y1


def test_a_name_covers_no_point_and_no_bar() -> None:
    figure, (axes,) = new_figure(6, 4)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    bar = [(0.0, 0.53), (1.0, 0.53)]  # where the name would be
    place_names(axes, [Name("first", 0.5, 0.5), Name("second", 0.5, 0.5)], [bar], [(0.55, 0.45)])
    for box in boxes(figure):
        box = box.shrunk(1, 0.8)
        for x, y in ((0.5, 0.5), (0.55, 0.45), *((k / 200, 0.53) for k in range(200))):
            assert not box.contains(*axes.transData.transform((x, y)))


def test_counts_have_whole_ticks() -> None:
    counts = scatter([Mark("a", 8, -1.5), Mark("b", 10, -2.0)], "unique concepts", "robustness").axes[0]
    assert all(float(tick).is_integer() for tick in counts.get_xticks()) and any(tick % 1 for tick in counts.get_yticks())


def test_a_map_near_one_is_not_black_and_has_its_numbers() -> None:
    figure = heat_map([[1.0, 0.97], [0.3, float("nan")]], ["a", "b"], ["c", "d"], "CKA", limits=(0, 1))
    assert [(text.get_text(), text.get_color()) for text in figure.axes[0].texts] == [("1.0", SURFACE), ("0.97", SURFACE), ("0.30", INK)]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    pixel = np.asarray(Image.open(buffer).convert("RGB"))
    x, y = figure.axes[0].transData.transform((0.35, 0.3)).astype(int)  # within the darkest cell, beside its number
    assert pixel[pixel.shape[0] - y, x].max() > 75
    assert not heat_map(np.eye(60), list(range(60)), list(range(60)), "CKA").axes[0].texts


def test_a_small_rank_is_drawn_once() -> None:
    curve = Curve([0.05, 0.1, 0.15, 0.2], [1, 1, 2, 2], [0.3, 0.3, 0.5, 0.5])
    assert curve.distinct() == [1, 3] and Curve([0.5, 1.0], [1, 2]).distinct() == [0, 1]


def test_many_values_that_go_up_and_down_are_points() -> None:
    lines = (
        curves([Series("a", [1, 2], [1.0, 2.0]), Series("b", [1, 2], [2.0, 1.0], points=True)], "x", "y", markers=False).axes[0].get_lines()
    )
    assert [(line.get_linestyle(), line.get_marker()) for line in lines] == [("-", "None"), ("None", "s")]
    low = curves([Series("a", [1, 2], [1.0, 1e-8])], "x", "y", log=True).axes[0]
    assert min(low.get_yticks()) < 1e-6


def test_the_name_of_a_feature_is_beside_a_longer_neighbor() -> None:
    size = np.ones(1024)
    size[980], size[994] = 40.0, 9.0
    figure = feature_profile(size, (size > 1).astype(float), named=[994], marked=[994])
    (name, _) = (text for axes in figure.axes for text in axes.texts)
    assert name.get_text() == "994" and name.get_ha() == "left"
    figure.draw_without_rendering()
    assert name.get_window_extent().x0 > figure.axes[0].transData.transform((980, 0))[0]


def test_the_important_columns_come_first() -> None:
    assert [column.key for column in LAYER_COLUMNS][:5] == [
        "layer",
        "vector_kurtosis",
        "vector_kurtosis_median",
        "gaussian",
        "outlier_features",
    ]
    empty = Column("alignment", "alignment", "", "share", optional=True)
    assert shown_columns([{"alignment": 0.0}], [empty]) == [] and shown_columns([{"alignment": 0.1}], [empty]) == [empty]


def test_dollar_signs_in_a_name_are_no_mathematics() -> None:
    figure, (axes,) = new_figure(6, 4)
    place_names(axes, [Name("\\_$%^x$ and {b", 0.5, 0.5)], [], [])
    assert len(boxes(figure)) == 1
