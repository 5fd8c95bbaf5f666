"""Pruned heads, and curves whose every accuracy is that of the pruned head, to the last image."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from products import products_in_bfloat16
from torch import nn

from torchprobe.analysis import pruning as pruning_module
from torchprobe.analysis.directions import privileged_directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.pruning import FRACTIONS, kept_directions, prune, pruning_bands, pruning_curve
from torchprobe.analysis.shares import share_interval
from torchprobe.encoders import Head
from torchprobe.studies.interpret.directions import measure_pruning

ORDERS = ("importance", "sigma", "random")
CLASSES, FEATURES = 17, 24


def embeddings(h, y, **options):
    return Embeddings(h, y, [f"{i}.png" for i in range(len(h))], **options)


def drawn(n=300, **options):
    return embeddings(torch.randn(n, FEATURES), torch.randint(-1, CLASSES, (n,)), **options)


def expected(head, directions, e, fractions, order="importance", seed=0, classes=None):
    return [evaluate(prune(head, directions, keep, order, seed), e, classes).accuracy for keep in fractions]


# -- prune ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(17, 24), (24, 17), (1, 5), (6, 1)])
@pytest.mark.parametrize("order", ORDERS)
def test_keeping_all_leaves_the_logits(shape, order):
    names = [str(row) for row in range(shape[0])]
    head = Head(torch.randn(shape) * torch.logspace(-6, 3, shape[1]), torch.randn(shape[0]), normalize=True, names=names)
    h = torch.randn(200, shape[1])
    whole = prune(head, privileged_directions(head, h), 1, order)
    expected = head(h)
    assert (whole(h) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(whole.bias, head.bias) and whole.normalize and whole.names == head.names
    assert whole.weight.dtype == torch.float32


def test_keeping_all_keeps_what_is_beyond_the_rank():
    weight = torch.randn(9, 3) @ torch.randn(3, 13)
    weight[0, 0] += 1e-5
    found = privileged_directions(weight, torch.randn(20, 13))
    assert found.rank < 9
    torch.testing.assert_close(prune(weight, found, 1).weight, weight, rtol=0, atol=1e-6)
    assert np.linalg.matrix_rank(prune(weight, found, 0.99).weight.detach().numpy()) == found.rank


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.99])
def test_a_pruned_head_is_a_projection(order, keep):
    head = nn.Linear(FEATURES, CLASSES)
    h = torch.randn(50, FEATURES)
    found = privileged_directions(head, h)
    kept = found.order(order, 3)[: kept_directions(found, keep)]
    pruned = prune(head, found, keep, order, 3)
    v = found.directions[kept]
    on_them = h.double() @ v.T @ v
    torch.testing.assert_close(pruned(h).double(), on_them @ head.weight.double().T + head.bias.double(), rtol=1e-5, atol=1e-5)
    weight = sum(found.singular_values[i] * torch.outer(found.left[:, i], found.directions[i]) for i in kept)
    torch.testing.assert_close(pruned.weight.double(), weight, rtol=1e-6, atol=1e-7)
    assert isinstance(pruned, Head) and not pruned.normalize


def test_types_of_the_weight():
    for dtype, stored in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        weight = torch.randn(5, 7).to(dtype)
        pruned = prune(weight, privileged_directions(weight, torch.randn(9, 7)), 1)
        assert pruned.weight.dtype == stored and pruned.bias is None
        torch.testing.assert_close(pruned.weight.double(), weight.double(), rtol=0, atol=1e-6)


def test_how_many_a_fraction_is():
    found = privileged_directions(torch.randn(10, 30), torch.randn(5, 30))
    assert [kept_directions(found, keep) for keep in (0.001, 0.1, 0.149, 0.15, 0.25, 0.949, 0.95, 1)] == [1, 1, 1, 2, 3, 9, 10, 10]
    low = privileged_directions(torch.eye(10, 30) * (torch.arange(10) < 4)[:, None], torch.randn(5, 30))
    assert [kept_directions(low, keep) for keep in (0.25, 0.5, 0.9, 1)] == [1, 2, 4, 10]
    for keep in (0, -0.1, 1.01, 50, math.nan):
        with pytest.raises(ValueError, match="keep is a fraction of the rank, above 0 and at most 1"):
            kept_directions(found, keep)


def test_pruning_by_importance_is_better_where_sigma_is_not_what_matters():
    """Half of the directions have a σ ten times as large, along which representations hardly lie; the others tell the classes apart."""
    y = torch.arange(1000) % 4
    h = torch.randn(1000, 8) * torch.tensor([0.02] * 4 + [1.0] * 4)
    h[torch.arange(1000), 4 + y] += 6.0
    head = torch.block_diag(10 * torch.eye(4), torch.eye(4))
    measured, evaluated = embeddings(h, 4 + y).select(slice(0, None, 2)), embeddings(h, 4 + y).select(slice(1, None, 2))
    found = privileged_directions(head, measured)
    assert sorted(found.order("importance")[:4].tolist()) == [4, 5, 6, 7]
    assert sorted(found.order("sigma")[:4].tolist()) == [0, 1, 2, 3]
    by_importance, by_sigma = (pruning_curve(head, found, evaluated, [0.5, 1.0], order).accuracy for order in ("importance", "sigma"))
    assert by_importance[0] > 0.99
    assert by_sigma[0] == 0
    assert by_importance[1] == by_sigma[1] > 0.99


def test_directions_of_another_head_are_refused():
    found = privileged_directions(torch.randn(5, 7), torch.randn(9, 7))
    with pytest.raises(ValueError, match=r"of a head \(classes, features\) of \(5, 7\), but this head is \(6, 7\)"):
        prune(torch.randn(6, 7), found, 0.5)
    with pytest.raises(ValueError, match=r"of a head .* of \(5, 7\), but this head is \(5, 24\)"):
        pruning_curve(torch.randn(5, FEATURES), found, drawn())
    with pytest.raises(ValueError, match="ordered by one of"):
        prune(torch.randn(5, 7), found, 0.5, "size")


# -- the curve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_every_point_is_that_of_the_pruned_head(normalize, bias, order):
    head = Head(torch.randn(CLASSES, FEATURES), torch.randn(CLASSES) if bias else None, normalize=normalize)
    e = drawn()
    found = privileged_directions(head, torch.randn(100, FEATURES))
    curve = pruning_curve(head, found, e, order=order, seed=2)
    assert curve.accuracy.tolist() == expected(head, found, e, FRACTIONS, order, 2)
    assert curve.keep.tolist() == list(FRACTIONS)
    assert curve.kept.tolist() == [kept_directions(found, keep) for keep in FRACTIONS]
    assert curve.accuracy.dtype == torch.float64
    assert (curve.n, curve.rank, curve.order) == (int((e.y >= 0).sum()), 17, order)
    assert curve.accuracy[-1] == evaluate(prune(head, found, 1), e).accuracy


HOSTILE = {
    "rounded, so full of ties": lambda w, h: (w.round(), h.round()),
    "rows that are the same, and nearly": lambda w, h: (
        torch.cat([w[:6], w[3:4], w[5:6] * (1 + 1e-7), w[5:6] * (1 - 1e-7), w[9:]]),
        torch.cat([h[:20], w[torch.randint(CLASSES, (40,))]]),
    ),
    "a large offset": lambda w, h: (w, h + 1000),
    "an outlier": lambda w, h: (w, h + 1e6 * (torch.arange(FEATURES) == 3)),
    "tiny against huge": lambda w, h: (w * 1e20, h * 1e-25),
    "huge against tiny": lambda w, h: (w * 1e-20, h * torch.tensor([1e-37, 1.0, 1e20, 1e36] * 3 + [1.0] * 48)[:, None]),
    "nearly of one rank": lambda w, h: (w[:1] + 1e-6 * w, h),
    "of low rank": lambda w, h: (w[:, :3] @ h[:3], h),
    "double": lambda w, h: (w.double(), h),
    "nothing to decide by": lambda w, h: (w, h * (torch.arange(len(h)) % 3 > 0)[:, None]),
    "not finite": lambda w, h: (w, h / (torch.arange(len(h)) % 5 > 0)[:, None]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_near_ties_are_decided_alike(name):
    w, h = HOSTILE[name](torch.randn(CLASSES, FEATURES), torch.randn(60, FEATURES))
    fractions = [0.1, 0.8, 1.0]
    some = torch.randn(100, FEATURES)
    for bias, normalize in ((None, False), (0.1 * torch.randn(CLASSES, dtype=w.dtype), True), (torch.ones(CLASSES, dtype=w.dtype), False)):
        head = Head(w, bias, normalize=normalize)
        found = privileged_directions(head, some)
        decided = evaluate(prune(head, found, 0.8), embeddings(h, torch.zeros(60, dtype=torch.int64))).predicted
        e = embeddings(h, decided.where(torch.arange(60) % 3 > 0, torch.randint(CLASSES, (60,))))
        for order in ("importance", "random"):
            assert pruning_curve(head, found, e, fractions, order).accuracy.tolist() == expected(head, found, e, fractions, order)


@pytest.mark.parametrize("groups", [None, {0: (0, 5), 2: (2, 4, 9)}])
@pytest.mark.parametrize("classes", [None, (0, 3, 4, 5, 9, 11, 15), (7,)])
def test_class_subsets_and_groups_of_labels(groups, classes):
    head = Head(torch.randn(CLASSES, FEATURES), torch.randn(CLASSES), normalize=True)
    found = privileged_directions(head, torch.randn(100, FEATURES))
    fractions = [0.1, 0.6, 1.0]
    e = drawn(groups=groups, classes=classes)
    curve = pruning_curve(head, found, e, fractions)
    assert curve.accuracy.tolist() == expected(head, found, e, fractions)
    assert curve.n == evaluate(head, e).n
    whole = drawn(groups=groups)
    curve = pruning_curve(head, found, whole, fractions, classes=classes)
    assert curve.accuracy.tolist() == expected(head, found, whole, fractions, classes=classes)
    assert curve.n == evaluate(head, whole, classes).n


def test_a_single_class_to_choose_from_is_no_decision_for_what_is_not_finite():
    head, e = torch.randn(CLASSES, FEATURES), embeddings(torch.randn(5, FEATURES), torch.full((5,), 7))
    e.h[0], e.h[1] = math.nan, 0.0
    found = privileged_directions(head, torch.randn(9, FEATURES))
    assert pruning_curve(head, found, e, [0.5, 1.0], classes=[7]).accuracy.tolist() == [0.8, 0.8]


def test_the_order_and_number_of_points_make_no_difference():
    head, e = torch.randn(CLASSES, FEATURES), drawn()
    found = privileged_directions(head, e.h)
    mixed = [1.0, 0.3, 0.05, 0.3, 0.9]
    assert pruning_curve(head, found, e, mixed).accuracy.tolist() == expected(head, found, e, mixed)
    assert pruning_curve(head, found, e, [0.3]).accuracy.tolist() == expected(head, found, e, [0.3])
    with pytest.raises(ValueError, match="at least one fraction"):
        pruning_curve(head, found, e, [])


def test_blocks_and_memory_maps_make_no_difference(monkeypatch, tmp_path):
    head, e = torch.randn(CLASSES, FEATURES), drawn()
    found = privileged_directions(head, e.h)
    whole = pruning_curve(head, found, e)
    e.save(tmp_path / "e.safetensors")
    mapped = Embeddings.load(tmp_path / "e.safetensors")
    for logits in (1, CLASSES * 7, CLASSES * 1000):
        monkeypatch.setattr(pruning_module, "_LOGITS", logits)
        assert torch.equal(pruning_curve(head, found, mapped).accuracy, whole.accuracy)


def test_each_direction_is_added_once(monkeypatch):
    """Whatever the number of points, the work is that of one product: columns of the products add up to the rank for each row."""
    added = []
    addmm_ = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, a, b: added.append(a.numel()) or addmm_(self, a, b))
    head, e = torch.randn(CLASSES, FEATURES), embeddings(torch.randn(100, FEATURES), torch.arange(100) % CLASSES)
    pruning_curve(head, privileged_directions(head, e.h), e)
    assert sum(added) == 100 * CLASSES


def test_reduced_precision_of_products_changes_nothing():
    head, e = torch.randn(CLASSES, FEATURES), drawn()
    found = privileged_directions(head, e.h)
    want = expected(head, found, e, FRACTIONS)
    with products_in_bfloat16():
        assert pruning_curve(head, found, e).accuracy.tolist() == want
    with torch.autocast("cpu"):
        assert pruning_curve(head, found, e).accuracy.tolist() == want


def test_only_what_rounding_may_change_is_decided_again(monkeypatch):
    asked = []
    monkeypatch.setattr(pruning_module, "predict", lambda w, b, h, *rest: asked.append(len(h)) or predict(w, b, h, *rest))
    predict = evaluate.__globals__["predict"]
    head, e = torch.randn(CLASSES, 256), embeddings(torch.randn(2000, 256), torch.arange(2000) % CLASSES)
    found = privileged_directions(head, e.h)
    curve = pruning_curve(head, found, e)
    assert sum(asked) < 0.001 * 2000 * len(FRACTIONS)
    assert curve.accuracy.tolist() == expected(head, found, e, FRACTIONS)


def test_what_cannot_be_evaluated():
    head = torch.randn(CLASSES, FEATURES)
    found = privileged_directions(head, torch.randn(5, FEATURES))
    with pytest.raises(ValueError, match="nothing to evaluate: of 4 rows 4 have no label"):
        pruning_curve(head, found, embeddings(torch.randn(4, FEATURES), torch.full((4,), -1)))
    with pytest.raises(ValueError, match="label 17 .*is not a row of the head, which has 17 rows"):
        pruning_curve(head, found, embeddings(torch.randn(1, FEATURES), torch.tensor([17])))
    with pytest.raises(ValueError, match="classes must be distinct rows"):
        pruning_curve(head, found, drawn(), classes=[])
    with pytest.raises(ValueError, match="takes 24 features"):
        pruning_curve(head, found, embeddings(torch.randn(1, 3), torch.tensor([0])))


# -- bands ---------------------------------------------------------------------------------------------------------------


def test_bands_are_those_of_the_curves():
    head, e = Head(torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)), drawn()
    found = privileged_directions(head, e.h)
    bands = pruning_bands(head, found, e, seeds=4, fractions=[0.2, 0.5, 1.0])
    curves = [pruning_curve(head, found, e, [0.2, 0.5, 1.0], "random", seed) for seed in range(4)]
    assert bands.seeds == (0, 1, 2, 3)
    assert torch.equal(bands.accuracy, torch.stack([curve.accuracy for curve in curves]))
    torch.testing.assert_close(bands.mean, bands.accuracy.mean(0))
    assert torch.equal(bands.low, bands.accuracy.amin(0)) and torch.equal(bands.high, bands.accuracy.amax(0)) and bands.level == 0.6
    assert bands.low[-1] == bands.high[-1] == curves[0].accuracy[-1]
    assert torch.equal(bands.kept, curves[0].kept) and bands.n == curves[0].n
    assert pruning_bands(head, found, e, seeds=[7], fractions=[0.5]).accuracy[0, 0] == pruning_curve(
        head, found, e, [0.5], "random", 7
    ).accuracy[0]  # fmt: skip
    with pytest.raises(ValueError, match="at least one seed"):
        pruning_bands(head, found, e, seeds=0)


def test_rows_for_tables():
    head, e = torch.randn(CLASSES, FEATURES), drawn()
    found = privileged_directions(head, e.h)
    curve, bands = pruning_curve(head, found, e, [0.5, 1.0]), pruning_bands(head, found, e, 2, [0.5, 1.0])
    assert curve.rows()[1] == {"order": "importance", "keep": 1.0, "kept": 17, "accuracy": float(curve.accuracy[1])}
    assert list(bands.rows()[0]) == ["order", "keep", "kept", "mean", "low", "high"]
    assert [row["kept"] for row in bands.rows()] == [9, 17]


# -- the benchmark -------------------------------------------------------------------------------------------------------


def test_the_benchmark_runs():
    sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package
    from benchmarks import pruning, report

    section = pruning.run(0.01, images=200, features=16, classes=10)
    assert report.table(section, 200).row_count == 5
    json.dumps(report.as_json([section]))
    assert [row.target is not None for row in section.rows].count(True) == 1
    weight, e = pruning.inputs(500, 64, 10)
    assert 0.5 < evaluate(weight, e).accuracy < 1


def test_intervals_are_over_the_images_that_were_evaluated():
    """Images of classes that the head may not choose are left out of the accuracy, and so out of its interval."""
    generator = torch.Generator().manual_seed(0)
    y, weight = torch.arange(120) % 4, torch.randn(4, 6, generator=generator)
    h = weight[y] + torch.randn(120, 6, generator=generator)
    e = Embeddings(h, y, [str(i) for i in range(120)], classes=(0, 1))
    found = measure_pruning(Head(weight), privileged_directions(weight, e), {"imagenet": e}, "full", None, seed=0)
    curve = found.curves["imagenet"]["sigma"]
    assert found.images == {"imagenet": 60}
    assert curve.accuracy is not None and curve.low is not None and curve.high is not None
    assert (curve.low[-1], curve.high[-1]) == share_interval(round(60 * curve.accuracy[-1]), 60)
