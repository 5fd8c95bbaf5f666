"""The top inputs of each feature against sorting everything."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor

from torchprobe.statistics import TopInputs

NAN, INF = float("nan"), float("inf")


def brute(scores: Tensor, ids: list[int], k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Scores (inputs, features): the k best of each feature by score, then id; every id once."""
    values, names = [], []
    for column in scores.double().T.tolist():
        best: dict[int, float] = {}
        for score, name in zip(column, ids, strict=True):
            if score == score:
                best[name] = max(score, best.get(name, -INF))
        order = sorted(best, key=lambda name: (-best[name], name))[:k]
        values.append([best[name] for name in order] + [-INF] * (k - len(order)))
        names.append(order + [-1] * (k - len(order)))
    return values, names


def check(top: TopInputs, scores: Tensor, ids: list[int]) -> None:
    values, names = brute(scores, ids, top.k)
    assert top.ids.tolist() == names
    assert top.scores.tolist() == values


def observed(x: Tensor, ids, parts=1, feature_dim=1, **options) -> TopInputs:
    top = TopInputs(x.shape[feature_dim], **options)
    ids = torch.as_tensor(ids)
    for part, names in zip(x.tensor_split(parts), ids.tensor_split(parts), strict=True):
        top.update(part, feature_dim, ids=names)
    return top


