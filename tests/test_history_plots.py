"""The distribution that a history keeps of every window, and the pictures of a history."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from models import Net, batches, record
from torch import nn

import torchprobe
from torchprobe.recording import History
from torchprobe.statistics.moments import BINS, bin_edges, histogram

# -- what the history keeps ----------------------------------------------------------------------------------------------


def spiky(vectors: int = 300, width: int = 64, size: float = 12.0, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors, every tenth with one large feature."""
    x = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    x[::10, 3] += size
    return x


def vector_kurtosis(x: torch.Tensor) -> np.ndarray:
    d = x.double() - x.double().mean(-1, keepdim=True)
    return (d.pow(4).mean(-1) / d.square().mean(-1).square()).numpy()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_histograms_hold_the_vector_kurtosis_of_each_window(offset):
    model = nn.Sequential(nn.Identity())
    windows = [spiky(seed=0) + offset, spiky(size=40.0, seed=1) + offset]
    with torchprobe.record(model, "0") as rec:
        for step, x in enumerate(windows):
            model(x)
            rec.snapshot(step)
    edges = rec.history.bin_edges
    for step, x in enumerate(windows):
        np.testing.assert_array_equal(rec.history.histograms[step, 0], np.histogram(vector_kurtosis(x), edges)[0])
    assert rec.history.histograms.shape == (2, 1, BINS)
    assert rec.history["vectors"].tolist() == [[300.0], [300.0]]


def test_bins_are_those_of_the_state_in_eighths():
    edges = bin_edges()
    assert edges.dtype == torch.float64 and edges.shape == (BINS + 1,)
    assert edges[:9].tolist() == [1 + i / 8 for i in range(9)] and edges[-1] == 2**18
    m = torchprobe.Moments(600_000)
    x = torch.zeros(1, 600_000)
    x[0, 0] = 1  # a kurtosis of 600,000: beyond the last edge
    m.update(x)
    assert histogram(m.state[None])[0, -1] == 1


def test_constant_and_invalid_vectors_are_in_no_bin_and_silent_layers_are_nan():
    model = nn.ModuleList([nn.Identity(), nn.Identity()])
    x = spiky(10)
    x[0], x[1, 5] = 1.0, math.nan
    with torchprobe.record(model, "*") as rec:
        model[0](x)
        model[1](x)
        rec.snapshot(0)
        model[1](x)
        rec.snapshot(1)
    assert rec.history.histograms[0, 0].sum() == 8
    assert np.isnan(rec.history.histograms[1, 0]).all()
    assert rec.history.histograms[1, 1].sum() == 8


def test_histograms_are_resumed_saved_copied_and_joined(tmp_path):
    data = batches(4)
    whole = torchprobe.record(Net())
    parts = []
    for recorder, steps in ((whole, (0, 1, 2)), (None, (0, 1)), (None, (2,))):
        torch.manual_seed(0)
        model = Net()
        recorder = torchprobe.record(model)
        if steps == (2,):
            recorder.load_state_dict(parts[1].state_dict())
        with recorder:
            for step in steps:
                model(data[step])
                recorder.snapshot(step)
        parts.append(recorder)
    uninterrupted, _, resumed = parts
    np.testing.assert_array_equal(uninterrupted.history.histograms, resumed.history.histograms)
    uninterrupted.save(tmp_path / "run.safetensors")
    np.testing.assert_array_equal(torchprobe.load(tmp_path / "run.safetensors").history.histograms, uninterrupted.history.histograms)
    joined = uninterrupted.history.copy()
    other = History()
    other.load_state_dict({**uninterrupted.history.state_dict(), "steps": [3, 4, 5]})
    joined.extend(other)
    np.testing.assert_array_equal(joined.histograms, np.tile(uninterrupted.history.histograms, (2, 1, 1)))


def test_only_the_bins_in_use_are_saved():
    rec = record(Net(), batches(1))
    rec.snapshot(0)
    saved = rec.history.state_dict()["histograms"]
    assert saved.shape[:2] == (1, 4) and saved.shape[2] <= 3 * 8  # of 6 features the kurtosis is below 8
    assert History().state_dict()["histograms"].shape == (0, 0, 0)


def test_a_history_without_histograms_loads_and_a_wrong_one_is_refused(tmp_path):
    rec = record(Net(), batches(1))
    rec.snapshot(0)
    state = rec.history.state_dict()
    older = History()
    older.load_state_dict({key: value for key, value in state.items() if key != "histograms"})
    assert np.isnan(older.histograms).all()
    np.testing.assert_array_equal(older.values, rec.history.values)
    for wrong in (torch.zeros(1, 3, 3), torch.zeros(1, 4, BINS + 1), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match="histograms of shape"):
            History().load_state_dict({**state, "histograms": wrong})


def test_a_snapshot_with_histograms_does_not_wait():
    from test_history import Copies

    model = Net()
    with torchprobe.record(model) as rec:
        model(batches(1)[0])
        with Copies() as seen:
            rec.snapshot(0)
    assert not seen.waits


