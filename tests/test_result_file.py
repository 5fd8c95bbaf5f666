"""Result files: those of the original and ours, read back as they were written; what they do not hold is unknown."""

from __future__ import annotations

import math

import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, preprocess

from torchprobe.common import limits
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.report import Report, write_report

# Three lines of caffe_reference_imagenet, conv5, as published for Network Dissection (Bau et al., CVPR 2017), and two categories of them.
PUBLISHED = """unit,category,label,score,object-label,object-truth,object-activation,object-intersect,object-iou,part-label,part-truth,part-activation,part-intersect,part-iou
3,part,wheel,0.21899864690447707,bicycle,1169902,2106473.0,301836,0.10147320307449323,wheel,1540612,1584597.0,561458,0.21899864690447707
2,object,ball,0.031227954955337582,ball,124778,870721.0,30146,0.031227954955337582,wheel,1540612,631128.0,19668,0.009139099435334877
1,object,stairway,0.040473311005337596,stairway,503591,540859.0,40628,0.040473311005337596,crosswalk,246024,313625.0,8608,0.015621
"""  # noqa: E501


@pytest.fixture
def published(tmp_path):
    (tmp_path / "conv5-result.csv").write_text(PUBLISHED)
    return tmp_path / "conv5-result.csv"


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    broden = Broden(write_trap_set(tmp_path_factory.mktemp("broden"), images=24, seed=0).root)
    return dissect(Net(), "norm", broden, preprocess=preprocess, quantile=0.05)["norm"]


