"""Detectors and concepts from tables of scores."""

from __future__ import annotations

import pytest
import torch

from torchprobe.dissection import best_labels, encoded, polysemanticity, unique_concepts, unique_detectors

CATEGORY = torch.tensor([-1, 0, 1, 0, 1, -1])
NAMES = ["object", "color"]


def test_best_labels_ignore_the_unlabeled_and_take_the_first_of_equals():
    iou = torch.tensor([[0.9, 0.2, 0.5, 0.2, 0.1, 0.8], [0.9, 0.0, 0.0, 0.0, 0.3, 0.8]])
    best = best_labels(iou, CATEGORY, 3)
    assert best.label.tolist() == [[1, 2, -1], [-1, 4, -1]]
    assert torch.equal(best.iou, torch.tensor([[0.2, 0.5, 0], [0, 0.3, 0]]))


def test_the_rules_differ_at_the_threshold_and_in_what_they_count():
    iou = torch.zeros(4, 6, dtype=torch.float64)
    iou[0, 1], iou[0, 2] = 0.3, 0.2  # two categories
    iou[1, 1] = 0.04  # exactly the threshold: enough for the report only
    iou[2, 3], iou[2, 4] = 0.1, 0.1  # equals in two categories: the report counts the first
    paper = unique_detectors(iou, CATEGORY, NAMES)
    assert paper == (4, 2, {"object": (2, 2), "color": (2, 2)})
    report = unique_detectors(iou, CATEGORY, NAMES, "report")
    assert report == (2, 3, {"object": (2, 3), "color": (0, 0)})
    assert unique_detectors(iou, CATEGORY, NAMES, threshold=0.5) == (0, 0, {"object": (0, 0), "color": (0, 0)})
    assert unique_detectors(iou[:0], CATEGORY, NAMES).detectors == 0


def test_concepts_of_encoded_pairs():
    ap = torch.tensor([[0.95, 0.90, 0.99, 0.2], [0.1, 0.95, float("nan"), 0.3]])
    p = torch.tensor([[0.01, 0.05, 0.9, 0.01], [0.01, 0.001, float("nan"), 0.01]])
    pairs = encoded(ap, p)
    assert pairs.tolist() == [[True, True, False, False], [False, True, False, False]]
    assert unique_concepts(pairs).tolist() == [0, 1] and polysemanticity(pairs).tolist() == [2, 1]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"rule must be one of paper, report, got 'both'"):
        unique_detectors(torch.zeros(1, 6), CATEGORY, NAMES, "both")
    with pytest.raises(ValueError, match=r"got \(1, 5\) and \(6,\)"):
        best_labels(torch.zeros(1, 5), CATEGORY, 2)