# -- the pictures ----------------------------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", "$\\frac{1}{0}$", "\x1b[31mred", "a" * 300, "\u202egnirts", ""]


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from torchprobe.rendering import plots

    return plots


@pytest.fixture
def heatmap():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from torchprobe.rendering import heatmap

    return heatmap


def run(steps: int = 4, snapshot_at: int = 10) -> torchprobe.Recorder:
    torch.manual_seed(0)
    model = Net()
    with torchprobe.record(model) as rec:
        for step, x in enumerate(batches(steps)):
            model(x)
            rec.snapshot(step * snapshot_at)
    return rec


def painted(axes, x: float, y: float) -> float:
    """How strongly a point of a picture is painted, 0 … 2: the opacity of what covers it."""
    return sum(patch.get_alpha() or 0 for patch in axes.patches if patch.get_path().contains_point((x, y), radius=0))


def test_the_map_has_layers_as_rows_and_steps_as_columns(heatmap):
    values = [[3.0, 4.0, 5.0], [3.0, 40.0, 5.0]]
    axes = heatmap.history_map(values, [100, 200], ["blocks.0", "blocks.1", ""]).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "output"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "200"]
    assert axes.get_xlabel() == "step"
    shades = np.array([[painted(axes, step, layer) for step in range(2)] for layer in range(3)])
    assert shades[1, 1] == shades.max() and shades[0, 0] == shades.min()  # the first layer on top
    assert shades[1, 0] < shades[2, 0] < shades[1, 1]


def test_windows_with_nonfinite_values_are_crossed_and_silent_ones_hatched(heatmap):
    values = np.full((3, 2), 3.0)
    values[1, 0] = math.nan
    marked = np.zeros((3, 2), bool)
    marked[2, 1] = True
    axes = heatmap.history_map(values, [0, 1, 2], ["a", "b"], marked=marked).axes[0]
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert (crosses.get_xdata().tolist(), crosses.get_ydata().tolist()) == ([2], [1])
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert len(hatched) == 1 and hatched[0].get_path().contains_point((1, 0)) and not hatched[0].get_path().contains_point((2, 1))


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([99 + 100 * i for i in range(50)], ["1,000", "2,000", "3,000", "4,000"]),
        ([0.25, 0.5, 0.75, 1.0], ["0.25", "0.5", "0.75", "1"]),
        ([i / 100 for i in range(40)], ["0", "0.1", "0.2", "0.3"]),
        ([7], ["7"]),
        (list(range(12, 0, -1)), ["12", "9", "6", "3"]),  # they do not go up: each by its name
        ([0, 1], ["0", "1"]),
    ],
)
def test_steps_are_round_numbers_where_they_lie(heatmap, steps, labels):
    axes = heatmap.history_map(np.full((len(steps), 1), 3.0), steps, ["a"], width=6).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == labels
    if len(steps) == 50:
        np.testing.assert_allclose(axes.get_xticks(), [9.01, 19.01, 29.01, 39.01])


