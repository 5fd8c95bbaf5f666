"""Average precision, compared with scikit-learn and with its definition, also with ties."""

from __future__ import annotations

import importlib

import dissection_oracle as oracle
import numpy as np
import pytest
import torch
from threads import threads

from torchprobe.dissection import average_precision, concept_matrix, gain, pool, support
from torchprobe.ops import average_precision as operator
from torchprobe.ops.average_precision import SCHEMA, reference

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["operator", "reference"])
def ap_of(request, monkeypatch):
    """Both implementations: the one that the dispatcher selects, and the reference."""

    def through_reference(scores, *arguments):
        return reference(scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores, *arguments)

    if request.param == "reference":  # the module: in its package the name is that of the function
        monkeypatch.setattr(importlib.import_module("torchprobe.dissection.average_precision"), "_operator", through_reference)
    return average_precision


def problem(units=3, images=400, concepts=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((images, concepts)) < rng.random(concepts) ** 3
    labels[:, 0], labels[:, 1] = False, True  # no image, every image
    return torch.from_numpy(rng.standard_normal((units, images))), torch.from_numpy(labels)


SCORES = {
    "distinct": lambda x: x,
    "relu": lambda x: x.relu(),
    "negative relu": lambda x: -x.relu(),
    "rounded": lambda x: x.round(),
    "all equal": lambda x: x * 0 + 3,
    "two values": lambda x: (x > 1.5).double(),
    "signed zeros": lambda x: torch.where(x > 1, x, torch.where(x > 0, 0.0, -0.0)),
    "infinities": lambda x: torch.where(x > 1, INF, torch.where(x < -1, -INF, x.round())),
    "tiny": lambda x: x * 1e-40,
    "huge": lambda x: x * 1e38,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCORES)
def test_against_the_definition(ap_of, name, dtype):
    x, labels = problem()
    scores = SCORES[name](x).to(dtype)
    got = ap_of(scores, labels).numpy()
    for unit in range(3):
        for concept in range(labels.shape[1]):
            want = oracle.average_precision(scores[unit].double().numpy(), labels[:, concept].numpy())
            assert got[unit, concept] == pytest.approx(want, abs=1e-12, nan_ok=True), (unit, concept)


@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_learn_with_heavy_ties(ap_of, seed):
    metrics = pytest.importorskip("sklearn.metrics")
    x, labels = problem(4, 3000, 10, seed)
    scores = [x.relu(), x.round(decimals=1), x.round(), x][seed].float()
    got = ap_of(scores, labels)
    for unit in range(4):
        for concept in labels.any(0).nonzero().flatten().tolist():
            want = metrics.average_precision_score(labels[:, concept].numpy(), scores[unit].numpy())
            assert got[unit, concept] == pytest.approx(want, abs=1e-6), (unit, concept)
    assert got[:, 0].isnan().all() and (got[:, 1] == 1).all()


def test_both_signs(ap_of):
    x, labels = problem()
    x = x.relu()
    up, down = ap_of(x, labels), ap_of(-x, labels)
    assert torch.allclose(ap_of(x, labels, sign="negative"), down, rtol=1e-12, atol=0, equal_nan=True)
    assert torch.allclose(ap_of(x, labels, sign="both"), torch.maximum(up, down), rtol=1e-12, atol=0, equal_nan=True)
    assert (down > up).any() and (down < up).any()


@pytest.mark.parametrize("categories", [1, 3, 8, 11])
def test_among_the_images_of_the_category(ap_of, categories):
    x, labels = problem(concepts=30, seed=categories)
    labels[:, 1] = False  # else everything is annotated
    category = torch.arange(30) % categories
    category[5] = -1  # belongs to none: no image is annotated for it
    got = ap_of(x, labels, negatives="category", category=category)
    among = support(labels, negatives="category", category=category)
    for c in range(30):
        kept = labels[:, category == category[c]].any(1) & (category[c] >= 0)
        assert (int(kept.sum()), int(labels[kept, c].sum())) == (among.images[c], among.positives[c])
        for unit in range(3):
            want = oracle.average_precision(x[unit, kept].numpy(), labels[kept, c].numpy())
            assert got[unit, c] == pytest.approx(want, abs=1e-12, nan_ok=True)
    rng = np.random.default_rng(0)
    annotated = torch.from_numpy(rng.random((400, categories)) < 0.5)
    ties = x.round()
    got = ap_of(ties, labels, negatives="category", category=category, annotated=annotated)
    for c in set(range(30)) - {5}:
        kept = annotated[:, category[c]]
        want = oracle.average_precision(ties[2, kept].numpy(), labels[kept, c].numpy())
        assert got[2, c] == pytest.approx(want, abs=1e-12, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_dense_and_sparse_labels(ap_of):
    x, labels = problem()
    want = ap_of(x, labels)
    sparse = labels.to_sparse_csr()
    for same in (sparse, labels.float().to_sparse_csr(), torch.sparse_csr_tensor(
        sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values(), sparse.shape
    )):  # fmt: skip
        assert torch.equal(ap_of(x, same).nan_to_num(), want.nan_to_num())
    stored_zeros = torch.sparse_csr_tensor(torch.arange(401) * 12, torch.arange(12).repeat(400), labels.flatten().float(), (400, 12))
    assert torch.equal(ap_of(x, stored_zeros).nan_to_num(), want.nan_to_num())
    assert support(stored_zeros).positives.tolist() == labels.sum(0).tolist()


def test_concept_matrix_with_a_least_area():
    crow, number, area = torch.tensor([0, 2, 2, 4]), torch.tensor([1, 3, 2, 3], dtype=torch.int32), torch.tensor([0.01, 0.5, 1.0, 0.02])
    assert concept_matrix(crow, number, 4).to_dense().int().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert concept_matrix(crow, number, 4, area, 0.05).to_dense().int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    with pytest.raises(RuntimeError, match=r"col_indices"):
        concept_matrix(crow, number, 3)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_few_images(ap_of, images):
    labels = torch.ones(images, 2, dtype=torch.bool)
    labels[:, 1] = False
    got = ap_of(torch.randn(3, images), labels)
    assert got.shape == (3, 2) and got[:, 1].isnan().all() and (got[:, 0] == 1).all() == (images > 0)
    assert ap_of(torch.zeros(0, images), labels).shape == (0, 2)
    assert ap_of(torch.zeros(3, images), labels[:, :0]).shape == (3, 0)


def test_any_strides(ap_of):
    x, labels = problem()
    want = ap_of(x, labels)
    for same in (x.T.contiguous().T, torch.stack([x, x], -1)[..., 0], x.clone().requires_grad_()):
        assert torch.equal(ap_of(same, labels.T.contiguous().T).nan_to_num(), want.nan_to_num())


def test_bitwise_the_same_for_any_number_of_threads():
    x, labels = problem(17, 999, 40)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(average_precision(x.relu(), labels, sign="both").nan_to_num())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gain_and_prevalence():
    among = support(torch.tensor([[True, True], [False, True]]))
    assert among.prevalence.tolist() == [0.5, 1.0]
    assert gain(torch.tensor([0.75, 1.0]), among.prevalence).nan_to_num(nan=-1).tolist() == [0.5, -1]


def test_pool():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-1.0, -2.0], [-3.0, -6.0]]]])
    assert pool(maps).tolist() == [[6, -1]] and pool(maps, "mean").tolist() == [[3, -3]]
    assert pool(torch.full((1, 1, 100, 100), 1000.0).half(), "mean").item() == 1000
    with pytest.raises(ValueError, match=r'"max" or "mean", got \'median\''):
        pool(maps, "median")
    with pytest.raises(ValueError, match=r"\(2, 3\) have no positions"):
        pool(torch.zeros(2, 3))


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_nan_is_refused(ap_of):
    x, labels = problem()
    x[1, 77] = NAN
    with pytest.raises(ValueError, match=r"the score of unit 1 for image 77 is nan"):
        ap_of(x, labels)


