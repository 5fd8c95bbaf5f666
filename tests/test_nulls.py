"""What chance gives: p-values that are uniform, bounds that hold, corrections that correct."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from torchprobe.dissection import average_precision, correct, encoded, nulls, p_values, permutation_test, support
from torchprobe.dissection.average_precision import Support
from torchprobe.dissection.nulls import critical_values, null_tables

stats = pytest.importorskip("scipy.stats")


def shown(images, positives, seed=0):
    """A label matrix in which concept c has positives[c] images, drawn at random."""
    rng = np.random.default_rng(seed)
    labels = torch.zeros(images, len(positives), dtype=torch.bool)
    for c, p in enumerate(positives):
        labels[rng.choice(images, p, replace=False), c] = True
    return labels


def broden_like(images, concepts=300, seed=0):
    """Colors on nearly every image, and a long tail of what is rare; which category each is of."""
    rng = np.random.default_rng(seed)
    frequent = np.r_[0.985, 0.97, rng.uniform(0.8, 0.96, 7), 0.6, 0.3]
    rare = np.clip(3.0 / np.arange(1, concepts - 10), 10 / images, 0.3)
    frequency = np.r_[frequent, rare]
    return shown(images, (frequency * images).astype(int), seed), torch.tensor([0] * 11 + [1 + c % 5 for c in range(concepts - 11)])


# -- one table -------------------------------------------------------------------------------------------------------------


def every_ranking(images, positives):
    """AP of each of the equally likely places that the positives can take."""
    places = itertools.combinations(range(1, images + 1), positives)
    return np.array([np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]) for ranks in places])


@pytest.mark.parametrize(("images", "positives"), [(9, 1), (9, 3), (10, 5), (12, 10), (8, 7)])
def test_against_every_ranking(images, positives):
    all_of_them = every_ranking(images, positives)
    table = null_tables([(images, positives)], draws=40_000)[images, positives]
    ap = np.unique(all_of_them.round(12))
    exact = np.array([(all_of_them >= value - 1e-9).mean() for value in ap])
    np.testing.assert_allclose(table.p_value(ap), exact, atol=0.012)
    p = np.linspace(0.001, 1, 50)
    reached = np.array([(all_of_them >= value - 1e-9).mean() for value in critical_values(images, positives, np.log(p))])
    assert (reached <= p + 1e-12).all()  # the bound is one


def rational_tail(images, positives):
    """AP → probability that a random ranking reaches it, both as fractions: without any rounding."""
    ranked = itertools.combinations(range(1, images + 1), positives)
    often = Counter(sum(Fraction(i + 1, rank) for i, rank in enumerate(ranks)) / positives for ranks in ranked)
    tail, reached = {}, 0
    for ap in sorted(often, reverse=True):
        reached += often[ap]
        tail[ap] = Fraction(reached, math.comb(images, positives))
    return tail


@pytest.mark.parametrize("images", range(1, 11))
def test_exact_where_every_ranking_is_listed(images):
    for positives in range(1, images + 1):
        tail = rational_tail(images, positives)
        table = null_tables([(images, positives)])[images, positives]
        ap = np.array([float(value) for value in tail])
        exact = np.array([float(p) for p in tail.values()])
        for moved in (ap, np.nextafter(ap, 0), np.nextafter(ap, 1), ap - 4e-16, ap + 4e-16):  # as rounding may leave it
            np.testing.assert_array_equal(table.p_value(moved), exact)
        between = (ap[1:] + ap[:-1]) / 2
        np.testing.assert_array_equal(table.p_value(between), exact[:-1])
        assert table.p_value(np.array([1.0]))[0] == 1 / math.comb(images, positives)


@pytest.mark.parametrize(("images", "positives"), [(18, 2), (12, 4), (9, 7)])
def test_a_drawn_table_counts_equal_values_as_reached(images, positives, monkeypatch):
    """AP = 7/12 among 18 images of which 2 are positive comes out in several roundings; all of them are one value."""
    monkeypatch.setattr(nulls, "_EVERY", (1, 1))
    table = null_tables([(images, positives)], draws=100_000, seed=5)[images, positives]
    tail = rational_tail(images, positives)
    ap = np.array([float(value) for value in tail])
    exact = np.array([float(p) for p in tail.values()])
    for moved in (ap, ap - 4e-16, ap + 4e-16):
        np.testing.assert_allclose(table.p_value(moved), exact, atol=4 * 0.5 / 100_000**0.5)
        assert (table.p_value(moved)[:1] <= 1 / math.comb(images, positives)).all()
    assert (images, positives) != (18, 2) or tail[Fraction(7, 12)] == Fraction(12, 153)  # .0784


@pytest.mark.parametrize(("images", "positives"), [(63_305, 10), (63_305, 62_358), (300, 299), (40, 20), (63_305, 30_000)])
def test_a_perfect_ranking_is_as_rare_as_it_is(images, positives):
    table = null_tables([(images, positives)], draws=200)[images, positives]
    p, near = table.p_value(np.array([1.0, 1 - 1e-6]))
    assert 0 < p <= max(1 / math.comb(images, positives) if images < 1000 or positives == 10 else 0, np.finfo(float).tiny)
    assert near >= p


def test_a_permutation_test_counts_what_is_equal_in_exact_arithmetic():
    """Two positives of 18 images: the smallest p-value of a permutation is often that of the unit itself, differently rounded."""
    labels = torch.zeros(18, 1, dtype=torch.bool)
    labels[[1, 11]] = True  # ranks 2 and 12: AP = (1/2 + 2/12) / 2 = 1/3, which other ranks give too
    found = permutation_test(-torch.arange(18.0)[None], labels, permutations=2000, seed=1)
    assert float(found.ap) == pytest.approx(1 / 3, abs=1e-15)
    assert abs(float(found.p) - float(rational_tail(18, 2)[Fraction(1, 3)])) < 0.05
    assert float(found.adjusted) == float(found.p)  # one pair only


@pytest.mark.parametrize(("images", "positives"), [(50, 1), (300, 7), (1000, 40), (1000, 950)])
def test_the_bound_holds_and_falls(images, positives):
    table = null_tables([(images, positives)], draws=40_000)[images, positives]
    log_p = np.log([0.1, 0.01, 0.001])
    for value, p in zip(critical_values(images, positives, log_p), np.exp(log_p), strict=True):
        assert np.interp(value, table.value, table.count, left=table.draws, right=0) / table.draws <= p
    ap = np.linspace(0, 1, 3001)
    p = table.p_value(ap)
    assert (np.diff(p) <= 0).all() and p[0] == 1 and p[-1] > 0


def test_far_tail():
    """A perfect detector of ten images among sixty thousand is no chance in millions of tests; nor is a good one of what is frequent."""
    tables = null_tables([(63_305, p) for p in (10, 100, 3000)], draws=200)
    for p, ap in ((10, 0.9), (100, 0.2), (3000, 0.2)):
        assert tables[63_305, p].p_value(np.array([ap]))[0] < 1e-20
    assert critical_values(63_305, 62_358, np.log([1e-9]))[0] < 0.992  # prevalence is 0.985


def test_tables_are_kept_and_the_seed_decides():
    first = null_tables([(200, 5), (100, 5)], draws=500)
    assert null_tables([(100, 5), (200, 5), (200, 5)], draws=500)[200, 5] is first[200, 5]
    other = null_tables([(200, 5), (100, 5)], draws=500, seed=1)
    assert not np.array_equal(other[200, 5].value, first[200, 5].value)
    assert null_tables([(200, 5)])[200, 5].draws == 100_000 and null_tables([(200, 1)])[200, 1].exact and null_tables([]) == {}
    with pytest.raises(ValueError, match=r"8 positives among 7 images: expected 1 to 7"):
        null_tables([(7, 8)])


# -- many pairs ------------------------------------------------------------------------------------------------------------


def test_p_values_of_random_units_are_uniform():
    rng = np.random.default_rng(0)
    labels = shown(2000, np.exp(rng.uniform(np.log(3), np.log(1950), 100)).astype(int))
    ap = average_precision(torch.from_numpy(rng.random((100, 2000))), labels)
    p = p_values(ap, support(labels))
    assert stats.kstest(p.flatten().numpy(), "uniform").pvalue > 0.01  # 10,000 pairs


@pytest.mark.slow("ranks 2,000 images by each of 10,000 units")
@pytest.mark.parametrize("positives", [4, 60, 1900])
def test_p_values_of_one_concept_are_uniform(positives):
    labels = shown(2000, [positives])
    ap = average_precision(torch.rand(10_000, 2000, dtype=torch.float64), labels)
    p = p_values(ap, support(labels))
    assert stats.kstest(p.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("negatives", ["all", "category"])
def test_a_random_unit_encodes_nothing(negatives):
    labels, category = broden_like(4000)
    units = 1000
    options = {"negatives": negatives, "category": category}
    ap = average_precision(torch.randn(units, 4000), labels, sign="both", **options)
    assert (ap >= 0.9).sum() > units  # a threshold alone would find concepts everywhere
    p = p_values(ap, support(labels, **options), draws=10_000)
    runs = [bool(encoded(of_unit, correct(row, signs=2)).any()) for of_unit, row in zip(ap, p, strict=True)]
    assert np.mean(runs) <= 0.01
    assert not encoded(ap, correct(p, signs=2)).any()  # as one layer


def test_a_true_detector_is_found_among_two_million_pairs():
    labels, _ = broden_like(4000)
    scores = torch.randn(1, 4000)
    scores[0, labels[:, 40]] += 6
    p = p_values(average_precision(scores, labels), support(labels), draws=10_000)
    assert p[0, 40] * 2048 * 1197 * 2 < 1e-6


def test_a_weak_relation_to_a_frequent_concept_is_not_encoded():
    """63,305 images of which 80 % show the concept, AUC .76: significant at any level, AP above 0.9, but little above chance."""
    torch.manual_seed(0)
    labels = shown(63_305, [int(0.8 * 63_305), 3000])
    scores = torch.randn(2, 63_305)
    scores[0, labels[:, 0]] += 0.9989  # Φ(0.9989 / √2) = .76
    scores[1, labels[:, 1]] += 5.5
    found = support(labels)
    ap = average_precision(scores, labels)
    adjusted = correct(p_values(ap, found, draws=200))
    assert encoded(ap, adjusted).tolist() == [[True, False], [False, True]]
    assert encoded(ap, adjusted, prevalence=found.prevalence).tolist() == [[False, False], [False, True]]


def test_the_gain_decides_for_concepts_that_more_than_half_of_the_images_show():
    ap, p = torch.full((1, 5), 0.9, dtype=torch.float64), torch.zeros(1, 5)
    prevalence = torch.tensor([0.1, 0.5, 0.51, 0.8, 1.0], dtype=torch.float64)
    assert encoded(ap, p, prevalence=prevalence).tolist() == [[True, True, False, False, False]]
    assert encoded(ap, p, prevalence=prevalence, gain_threshold=0.5).tolist() == [[True, True, True, True, False]]
    for threshold in (0.5, 0.6, 0.7, 0.9, 0.95):  # exactly at both thresholds
        half = torch.tensor([0.5], dtype=torch.float64)
        assert encoded(torch.full((1, 1), threshold, dtype=torch.float64), torch.zeros(1, 1), threshold, prevalence=half).all()


def test_special_concepts():
    labels = shown(50, [0, 50, 5])
    ap = average_precision(torch.randn(4, 50), labels)
    p = p_values(ap, support(labels))
    assert p[:, 0].isnan().all() and (p[:, 1] == 1).all() and ((p[:, 2] > 0) & (p[:, 2] <= 1)).all()
    with pytest.raises(ValueError, match=r"AP of shape \(4, 2\) does not fit 3 concepts"):
        p_values(ap[:, :2], support(labels))
    assert p_values(ap[0], support(labels)).shape == (3,)
    assert p_values(torch.zeros(2, 0), Support(*torch.zeros(2, 0, dtype=torch.int64))).shape == (2, 0)


# -- corrections -----------------------------------------------------------------------------------------------------------


def test_holm_and_benjamini_hochberg():
    p = torch.rand(40, dtype=torch.float64).square()
    order = sorted(range(40), key=lambda i: float(p[i]))
    holm, largest = [0.0] * 40, 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (40 - rank) * float(p[i])))
        holm[i] = largest
    assert torch.allclose(correct(p.view(4, 10)), torch.tensor(holm, dtype=torch.float64).view(4, 10), rtol=1e-12)
    assert np.allclose(correct(p, "bh").numpy(), stats.false_discovery_control(p.numpy()), rtol=1e-12)
    with_nan = torch.cat([p, torch.full((5,), torch.nan)])
    assert torch.equal(correct(with_nan)[:40], correct(p)) and correct(with_nan)[40:].isnan().all()
    assert correct(torch.tensor([0.01]), signs=2).item() == pytest.approx(0.02)
    assert correct(torch.zeros(0)).shape == (0,) and correct(torch.tensor([torch.nan])).isnan().all()
    with pytest.raises(ValueError, match=r'"holm" or "bh", got \'none\''):
        correct(p, "none")


# -- permutations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sign": "both"}, {"negatives": "category", "category": torch.tensor([0, 1, 1, 0])}])
def test_permutations_find_what_is_there_through_ties(options):
    labels = shown(120, [12, 30, 6, 60])
    scores = torch.randn(5, 120).relu()
    scores[2] += 5 * labels[:, 1]
    test = permutation_test(scores, labels, permutations=39, **options)
    assert torch.equal(test.ap, average_precision(scores, labels, **options))
    assert test.p[2, 1] == test.adjusted[2, 1] == 1 / 40
    others = torch.ones(5, 4, dtype=torch.bool)
    others[2] = False
    assert (test.adjusted[others] >= test.p[others] - 1e-12).all() and (test.adjusted[others] > 0.05).float().mean() > 0.9
    again = permutation_test(scores, labels, permutations=39, **options)
    assert torch.equal(test.p, again.p)


def test_permutation_p_values_are_valid_where_scores_are_tied():
    labels = shown(60, [10, 20, 5])
    p = torch.cat([permutation_test((torch.randn(40, 60) - 1).relu(), labels, permutations=49, seed=s).p for s in range(3)]).flatten()
    for alpha in (0.02, 0.1, 0.3, 0.6):
        expected = alpha + 3 * (alpha * (1 - alpha) / len(p)) ** 0.5
        assert (p <= alpha).float().mean() <= expected, alpha
    assert (p <= 0.6).float().mean() > 0.3


def test_permutation_of_nothing():
    labels = shown(20, [0, 5])
    test = permutation_test(torch.randn(2, 20), labels, permutations=3)
    assert test.p[:, 0].isnan().all() and test.adjusted[:, 0].isnan().all() and not test.p[:, 1].isnan().any()
    with pytest.raises(ValueError, match=r"permutations must be at least 1, got 0"):
        permutation_test(torch.randn(2, 20), labels, permutations=0)
