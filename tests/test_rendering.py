"""Tables, figures and pages from rows and arrays, with names that mean harm."""

import csv
import functools
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from torchprobe.rendering.tables import LAYER_COLUMNS, Column, layer_table, number, printable, shown_columns, write_csv
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></svg><img src=x onerror=alert(1)>",
    "[bold red]markup[/]",
    "$\\frac{1}{0}$",
    "$",
    "\x1b[2J\x1b[31mred",
    "line\nbreak\ttab",
    "\u202egnirts",
    "\udcff surrogate",
    "{{ 7 * 7 }}{% raw %}",
    '" onclick="alert(1)',
    "&lt;already&gt;",
    "x" * 300,
]


def row(layer, **values):
    return {
        "layer": layer,
        "module": "Block",
        "features": 64,
        "feature_dim": -1,
        "positions": "all",
        "vectors": 1000.0,
        "vector_kurtosis": 3.5,
        "vector_kurtosis_std": 0.4,
        "vector_kurtosis_median": 3.3,
        "kurtosis_median": 3.0,
        "kurtosis_max": 9.0,
        "std": 1.0,
        "mean_abs_max": 2.0,
        "outlier_features": 1.0,
        "nonfinite": 0.0,
        "constant_vectors": 0.0,
        "invalid_vectors": 0.0,
    } | values


def printed(table, width=200):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


# -- numbers and what they are read against ------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [8, 64, 768])
def test_gaussian_reference_agrees_with_simulation(d):
    kurtosis = scipy.stats.kurtosis(np.random.default_rng(0).normal(size=(20000, d)), axis=-1, fisher=False)
    assert gaussian_kurtosis(d) == pytest.approx(kurtosis.mean(), abs=4 * kurtosis.std() / math.sqrt(20000))
    assert gaussian_kurtosis_std(d) == pytest.approx(kurtosis.std(), rel=0.05)


def test_the_ceiling_is_reached_by_one_hot_vectors():
    for d in (2, 3, 50, 1000):
        one_hot = np.zeros(d)
        one_hot[0] = 7
        assert kurtosis_ceiling(d) == pytest.approx(scipy.stats.kurtosis(one_hot, fisher=False))
    assert math.isnan(kurtosis_ceiling(1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "–"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "−∞"), (0.0, "0"), (12608, "12,608"), (-1, "-1")],
        *[(3.0, "3.000"), (12.34567, "12.35"), (1234.5, "1,234"), (1e-7, "1.00e-07"), (0.00123, "0.001230"), (1e12, "1.00e+12")],
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_printable_leaves_nothing_that_acts(name):
    assert printable(name).isprintable()
    printable(name).encode("utf-8")


# -- tables --------------------------------------------------------------------------------------------------------------


def test_the_layer_table_says_what_was_measured():
    text = printed(layer_table([row("blocks.0"), row("", vector_kurtosis=math.nan)], width=200))
    assert "blocks.0" in text
    assert "(output)" in text
    assert "positions: all" in text
    assert "–" in text
    assert "1,000" in text
    assert "invalid" not in text


def test_trouble_shows_up_as_a_column():
    assert "invalid" in printed(layer_table([row("a", invalid_vectors=3.0)], width=200))
    assert {c.key for c in LAYER_COLUMNS} - {c.key for c in shown_columns([row("a")])} == {
        "nonfinite",
        "constant_vectors",
        "invalid_vectors",
        "feature_dim_by",
    }


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_narrow_terminal_keeps_names_and_kurtosis(width):
    text = printed(layer_table([row("visual.blocks.11")], width=width), width)
    assert "visual.blocks.11" in text
    assert "vector κ" in text
    assert "3.500" in text
    assert "Gauss" in text
    assert max(map(len, text.splitlines())) <= width


