"""The modality gap against a reference in NumPy, its interval in a simulation, and comparisons that show it."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from torchprobe.analysis.modality import modality_gap

Floats = NDArray[np.float64]


def units(h: Floats) -> Floats:
    return h / np.linalg.norm(h, axis=1, keepdims=True)


def distance(a: Floats, b: Floats) -> Floats:
    return 1 - units(a) @ units(b).T


def two_sets(n: int = 40, m: int = 40, d: int = 12, seed: int = 0) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(max(n, m), d))
    return (shared[:n] + random.normal(size=(n, d)) + np.eye(d)[2] * 4), (shared[:m] + random.normal(size=(m, d)) - np.eye(d)[4] * 3)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e150])
def test_every_number_against_its_formula(paired: bool, scale: float) -> None:
    a, b = two_sets(40, 40 if paired else 25)
    found = modality_gap(scale * a, b / scale, paired)
    x, y = units(a), units(b)
    difference = x.mean(0) - y.mean(0)
    assert found.difference.numpy() == pytest.approx(difference, abs=1e-13)
    assert found.length == pytest.approx(np.linalg.norm(difference), rel=1e-12)
    share = np.sort(difference**2 / (difference**2).sum())[::-1]
    assert found.share[found.order()].numpy() == pytest.approx(share, rel=1e-10)
    assert [found.carrying(part) for part in (0.5, 0.9, 1.0)] == [
        int((share.cumsum() < part - 1e-12).sum()) + 1 for part in (0.5, 0.9, 1.0)
    ]
    assert found.effective_features == pytest.approx(1 / (share**2).sum(), rel=1e-12)
    within = [distance(one, one)[~np.eye(len(one), dtype=bool)].mean() for one in (a, b)]
    assert found.within == pytest.approx([1 - one for one in within], rel=1e-11)
    cosine = x @ y.T
    if paired:
        pairs = 1 - cosine.diagonal().mean()
        assert found.relative == pytest.approx(pairs / (sum(within) / 2 + pairs), rel=1e-11)  # arXiv 2404.07983, cosine distances
        assert found.paired_cosine == pytest.approx(1 - pairs) and found.pairs == 40
        assert found.unpaired_cosine == pytest.approx(cosine[~np.eye(40, dtype=bool)].mean())
    else:
        assert math.isnan(found.relative) and math.isnan(found.paired_cosine) and found.pairs == 0
        assert found.unpaired_cosine == pytest.approx(cosine.mean())
    feature = int(found.order()[0])
    wins = [(one > other) + (one == other) / 2 for one, other in product(x[:, feature], y[:, feature])]
    assert found.separation[feature] == pytest.approx(max(np.mean(wins), 1 - np.mean(wins)))


@pytest.mark.parametrize("paired", [True, False])
def test_length_by_chance_is_that_of_exchanged_sets(paired: bool) -> None:
    a, b = two_sets(30, 30 if paired else 20, d=6)
    x, y = units(a), units(b)
    random, lengths = np.random.default_rng(0), []
    for _ in range(4000):
        if paired:
            sign = random.choice([-1, 1], size=(30, 1))
            lengths.append(np.linalg.norm((sign * (x - y)).mean(0)))
        else:
            both = random.permutation(np.concatenate([x, y]))
            lengths.append(np.linalg.norm(both[:30].mean(0) - both[30:].mean(0)))
    assert modality_gap(a, b, paired).by_chance == pytest.approx(np.sqrt(np.mean(np.square(lengths))), rel=0.02)


@pytest.mark.slow("1,600 samples")
@pytest.mark.parametrize(("n", "spread"), [(20, 0.1), (20, 0.4), (40, 0.5)])
@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_covers_what_it_says(n: int, spread: float, paired: bool) -> None:
    random = np.random.default_rng(n)
    d, size = 32, np.exp(0.7 * random.normal(size=32))
    centers = units(random.normal(size=(2, d)))

    def draw(count: int) -> list[Floats]:
        shared = random.normal(size=(count, d)) * size / 2
        return [center + spread / math.sqrt(d) * (random.normal(size=(count, d)) * size + shared) for center in centers]

    many = [units(one).mean(0) for one in draw(200_000)]
    true = np.linalg.norm(many[0] - many[1])
    covered = []
    for _ in range(800):
        a, b = draw(n)
        low, high = modality_gap(a, b if paired else draw(n)[1], paired).interval
        covered.append(low <= true <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_without_a_gap_the_interval_is_withheld() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 100, 16))
    found = modality_gap(a, b)
    assert found.length < 2 * found.by_chance and all(map(math.isnan, found.interval))
    same = modality_gap(a, a)
    assert same.length == 0 and same.by_chance == pytest.approx(0, abs=1e-8) and same.relative == pytest.approx(0, abs=1e-12)
    few = modality_gap(*two_sets(12, 12, d=6))
    assert few.length > 2 * few.by_chance and all(map(math.isnan, few.interval))


def test_rows_that_have_no_direction_are_left_out() -> None:
    a, b = two_sets()
    want = modality_gap(np.delete(a, [3, 5, 8], 0), np.delete(b, [3, 5, 8], 0))
    a[3], a[5, 0], b[8, 1] = 0, np.nan, np.inf
    found = modality_gap(a, b)
    assert found.length == pytest.approx(want.length) and found.left_out == 3 and found.pairs == 37
    assert modality_gap(a, b, paired=False).vectors == (38, 39)
    with pytest.raises(ValueError, match="two vectors of each set that are finite and not zero, got 0 and 0"):
        modality_gap(a, np.zeros_like(b))
    with pytest.raises(ValueError, match=r"must share a space, row by row; got \(40, 12\) and \(39, 12\)"):
        modality_gap(a, b[1:])
    assert modality_gap(torch.from_numpy(a), torch.from_numpy(b).half().double()).pairs == 37