def test_a_published_file(published):
    result = Dissection.from_csv(published)
    assert (result.layer, result.units, tuple(result.categories)) == ("conv5-result", 3, ("object", "part"))
    assert [label.name for label in result.labels] == ["ball", "bicycle", "stairway", "crosswalk", "wheel"]
    assert {(label.number, label.frequency, label.coverage) for label in result.labels} == {(-1, -1, -1.0)}
    nan, iou = math.nan, result.iou
    want = torch.tensor(
        [
            [nan, nan, 40628 / 1003822, 8608 / 551041, nan],
            [30146 / 965353, nan, nan, nan, 19668 / 2152072],
            [nan, 301836 / 2974539, nan, nan, 561458 / 2563751],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(iou, want, rtol=1e-15, atol=0, equal_nan=True)
    assert torch.equal(result.table("iou").isnan(), want.isnan())
    assert result.counts.truth.tolist() == [124778, 1169902, 503591, 246024, 1540612]
    assert result.counts.activation[2].tolist() == [-1, 2106473, -1, -1, 1584597]
    assert [(row.unit, row.category, row.label) for row in result.best()] == [
        (2, "part", "wheel"),
        (0, "object", "stairway"),
        (1, "object", "ball"),
    ]
    paper, report = result.unique_detectors("paper"), result.unique_detectors("report")
    assert (paper.unique, paper.detectors, paper.by_category) == (3, 2, {"object": (2, 2), "part": (1, 1)})
    assert (report.unique, report.detectors, report.by_category) == (2, 2, {"object": (1, 1), "part": (1, 1)})
    assert result.unique_detectors(threshold=0.2).detectors == 1
    assert "3 units, 5 labels, best by iou" in repr(result)


def test_what_a_file_does_not_hold_is_unknown(published, layer):
    result = Dissection.from_csv(published, layer="conv5")
    summary = result.summary()
    assert summary["images"] is None and summary["labels"] is None and summary["detectors"]["report"]["unique"] == 2
    assert result.thresholds is None and result.average_precision is None and result.never_active is None
    assert result.rows()[0]["label"] == "wheel" and result.rows()[0]["never_active"] is None and result.silence() == []
    for method in (
        lambda: result.adjusted_p_values(), lambda: result.encoded(), lambda: result.unique_concepts(), lambda: result.polysemanticity(),
        lambda: result.concepts(), lambda: result.permutation_test(), lambda: result.merge(layer), lambda: result.overlap(layer),
        lambda: layer.overlap(result), lambda: result.save("x"), lambda: result.report("x", None), lambda: result.table("gain"),
        lambda: result.best("ap"), lambda: result.images, lambda: write_report(result, "x", None), lambda: result.to_csv("x", score="ap"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"layer 'conv5': conv5-result.csv holds only the best label of each unit.*is unknown: use"):
            method()
    with pytest.raises(ValueError, match="layer"):
        layer.merge(result)


@pytest.mark.parametrize("score", ["iou", "ap", "gain"])
def test_our_own_files_come_back(layer, score, tmp_path):
    path = layer.to_csv(tmp_path / f"{score}.csv", score=score)
    read = Dissection.from_csv(path, layer="norm")
    assert read == Dissection.from_csv(path, layer="norm") != layer != read
    assert read.best_by == score and read.to_csv(tmp_path / "again.csv").read_bytes() == path.read_bytes()
    given = Dissection.from_csv(path, layer="norm", labels=layer.labels)
    assert given.to_csv(tmp_path / "again.csv").read_bytes() == path.read_bytes() and given.labels == tuple(layer.labels)
    table, known = layer.table(score), ~given.table(score).isnan()
    assert torch.equal(given.table(score)[known], table[known]) and 0 < int(known.sum()) < known.numel()
    for mine, theirs in zip(given.best(), layer.best(score), strict=True):
        assert (mine.unit, mine.label, mine.category, mine.score, mine.number, mine.index, mine.iou is None) == (
            theirs.unit, theirs.label, theirs.category, theirs.score, theirs.number, theirs.index, score != "iou",
        )  # fmt: skip
    if score == "iou":
        for rule in ("paper", "report"):
            for threshold in (0.0, 0.04, 0.2):
                assert (
                    read.unique_detectors(rule, threshold)
                    == given.unique_detectors(rule, threshold)
                    == layer.unique_detectors(rule, threshold)
                )
        assert torch.equal(given.counts.truth.where(known.any(0), -1), layer.counts.truth.where(known.any(0), -1))
    else:
        seen = known.any(0)
        assert torch.equal(given.support.images[seen], layer.support.images[seen]) and (given.support.images[~seen] == -1).all()
        assert torch.equal(given.p_values[known], layer.p_values[known]) and given.prevalence[~seen].isnan().all()
        with pytest.raises(ValueError, match="is unknown"):
            given.unique_detectors()
        with pytest.raises(ValueError, match=f"by {score}, and no images, so that the table by iou is unknown"):
            given.table("iou")


def test_units_without_a_label(layer, tmp_path):
    """A category in which every IoU is 0 has no label; the original names its first label, or "unlabeled"."""
    lines = PUBLISHED.splitlines()
    parts = lines[3].split(",")
    for name in ("", "-", "unlabeled"):
        (tmp_path / "a.csv").write_text("\n".join([*lines[:3], ",".join([*parts[:9], name, "0", "0", "0", "0.0"])]) + "\n")
        result = Dissection.from_csv(tmp_path / "a.csv")
        assert [label.name for label in result.labels] == ["ball", "bicycle", "stairway", "wheel"] and result.iou[0, 3].isnan()
    (tmp_path / "a.csv").write_text("\n".join([*lines[:3], ",".join([*parts[:9], "wheel", "1540612", "7.0", "0", "0.0"])]) + "\n")
    assert Dissection.from_csv(tmp_path / "a.csv").iou[0, 3] == 0
    empty = ",".join(["1", "", "", "0.0", "", "0", "0", "0", "0.0", "", "0", "0", "0", "0.0"])
    (tmp_path / "a.csv").write_text("\n".join([*lines[:3], empty]) + "\n")
    silent = Dissection.from_csv(tmp_path / "a.csv")
    assert silent.best()[-1].index == -1 and silent.best()[-1].unit == 0 and silent.iou[0].isnan().all()
    # ResNet-152 of the published results has a label without a name in texture, with pixels: unit 524, .0054.
    unnamed = ",".join([*parts[:9], "", "24924928", "0.0", "135010", "0.0054461656549247154"])
    (tmp_path / "a.csv").write_text("\n".join([*lines[:3], unnamed]) + "\n")
    result = Dissection.from_csv(tmp_path / "a.csv")
    assert [label.name for label in result.labels if label.category == "part"] == ["", "wheel"] and float(result.iou[0, 3]) > 0.005
    given = Dissection.from_csv(tmp_path / "a.csv", labels=[label for label in result.labels if label.name])
    assert [label.name for label in given.labels] == ["ball", "bicycle", "stairway", "wheel", ""]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit,category,", "unit,kind,", "no column category; a result file has unit, category, label, score"),
        ("object-truth", "object-count", "no column object-truth; each category has label, truth, activation, intersect, iou"),
        ("-iou", "-score", "no column ends in -iou or -ap"),
        ("part-truth", "object-truth", "a column occurs twice"),
        ("\n2,", "\n3,", "unit 3 has two lines"),
        ("\n2,", "\n4,", "unit 2 is missing"),
        ("\n2,", "\n0,", "has one line for each unit, counted from 1"),
        ("\n2,", "\n-2,", "line 3: unit is '-2'; expected a number ≥ 0"),
        ("\n2,", "\n2.5,", "line 3: unit is '2.5'; expected a whole number"),
        ("2106473.0", "2106473.5", "line 2: object-activation is '2106473.5'; expected a whole number ≥ 0"),
        ("2106473.0", "many", "line 2: object-activation is 'many'; expected a number ≥ 0"),
        ("301836", "nan", "line 2: object-intersect is 'nan'"),
        ("301836", "1e300", "line 2: object-intersect is '1e300'"),
        ("301836", "301", "line 2: object-iou is 0.101473, but its counts give 301 / "),
        ("wheel,1540612,631128.0", "wheel,1540613,631128.0", "line 3: part-truth is 1540613, but 1540612 in a line before for"),
        ("part,wheel,0.21899864690447707", "part,leg,0.21899864690447707", "line 2: the best label is 'leg' of 'part' with 0.218999, but"),
        ("part,wheel,0.21899864690447707", "part,wheel,0.31899864690447707", "line 2: the best label is 'wheel' of 'part' with 0.318999"),
        ("\n3,part,", "\n3,scene,", "line 2: the category 'scene' has no columns; there are object, part"),
        (",0.015621", "", "line 4: 13 fields; the header has 14"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves(tmp_path, old, new, message):
    (tmp_path / "a.csv").write_text(PUBLISHED.replace(old, new))
    with pytest.raises(ValueError, match="a.csv.*" + message.replace("(", r"\(")):
        Dissection.from_csv(tmp_path / "a.csv")


def test_other_files(tmp_path, monkeypatch, layer, published):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Dissection.from_csv(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        Dissection.from_csv(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(PUBLISHED.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="has no line for any unit"):
        Dissection.from_csv(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"line 2: the label 'wheel' of part is not among those given|has no category 'color'"):
        Dissection.from_csv(published, labels=layer.labels)
    (tmp_path / "marked.csv").write_text("﻿" + PUBLISHED)
    assert Dissection.from_csv(tmp_path / "marked.csv").units == 3
    monkeypatch.setattr("torchprobe.dissection.result_file.MAX_PAIRS", 14)
    with pytest.raises(ValueError, match="3 units and 5 labels are more than 14 pairs"):
        Dissection.from_csv(published)
    with limits.changed(table_bytes=100), pytest.raises(ValueError, match="more than 100 bytes"):
        Dissection.from_csv(published)


def test_the_number_of_a_unit_is_no_size(published):
    published.write_text(PUBLISHED.replace("\n3,part", "\n9000000000000000,part"))
    with pytest.raises(ValueError, match="unit 3 is missing"):
        Dissection.from_csv(published)


def test_ap_files_that_contradict_themselves(layer, tmp_path):
    text = layer.to_csv(tmp_path / "ap.csv", score="ap").read_text()
    row = text.splitlines()[1].split(",")
    images, positives, ap, prevalence = row[5:9]
    for column, new, message in (
        (5, "0", "prevalence is"),
        (6, f"{int(images) + 1}", "prevalence is"),
        (7, "1.5", "from 0 to 1"),
        (8, "0.001", "prevalence is 0.001, but"),
    ):
        changed = [*row[:column], new, *row[column + 1 :]]
        (tmp_path / "bad.csv").write_text(text.replace(",".join(row), ",".join(changed)))
        with pytest.raises(ValueError, match=message):
            Dissection.from_csv(tmp_path / "bad.csv")
    assert 0 < float(ap) <= 1 and float(prevalence) == int(positives) / int(images)


def test_a_result_file_beside_a_new_dissection_on_a_page(layer, tmp_path):
    """As a condition to compare with: its units count, its images are unknown."""
    old = Dissection.from_csv(layer.to_csv(tmp_path / "old.csv"), layer="norm")
    own, other = Report(layer, {"published": old}).comparison()
    assert (other["detectors"], other["concepts"], other["paper"]) == (own["detectors"], own["concepts"], own["paper"])
    assert (other["median"], other["highest"]) == (own["median"], own["highest"])
