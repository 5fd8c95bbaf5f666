"""The published results of the original Network Dissection: same arithmetic, same labels, same counts.

The files are its ``<layer>-result.csv``; TORCHPROBE_GOLDEN names the folder that holds ``netdissect/`` with them.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torchprobe.dissection import Counts, Dissection, best_labels, compare_dissections, unique_detectors

FOLDER = os.environ.get("TORCHPROBE_GOLDEN", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="TORCHPROBE_GOLDEN does not name the folder of the published results")

# file → name in the published table; paper's rule: unique, detectors; report's rule: concepts
FILES = {
    "caffe_reference_imagenet.csv": ("caffe_reference_imagenet", 61, 97, 50),
    "caffe_reference_places365.csv": ("caffe_reference_places365", 91, 118, 72),
    "ResNet-152-model_imagenet.csv": ("resnet-152-torch-imagenet", 242, 1325, 197),
}


@pytest.fixture(params=FILES)
def golden(request):
    """Rows of a file; its categories; counts (units, labels), of which a file has the best label of each unit and category only."""
    with open(Path(FOLDER, "netdissect", request.param), newline="") as file:
        rows = list(csv.DictReader(file))
    categories = [column.removesuffix("-iou") for column in rows[0] if column.endswith("-iou")]
    names = sorted({(c, row[f"{categories[c]}-label"]) for row in rows for c in range(len(categories))})
    number = {key: i + 1 for i, key in enumerate(names)}
    shape = (len(rows), len(names) + 1)
    counts = Counts(*(torch.zeros(size, dtype=torch.int64) for size in (shape, shape, shape[1:])))
    for unit, row in enumerate(rows):
        for c, name in enumerate(categories):
            label = number[c, row[f"{name}-label"]]
            counts.intersection[unit, label] = int(row[f"{name}-intersect"])
            counts.activation[unit, label] = int(float(row[f"{name}-activation"]))
            counts.truth[label] = int(row[f"{name}-truth"])
    category = torch.tensor([-1, *(c for c, _ in names)])
    return request.param, rows, categories, names, category, counts


def test_every_iou_recomputed(golden):
    _, rows, categories, names, _, counts = golden
    iou = counts.iou()
    number = {key: i + 1 for i, key in enumerate(names)}
    for c, name in enumerate(categories):
        labels = [number[c, row[f"{name}-label"]] for row in rows]
        published = np.array([float(row[f"{name}-iou"]) for row in rows])
        np.testing.assert_allclose(iou[torch.arange(len(rows)), labels].numpy(), published, rtol=1e-12, atol=1e-12)


def test_the_same_best_labels_and_order(golden):
    _, rows, categories, names, category, counts = golden
    iou = counts.iou()
    best = best_labels(iou, category, len(categories))
    for c, name in enumerate(categories):
        for row, label, value in zip(rows, best.label[:, c].tolist(), best.iou[:, c].tolist(), strict=True):
            if value > 0:  # where all are 0 the original says the first label, or "unlabeled"
                assert names[label - 1] == (c, row[f"{name}-label"])
    overall = best.iou.max(1)
    for row, c, score in zip(rows, overall.indices.tolist(), overall.values.tolist(), strict=True):
        assert (row["category"], float(row["score"])) == (categories[c], pytest.approx(score, rel=1e-12))
        assert row["label"] == row[f"{categories[c]}-label"]
    assert (overall.values[:-1] >= overall.values[1:] - 1e-15).all()  # the files are sorted by score


def test_unique_detectors(golden):
    file, _, categories, _, category, counts = golden
    _, unique, detectors, concepts = FILES[file]
    paper = unique_detectors(counts.iou(), category, categories, "paper")
    report = unique_detectors(counts.iou(), category, categories, "report")
    assert (paper.unique, paper.detectors) == (unique, detectors)
    assert (report.unique, report.detectors) == (concepts, detectors)


def test_the_reader_of_result_files(golden, tmp_path):
    file, rows, categories, names, _, counts = golden
    result = Dissection.from_csv(Path(FOLDER, "netdissect", file))
    _, unique, detectors, concepts = FILES[file]
    assert result.layer == file.removesuffix(".csv") and list(result.categories) == categories and result.units == len(rows)
    assert [(categories.index(label.category), label.name) for label in result.labels] == names
    iou, found = counts.iou()[:, 1:], result.iou[[int(row["unit"]) - 1 for row in rows]]
    known = ~found.isnan()
    assert torch.equal(found[known], iou[known]) and int(known.sum()) == len(rows) * len(categories)
    for rule, distinct in (("paper", unique), ("report", concepts)):
        assert result.unique_detectors(rule)[:2] == (distinct, detectors)
    for row, best in zip(rows, result.best(), strict=True):
        assert best.score == pytest.approx(float(row["score"]), rel=1e-12)
    assert {(b.unit + 1, b.category, b.label) for b in result.best()} == {(int(r["unit"]), r["category"], r["label"]) for r in rows}
    again = Dissection.from_csv(result.to_csv(tmp_path / file))
    assert again.best() == result.best() and torch.equal(again.counts.activation, result.counts.activation)


def test_published_table_by_category(golden):
    file, _, categories, _, category, counts = golden
    table = json.loads(Path(FOLDER, "unique_detectors.json").read_text())
    row = next(row for row in table["rows"] if row["network"] == FILES[file][0])
    got = unique_detectors(counts.iou(), category, categories, "paper")
    published = dict(zip(table["columns"], zip(row["unique"], row["detectors"], strict=True), strict=True))
    assert {"all": (got.unique, got.detectors), **got.by_category} == published


def test_two_published_results_compared():
    """AlexNet trained on ImageNet and on Places365: 50 and 72 concepts by the rule of the report."""
    first, second = (Dissection.from_csv(Path(FOLDER, "netdissect", f"caffe_reference_{name}.csv")) for name in ("imagenet", "places365"))
    concepts = compare_dissections(first, second).summary()["concepts"]
    assert len(concepts["kept"]) + len(concepts["lost"]) == 50
    assert len(concepts["kept"]) + len(concepts["gained"]) == 72
