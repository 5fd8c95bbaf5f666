"""Decisions of a head on hostile numbers, held to exact arithmetic; accuracy, subsets of classes, classes of several rows."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from torchprobe.analysis.decisions import predict, settle
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate, is_correct
from torchprobe.analysis.inputs import as_head, normalizes, weight_and_bias
from torchprobe.encoders import Head


def exact(weight, bias, h, top=1):
    """The order of the logits in rational arithmetic, the lowest row first among equals."""
    rows = []
    for x in h.tolist():
        logits = [sum((Fraction(a) * Fraction(b) for a, b in zip(w, x, strict=True)), Fraction(0)) for w in weight.tolist()]
        if bias is not None:
            logits = [a + Fraction(b) for a, b in zip(logits, bias.tolist(), strict=True)]
        rows.append(sorted(range(len(logits)), key=lambda c: (-logits[c], c))[:top])
    return torch.tensor(rows)[:, 0] if top == 1 else torch.tensor(rows)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hostile():
    small = torch.randint(-2, 3, (40, 6), generator=torch.Generator().manual_seed(1)).float()
    near = randn(20, 16)
    near[7] = torch.nextafter(near[3], torch.tensor(9.0))  # a last digit apart
    near[12] = near[3]
    near[15] = near[2].flip(0)  # the same numbers in another order, so that only the order of summation differs
    far = randn(60, 16, seed=2) + 1e4
    symmetric = torch.cat([randn(30, 8, seed=3)] * 2, dim=1)
    symmetric = (symmetric + symmetric.flip(1)) / 2
    canceling = torch.tensor([[1e8, 1.0, -1e8, 0.0], [1e8, 0.0, -1e8, 1.0], [0.0, 0.75, 0.0, 0.0]])
    return {
        "ties of whole numbers": (small[:12], None, small),
        "ties with a bias": (small[:12], small[:12, 0], small),
        "close rows and an offset": (randn(1, 16, seed=6) + 1e-6 * near, None, far),
        "another order": (near, None, symmetric),
        "cancellation": (canceling, None, torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0 + 2**-20], [1.0, 0.0, 1.0, 0.0]])),
        "zeros": (near, None, torch.zeros(3, 16)),
        "zeros with a bias": (near, torch.arange(20.0) % 7, torch.zeros(3, 16)),
        "zero weights": (torch.zeros(5, 16), None, far),
        "beyond float32 on the way": (
            torch.tensor([[3e38, -3e38, 1.0], [3e38, -3e38, 2.0], [-3e38, 0.0, 0.0]]),
            None,
            torch.full((2, 3), 3e38),
        ),
        "denormal": (torch.tensor([[1e-30, 0.0], [0.0, 1e-30]]), None, torch.tensor([[1e-20, 2e-20], [2e-20, 1e-20]])),
        "float64": (randn(9, 5, dtype=torch.float64) * 1e100, None, randn(30, 5, seed=4, dtype=torch.float64)),
        "float64, a last digit apart": (1 + torch.tensor([[0.0], [2**-52]], dtype=torch.float64), None, torch.tensor([[1.0], [-1.0]])),
        "half": (randn(30, 8).half(), None, randn(50, 8, seed=5).half()),
        "one class": (near[:1], None, far),
        "one feature": (near[:, :1], None, far[:, :1]),
    }


@pytest.mark.parametrize("case", hostile())
def test_decisions_are_exact(case):
    weight, bias, h = hostile()[case]
    expected = exact(weight, bias, h)
    assert torch.equal(predict(weight, bias, h), expected)
    top = min(5, len(weight))
    assert torch.equal(predict(weight, bias, h, top=top).reshape(len(h), top), exact(weight, bias, h, top).reshape(len(h), top))


def test_float32_alone_would_decide_otherwise():
    weight, _, h = hostile()["close rows and an offset"]
    assert not torch.equal((h @ weight.T).argmax(1), exact(weight, None, h))


def test_decisions_do_not_depend_on_how_the_work_is_cut():
    weight, h = randn(50, 64), randn(200, 64, seed=1) + 1000
    whole = predict(weight, None, h)
    assert torch.equal(whole, torch.cat([predict(weight, None, row[None]) for row in h]))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole, predict(weight[:, order], None, h[:, order]))
    assert torch.equal(whole, predict(weight.T.contiguous().T, None, h.T.contiguous().T))


def test_large_heads_are_cut_into_blocks(monkeypatch):
    weight, h = randn(30, 8), randn(100, 8, seed=1)
    whole = predict(weight, None, h)
    monkeypatch.setattr("torchprobe.analysis.decisions._BLOCK", 64)
    assert torch.equal(whole, predict(weight, None, h))


def test_normalizing_matters_only_with_a_bias():
    weight, bias, h = randn(20, 16), randn(20, seed=1) * 0.3, randn(300, 16, seed=2) * 30
    h[5] = 0
    reference = (functional.normalize(h.double()) @ weight.double().T + bias.double()).argmax(1)
    assert torch.equal(predict(weight, bias, h, normalize=True), reference)
    assert not torch.equal(reference, predict(weight, bias, h))
    assert torch.equal(predict(weight, None, h, normalize=True), predict(weight, None, h))


def test_reduced_precision_of_products_does_not_reach_decisions():
    weight, h = randn(50, 64), randn(200, 64, seed=1)
    expected = predict(weight, None, h)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(predict(weight, None, h), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_representations_with_nan_or_inf_have_no_class():
    h = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 1.0]])
    assert predict(torch.eye(2), None, h).tolist() == [0, -1, -1, 1]
    assert predict(torch.eye(2), None, h, classes=[1]).tolist() == [1, -1, -1, 1]
    assert predict(torch.eye(2), None, h, top=2).tolist() == [[0, 1], [-1, -1], [-1, -1], [1, 0]]
    assert predict(torch.eye(2), None, h[:0]).shape == (0,)
    huge = torch.tensor([[1e200]], dtype=torch.float64)
    assert predict(torch.cat([huge, -huge]), None, huge).tolist() == [-1]


def test_classes_restrict_the_choice():
    weight, h = randn(20, 8), randn(50, 8, seed=1)
    chosen = [17, 3, 9]
    expected = torch.tensor(sorted(chosen))[exact(weight[sorted(chosen)], None, h)]
    assert torch.equal(predict(weight, None, h, chosen), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(3), None, torch.zeros(2, 4)), r"got \(3, 3\) and \(2, 4\)"),
        ((torch.eye(3), None, torch.zeros(3)), r"got \(3, 3\) and \(3,\)"),
        ((torch.eye(3), None, torch.zeros(2, 3), [0, 3]), r"class 3 is not a row of the head, which has 3 rows \(0 to 2\)"),
        ((torch.eye(3), None, torch.zeros(2, 3), [-1]), "class -1 is not a row"),
        ((torch.eye(3), None, torch.zeros(2, 3), []), "at least one"),
        ((torch.eye(3), None, torch.zeros(2, 3), [1, 1]), "got 2 of which 1 are distinct"),
        ((torch.eye(3), None, torch.zeros(2, 3), [1, 2], False, 3), "top must be between 1 and the number of classes, 2, got 3"),
    ],
)
def test_decisions_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(*arguments)


def test_settle_leaves_close_rows_to_the_exact_rule():
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.5], [float("nan"), 0.0], [float("inf"), 0.0]])
    asked = []

    def rule(rows):
        asked.append(rows.tolist())
        return torch.full_like(rows, 1)

    assert settle(logits, 0.6, rule).tolist() == [0, 1, 1, 1, 1]
    assert settle(logits, torch.tensor([0.0, 0.0, 0.4, 0.0, 0.0]), rule).tolist() == [0, 1, 1, 1, 1]
    assert settle(logits[:3], torch.tensor([float("inf"), 0.0, 0.0]), rule).tolist() == [1, 1, 1]
    assert asked == [[1, 2, 3, 4], [1, 3, 4], [0, 1]]
    assert settle(logits[:1], 0.0, None).tolist() == [0]
    assert settle(torch.ones(2, 1), 0.0, None).tolist() == [0, 0]


# -- heads ---------------------------------------------------------------------------------------------------------------


def test_what_a_head_may_be():
    linear = nn.Linear(4, 3)
    weight, bias = weight_and_bias(linear)
    assert torch.equal(weight, linear.weight) and torch.equal(bias, linear.bias) and not weight.requires_grad
    assert weight_and_bias(torch.eye(3).half())[0].dtype == torch.float32
    assert weight_and_bias(torch.eye(3).double())[0].dtype == torch.float64
    normalizing = Head(torch.eye(3), normalize=True, names=["a", "b", "c"])
    assert normalizes(normalizing) and not normalizes(linear) and not normalizes(torch.eye(3))
    assert as_head(normalizing) is normalizing
    x = randn(5, 4)
    assert torch.equal(as_head(linear)(x), linear(x)) and isinstance(as_head(linear), Head)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), TypeError, "an nn.Linear or its weight .* got Sequential"),
        (torch.zeros(4), ValueError, r"got torch.float32 \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, "torch.int64"),
        (torch.zeros(0, 4), ValueError, r"\(0, 4\)"),
        (nn.Linear(5, 2), ValueError, r"the head takes 5 features \(its weight is \(2, 5\)\), but the representations have 4"),
        (torch.tensor([[1.0, 1, 1, 1], [1, 1, float("nan"), 1]]), ValueError, "nan or inf in 1 of its 2 rows, the first is row 1"),
    ],
)
def test_heads_that_cannot_be_used(head, error, message):
    with pytest.raises(error, match=message):
        evaluate(head, embeddings(randn(3, 4), [0, 1, 0]))


# -- accuracy ------------------------------------------------------------------------------------------------------------


def embeddings(h, y, **more):
    return Embeddings(h, torch.tensor(y), [str(i) for i in range(len(h))], **more)


def test_accuracy_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    head, h = nn.Linear(16, 12), randn(400, 16)
    y = torch.randint(0, 12, (400,), generator=torch.Generator().manual_seed(0))
    logits = (h.double() @ head.weight.detach().double().T + head.bias.detach().double()).numpy()
    found = evaluate(head, embeddings(h, y.tolist()))
    assert found.n == 400 and found.classes == tuple(range(12))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(y, logits.argmax(1)), abs=1e-15)
    assert found.top5 == pytest.approx(metrics.top_k_accuracy_score(y, logits, k=5, labels=range(12)), abs=1e-15)
    assert np.allclose(found.per_class, metrics.recall_score(y, logits.argmax(1), average=None), atol=1e-15)
    assert found.images.tolist() == torch.bincount(y).tolist()
    assert torch.equal(found.correct, found.predicted == y) and found.per_class.dtype == torch.float64


def test_rows_without_a_label_and_labels_outside_the_classes_are_left_out_and_counted():
    h = torch.eye(4)[[0, 1, 2, 3, 1, 0]]
    found = evaluate(torch.eye(4), embeddings(h, [0, 1, -1, 3, 2, 1], classes=(0, 1, 2)))
    assert (found.n, found.unlabeled, found.outside) == (4, 1, 1)
    assert found.rows.tolist() == [0, 1, 4, 5] and found.predicted.tolist() == [0, 1, 1, 0]
    assert found.accuracy == 0.5 and found.classes == (0, 1, 2)
    assert found.per_class.tolist() == [1.0, 0.5, 0.0] and found.images.tolist() == [1, 2, 1]
    assert found.top5 == 1.0  # of fewer than five
    assert "4 classes" in repr(evaluate(torch.eye(4), embeddings(h, [0] * 6))) and "1 outside" in repr(found)
    other = evaluate(torch.eye(4), embeddings(h, [0, 1, -1, 3, 2, 1], classes=(0, 1, 2)), classes=[3, 0])
    assert (other.n, other.outside, other.classes) == (2, 3, (0, 3)) and other.accuracy == 1
    assert evaluate(torch.eye(4), embeddings(h, [0] * 6), classes=[0, 3]).per_class[1].isnan()


def test_nonfinite_rows_are_wrong_and_counted():
    h = torch.eye(3)
    h[1, 0] = float("nan")
    found = evaluate(torch.eye(3), embeddings(h, [0, 1, 2]))
    assert found.accuracy == pytest.approx(2 / 3) and found.nonfinite == 1
    assert found.predicted.tolist() == [0, -1, 2] and found.correct.tolist() == [True, False, True]
    assert found.top5 == pytest.approx(2 / 3)


def test_rows_that_stand_for_the_same_class():
    """As in ObjectNet: 0 and 3 are one class. It equals the argmax over classes of the largest logit of each."""
    weight, h = randn(6, 8), randn(200, 8, seed=1)
    y = torch.tensor([0, 1, 2, 5])[torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))]
    found = evaluate(weight, embeddings(h, y.tolist(), classes=(0, 1, 2, 3, 5), groups={0: (0, 3)}))
    logits = h.double() @ weight.double().T
    projected = torch.stack([logits[:, [0, 3]].amax(1), logits[:, 1], logits[:, 2], logits[:, 5]], dim=1)
    expected = torch.tensor([0, 1, 2, 5])[projected.argmax(1)] == y
    assert torch.equal(found.correct, expected)
    assert set(found.predicted.tolist()) == {0, 1, 2, 3, 5}
    assert found.per_class[0] == expected[y == 0].double().mean() and found.per_class[3].isnan()
    assert is_correct(torch.tensor([[3, -1], [0, 1]]), torch.tensor([[0], [3]]), {0: (0, 3)}).tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": [0, 4, 1]}, r"label 4 \(of '1'\) is not a row of the head, which has 3 rows \(0 to 2\)"),
        ({"y": [-1, -1, -1]}, "nothing to evaluate: of 3 rows 3 have no label, and the class of 0 is not among"),
        ({"y": [0, 0, -1], "classes": (1, 2)}, "of 3 rows 1 have no label, and the class of 2 is not among the classes"),
        ({"y": [0, 0, 0], "groups": {1: (1, 7)}}, "class 1 stands for row 7, but the head has only 3 rows"),
        ({"y": [0, 0, 0], "classes": (0, 9)}, "class 9 is not a row of the head"),
    ],
)
def test_evaluations_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(torch.eye(3), embeddings(torch.eye(3), **given))


def test_a_mapped_file_is_evaluated_in_pieces(tmp_path, monkeypatch):
    whole = embeddings(randn(100, 8), [i % 5 for i in range(100)])
    whole.save(tmp_path / "e.safetensors")
    head = randn(5, 8, seed=1)
    expected = evaluate(head, whole)
    monkeypatch.setattr("torchprobe.analysis.evaluation._BLOCK", 7)
    found = evaluate(head, Embeddings.load(tmp_path / "e.safetensors"))
    assert torch.equal(found.predicted, expected.predicted) and found.accuracy == expected.accuracy