def test_a_long_run_is_averaged_and_its_steps_stay_in_place(heatmap):
    steps = list(range(0, 10_000, 10))
    values = np.where(np.arange(1000) < 500, 3.0, 30.0)[:, None]
    axes = heatmap.history_map(values, steps, ["a"]).axes[0]
    at = dict(zip((text.get_text() for text in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    assert painted(axes, at["4,000"], 0) < painted(axes, at["6,000"], 0)
    assert abs(at["5,000"] - 125) < 0.5  # four windows to a column


def test_a_column_is_the_histogram_of_its_window(heatmap):
    edges = [2.0, 4.0, 8.0, 16.0]
    axes = heatmap.layer_over_time([[9, 1, 0], [0, 0, 10], [math.nan] * 3], edges, [0, 1, 2], mean=[3.0, 12.0, math.nan]).axes[0]
    assert painted(axes, 0, 3) > painted(axes, 0, 6) > painted(axes, 0, 12) and painted(axes, 0, 12) < 0.1
    assert painted(axes, 1, 12) > 1 and painted(axes, 1, 3) < 0.1
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert all(patch.get_path().contains_point((2, 5)) and not patch.get_path().contains_point((0, 5)) for patch in hatched) and hatched
    mean = next(line for line in axes.lines if line.get_label() == "mean")
    np.testing.assert_array_equal(mean.get_ydata(), [3.0, 12.0, math.nan])


def test_one_vector_in_ten_thousand_is_seen(heatmap):
    counts = np.zeros((2, 3))
    counts[:, 0], counts[1, 2] = 10_000, 1
    axes = heatmap.layer_over_time(counts, [2.0, 4.0, 8.0, 16.0], [0, 1]).axes[0]
    assert painted(axes, 1, 12) > painted(axes, 0, 12) + 0.05


def test_neighbors_of_a_long_run_are_added_up(heatmap):
    counts = np.zeros((900, 2))
    counts[:, 0] = 1
    counts[450, :] = (0, 1)
    axes = heatmap.layer_over_time(counts, [2.0, 4.0, 8.0], list(range(900))).axes[0]
    assert painted(axes, 451, 6) > painted(axes, 400, 6) + 0.05  # windows 450 … 452 are one column
    assert axes.get_xlim() == (-0.5, 899.5)


@pytest.mark.parametrize("width", [3.0, 9.0])
def test_pictures_of_nothing_and_of_hostile_names(heatmap, plots, width, tmp_path):
    nothing = np.full((2, 6), math.nan)
    figures = [
        heatmap.history_map(np.empty((0, 0)), [], [], width=width),
        heatmap.history_map(nothing, [0, 1], HOSTILE, HOSTILE[0], marked=nothing > 0, width=width),
        heatmap.history_map(np.zeros((2, 6)), [1e-9, 1e12], HOSTILE, width=width),
        heatmap.layer_over_time(np.empty((0, BINS)), bin_edges(), [], mean=[], median=[], width=width),
        heatmap.layer_over_time(np.full((3, BINS), math.nan), bin_edges(), [0, 1, 2], layer=HOSTILE[1], width=width),
        *(heatmap.layer_over_time(np.eye(2, BINS), bin_edges(), [0, 1], mean=[1, 1], layer=name, width=width) for name in HOSTILE),
    ]
    for figure in figures:
        text = plots.svg(figure, HOSTILE[0])
        assert text.startswith("<svg") and "<script" not in text and "<image" not in text and "://" not in text
    assert plots.write(figures[-1], tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_gives_the_pictures_its_colors(heatmap, plots):
    rec = run()
    for figure in (rec.history.plot(), rec.history.plot_layer("blocks.1"), rec.plot()):
        text = plots.svg(figure, "a picture")
        assert "var(--accent)" in text and "#1" not in text.replace("url(#", "").replace('"#', "")


def test_cells_have_crisp_edges_and_short_numbers(heatmap, plots):
    text = plots.svg(heatmap.history_map(np.linspace(3, 9, 40).reshape(20, 2), list(range(20)), ["a", "b"]), "map")
    cells = re.findall(r'<path d="([^"]*)"([^>]*)', text)
    crisp = [d for d, rest in cells if "crispEdges" in rest]
    assert len(crisp) >= 40 and all(d.endswith("z") for d in crisp)
    assert not re.search(r' d="[^"]*\.\d{3}', text)
    curve = plots.svg(plots.depth_profile([{"layer": str(i), "vector_kurtosis": 3.0 + i} for i in range(9)]), "depth")
    assert not [rest for d, rest in re.findall(r'<path d="([^"]*)"([^>]*)', curve) if "crispEdges" in rest and "z" not in d]


def test_a_notebook_shows_a_figure_without_pyplot(plots):
    """IPython calls `_repr_png_` of an object; it can show figures by itself only after pyplot was imported."""
    for figure in (run().plot(), run().plot("history")):
        assert figure._repr_png_().startswith(b"\x89PNG")


# -- from a recording ------------------------------------------------------------------------------------------------------


def test_a_recording_plots_its_history(plots):
    rec = run()
    axes = rec.plot("history").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2", "output"]
    assert rec.history.plot("std").axes[0].child_axes[0].get_ylabel() == "std"
    with pytest.raises(KeyError, match="'kurtosis' is not a field of the history"):
        rec.history.plot("kurtosis")
    with pytest.raises(ValueError, match=r'what must be "depth" or "history", got \'blocks.0\'; did you mean history.plot_layer'):
        rec.plot("blocks.0")


def test_a_layer_is_found_under_its_canonical_name_or_named_nearest(plots):
    rec = run()
    axes = rec.history.plot_layer("module.blocks.1").axes[0]
    assert axes.get_ylabel() == "vector kurtosis, layer blocks.1"
    mean = next(line for line in axes.lines if line.get_label() == "mean")
    np.testing.assert_array_equal(mean.get_ydata(), rec.history["vector_kurtosis"][:, rec.history.layers.index("blocks.1")])
    assert rec.history.plot_layer("").axes[0].get_ylabel() == "vector kurtosis, output"
    with pytest.raises(KeyError, match=r"no layer 'blocks.11' in the history; did you mean 'blocks.1'\?"):
        rec.history.plot_layer("blocks.11")


def depth_of(figure, label: str) -> np.ndarray:
    return next(line for line in figure.axes[0].lines if line.get_label() == label).get_ydata()


def test_the_depth_profile_is_of_the_running_window_or_else_of_the_last(plots):
    rec = run()
    np.testing.assert_array_equal(depth_of(rec.plot(), f"last closed window, {rec.history.steps[-1]}"), rec.history["vector_kurtosis"][-1])
    np.testing.assert_allclose(depth_of(rec.plot(), "closed windows: mean"), rec.history["vector_kurtosis"].mean(0))
    model = Net()
    with torchprobe.record(model) as running:
        for step, x in enumerate(batches(3)):
            running.snapshot(step) if step else None
            model(x)
    expected = [running[layer].vector_kurtosis for layer in running.layers]
    np.testing.assert_array_equal(depth_of(running.plot(), "mean over vectors"), expected)
    plain = record(Net(), batches(1)).plot()
    assert not [line for line in plain.axes[0].lines if "closed" in line.get_label()]
