"""Features taken out of representations, and the accuracy without them against that without others."""

import math

import pytest
import torch
from torch import nn

from torchprobe.analysis.ablation import ablate, ablation
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.outliers import outlier_features
from torchprobe.encoders import Head


def embeddings(h, y, **options):
    return Embeddings(h, y, [f"{i}.png" for i in range(len(h))], **options)


@pytest.fixture
def planted():
    """Four classes that features 0 … 3 alone tell apart, among 40; feature 9 is large in every image alike and says nothing."""
    y = torch.arange(400) % 4
    h = 0.1 * torch.randn(400, 40)
    h[torch.arange(400), y] += 2.0
    h[:, 9] += 30.0
    return Head(torch.eye(4, 40)), embeddings(h, y)


# -- ablate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_and_mean(dtype):
    h = (torch.randn(50, 9) + 3).to(dtype)
    before = h.clone()
    zero, mean = ablate(h, [2, 7], "zero"), ablate(h, torch.tensor([7, 2]), "mean")
    assert torch.equal(h, before)
    assert zero.dtype == mean.dtype == dtype
    assert torch.equal(ablate(h, [2, 7]), zero)
    others = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(zero[:, others], h[:, others]) and torch.equal(mean[:, others], h[:, others])
    assert not zero[:, [2, 7]].any()
    assert torch.equal(mean[:, [2, 7]], h[:, [2, 7]].double().mean(0).to(dtype).expand(50, 2))


def test_the_mean_is_of_the_reference_without_what_is_not_finite():
    h, other = torch.randn(5, 4), torch.randn(7, 4) + 100
    spoiled = torch.cat([other, torch.full((1, 4), math.inf)])
    expected = other.double().mean(0)[1].float()
    assert torch.equal(ablate(h, [1], "mean", spoiled)[:, 1], expected.expand(5))
    assert torch.equal(ablate(h, [1], "mean", embeddings(spoiled, torch.zeros(8, dtype=torch.int64)))[:, 1], expected.expand(5))
    h[0, 2] = math.nan
    assert torch.equal(ablate(h, [1], "mean")[:, 1], h[1:].double().mean(0)[1].float().expand(5))


def test_no_feature_changes_nothing():
    h = torch.randn(5, 4)
    for none in ([], torch.tensor([], dtype=torch.int64), outlier_features(h)):
        assert torch.equal(ablate(h, none, "mean"), h)


def test_embeddings_give_a_tensor():
    e = embeddings(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(ablate(e.h, [0]), ablate(e.h, [0], "zero"))


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ([4], "indices from 0 to 3, got 4"),
        ([-1, 2], "indices from 0 to 3, got -1"),
        ([1, 1], "2 features are given, but only 1"),
        ([1.0], "whole numbers"),
        (torch.tensor([True, False, True, False]), "whole numbers"),
        (torch.tensor([[1]]), "whole numbers"),
    ],
)
def test_features_are_indices(features, said):
    with pytest.raises(ValueError, match=said):
        ablate(torch.randn(3, 4), features)


def test_what_is_refused(planted):
    head, e = planted
    with pytest.raises(ValueError, match='by their "mean" or by "zero", got how="?\'median\''):
        ablate(e.h, [1], "median")
    with pytest.raises(ValueError, match="the reference has 3 features, the representations have 40"):
        ablate(e.h, [1], "mean", torch.randn(5, 3))
    with pytest.raises(ValueError, match="no vector to take the mean of: of the 2 vectors of the reference"):
        ablate(e.h, [1], "mean", torch.full((2, 40), math.nan))
    with pytest.raises(ValueError, match=r"expected representations \(n, d\)"):
        ablate(torch.randn(4), [1])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        ablation(head, e, [1], repeats=0)
    with pytest.raises(ValueError, match="there are only 10 features other than the 30 to ablate"):
        ablation(head, e, list(range(30)))
    with pytest.raises(ValueError, match="takes 39 features"):
        ablation(torch.randn(4, 39), e, [1])


# -- accuracy ------------------------------------------------------------------------------------------------------------


def test_what_carries_the_classes_is_missed_and_others_are_not(planted):
    head, e = planted
    found = ablation(head, e, [0, 1], how="mean", repeats=30)
    assert found.accuracy == 1
    assert found.ablated < 0.9
    assert found.random.shape == (30,)
    assert found.random_band[0] <= found.random_mean <= found.random_band[1] <= 1
    assert found.ablated < found.random_mean
    assert found.n == 400
    useless = ablation(head, e, outlier_features(e.h, sigma=5, frequency=0.5), repeats=5)  # the other four are far out in a quarter each
    assert useless.features.tolist() == [9]
    assert useless.ablated == 1


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_accuracies_are_those_of_evaluate(how, normalize):
    torch.manual_seed(3)
    head = Head(torch.randn(7, 24), torch.randn(7), normalize=normalize)
    e = embeddings(torch.randn(300, 24), torch.randint(-1, 7, (300,)), classes=(0, 2, 3, 6), groups={2: (2, 3)})
    other = torch.randn(50, 24)
    found = ablation(head, e, [3, 5, 8], how=how, repeats=4, seed=11, reference=other)

    def accuracy(features):
        return evaluate(head, embeddings(ablate(e.h, features, how, other), e.y, classes=e.classes, groups=e.groups)).accuracy

    assert found.accuracy == evaluate(head, e).accuracy
    assert found.ablated == accuracy([3, 5, 8])
    others = torch.tensor([i for i in range(24) if i not in (3, 5, 8)])
    generator = torch.Generator().manual_seed(11)
    draws = [others[torch.randperm(21, generator=generator)[:3]] for _ in range(4)]
    assert found.random.tolist() == [accuracy(draw) for draw in draws]
    assert found.random_mean == pytest.approx(float(found.random.mean()))
    assert found.random_band == (float(found.random.min()), float(found.random.max())) and found.random_level == 0.6
    assert ablation(head, e, [3, 5, 8], how, 4, 11, other, classes=[1, 2]).n == evaluate(head, e, [1, 2]).n


def test_the_seed_decides(planted):
    head, e = planted
    first, again, other = (ablation(head, e, list(range(4, 18)), repeats=3, seed=seed).random.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_no_feature_is_the_whole_accuracy(planted):
    head, e = planted
    found = ablation(nn.Linear(40, 4), e, [], repeats=2)
    assert found.ablated == found.accuracy == found.random_mean == found.random_band[0]
    assert found.as_dict()["features"] == []
    assert ablation(head, e, [2], repeats=2).as_dict()["features"] == [2]
