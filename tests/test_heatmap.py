"""Matrices as pictures: names, shades, what is missing, and names that mean harm."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.colors import to_rgb
from test_rendering import HOSTILE, Tags

from torchprobe.rendering.axes import ACCENT, BAND
from torchprobe.rendering.heatmap import LEVELS, MOST, _shades, heat_map
from torchprobe.rendering.plots import svg, write


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def hatched(figure):
    return [patch for patch in figure.axes[0].patches if patch.get_hatch()]


def test_names_are_written_and_what_they_share_once():
    figure = heat_map(np.eye(3), ["a.0", "a.1", ""], ["b.x.0", "b.x.1", "b.x.2"], "CKA", row_label="first", column_label="second")
    axes = figure.axes[0]
    assert (ticks(axes.yaxis), ticks(axes.xaxis)) == (["0", "1", "output"], ["0", "1", "2"])
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("first\na.*", "second: b.x.*")
    assert axes.get_ylim() == (2.5, -0.5)  # the first row on top


def test_names_are_thinned_out_where_there_is_no_room():
    figure = heat_map(np.random.default_rng(0).random((100, 200)), [f"layer {i}" for i in range(100)], range(200), "CKA", width=5)
    assert 10 < len(ticks(figure.axes[0].yaxis)) < 40
    assert 5 < len(ticks(figure.axes[0].xaxis)) < 20
    assert ticks(figure.axes[0].xaxis)[0] == "0"


def test_shades_follow_the_scale():
    values = np.array([[1.0, 10.0, 100.0, 1000.0, math.nan, math.inf, 0.0, -5.0]])
    assert _shades(values, 1, 100, "log").tolist() == [[0, LEVELS // 2, LEVELS - 1, LEVELS - 1, -1, -1, -1, -1]]
    assert _shades(values, 0, 20, "linear").tolist() == [[3, 32, 63, 63, -1, -1, 0, 0]]


def test_every_cell_is_painted_once():
    values = np.random.default_rng(0).random((7, 11))
    values[2, 3:6] = math.nan
    figure = heat_map(values, range(7), range(11), "value", limits=(0, 1))
    (missing,) = hatched(figure)
    accent = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == to_rgb(ACCENT) and patch is not missing]
    assert area([missing]) == 3
    assert area(accent) == 74


def area(patches):
    corners = np.concatenate([patch.get_path().vertices.reshape(-1, 5, 2) for patch in patches])
    return np.abs((corners[:, 1, 0] - corners[:, 0, 0]) * (corners[:, 2, 1] - corners[:, 1, 1])).sum()


def test_the_color_bar_has_the_limits():
    (bar,) = heat_map([[0.2, 0.4]], ["a"], ["b", "c"], "CKA", limits=(0, 1)).axes[0].child_axes
    assert bar.get_ylim() == (0, 1)
    assert bar.get_ylabel() == "CKA"
    (bar,) = heat_map([[3.0, 300.0]], ["a"], ["b", "c"], "kurtosis", scale="log").axes[0].child_axes
    assert bar.get_ylim() == (3, 300)
    assert bar.get_yscale() == "log"


def test_neighbors_of_very_many_are_averaged():
    values = np.arange(4.0 * MOST).reshape(2, -1)
    values[0, 1] = math.nan
    figure = heat_map(values, ["a", "b"], range(2 * MOST), "value", column_label="step")
    assert figure.axes[0].get_xlabel() == "step (means of 2)"
    assert figure.axes[0].get_xlim() == (-0.5, MOST - 0.5)
    assert not hatched(figure)
    assert len(svg(figure, "many")) < 200_000


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("width", [3.0, 9.0])
def test_matrices_of_nothing(scale, width, tmp_path):
    for values in (
        np.zeros((0, 0)),
        np.zeros((0, 3)),
        np.full((2, 3), math.nan),
        np.full((2, 3), 7.0),
        np.full((1, 1), -7.0),
        np.zeros((2, 2)),
    ):
        figure = heat_map(values, range(values.shape[0]), range(values.shape[1]), "value", scale=scale, width=width)
        assert svg(figure, "a figure").startswith("<svg")
    assert write(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_may_show_it():
    values = np.random.default_rng(0).random((len(HOSTILE), len(HOSTILE)))
    values[0, 0] = math.nan
    for name in HOSTILE[:4]:
        text = svg(heat_map(values, HOSTILE, HOSTILE, name, row_label=name, column_label=name), name)
        assert not {"script", "img", "image", "style", "foreignobject", "a"} & set(Tags(text).tags)
        assert "://" not in text and "data:" not in text
        assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", text))  # the page's colors, light or dark
    assert BAND not in text


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.eye(2), ["a"], ["b", "c"]), {}, r"1 rows and 2 columns are named, but the values have shape \(2, 2\)"),
        ((np.eye(1), ["a"], ["b"]), {"limits": (1, 1)}, "two numbers, the lower one first"),
        ((np.eye(1), ["a"], ["b"]), {"limits": (0, math.nan)}, "two numbers, the lower one first"),
        ((np.eye(1), ["a"], ["b"]), {"limits": (0, 1), "scale": "log"}, "two numbers above 0"),
    ],
)
def test_what_cannot_be_drawn(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        heat_map(*arguments, "value", **options)
