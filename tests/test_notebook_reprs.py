"""What a notebook shows of a result: right numbers, every text escaped, not too many rows."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.rendering.notebook import ROWS, fragment
from torchprobe.rendering.page import Fact
from torchprobe.rendering.tables import Column
from torchprobe.statistics.moments import gaussian_kurtosis

HOSTILE = "<script>alert(1)</script>"


class Cells(HTMLParser):
    """The texts of the cells of a table, row by row; every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}, tag
        assert all(name in ("style", "title") for name, _ in attrs)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def recording(names: tuple[str, ...] = ("a", "b"), windows: int = 0) -> torchprobe.Recorder:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
    model.forward = lambda x: [layer(x) for layer in model.values()]
    with torchprobe.record(model, list(names)) as rec:
        for step in range(windows):
            model(torch.randn(32, 16))
            rec.snapshot(step)
        model(torch.randn(32, 16))
    return rec


def test_a_recording_shows_its_layers() -> None:
    rec = recording()
    cells = Cells(rec._repr_html_())
    heads, first, second = cells.rows
    assert heads[:2] == ["layer", "vector κ"] and (first[0], second[0]) == ("a", "b")
    assert float(first[1]) == pytest.approx(rec["a"].vector_kurtosis, rel=1e-3)
    assert float(first[heads.index("Gauss")]) == pytest.approx(gaussian_kurtosis(16), rel=1e-3)
    assert "2 layers, 0 windows closed" in cells.text


def test_an_empty_window_says_where_the_numbers_are() -> None:
    rec = recording(windows=2)
    rec.snapshot(2)
    assert "This window is empty. total.table() shows all 3 closed windows." in Cells(rec._repr_html_()).text
    assert float(Cells(rec.total._repr_html_()).rows[1][1]) == pytest.approx(rec.total["a"].vector_kurtosis, rel=1e-3)


def test_names_are_text() -> None:
    rec = recording((HOSTILE, "b"), windows=1)
    for html in (rec._repr_html_(), rec.history._repr_html_()):
        assert "<script" not in html and "&lt;script&gt;" in html
        assert any(HOSTILE in row for row in Cells(html).rows)


def test_a_history_shows_its_ends_and_steps_between_them() -> None:
    rec = recording(windows=30)
    heads, first, _ = Cells(rec.history._repr_html_()).rows
    assert heads[0] == "layer" and len(heads) == 9 and (heads[1], heads[-1]) == ("0", "29")
    for step, value in zip(heads[1:], first[1:], strict=True):
        assert float(value) == pytest.approx(rec.history["vector_kurtosis"][int(step), 0], rel=1e-3)
    assert Cells(torchprobe.recording.History()._repr_html_()).rows == []  # nothing yet


def test_of_many_rows_some_are_shown() -> None:
    rows = [{"name": f"row {i}"} for i in range(ROWS + 7)]
    cells = Cells(fragment("many", [Fact("A", "1", "of 2")], rows, [Column("name", "name", "its name", "text")], "The end.", "names"))
    assert len(cells.rows) == ROWS + 1 and "… and 7 more names. The end." in cells.text and "A: 1 of 2" in cells.text


def test_a_dissection_shows_its_units() -> None:
    from test_dissection_file import small

    dissection = small()
    cells = Cells(dissection._repr_html_())
    best = dissection.best()
    heads, *rows = cells.rows
    assert [int(row[heads.index("unit")]) for row in rows] == [unit.unit for unit in best]
    assert float(rows[0][heads.index("IoU")]) == pytest.approx(best[0].iou, rel=1e-3)
    assert "block.1: 2 units, 2 labels, 3 images" in cells.text
    assert "<img" not in dissection._repr_html_()


@pytest.fixture(scope="module")
def interpretation(tmp_path_factory: pytest.TempPathFactory) -> object:
    sets = pytest.importorskip("interpret_sets")
    from torchprobe.datasets import labeled_folder
    from torchprobe.studies.interpret import interpret

    folder = tmp_path_factory.mktemp("interpretation")
    sets.write_classes(folder / "images")
    found = interpret(sets.encoder(name=HOSTILE), labeled_folder(folder / "images"), folder / "out", layer_images=0)
    yield found
    shutil.rmtree(folder)


def test_an_interpretation_shows_its_headline(interpretation) -> None:  # type: ignore[no-untyped-def]
    html = interpretation._repr_html_()
    cells = Cells(html)
    assert "<script" not in html and HOSTILE in cells.text
    (kurtosis,) = re.findall(r"Vector kurtosis: ([\d.]+)", cells.text)
    assert float(kurtosis) == pytest.approx(interpretation.results.kurtosis.mean, rel=5e-3)
    assert [row[0] for row in cells.rows[1:]] == list(interpretation.results.skipped)
    assert str(Path("out", "index.html")) in cells.text
