"""Privileged directions: the decomposition, importance against the formula in float64, alignment, orders, gaps, and the split of images."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.analysis import inputs as blocks_module
from torchprobe.analysis.directions import centered, privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.outliers import outlier_features
from torchprobe.encoders import Head


def embeddings(n, d=6, names=None):
    return Embeddings(torch.randn(n, d), torch.arange(n) % 3, list(names) if names else [f"class {i % 7}/{i}.png" for i in range(n)])


def head_with(sigma, classes=9, features=13):
    u = torch.linalg.qr(torch.randn(classes, len(sigma), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(features, len(sigma), dtype=torch.float64))[0]
    return (u * torch.tensor(sigma, dtype=torch.float64)) @ v.T


# -- the decomposition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 13), (13, 9), (7, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_decomposition_of_the_head(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    found = privileged_directions(weight, torch.randn(20, shape[1]))
    r = min(shape)
    assert (len(found), found.rank) == (r, r)
    assert (found.singular_values.shape, found.directions.shape, found.left.shape, found.importance.shape) == (
        *((r,), (r, shape[1]), (shape[0], r)),
        (r,),
    )
    for part in (found.singular_values, found.directions, found.left, found.importance):
        assert part.dtype == torch.float64
    torch.testing.assert_close((found.left * found.singular_values) @ found.directions, weight.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found.singular_values.diff() <= 0).all()
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_linear_layer_is_its_weight():
    layer = nn.Linear(13, 9)
    h = torch.randn(20, 13)
    assert torch.equal(privileged_directions(layer, h).importance, privileged_directions(layer.weight, h).importance)
    flipped = privileged_directions(-layer.weight, h)
    assert torch.equal(flipped.directions.abs(), privileged_directions(layer, h).directions.abs())


def test_importance_is_its_formula(monkeypatch):
    monkeypatch.setattr(blocks_module.blocks, "__defaults__", (13 * 7,))
    weight, h = torch.randn(9, 13), torch.randn(50, 13) * 10 ** torch.randn(50, 1) + 2
    found = privileged_directions(weight, h)
    _, sigma, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    wide = h.double().numpy()
    cosines = abs(wide @ v.T) / np.linalg.norm(wide, axis=1, keepdims=True)
    np.testing.assert_allclose(found.importance, sigma * cosines.mean(0), rtol=1e-9)
    assert found.vectors == 50
    y = torch.zeros(50, dtype=torch.int64)
    assert torch.equal(privileged_directions(weight, Embeddings(h, y, ["x"] * 50)).importance, found.importance)
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(privileged_directions(weight, h.double() * scale).importance, found.importance, rtol=1e-9)


def test_what_points_nowhere_is_left_out_and_counted():
    weight, h = torch.randn(9, 13), torch.randn(50, 13)
    spoiled = torch.cat([h, torch.zeros(2, 13), torch.full((1, 13), math.nan), h[:1] / 0, torch.full((1, 13), math.inf)])
    found = privileged_directions(weight, spoiled)
    torch.testing.assert_close(found.importance, privileged_directions(weight, h).importance)
    assert (found.vectors, found.zero_vectors, found.invalid_vectors) == (50, 2, 3)
    with pytest.raises(ValueError, match="of 3, 2 are zero and 1 have nan or inf"):
        privileged_directions(weight, spoiled[50:53])
    with pytest.raises(ValueError, match="no representation to measure importance on: of 0"):
        privileged_directions(weight, torch.randn(0, 13))


def test_heads_that_have_no_directions():
    with pytest.raises(ValueError, match="all 12 weights of the head are 0"):
        privileged_directions(torch.zeros(3, 4), torch.randn(5, 4))
    with pytest.raises(ValueError, match="nan or inf in 1 of its 3 rows"):
        privileged_directions(torch.tensor([[1.0], [2.0], [math.nan]]), torch.randn(5, 1))
    with pytest.raises(ValueError, match="takes 4 features"):
        privileged_directions(torch.randn(3, 4), torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"expected representations \(n, d\)"):
        privileged_directions(torch.randn(3, 4), torch.randn(4))
    with pytest.raises(TypeError, match="a head is an nn.Linear"):
        privileged_directions([[1.0]], torch.randn(5, 1))


# -- what is read off it -------------------------------------------------------------------------------------------------


def test_alignment_with_outlier_features():
    h = torch.randn(200, 64)
    h[:, [5, 40]] = 30
    found = privileged_directions(torch.randn(70, 64), h)
    features = outlier_features(h, sigma=5)
    assert sorted(features.indices.tolist()) == [5, 40]
    expected = found.directions[:, [5, 40]].square().sum(1)
    for given in (features, [40, 5], torch.tensor([5, 40], dtype=torch.int32)):
        torch.testing.assert_close(found.alignment(given), expected)
    assert found.alignment(features).sum() == pytest.approx(2)  # all 64 directions share two features
    torch.testing.assert_close(found.alignment(range(64)), torch.ones(64, dtype=torch.float64))
    assert not found.alignment([]).any()
    with pytest.raises(ValueError, match="from 0 to 63, got 64"):
        found.alignment([64])


def test_orders():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    h = torch.tensor([[0.1, 0.5, 0.2, 3.0], [0.1, -0.5, 0.2, -3.0]])
    found = privileged_directions(weight, h)
    assert found.order("sigma").tolist() == [0, 1, 2, 3]
    assert found.order().tolist() == found.order("importance").tolist() == [3, 1, 2, 0]
    draws = {tuple(found.order("random", seed).tolist()) for seed in range(30)}
    assert len(draws) > 10 and all(sorted(draw) == [0, 1, 2, 3] for draw in draws)
    assert torch.equal(found.order("random", 3), found.order("random", 3))
    with pytest.raises(ValueError, match="importance, sigma, random, got 'value'"):
        found.order("value")


def test_directions_beyond_the_rank_come_last():
    weight = head_with([3.0, 2.0, 1.0]).float()
    found = privileged_directions(weight, torch.randn(30, 13))
    assert (found.rank, len(found)) == (3, 9)
    for by in ("importance", "sigma", "random"):
        assert found.order(by, seed=4)[3:].tolist() == list(range(3, 9))
        assert sorted(found.order(by, seed=4)[:3].tolist()) == [0, 1, 2]
    assert found.rank == np.linalg.matrix_rank(weight.numpy())


def test_gaps_tell_which_directions_are_determined():
    found = privileged_directions(head_with([8.0, 4.0, 3.9, 1.0]), torch.randn(5, 13))
    gaps = found.gaps()
    np.testing.assert_allclose(gaps[:4], [0.5, 0.1 / 8, 0.1 / 8, 1 / 8], rtol=1e-9)
    np.testing.assert_allclose(gaps[4:], 0, atol=1e-12)
    square = privileged_directions(torch.diag(torch.tensor([3.0, 1.0])), torch.randn(5, 2))
    np.testing.assert_allclose(square.gaps(), [2 / 3, 2 / 3])
    wide = privileged_directions(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.randn(5, 3))
    np.testing.assert_allclose(wide.gaps(), [2 / 3, 1 / 3])
    assert privileged_directions(torch.ones(1, 1), torch.ones(1, 1)).gaps().isnan().all()


def test_a_centered_head_says_the_same_differences():
    whole = Head(torch.randn(9, 13) + 5, torch.randn(9) + 3, normalize=True, names=[str(i) for i in range(9)])
    less = centered(whole)
    assert less.normalize and less.names == whole.names
    wide = whole.weight.detach().double()
    torch.testing.assert_close(less.weight.double(), wide - wide.mean(0), rtol=0, atol=1e-6)
    assert less.bias.double().mean().abs() < 1e-6
    h = torch.randn(40, 13)
    difference = whole(h) - less(h)
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, 9), rtol=1e-4, atol=1e-4)
    found = privileged_directions(less, h)
    assert found.rank == 8
    first = privileged_directions(whole, h)
    assert first.singular_values[0] > 3 * first.singular_values[1]  # what all classes share
    assert found.singular_values[0] < 3 * found.singular_values[1]
    assert centered(torch.randn(3, 4)).bias is None


# -- splitting images ----------------------------------------------------------------------------------------------------


def test_a_split_depends_on_the_ids_alone():
    whole = embeddings(400)
    first, second = split(whole)
    assert {*first.ids, *second.ids} == set(whole.ids) and not {*first.ids} & {*second.ids}
    assert 150 < len(first) < 250
    assert torch.equal(first.h, whole.select([whole.ids.index(name) for name in first.ids]).h)
    other = embeddings(400, d=11).select(torch.randperm(400)[:300])  # another encoder, another order, some images missing
    assert set(split(other)[0].ids) == set(first.ids) & set(other.ids)
    assert set(split(whole, seed=1)[0].ids) != set(first.ids)
    assert len(split(whole, 0.1)[0]) < 80
    assert {name for name in first.ids if name in set(split(whole, 0.7)[0].ids)} == set(first.ids)  # a larger part holds the smaller


def test_names_of_any_kind_are_split():
    names = [f"bild {i} é\udcff.png" for i in range(64)]
    assert sum(map(len, split(embeddings(64, names=names)))) == 64


def test_what_cannot_be_split():
    for fraction in (0, 1, 50, math.nan):
        with pytest.raises(ValueError, match="fraction is the share of the first part"):
            split(embeddings(10), fraction)
    with pytest.raises(ValueError, match="1 images are too few to split"):
        split(embeddings(1))