def test_what_does_not_fit_is_refused_in_words(ap_of):
    x, labels = problem()
    with pytest.raises(ValueError, match=r"scores of shape \(3, 399\) do not fit labels of 400 images: expected \(units, 400\)"):
        ap_of(x[:, 1:], labels)
    with pytest.raises(ValueError, match=r"scores must be floating point.*torch.int64"):
        ap_of(x.long(), labels)
    with pytest.raises(ValueError, match=r"labels must be \(images, concepts\), bool or sparse CSR; got torch.float32"):
        ap_of(x, labels.float())
    with pytest.raises(ValueError, match=r"call .to_sparse_csr\(\)"):
        ap_of(x, labels.to_sparse_coo())
    with pytest.raises(ValueError, match=r"sign must be one of positive, negative, both, got 'up'"):
        ap_of(x, labels, sign="up")
    with pytest.raises(ValueError, match=r"negatives must be one of all, category, got 'some'"):
        ap_of(x, labels, negatives="some")
    with pytest.raises(ValueError, match=r"needs the category of each concept, integers of shape \(12,\); got none"):
        ap_of(x, labels, negatives="category")
    with pytest.raises(ValueError, match=r"annotated must be bool \(400, categories\), got torch.bool of shape \(3, 2\)"):
        ap_of(x, labels, negatives="category", category=torch.zeros(12, dtype=torch.int64), annotated=torch.ones(3, 2, dtype=torch.bool))


