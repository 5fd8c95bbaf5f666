"""Two dissections compared: what became of each unit and concept, and what else differs."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from click.testing import CliRunner

from torchprobe.cli import cli
from torchprobe.datasets.broden import Label
from torchprobe.dissection import Counts, Dissection, compare_dissections
from torchprobe.dissection.average_precision import Support
from torchprobe.studies.diff import diff
from torchprobe.studies.dissect import write

NAMES = (("sky", "object"), ("sea", "object"), ("red", "color"), ("<b>x</b>", "color"))


def layer(iou, ap=None, names=NAMES, name="layer", **metadata):
    """A dissection with these IoU (units × labels), of regions and labels of 1000 pixels each."""
    categories = ["object", "color"]
    labels = [Label(i + 1, label, category, (category,), 1, 1.0, ()) for i, (label, category) in enumerate(names)]
    wanted = torch.tensor(iou, dtype=torch.float64)
    intersection = (2000 * wanted / (1 + wanted)).round().long()
    full = torch.full_like(intersection, 1000)
    d = Dissection(
        name, labels, categories, torch.tensor([categories.index(c) for _, c in names]), len(iou), torch.arange(100),
        thresholds=torch.zeros(len(iou)), counts=Counts(intersection, full, full[0].clone()), metadata={"mode": "default", **metadata},
    )  # fmt: skip
    if ap is not None:
        d.average_precision = torch.tensor(ap, dtype=torch.float64)
        d.support = Support(torch.full((len(names),), 100), torch.full((len(names),), 20))
        d.p_values = torch.where(d.average_precision > 0.8, 1e-9, 0.5)
    return d


BEFORE = [[0.3, 0.1, 0.0, 0.0], [0.0, 0.2, 0.01, 0.0], [0.02, 0.0, 0.0, 0.0], [0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]
AFTER = [[0.25, 0.0, 0.0, 0.0], [0.0, 0.1, 0.3, 0.0], [0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.03, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_each_unit():
    found = compare_dissections(layer(BEFORE), layer(AFTER))
    assert list(found.units) == ["iou"] and found.remarks == []
    rows = {row.unit: row for row in found.units["iou"]}
    assert [rows[i].change for i in range(5)] == ["kept", "other", "gained", "lost", "none"]
    assert (rows[1].label_before, rows[1].label_after) == ("sea", "red")
    assert rows[1].before_now == pytest.approx(0.1, abs=1e-3) and rows[1].difference == pytest.approx(0.1, abs=2e-3)
    assert (rows[2].label_after, rows[2].category_after) == ("<b>x</b>", "color")
    assert rows[4].label_before == "" and math.isnan(rows[4].before_now) and rows[4].difference == 0
    assert [abs(row.difference) for row in found.units["iou"]] == sorted((abs(row.difference) for row in rows.values()), reverse=True)


def test_each_concept():
    found = compare_dissections(layer(BEFORE), layer(AFTER))
    rows = {row.label: row for row in found.concepts}
    assert {label: row.change for label, row in rows.items()} == {"sky": "kept", "sea": "lost", "red": "kept", "<b>x</b>": "gained"}
    assert (rows["red"].units_before, rows["red"].units_after) == ([3], [1])
    assert (rows["sea"].detected_before, rows["sea"].detected_after, rows["sea"].encoded_before) == (1, 0, None)
    assert rows["sky"].iou_before == pytest.approx(0.3, abs=1e-3) and math.isnan(rows["sky"].ap_before)
    assert [row.change for row in found.concepts] == ["gained", "lost", "kept", "kept"]
    summary = found.summary()
    assert summary["units"]["iou"] == {"kept": 1, "other": 1, "gained": 1, "lost": 1, "none": 1}
    assert summary["concepts"] == {"kept": ["red", "sky"], "gained": ["<b>x</b>"], "lost": ["sea"]}
    same = compare_dissections(layer(BEFORE), layer(BEFORE))
    assert {row.change for row in same.units["iou"]} == {"kept", "none"} and not same.summary()["concepts"]["gained"]


def test_average_precision_and_its_rule():
    first = [[0.95, 0.3, 0.2, 0.2], [0.3, 0.2, 0.2, 0.2]]
    second = [[0.3, 0.95, 0.2, 0.2], [0.3, 0.2, 0.85, 0.2]]
    zeros = [[0.0] * 4] * 2
    found = compare_dissections(layer(zeros, first), layer(zeros, second))
    rows = {row.unit: row for row in found.units["gain"]}
    assert rows[0].change == "other" and rows[0].before_now == pytest.approx((0.3 - 0.2) / 0.8)
    assert rows[1].change == "none"
    loose = compare_dissections(layer(zeros, first), layer(zeros, second), ap_threshold=0.8)
    assert {row.unit: row.change for row in loose.units["gain"]} == {0: "other", 1: "gained"}
    assert {row.label: row.encoded_after for row in loose.concepts} == {"sky": 0, "sea": 1, "red": 1, "<b>x</b>": 0}
    strict = compare_dissections(layer(zeros, first), layer(zeros, second), ap_threshold=0.8, gain_threshold=0.9)
    assert {row.unit: row.change for row in strict.units["gain"]} == {0: "other", 1: "none"}


def test_a_score_that_only_one_has_does_not_count():
    first = [[0.95, 0.3, 0.2, 0.2]] + [[0.2] * 4] * 4
    found = compare_dissections(layer(BEFORE, first), layer(AFTER))
    assert found.remarks == ["Average precision is only in the first, so it does not count."]
    rows = {row.label: row for row in found.concepts}
    assert rows["sky"].units_before == [0] and rows["sky"].encoded_before == 1 and rows["sky"].encoded_after is None
    only = layer([[0.0] * 4], [[0.95, 0.2, 0.2, 0.2]])
    only.counts = None
    assert {row.change for row in compare_dissections(only, layer([[0.3, 0.0, 0.0, 0.0]])).concepts} == {"none"}


def test_labels_are_matched_by_name_and_category():
    renumbered = (NAMES[2], ("sky", "color"), NAMES[0])
    after = [[0.0, 0.0, 0.3], [0.3, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0] * 3, [0.0] * 3]
    found = compare_dissections(layer(BEFORE), layer(after, names=renumbered))
    rows = {row.unit: row for row in found.units["iou"]}
    assert rows[0].change == "kept" and rows[0].before_now == pytest.approx(0.3, abs=1e-3)
    assert rows[1].change == "other" and math.isnan(rows[1].before_now)  # no sea after
    assert rows[2].change == "gained" and (rows[2].label_after, rows[2].category_after) == ("sky", "color")
    concepts = {(row.label, row.category): row for row in found.concepts}
    assert concepts["sky", "object"].change == "kept" and concepts["sky", "color"].change == "missing"
    assert concepts["sea", "object"].detected_after is None and concepts["sea", "object"].change == "missing"
    assert found.remarks == ["2 labels only in the first: sea, <b>x</b>.", "1 label only in the second: sky."]


def test_result_files_are_compared_by_what_they_hold(tmp_path):
    files = [Dissection.from_csv(layer(iou).to_csv(tmp_path / f"{i}.csv"), layer="layer") for i, iou in enumerate((BEFORE, AFTER))]
    whole, found = compare_dissections(layer(BEFORE), layer(AFTER)), compare_dissections(*files)
    assert {row.unit: row.change for row in found.units["iou"]} == {row.unit: row.change for row in whole.units["iou"]}
    assert [row.score_after for row in found.units["iou"]] == pytest.approx([row.score_after for row in whole.units["iou"]])
    changes = {row.label: row.change for row in found.concepts}
    assert changes == {row.label: row.change for row in whole.concepts}
    assert {row.label: row.units_after for row in found.concepts} == {row.label: row.units_after for row in whole.concepts}
    assert len(found.remarks) == 1 and "The first and the second are result files" in found.remarks[0]
    mixed = compare_dissections(files[0], layer(AFTER))
    assert mixed.summary()["concepts"] == whole.summary()["concepts"] and "The first is a result file" in mixed.remarks[0]
    assert diff(tmp_path / "0.csv", tmp_path / "1.csv")["0"].summary()["units"] == whole.summary()["units"]


def test_what_differs_is_said():
    a = layer(BEFORE, weights="1", dataset={"name": "broden", "digest": "x"}, quantile="0.005", preprocessing={"transform": "a"})
    b = layer(
        AFTER[:3], name="other", dataset={"name": "ade", "digest": "y"}, quantile="0.01", mode="global", preprocessing={"transform": "b"}
    )
    b.images = torch.arange(50, 120)
    found = compare_dissections(a, b)
    text = " ".join(found.remarks)
    for part in (
        "layer and other",
        "5 and 3 units",
        "broden and ade",
        "100 and 70 rows",
        "50 of them",
        "preprocessed",
        "mode: default and global",
    ):
        assert part in text, part
    assert "quantile: 0.005 and 0.01" in text and found.units == {} and found.concepts
    again = layer(BEFORE, weights="1", dataset={"name": "broden", "digest": "z"})
    assert "The weights are the same." in compare_dissections(a, again).remarks
    assert any("same name, but other" in remark for remark in compare_dissections(a, again).remarks)


@pytest.fixture
def folders(tmp_path):
    for name, iou in (("a", BEFORE), ("b", AFTER)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"layer": layer(iou), f"only-{name}": layer(iou, name=f"only-{name}")})
    return tmp_path


def test_on_the_command_line(folders):
    done = CliRunner().invoke(cli, ["diff", str(folders / "a"), str(folders / "b"), "--out", str(folders / "out"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["layers"][0]["concepts"]["lost"] == ["sea"] and len(told["layers"]) == 1
    assert sorted(path.name for path in (folders / "out").glob("[!.]*")) == [
        "comparison.json", "layer-concepts.csv", "layer-units-iou.csv", "layer.html"
    ]  # fmt: skip
    with open(folders / "out" / "layer-concepts.csv", newline="", encoding="utf-8") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert rows["red"]["units_before"] == "3" and rows["red"]["change"] == "kept"
    page = (folders / "out" / "layer.html").read_text(encoding="utf-8")
    assert "<b>x</b>" not in page and "&lt;b&gt;x" in page and "− 3, + 1" in page
    with open(folders / "b" / "layer-concepts.csv", newline="", encoding="utf-8") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert rows["red"]["detected_by"] == "1" and rows["red"]["pixels"] == "1000" and rows["red"]["encoded_by"] == ""
    files = [str(folders / "a" / "only-a.safetensors"), str(folders / "b" / "only-b.safetensors")]
    done = CliRunner().invoke(cli, ["diff", *files, "--out", str(folders / "files")])
    assert done.exit_code == 0 and "The layers are only-a and only-b." in done.output and "gained: 1" in done.output


def test_what_cannot_be_compared(folders):
    (folders / "c").mkdir()
    write(folders / "c", {"x": layer(BEFORE, name="x"), "y": layer(BEFORE, name="y")})
    with pytest.raises(ValueError, match="no layer is in both: .* has layer, only-a, .* has x, y. Name two files instead"):
        diff(folders / "a", folders / "c")
    with pytest.raises(FileNotFoundError):
        diff(folders / "a", folders / "missing.safetensors")
    (folders / "empty").mkdir()
    with pytest.raises(ValueError, match="does not hold a finished dissection"):
        diff(folders / "empty", folders / "a")