SCORES = {
    "normal": lambda: torch.randn(200, 9),
    "ties": lambda: torch.randint(0, 4, (200, 9)).float(),
    "rectified": lambda: (torch.randn(200, 9) - 2).relu(),
    "constant": lambda: torch.zeros(200, 9),
    "nan": lambda: torch.randn(200, 9).masked_fill(torch.rand(200, 9) < torch.linspace(0, 1, 9), NAN),
    "inf": lambda: torch.randn(200, 9).masked_fill(torch.rand(200, 9) < 0.3, INF).masked_fill(torch.rand(200, 9) < 0.3, -INF),
    "minus inf": lambda: torch.full((200, 9), -INF),
    "few": lambda: torch.randn(3, 9),
    "signed zeros": lambda: torch.where(torch.rand(200, 9) < 0.5, 0.0, -0.0),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("parts", [1, 3, 50])
def test_against_sorting(name, k, parts):
    scores = SCORES[name]()
    ids = torch.randperm(10_000)[: len(scores)].tolist()
    top = observed(scores, ids, parts, k=k)
    check(top, scores, ids)
    assert top.inputs == len(scores) and top.unscored.tolist() == scores.isnan().sum(0).tolist()


@pytest.mark.parametrize("name", ["ties", "nan", "inf", "constant"])
def test_any_partition_order_and_merging_is_the_same(name):
    scores = SCORES[name]()
    ids = torch.randperm(10_000)[:200]
    want = observed(scores, ids, k=7)
    for seed in range(8):
        shuffle = random.Random(seed)
        order = torch.randperm(200)
        parts = order.tensor_split(sorted(shuffle.sample(range(1, 200), 5)))
        several = [observed(scores[part], ids[part], k=7) for part in parts]
        while len(several) > 1:
            a, b = (several.pop(shuffle.randrange(len(several))) for _ in range(2))
            several.append(a.merge(b))
        for key, value in several[0].state_dict().items():
            assert torch.equal(value, want.state_dict()[key]) if isinstance(value, Tensor) else value == want.state_dict()[key], key


def test_an_input_seen_twice_counts_once():
    scores = torch.randn(60, 4)
    ids = [i % 25 for i in range(60)]  # as with the padding of a distributed sampler, but with other scores
    check(observed(scores, ids, parts=7, k=10), scores, ids)
    top = observed(scores[:20], range(20), k=10)
    check(top.merge(copy.deepcopy(top)), scores[:20], list(range(20)))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: (x, 1),
        lambda x: (x.contiguous(memory_format=torch.channels_last), -3),
        lambda x: (x.permute(0, 2, 3, 1), -1),
        lambda x: (x.permute(0, 2, 1, 3), 2),
        lambda x: (x.flatten(2), 1),
        lambda x: (x.flatten(2).mT, 2),
    ],
)
@pytest.mark.parametrize("score", ["max", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_maps(layout, score, dtype):
    x = (torch.randn(30, 6, 5, 7) + 1).to(dtype)
    x.masked_fill_(torch.rand(x.shape) < 0.1, NAN)
    x[4, 2] = NAN
    maps = x.double().flatten(2)
    scores = maps.nan_to_num(nan=-INF).amax(2).where(~maps.isnan().all(2), NAN) if score == "max" else maps.nanmean(2)
    x, feature_dim = layout(x)
    top = observed(x, range(30), parts=4, feature_dim=feature_dim, k=8, score=score)
    values, names = brute(scores, list(range(30)), 8)
    assert top.ids.tolist() == names
    torch.testing.assert_close(top.scores, torch.tensor(values, dtype=torch.float64), rtol=0 if score == "max" else 1e-12, atol=0)
    assert top.unscored.tolist() == [0, 0, 1, 0, 0, 0]


def test_the_mean_does_not_depend_on_the_batch():
    x = torch.randn(40, 700, 7, 7) * torch.logspace(-8, 8, 49).view(7, 7)
    want = observed(x, range(40), score="mean", k=40)
    for parts in (2, 7, 40):
        assert torch.equal(observed(x, range(40), parts, score="mean", k=40).scores, want.scores)
    assert torch.equal(observed(x.permute(0, 2, 3, 1).contiguous(), range(40), 3, -1, score="mean", k=40).scores, want.scores)


def test_default_ids_continue():
    top = TopInputs(3, k=4)
    scores = torch.randn(50, 3)
    for part in scores.split(8):
        top.update(part)
    check(top, scores, list(range(50)))


def test_nothing_seen():
    top = TopInputs(3, k=2)
    top.update(torch.empty(0, 3), ids=[])
    top.update(torch.empty(2, 3, 0), feature_dim=1, ids=[7, 8])  # maps without positions have no score
    assert top.ids.tolist() == [[-1, -1]] * 3 and (top.scores == -INF).all() and top.unscored.tolist() == [2, 2, 2]
    top.update(torch.full((1, 3), -INF), ids=[5])
    assert top.ids.tolist() == [[5, -1]] * 3
    top.reset()
    assert top.inputs == 0 and (top.ids == -1).all() and not top.unscored.any()


def test_saving():
    scores = torch.randn(80, 5)
    straight = observed(scores, range(80), parts=4)
    first = observed(scores[:40], range(40))
    saved = first.state_dict()
    first.update(scores[40:], ids=range(40, 80))  # the saved state is a copy
    second = TopInputs(5)
    second.load_state_dict(saved)
    second.update(scores[40:], ids=range(40, 80))
    for other in (first, second, copy.deepcopy(straight), pickle.loads(pickle.dumps(straight))):
        check(other, scores, list(range(80)))
        assert other.inputs == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 6}, "features=6, these have features=5"),
        ({"k": 3}, "k=3, these have k=20"),
        ({"score": "mean"}, "score=.mean"),
        ({"scores": torch.zeros(5, 20)}, "scores of the saved TopInputs is torch.float32"),
        ({"ids": torch.zeros(5, 19, dtype=torch.int64)}, r"expected torch.int64 of shape \(5, 20\)"),
        ({"unscored": None}, "unscored of the saved TopInputs is NoneType"),
        ({"inputs": -1}, "inputs of the saved TopInputs is -1"),
        ({"extra": 1}, r"unknown \['extra'\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, message):
    top = observed(torch.randn(30, 5), range(30))
    before = top.state_dict()
    with pytest.raises(ValueError, match=message):
        top.load_state_dict({**before, **change})
    assert torch.equal(top.ids, before["ids"]) and top.inputs == 30


def test_refusals():
    for arguments in ({"features": 0}, {"features": 3, "k": 0}, {"features": 3, "score": "median"}):
        with pytest.raises(ValueError, match="must be"):
            TopInputs(**arguments)
    top = TopInputs(3)
    for x, dim in (
        (torch.zeros(3), -1),
        (torch.zeros(4, 5), -1),
        (torch.zeros(3, 4), 0),
        (torch.zeros(3, 4), -2),
        (torch.zeros(4, 3).int(), 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            top.update(x, dim)
    for ids in ([1, 2], [1, 2, 3, -4], [1.0, 2.0, 3.0, 4.0], [[1, 2, 3, 4]]):
        with pytest.raises(ValueError, match="ids must be 4 whole numbers"):
            top.update(torch.zeros(4, 3), ids=ids)
    with pytest.raises(TypeError, match="merge TopInputs with dict"):
        top.merge({})
    for other, message in (
        (TopInputs(4), "features 3 and 4"),
        (TopInputs(3, k=2), "k 20 and 2"),
        (TopInputs(3, score="mean"), "score max and mean"),
    ):
        with pytest.raises(ValueError, match=message):
            top.merge(other)
    assert top.inputs == 0
    assert repr(top) == "TopInputs(3 features, the 20 of 0 inputs with the largest max)"


@pytest.mark.gpu
def test_on_a_gpu():
    x = torch.randint(0, 9, (100, 30, 3, 3)).float()
    x[5, 2] = NAN
    for score in ("max", "mean"):
        cpu = observed(x, range(100), 6, score=score)
        gpu = TopInputs(30, device="cuda", score=score)
        for part, ids in zip(x.cuda().split(17), torch.arange(100).split(17), strict=True):
            gpu.update(part, 1, ids=ids)
        assert (
            torch.equal(gpu.ids.cpu(), cpu.ids)
            and torch.equal(gpu.scores.cpu(), cpu.scores)
            and gpu.unscored.tolist() == cpu.unscored.tolist()
        )
        assert cpu.merge(gpu).inputs == 200
