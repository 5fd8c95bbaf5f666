"""The robust rule of outlier features: against a loop in numpy, on planted outliers that hide each other, and on features without any."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torchprobe.analysis import inputs as blocks_module
from torchprobe.analysis.outlier_rule import beyond_chance, outside_bulk
from torchprobe.analysis.outliers import FREQUENCY, OutlierFeatures, outlier_features


def by_hand(vector: np.ndarray, sigma: float, core: float = 0.9) -> np.ndarray:
    """One vector in longdouble, feature by feature."""
    x = vector.astype(np.longdouble)
    distance = abs(x - np.sort(x)[(len(x) - 1) // 2])
    bulk = distance <= np.sort(distance)[math.ceil(core * len(x)) - 1]
    if not distance[bulk].any():
        bulk[:] = True
    while True:
        mean = x[bulk].mean()
        std = np.sqrt(((x[bulk] - mean) ** 2).mean())
        outside = abs(x - mean) > sigma * std
        if not (grown := ~outside & ~bulk).any():
            return outside
        bulk |= grown


def spread(generator: np.random.Generator, n: int, d: int) -> dict[str, np.ndarray]:
    """Vectors that are difficult for a rule: heavy tails, ties, a large offset, few distinct values."""
    normal = generator.normal(size=(n, d))
    sparse = np.maximum(generator.normal(size=(n, d)) - 1, 0)
    return {
        "Gaussian": normal,
        "Student": generator.standard_t(2, size=(n, d)),
        "masked": np.where(np.arange(d) < d // 12, 60.0, normal),
        "two sizes of outliers": np.where(np.arange(d) == 1, 500.0, np.where(np.arange(d) < 5, -25.0, normal)),
        "offset": 1e6 + 1e-3 * np.where(np.arange(d) == 3, 80, normal),
        "rectified": sparse,
        "ties": generator.integers(0, 3, size=(n, d)).astype(float),
        "one value": np.where(np.arange(d) == 2, 1.0, np.zeros((n, d))),
        "constant": np.full((n, d), 0.1),
    }


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("d", [1, 2, 9, 10, 36, 64, 257])
def test_the_rule_is_that_of_a_loop(d, scale):
    for name, h in spread(np.random.default_rng(d), 12, d).items():
        found = outside_bulk(torch.from_numpy(h * scale), 6.0).numpy()
        np.testing.assert_array_equal(found, [by_hand(vector * scale, 6.0) for vector in h], err_msg=name)


def test_the_rule_does_not_depend_on_sign_order_and_offset():
    h = torch.from_numpy(spread(np.random.default_rng(0), 20, 128)["two sizes of outliers"])
    found, order = outside_bulk(h, 6.0), torch.randperm(128)
    assert found.any()
    for other, expected in ((-h, found), (h[:, order], found[:, order]), (3 * h + 1e4, found), (h.flip(0), found.flip(0))):
        assert torch.equal(outside_bulk(other, 6.0), expected)
    assert outside_bulk(h[:0], 6.0).shape == (0, 128)


def test_without_outliers_it_is_the_classical_rule():
    h = torch.randn(500, 256, dtype=torch.float64)
    deviation = (h - h.mean(1, keepdim=True)).abs() / h.std(1, correction=0, keepdim=True)
    for sigma in (4.0, 4.5):  # few values lie so far out that they change the standard deviation
        assert (outside_bulk(h, sigma) ^ (deviation > sigma)).float().mean() < 2e-4


# -- chance ----------------------------------------------------------------------------------------------------------------


def test_the_bound_is_never_below_the_tail_of_the_binomial():
    for n, d in ((1, 50), (2, 1000), (20, 64), (300, 512)):
        for count in range(1, n + 1):
            counts = torch.zeros(d, dtype=torch.int64)
            counts[0], counts[1 : 1 + d // 20] = count, 1  # and some chance outliers
            p = float(counts.sum()) / n / d
            tail = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))
            if beyond_chance(counts, n)[0]:
                assert tail <= 0.05 / d * (1 + 1e-9)


def test_one_vector_shows_nothing_and_all_features_show_nothing():
    assert not beyond_chance(torch.tensor([1, 0, 0, 0]), 1).any()
    assert not beyond_chance(torch.full((8,), 5), 5).any()
    assert not beyond_chance(torch.zeros(8, dtype=torch.int64), 0).any()
    assert not beyond_chance(torch.zeros(8, dtype=torch.int64), 5).any()
    assert beyond_chance(torch.tensor([1, 0]), 1, alpha=1).tolist() == [True, False]


# -- outlier features --------------------------------------------------------------------------------------------------------


def gaussian(n: int, d: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(n, d)))


def planted(n: int, d: int, features: slice | list[int], value: float, vectors: int | None = None) -> torch.Tensor:
    h = gaussian(n, d)
    h[:vectors, features] = value
    return h


def test_outliers_do_not_hide_each_other():
    many = outlier_features(planted(200, 768, slice(24), 60))
    assert sorted(many.indices.tolist()) == list(range(24)) and not len(many.classical)
    assert many.energy_share == pytest.approx(0.991, abs=5e-4)
    larger = gaussian(200, 512)
    larger[:, 0], larger[:, 1:9] = 200, 25
    found = outlier_features(larger)
    assert sorted(found.indices.tolist()) == list(range(9)) and found.classical.tolist() == [0]
    assert sorted(outlier_features(planted(200, 64, [7, 50], 1000)).indices.tolist()) == [7, 50]
    often = outlier_features(planted(400, 512, [3], 50, vectors=160))
    assert often.indices.tolist() == [3] and often.classical.tolist() == []
    assert often.rows()[0]["robust_share"] == often.rows()[0]["outlier_share"] == 0.4


@pytest.mark.parametrize("d", [64, 512, 768, 4096])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("size", [9.0, 1e3, -1e6])
def test_every_planted_feature_is_found_and_no_other(d, k, size):
    h = torch.randn(60, d) + torch.where(torch.arange(d) < k, size, 0.0)
    found = outlier_features(h)
    assert sorted(found.indices.tolist()) == list(range(k))
    assert [row["feature"] for row in found.rows()[:k]] == found.indices.tolist()


def test_a_twelfth_of_the_features_is_found_and_a_third_is_not():
    assert len(outlier_features(planted(50, 600, slice(50), 60))) == 50
    assert len(outlier_features(planted(50, 600, slice(200), 60))) == 0  # a third is no outlier but a group


MODELS = {
    "Gaussian": lambda rng, n, d: rng.normal(size=(n, d)),
    "Laplace": lambda rng, n, d: rng.laplace(size=(n, d)),
    "Student t3": lambda rng, n, d: rng.standard_t(3, size=(n, d)),
    "exponential": lambda rng, n, d: rng.exponential(size=(n, d)),
    "ReLU": lambda rng, n, d: np.maximum(rng.normal(size=(n, d)), 0),
    "correlated": lambda rng, n, d: rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)) + 0.5 * rng.normal(size=(n, d)),
}


@pytest.mark.parametrize(("n", "d"), [(3, 512), (8, 256), (100, 512)])
@pytest.mark.parametrize("name", MODELS)
def test_features_without_outliers_have_none(name, n, d):
    with_some = sum(len(outlier_features(torch.from_numpy(MODELS[name](np.random.default_rng(i), n, d)))) > 0 for i in range(20))
    assert with_some <= 1


def test_what_is_left_out_and_what_is_said(monkeypatch):
    monkeypatch.setattr(blocks_module.blocks, "__defaults__", (512 * 7,))
    h = planted(40, 512, [3, 9], 50)
    spoiled = torch.cat([h, torch.full((2, 512), 3.0), torch.full((1, 512), math.nan)])
    clean, found = outlier_features(h), outlier_features(spoiled)
    assert (found.vectors, found.constant_vectors, found.invalid_vectors) == (42, 2, 1)
    assert isinstance(found, OutlierFeatures) and found.rule == "robust" and found.frequency == FREQUENCY["robust"] == 0.25
    assert found.indices.tolist() == clean.indices.tolist() and found.rows()[0]["robust_share"] == 1
    assert outlier_features(h[:1]).indices.tolist() == []  # one vector cannot show which features are outliers in many
    assert sorted(outlier_features(h[:1], alpha=1).indices.tolist()) == [3, 9]
    nothing = outlier_features(h[:0])
    assert not len(nothing) and math.isnan(nothing.rows()[0]["robust_share"])
    assert not len(outlier_features(planted(40, 9, [3], 50)))  # fewer than ten features
    assert outlier_features(planted(40, 12, [3], 50)).indices.tolist() == [3]


# -- real CLIP -------------------------------------------------------------------------------------------------------------------

GOLDEN = os.environ.get("TORCHPROBE_GOLDEN", "")


@pytest.mark.skipif(not GOLDEN, reason="TORCHPROBE_GOLDEN does not name the folder of the published results")
@pytest.mark.parametrize(
    ("file", "images", "captions"), [("openai_vit_b16_coco500.npz", [442], [362]), ("random_vit_b16_coco500.npz", [], [])]
)
def test_the_outlier_features_of_openais_vit_b16(file, images, captions):
    with np.load(Path(GOLDEN) / "clip" / file, allow_pickle=False) as saved:
        for name, expected in (("images", images), ("captions", captions)):
            found = outlier_features(torch.from_numpy(saved[name]))
            assert found.indices.tolist() == found.classical.tolist() == expected