def test_names_are_not_markup_and_move_no_cursor():
    text = printed(layer_table([row(name) for name in HOSTILE], width=400), 400)
    assert "[bold red]markup[/]" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_csv_round_trip(tmp_path):
    rows = [row(name, vector_kurtosis=1 / 3) for name in HOSTILE] + [{"layer": "short", "extra": math.nan}]
    with open(write_csv(rows, tmp_path / "a.csv"), newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    written = {"\udcff": "\\udcff", "\x1b": "\\x1b"}  # what UTF-8 cannot hold, and what a terminal obeys
    assert [r["layer"] for r in back[:-1]] == [
        functools.reduce(lambda text, pair: text.replace(*pair), written.items(), name) for name in HOSTILE
    ]
    assert float(back[0]["vector_kurtosis"]) == 1 / 3
    assert back[-1]["extra"] == "nan"
    assert back[-1]["vectors"] == ""


# -- figures -------------------------------------------------------------------------------------------------------------


def all_figures(names):
    plots = pytest.importorskip("torchprobe.rendering.plots")
    rng = np.random.default_rng(0)
    rows = [row(name, vector_kurtosis=3.0 + i) for i, name in enumerate(names)]
    yield plots.depth_profile(rows, band=[rows, rows[:-1]], label=names[0], band_label=names[-1])
    yield plots.kurtosis_histogram(rng.lognormal(2, 1, 100), 64, interval=(7, 9))
    yield plots.feature_profile(rng.random(100), rng.random(100), named=[3, 4, 90])


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from torchprobe.rendering import plots

    return plots


def test_figures_leave_no_global_state(plots):
    import sys

    list(all_figures(["a.0", "a.1", ""]))
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("width", [3.0, 9.0])
def test_figures_of_nothing_nan_and_one_layer(plots, width, tmp_path):
    nothing = np.full(5, math.nan)
    figures = [
        plots.depth_profile([], width=width),
        plots.depth_profile([row("a", vector_kurtosis=math.nan)], width=width),
        plots.depth_profile([{"layer": "a"}], width=width),
        plots.depth_profile([row(f"blocks.{i}.attn") for i in range(200)], width=width),
        plots.kurtosis_histogram([], 8, width=width),
        plots.kurtosis_histogram(nothing, 1, width=width),
        plots.kurtosis_histogram([2.0], 3, interval=(math.nan, math.nan), width=width),
        plots.feature_profile(nothing, nothing, width=width),
        plots.feature_profile(np.zeros(4), np.zeros(4), named=[0], width=width),
    ]
    for figure in figures:
        assert plots.svg(figure, "a figure").startswith("<svg")
    assert plots.write(figures[0], tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_band_is_aligned_by_layer(plots):
    rows = [row("a", vector_kurtosis=3.0), row("b", vector_kurtosis=4.0), row("c", vector_kurtosis=5.0)]
    figure = plots.depth_profile(
        rows, band=[[row("b", vector_kurtosis=8.0)], [row("b", vector_kurtosis=6.0), row("a", vector_kurtosis=2.0)]]
    )
    line = next(line for line in figure.axes[0].lines if "baseline: mean" in line.get_label())
    np.testing.assert_equal(line.get_ydata(), [2.0, 7.0, math.nan])


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def test_svg_escapes_names_and_links_nowhere(plots):
    for figure in all_figures(HOSTILE):
        text = plots.svg(figure, HOSTILE[0])
        parsed = Tags(text)
        assert not {"script", "img", "style", "metadata", "foreignobject", "a"} & set(parsed.tags)
        assert "://" not in text
        assert all(value.startswith("#") for _, name, value in parsed.attributes if "href" in name)
        assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]


def test_svg_takes_its_colors_from_the_page_and_is_reproducible(plots):
    first, second = (plots.svg(plots.depth_profile([row("a"), row("b")]), "depth") for _ in range(2))
    assert first == second
    assert "var(--accent)" in first
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", first))


# -- pages ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from torchprobe.rendering import page

    return page


def hostile_page(page, plots, name):
    columns = [Column("layer", name, name, "text"), Column("vectors", name, name, "count")]
    return page.Page(
        kind=name,
        title=name,
        summary=name,
        notice=name,
        facts=[page.Fact(name, name, name)],
        sections=[
            page.Section(
                name,
                [name],
                [page.Picture(lambda width: plots.depth_profile([row(name), row("b")], width=width), name)],
                [page.Table([row(name)], columns, name)],
                [(name, name)],
            )
        ],
        footer=[name],
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_of_hostile_names_has_only_its_own_tags(page, plots, name, tmp_path):
    harmless, hostile = (Tags(page.render(hostile_page(page, plots, text))) for text in ("name", name))
    assert [tag for tag in hostile.tags if tag in ("script", "style", "img", "button", "section", "svg")] == [
        tag for tag in harmless.tags if tag in ("script", "style", "img", "button", "section", "svg")
    ]
    assert not [attribute for attribute in hostile.attributes if attribute[1].startswith("on")]
    assert printable(name) in hostile.text
    page.write(hostile_page(page, plots, name), tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_page_is_self_contained(page, plots):
    text = page.render(hostile_page(page, plots, "a name"))
    assert "://" not in text
    assert not [a for a in Tags(text).attributes if a[1] in ("src", "href") or (a[1].endswith("href") and not a[2].startswith("#"))]
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_ids_on_a_page_are_unique(page, plots):
    ids = [value for _, name, value in Tags(page.render(hostile_page(page, plots, "a name"))).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_page_knows_dark_and_narrow(page):
    text = page.render(page.Page("scan", "title", "summary"))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_missing_packages_are_named_before_the_work(monkeypatch, page):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else found(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=r"jinja2: pip install 'torchprobe-interp\[report\]'"):
        page.require()
