"""Figures and tables for a paper: what they show is what the tables say, and the files can be used as they are."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from torchprobe.analysis.baseline import FITS, MEAN, Baseline
from torchprobe.analysis.robustness_intervals import SIZES
from torchprobe.analysis.standard_models import cloud, standard_models
from torchprobe.common.records import decode, encode
from torchprobe.rendering.differences import MOST, Estimate
from torchprobe.rendering.latex import escape, latex_table, write_latex
from torchprobe.rendering.page import NARROW, WIDE, Picture
from torchprobe.rendering.style import COLUMN, TEXT
from torchprobe.rendering.tables import Column, write_csv
from torchprobe.studies.compare.figures import kurtosis_mark, pair_estimates
from torchprobe.studies.compare.pairs import Difference
from torchprobe.studies.compare.saved import Summary
from torchprobe.studies.interpret.accuracy import Robustness, measure_robustness
from torchprobe.studies.interpret.figures import Robust, robustness_pictures, write_figures

pytest.importorskip("matplotlib")
from torchprobe.rendering import axes as shared
from torchprobe.rendering.curves import Mark, scatter
from torchprobe.rendering.differences import differences
from torchprobe.rendering.logit import logit_scatter
from torchprobe.rendering.plots import svg, write

CLIP = {"imagenet": 63.32, "imagenet_v2": 55.92, "imagenet_r": 69.33, "imagenet_sketch": 42.3, "objectnet": 44.2, "imagenet_a": 31.5}


def measured(accuracies: dict[str, float] = CLIP, images: dict[str, int] = SIZES, baseline: Baseline | None = None) -> Robustness:
    return measure_robustness(accuracies, [name for name in accuracies if name != "imagenet"], "full", baseline, "measured", images)


def lines(figure: object) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in figure.axes[0].get_lines()]  # type: ignore[attr-defined]


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -- the standard models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FITS, ids=" ".join)
def test_the_cloud_is_what_the_line_was_fitted_to(key: tuple[str, str]) -> None:
    fit = FITS[key]  # type: ignore[index]
    found = cloud(fit)
    assert found is not None and len(found) == fit.n
    x, y = np.log(np.array(found).T / (100 - np.array(found).T))
    slope, intercept = np.polyfit(x, y, 1)
    assert (slope, intercept) == pytest.approx((fit.slope, fit.intercept), rel=1e-7)
    assert min(found)[0] == fit.lowest_x and max(found)[0] == fit.highest_x


def test_another_line_has_no_published_cloud() -> None:
    own = Baseline({"imagenet": [60, 70, 80], "imagenet_v2": [47, 58, 69]})
    assert cloud(own.fit("imagenet_v2")) is None
    assert own.points("imagenet_v2") == [(60, 47), (70, 58), (80, 69)]


def test_points_leave_out_what_the_fit_leaves_out() -> None:
    own = Baseline({"imagenet": [60, 70, 80, 90, 20], "imagenet_v2": [47, math.nan, 0, 79, 10]}, minimum=55)
    assert own.points("imagenet_v2") == [(60, 47), (90, 79)]
    assert len(standard_models().points(MEAN)) == FITS[MEAN, "full"].n


# -- effective robustness on logit axes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WIDE, TEXT, NARROW, COLUMN])
def test_plotted_are_the_numbers_of_the_table(width: float) -> None:
    found = measured()
    pictures = robustness_pictures([Robust("mine", "", found)])
    assert [picture.name for picture in pictures] == [f"robustness-{row.shift}" for row in found.rows] and len(pictures) == 6
    for picture, row in zip(pictures, found.rows, strict=True):
        drawn = lines(picture.draw(width))
        assert drawn[-1] == [[row.imagenet, row.accuracy]]
        bar = [[row.imagenet, row.predicted + end] for end in (row.line_low, row.line_high)]
        assert np.allclose(drawn[-2], bar) and row.line_low < row.effective_robustness < row.line_high
        assert sorted(map(tuple, drawn[-3])) == sorted(cloud(row.fit()) or [])
        x, y = np.array(drawn[1]).T  # the extent of the standard models
        assert np.allclose(y, FITS[row.shift, "full"].predict(x)) and (x.min(), x.max()) == pytest.approx((56.522, 84.726))


def test_own_standard_models_are_kept_and_drawn() -> None:
    own = Baseline({"imagenet": [60, 70, 80, 90], "noisy": [47, 58, 69, 75]})
    found = measured({"imagenet": 71.0, "noisy": 66.0}, {"imagenet": 500, "noisy": 400}, own)
    again = decode(Robustness, encode(found))
    assert again.standard_models == {"noisy": [(60, 47), (70, 58), (80, 69), (90, 75)]} and measured().standard_models is None
    assert lines(robustness_pictures([Robust("mine", "", again)])[0].draw(WIDE))[-3] == [[60, 47], [70, 58], [80, 69], [90, 75]]


def test_encoders_with_another_line_are_not_in_the_figure() -> None:
    own = Baseline({"imagenet": [60, 70, 80, 90], "imagenet_v2": [47, 58, 69, 75]})
    encoders = [
        Robust(name, "", measured({"imagenet": 70.0, "imagenet_v2": 60.0}, SIZES, base))
        for name, base in (("a", None), ("b", own), ("c", None))
    ]
    (picture,) = robustness_pictures(encoders)
    names = [text.get_text() for text in picture.draw(WIDE).axes[0].texts]
    assert names == ["a", "c"]


@pytest.mark.parametrize("accuracies", [(0.0, 50.0), (100.0, 50.0), (70.0, 0.0), (70.0, 100.0), (0.02, 0.02), (99.99, 99.98)])
def test_accuracies_at_the_ends(accuracies: tuple[float, float]) -> None:
    found = measured(dict(zip(("imagenet", "imagenet_v2"), accuracies, strict=True)))
    for width in (WIDE, COLUMN):
        for picture in robustness_pictures([Robust("mine", "", found)]):
            assert svg(picture.draw(width), picture.description)


def test_results_of_earlier_versions_have_no_band() -> None:
    old = encode(measured({"imagenet": 70.0, "imagenet_v2": 60.0}))
    for row in old["rows"]:
        for key in ("residual_std", "x_mean", "x_squares", "line_low", "line_high"):
            del row[key]
    found = [decode(Robustness, old) for _ in range(2)]
    (picture,) = robustness_pictures([Robust(f"m{i}", "", one) for i, one in enumerate(found)])
    axes = picture.draw(WIDE).axes[0]
    assert [text.get_text() for text in axes.texts] == ["m0", "m1"] and not axes.collections


def test_no_bar_without_an_interval() -> None:
    found = measured({"imagenet": 70.0, "imagenet_v2": 60.0}, {"imagenet": 10, "imagenet_v2": 10})
    assert math.isnan(found.rows[0].line_low)
    (picture,) = robustness_pictures([Robust("mine", "", found)])
    assert len(lines(picture.draw(WIDE))[-2]) == FITS["imagenet_v2", "full"].n  # the cloud, with nothing between


def test_ticks_are_round_and_apart() -> None:
    for x, y in ((63.0, 55.0), (1.0, 0.5), (99.0, 97.0), (70.0, 69.5)):
        figure = logit_scatter([Mark("m", x, y)], [(x + 0.5, y + 0.4)], lambda a: a, None, "x", "y", width=COLUMN)
        figure.draw_without_rendering()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            assert 2 <= len(axis.get_ticklocs()) <= 12, (x, y, axis.get_ticklocs())


# -- comparisons ---------------------------------------------------------------------------------------------------------


def test_bars_of_a_scatter_are_the_intervals() -> None:
    drawn = lines(scatter([Mark("a", 3.0, 1.0, x_low=2.5, x_high=3.6, y_low=-1.0, y_high=4.0), Mark("b", 4.0, 2.0)], "x", "y"))
    assert drawn == [[[2.5, 1.0], [3.6, 1.0]], [[3.0, -1.0], [3.0, 4.0]], [[3.0, 1.0], [4.0, 2.0]]]


def test_an_encoder_under_a_shift_has_both_intervals() -> None:
    row = {"model": "a", **measured().rows[0]}
    model = Summary("a", "zero-shot", "ViT", "", 512, 9.0, 8.5, 9.5, 9.0, 2, 0.6, 5.0, "", 1, False, None, math.nan)
    mark = kurtosis_mark(model, row)
    assert (mark.x, mark.x_low, mark.x_high) == (9.0, 8.5, 9.5)
    assert (mark.y, mark.y_low, mark.y_high) == tuple(row[key] for key in ("effective_robustness", "line_low", "line_high"))


def test_differences_are_those_of_the_table() -> None:
    nan = math.nan
    pair = Difference("a − b", "a", "b", "", 40, 1.5, 1.0, 2.0, -0.1, 0.2, 1, 0.05, nan, None, nan, 0, None, nan)
    panels = pair_estimates([pair])
    assert panels == {
        "Δ vector kurtosis": [Estimate("a − b", 1.5, 1.0, 2.0)],
        "Δ accuracy, points": [Estimate("a − b", 5.0, -10.0, 20.0)],
    }
    for width in (WIDE, COLUMN):
        figure = differences(panels, width=width)
        assert lines(figure)[1:] == [[[1.0, 0.0], [2.0, 0.0]], [[1.5, 0.0]]]
        assert all(axes.xaxis.get_ticklabels()[0].get_visible() for axes in figure.axes)
    with pytest.raises(ValueError, match="expected 1 to"):
        differences({"x": [Estimate("a", 1.0)] * (MOST + 1)})


# -- files ---------------------------------------------------------------------------------------------------------------


def pictures(names: tuple[str, ...] = ("a", "b")) -> list[Picture]:
    def draw(width: float) -> object:
        return logit_scatter(
            [Mark("a_b & $x$ 50 %", 60.0, 55.0)], [(60, 48), (70, 58)], lambda x: x - 12, None, "x, %", "y, %", width=width
        )

    return [Picture(draw, f"{i} images", name, paper=not i) for i, name in enumerate(names)]  # type: ignore[arg-type]


def test_files_for_a_paper(tmp_path: Path) -> None:
    from PIL import Image

    write_figures(tmp_path, pictures())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{name}.{end}" for name in ("a", "a-column", "b") for end in ("pdf", "svg", "png")] + ["files.txt"]
    )
    drawing, document = (tmp_path / "a.svg").read_text(), (tmp_path / "a.pdf").read_bytes()
    assert "<text" in drawing and "a_b &amp; $x$ 50 %" in drawing and "<dc:date>" not in drawing
    assert b"/CIDFontType2" in document and b"/Type3" not in document and b"/CreationDate" not in document  # fonts of type 42
    with Image.open(tmp_path / "a-column.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1) and image.width == round(COLUMN * 300)


def test_figures_of_an_earlier_run_go_and_other_files_stay(tmp_path: Path) -> None:
    write_figures(tmp_path, pictures())
    (tmp_path / "mine.pdf").touch()
    (tmp_path.parent / "outside.pdf").touch()
    with open(tmp_path / "files.txt", "a") as file:
        file.write("../outside.pdf\n/etc/hosts\n")
    write_figures(tmp_path, pictures(("b",)))
    assert {path.stem for path in tmp_path.glob("*.pdf")} == {"b", "b-column", "mine"} and (tmp_path.parent / "outside.pdf").exists()


def test_no_figure_replaces_another(tmp_path: Path) -> None:
    write_figures(tmp_path, pictures(("A", "a", "a/b", "a:b", "a-column", "../../x", "")))
    stems = sorted(path.stem for path in tmp_path.glob("*.pdf"))
    assert stems == sorted(["A", "A-column", "a-2", "a_b", "a_b-2", "a-column-2", "_.._x", "6_images"])
    assert set((tmp_path / "files.txt").read_text().split()) == {path.name for path in tmp_path.iterdir()} - {"files.txt"}


def test_drawn_again_it_is_the_same_file(tmp_path: Path) -> None:
    for end in ("pdf", "svg", "png"):
        first, second = (write(scatter([Mark("ä", 1.0, 2.0, "g")], "κ", "ER"), tmp_path / f"{i}.{end}").read_bytes() for i in range(2))
        assert first == second, end


@pytest.mark.slow("starts two processes")
def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    code = (
        "import sys; from torchprobe.rendering.curves import Mark, scatter; from torchprobe.rendering.plots import write\n"
        "for end in ('pdf', 'svg', 'png'): write(scatter([Mark('ä', 1.0, 2.0, 'g')], 'κ', 'ER'), f'{sys.argv[1]}.{end}')"
    )
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    for end in ("pdf", "svg", "png"):
        assert (tmp_path / f"1.{end}").read_bytes() == (tmp_path / f"2.{end}").read_bytes(), end


def test_one_style_whatever_the_user_has_set(tmp_path: Path) -> None:
    import matplotlib

    def draw() -> Figure:
        return scatter([Mark("a", 1, 2)], "x", "y")

    plain = write(draw(), tmp_path / "plain.svg").read_text()
    other = {"svg.fonttype": "path", "axes.grid": False, "axes.facecolor": "red", "axes.labelsize": 20, "savefig.dpi": 20}
    with matplotlib.rc_context(other):  # type: ignore[arg-type]
        assert write(draw(), tmp_path / "other.svg").read_text() == plain


def test_the_stylesheet_has_the_colors_of_the_page() -> None:
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context("torchprobe.rendering.paper"):
        settings = matplotlib.rcParams
        found = [settings[key] for key in ("figure.facecolor", "axes.edgecolor", "grid.color", "axes.labelcolor")]
        assert [f"#{color.lstrip('#')}" for color in found] == [shared.SURFACE, shared.MUTED, shared.GRID, shared.INK]
        cycle = [f"#{color.lstrip('#')}" for color in settings["axes.prop_cycle"].by_key()["color"]]
        assert cycle == [shared.ACCENT, shared.WARM, shared.MUTED, shared.INK, shared.BAND]


# -- LaTeX ---------------------------------------------------------------------------------------------------------------

HOSTILE = "a_b & 50 % $x$ #1 {y} \\input{/etc/passwd} ^ ~ <t> | \" ` [x] * -- '' ,, é Å ñ ı 猫 😀 κ − → \u202e\n\x00"


def test_no_text_can_break_a_table() -> None:
    found = escape(HOSTILE)
    assert found.isascii() and "\n" not in found
    assert "\\input" not in found and "{[}U+732B{]}" in found and r"\'{e}" in found and r"\aa{}" not in found
    bare = re.sub(r"\\(?:[\\_&%#${}^~'\"`=.]|[A-Za-z]+)|\$[^$]*\$|\{\[\}|\{\]\}|\{\*\}|\{`\}", "", found)
    assert not re.search(r"[\\_&%#$^~<>|\"`\[\]*]", bare), bare
    assert "--" not in found and escape("a") == "a"
    depth = 0
    for sign in re.sub(r"\\[{}]", "", found):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0


def test_every_character_of_the_common_planes_is_ascii() -> None:
    for code in range(0x3000):
        assert escape(chr(code)).isascii() and "\n" not in escape(chr(code)), hex(code)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-1.5, "$-$1.500"), (1.5e-7, r"1.50$\times 10^{-7}$"), (12608, "12,608"), (math.nan, "--"), (None, "--"), (math.inf, r"$\infty$")],
)
def test_numbers(value: float | None, expected: str) -> None:
    assert latex_table([{"x": value}], [Column("x", "x", "")]).splitlines()[-3] == rf"{expected} \\"


def test_the_tables_have_the_same_rows(tmp_path: Path) -> None:
    from torchprobe.studies.interpret.accuracy import ROBUSTNESS_COLUMNS

    rows = measured().rows
    table = write_latex(rows, ROBUSTNESS_COLUMNS, tmp_path / "a.tex", "a\nb").read_text(encoding="utf-8")
    with open(write_csv(rows, tmp_path / "a.csv"), newline="") as file:
        written = list(csv.DictReader(file))
    body = [line.removesuffix(r" \\").split(" & ") for line in table.split(r"\midrule")[1].splitlines() if line.endswith(r"\\")]
    assert len(body) == len(written) == 6 and all(len(cells) == len(body[0]) for cells in body)
    for cells, row in zip(body, written, strict=True):
        assert cells[0] == row["shift"].replace("_", r"\_")
        for cell, key in zip(cells[1:7], ("effective_robustness", "low", "high", "accuracy", "imagenet", "predicted"), strict=True):
            assert float(cell.replace("$-$", "-")) == pytest.approx(float(row[key]), rel=1e-3)
    assert table.count(r"\begin{tabular}") == table.count(r"\end{tabular}") == 1 and table.isprintable() is False
    assert all(line.startswith("%") for line in table.split(r"\begin")[0].splitlines())