@pytest.mark.parametrize("call", [operator, reference])
def test_bad_rows_are_refused_in_words(call):
    x, index, none, yes = torch.randn(2, 3), torch.tensor, torch.tensor([], dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)
    cases = [
        ((index([0, 1, 2]), index([0, 0]), 1), r"crow of shape \(4,\) for 3 images"),
        ((index([0, 1, 1, 2]), index([0, 5]), 2), r"image 2 shows concept 5, but there are 2"),
        ((index([0, 1, 1, 2]), index([0, -1]), 2), r"image 2 shows concept -1"),
        ((index([0, 0, 2, 2]), index([1, 1]), 2), r"image 1 shows concept 1 twice"),
        ((index([0, 2, 1, 2]), index([0, 1]), 2), r"crow must rise from 0 to 2"),
        ((index([0, 1, 1, 3]), index([0, 1]), 2), r"crow must rise from 0 to 2"),
        ((index([0, 0, 0, 0]), none, -1), r"number of concepts cannot be -1"),
        ((index([0, 0, 0, 0]), none, 2, yes), r"eligible and group must be given together"),
        ((index([0, 0, 0, 0]), none, 1, yes, index([2])), r"group must number the 2"),
        ((index([0, 0, 0, 0]), none, 1, yes[:2], index([0])), r"eligible must be bool.*\(3, "),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            call(x, *arguments)


# -- the operator ----------------------------------------------------------------------------------------------------------


def test_schema():
    schema = torch.ops.torchprobe.average_precision.default._schema
    assert schema == torch._C.parse_schema(f"torchprobe::{SCHEMA}")


@pytest.mark.parametrize("both", [False, True])
def test_opcheck(both):
    crow, col = torch.tensor([0, 1, 3, 3]), torch.tensor([0, 0, 1])
    eligible, group = torch.tensor([[True, False], [True, True], [False, True]]), torch.tensor([0, 1])
    overload = torch.ops.torchprobe.average_precision.default
    torch.library.opcheck(overload, (torch.randn(4, 3), crow, col, 2, None, None, both))
    torch.library.opcheck(overload, (torch.randn(4, 3, dtype=torch.float64), crow.int(), col.int(), 2, eligible, group, both))


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    x, labels = problem()
    category = torch.arange(12) % 3
    for options in ({}, {"sign": "both"}, {"negatives": "category", "category": category}):
        want = average_precision(x.relu(), labels, **options)
        got = average_precision(x.relu().cuda(), labels.cuda(), **options).cpu()
        assert torch.allclose(got, want, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_absurd_numbers_of_concepts_and_categories_take_no_memory():
    """A sparse matrix may name any number of concepts, and a category may have any number."""
    crow, col, shown = torch.tensor([0, 1, 1]), torch.tensor([0]), torch.ones(1, dtype=torch.bool)
    scores = torch.tensor([[1.0, 0.0]])
    wide = torch.sparse_csr_tensor(crow, col, shown, (2, 2**31 - 2), check_invariants=True)
    category = torch.zeros(1, dtype=torch.int64).expand(2**31 - 2)
    for options in ({}, {"negatives": "category", "category": category}):
        with pytest.raises(ValueError, match="labels have 2147483646 concepts, more than 4194304"):
            average_precision(scores, wide, **options)
        with pytest.raises(ValueError, match="labels have 2147483646 concepts, more than 4194304"):
            support(wide, **options)
    labels = torch.tensor([[True], [False]])
    for function in (lambda **options: average_precision(scores, labels, **options), lambda **options: support(labels, **options)):
        with pytest.raises(ValueError, match="categories are numbered up to 1099511627776, but there can be 1048575"):
            function(negatives="category", category=torch.tensor([1 << 40]))
        assert function(negatives="category", category=torch.tensor([1 << 10]))[0].tolist() in ([1.0], [1])


def test_a_bool_that_is_a_view_of_bytes() -> None:
    """Its bytes may be others than 0 and 1; they are not numbers to count with."""
    scores, crow, col = torch.randn(2, 4), torch.tensor([0, 1, 2, 2, 3]), torch.tensor([0, 1, 0])
    bytes_ = torch.tensor([[200, 0], [7, 255], [63, 1], [2, 0]], dtype=torch.uint8)
    group = torch.tensor([0, 1])
    got = operator(scores, crow, col, 2, bytes_.view(torch.bool), group, True)
    assert torch.equal(got.nan_to_num(-1), operator(scores, crow, col, 2, bytes_ != 0, group, True).nan_to_num(-1))


@pytest.mark.parametrize("both", [False, True])
def test_no_images(both: bool) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert operator(torch.empty(2, 0), torch.zeros(1, dtype=torch.int64), empty, 3, both=both).isnan().all()
