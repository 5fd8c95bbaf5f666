"""Units against words: every measure against its formula in NumPy, bad input, and the p-values under the null and with planted units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score

from torchprobe.dissection.words import MEASURES, WPMI, CosineCubed, RankReorder, SoftWPMI, TopPrecision, match
from torchprobe.dissection.words.measures import mixed

PERMUTED = ["soft_wpmi", "wpmi", "cosine_cubed", "rank_reorder"]


# -- the formulas, one pair at a time ------------------------------------------------------------------------------------


def first_images(x, count):
    """The positions of the largest values, of equal ones in the order of ties."""
    ties = mixed(len(x)).argsort().tolist()
    return sorted(range(len(x)), key=lambda i: (-x[i], ties[i]))[:count]


def cosine_cubed(x, y):
    a, b = (x - x.mean()) ** 3, (y - y.mean()) ** 3
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def log_given(x, labels, concept, scale, weights, floor):
    total = 0.0
    for i, w in zip(first_images(x, len(weights)), weights, strict=False):
        row = np.exp(scale * (labels[i] - labels[i].max()))
        total += np.log(1 - w + w * (row / row.sum())[concept] + floor)
    return total


def information(scores, labels, scale, weights, floor, factor):
    given = np.array([[log_given(x, labels, c, scale, weights, floor) for c in range(labels.shape[1])] for x in scores])
    return given - factor * (np.logaddexp.reduce(given, 0) - np.log(len(given)))


def rank_reorder(x, y, share=0.05, power=3, label_power=0.5):
    top = first_images(x, min(len(x), max(2, int(share * len(x)))))
    t = x[top]
    rising = sorted(t)
    ties = mixed(len(x)).argsort().tolist()
    by_concept = sorted(range(len(top)), key=lambda i: (y[top[i]], ties[top[i]]))
    moved = np.empty(len(t))
    for rank, i in enumerate(by_concept):
        moved[i] = rising[rank]
    expected = np.mean([abs(a - b) ** power for a in t for b in t])
    return -np.mean(np.abs(t - moved) ** power) / expected / np.mean(y[top]) ** label_power


def precision(x, y, share=0.05):
    shown = np.zeros(len(x), bool)
    shown[first_images(y, max(1, round(share * len(x))))] = True
    return average_precision_score(shown, x)


def reference(name, scores, labels):
    scores, labels = np.float64(scores), np.float64(labels)
    if name == "soft_wpmi":
        weights = [0.998 - r / min(100, len(labels)) * (0.998 - 0.97) for r in range(min(100, len(labels)))]
        return information(scores, labels, 10, weights, 1e-7, 1.0)
    if name == "wpmi":
        return information(scores, labels, 2, [1.0] * min(28, len(labels)), 1e-7, 0.6)
    pair = {"cosine_cubed": cosine_cubed, "rank_reorder": rank_reorder, "average_precision": precision}[name]
    return np.array([[pair(x, y) for y in labels.T] for x in scores])


def drawn(units=7, images=150, concepts=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(units, images, generator=generator, dtype=torch.float64)
    labels = 0.2 + 0.05 * torch.randn(images, concepts, generator=generator, dtype=torch.float64)
    return scores.to(dtype), labels.to(dtype)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("images", [150, 40, 7, 2])
def test_the_formulas(name, images):
    scores, labels = drawn(images=images)
    found = match(scores, labels, name, permutations=1).score
    np.testing.assert_allclose(found.numpy(), reference(name, scores, labels), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_more_concepts_than_images_and_more_units_than_a_block(name):
    scores, labels = drawn(units=300, images=12, concepts=40)
    found = match(scores, labels, name, permutations=1)
    assert found.score.shape == found.p.shape == found.adjusted.shape == (300, 40)
    some = [0, 255, 256, 299]
    if "wpmi" not in name:  # which depends on the other units
        np.testing.assert_allclose(found.score[some].numpy(), reference(name, scores[some], labels), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties(name, dtype):
    scores, labels = drawn()
    scores, labels = scores.clamp(min=0).mul(2).round().to(dtype), labels.mul(40).round().div(64).to(dtype)
    found = match(scores, labels, name, permutations=1).score
    np.testing.assert_allclose(found.numpy(), reference(name, scores.double(), labels.double()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine_cubed", "rank_reorder", "average_precision"])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-6, 1e9, 1e30, 3e37])
def test_the_scale_of_the_units_does_not_matter(name, scale):
    scores, labels = drawn(images=60)
    scores = scores.mul(1000).round().clamp(-4000, 4000).div(1000 if scale > 1 else 1)
    scaled = (scores.double() * scale).float()
    found, want = match(scaled, labels, name, permutations=9), match(scaled.double() / scale, labels, name, permutations=9)
    np.testing.assert_allclose(found.score.numpy(), want.score.numpy(), rtol=1e-9, atol=1e-12)
    assert torch.equal(found.p, want.p) and torch.equal(found.adjusted, want.adjusted)


@pytest.mark.parametrize("name", PERMUTED)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_an_offset_of_the_units_does_not_matter(name, offset):
    scores, labels = drawn(images=80, dtype=torch.float64)
    found = match(scores + offset, labels, name, permutations=1).score
    np.testing.assert_allclose(found.numpy(), match(scores, labels, name, permutations=1).score.numpy(), rtol=1e-6, atol=1e-9)


def test_cosine_cubed_has_no_least_length():
    """The published code lets no length of a cubed vector fall below 0.001: for CLIP's cosines, which differ little, its cosines shrink."""
    scores, labels = drawn()
    found = match(scores, 0.2 + 1e-3 * (labels - 0.2), "cosine_cubed", permutations=1).score
    assert torch.allclose(found, match(scores, labels, "cosine_cubed", permutations=1).score, atol=1e-3)


# -- what has no value ---------------------------------------------------------------------------------------------------


def test_constant_units_and_concepts():
    scores, labels = drawn(images=60)
    scores[1], labels[:, 2] = 0.1, 0.3  # 0.1 is not a multiple of its own mean in floating point
    for name in PERMUTED:
        found = match(scores, labels, name, permutations=9)
        undefined = torch.zeros_like(found.score, dtype=torch.bool)
        undefined[1] = True
        if name == "cosine_cubed":
            undefined[:, 2] = True
        for table in found:
            assert torch.equal(table.isnan(), undefined), name
        assert bool((found.p[~undefined] <= 1).all())


@pytest.mark.parametrize("name", MEASURES)
def test_a_unit_that_is_mostly_zero_does_not_agree_with_the_first_folder(name):
    """Images of class folders come class by class. Among equal scores, the first images would all be of one class."""
    p = []
    for images in range(400, 440, 2):
        _, labels = drawn(images=images, concepts=10, seed=images)
        labels[torch.arange(images), torch.arange(images) * 10 // images] += 0.1
        rare = torch.zeros(images)
        rare[[177, 277, 377]] = torch.tensor([1.0, 2.0, 3.0])
        p.append(float(match(rare[None], labels, name, permutations=39).p[0, 0]))
    assert sum(one <= 0.05 for one in p) <= 4, p


def test_equal_labels_do_not_agree_with_the_order_of_the_files():
    rising = torch.arange(400.0)
    assert float(match(rising[None], torch.full((400, 2), 0.5), "rank_reorder", permutations=39).p.min()) > 0.05


@pytest.mark.parametrize("name", MEASURES)
def test_one_image(name):
    found = match(torch.tensor([[3.0], [1.0]]), torch.tensor([[0.1, 0.2, 0.3]]), name, permutations=5)
    assert not bool((found.p < 1).any()) and not bool((found.adjusted < 1).any())


def test_a_sum_over_all_images_says_nothing():
    """With fewer images than top images every order gives the same sum."""
    scores, labels = drawn(images=20)
    found = match(scores, labels, "wpmi", permutations=19)
    assert bool((found.p == 1).all()) and bool((found.adjusted == 1).all())


def test_labels_below_zero():
    scores, labels = drawn()
    labels[:, 1] -= 0.5
    found = match(scores, labels, "rank_reorder", permutations=9)
    assert bool((found.score[:, 1] == -torch.inf).all()) and bool((found.p[:, 1] == 1).all())
    assert bool(found.score[:, [0, 2, 3, 4]].isfinite().all()) and bool((found.adjusted[:, 1] == 1).all())


def test_what_is_refused():
    scores, labels = drawn()
    bad = scores.clone()
    bad[3, 17] = torch.nan
    with pytest.raises(ValueError, match="the score of unit 3 for image 17 is nan"):
        match(bad, labels)
    worse = labels.clone()
    worse[4, 1] = torch.inf
    with pytest.raises(ValueError, match="the soft label of image 4 for concept 1 is inf"):
        match(scores, worse)
    with pytest.raises(ValueError, match=r"got \(7, 150\) and \(149, 5\)"):
        match(scores, labels[1:])
    with pytest.raises(ValueError, match="expected floating point numbers"):
        match(scores.int(), labels)
    with pytest.raises(ValueError, match="measure must be one of .*; did you mean soft_wpmi"):
        match(scores, labels, "softwpmi")
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        match(scores, labels, permutations=0)
    for name in ("wpmi", "soft_wpmi"):
        with pytest.raises(ValueError, match="there is only one"):
            match(scores, labels[:, :1], name)


def test_other_numbers():
    scores, labels = drawn()
    assert torch.equal(match(scores, labels, WPMI(), permutations=1).score, match(scores, labels, "wpmi", permutations=1).score)
    found = match(scores, labels, SoftWPMI(top=10, scale=3, weight=0.5, first=0.9, last=0.4), permutations=1).score
    weights = [0.9 - r / 10 * 0.5 for r in range(10)]
    np.testing.assert_allclose(found.numpy(), information(np.float64(scores), np.float64(labels), 3, weights, 1e-7, 0.5), rtol=1e-9)
    found = match(scores, labels, RankReorder(share=0.2, power=2, label_power=1), permutations=1).score
    want = [[rank_reorder(np.float64(x), np.float64(y), 0.2, 2, 1) for y in labels.T] for x in scores]
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-9)


# -- the null ------------------------------------------------------------------------------------------------------------


def test_p_values_are_counts_of_permutations():
    """Against a loop that permutes the units and computes the measure again."""
    scores, labels = drawn(units=3, images=30, concepts=3)
    for measure, own in ((CosineCubed(), cosine_cubed), (RankReorder(share=0.4), lambda x, y: rank_reorder(x, y, 0.4))):
        found = match(scores, labels, measure, permutations=19, seed=4)
        generator = torch.Generator().manual_seed(4)
        reached = np.ones((3, 3))
        for _ in range(19):
            order = torch.randperm(30, generator=generator)
            permuted = torch.empty_like(scores)
            permuted[:, order] = scores
            again = np.array([[own(np.float64(x), np.float64(y)) for y in labels.T] for x in permuted])
            reached += again >= found.score.numpy() - 1e-12
        np.testing.assert_allclose(found.p.numpy(), reached / 20)


@pytest.mark.parametrize("name", PERMUTED)
def test_the_statistic_of_a_pair_grows_with_its_measure(name):
    """A permutation counts if and only if the measure of the pair, with all else fixed, is at least as large."""
    scores, labels = drawn(units=4, images=60, concepts=3)
    matcher = MEASURES[name].of(scores, labels)
    generator = torch.Generator().manual_seed(0)
    for unit in range(4):
        seen = []
        for _ in range(12):
            order = torch.randperm(60, generator=generator)
            alone = scores.clone()
            alone[unit, order] = scores[unit]
            measure = match(alone, labels, name, permutations=1).score[unit]
            seen.append((measure, matcher.statistic(slice(unit, unit + 1), order)[0]))
        for concept in range(3):
            pairs = [(float(m[concept]), float(t[concept])) for m, t in seen]
            assert stats.spearmanr(*zip(*pairs, strict=True)).statistic > (0.999 if name != "rank_reorder" else 0.95)


@pytest.mark.parametrize("name", [*PERMUTED, "average_precision"])
def test_p_values_are_uniform_under_the_null(name):
    """Independent data sets, with dependent units, heavy tails and ties: p of a pair is at most α in a share α of them, and so is the
    smallest adjusted p of all pairs."""
    repeats, permutations = 120, 19
    measure = RankReorder(share=0.5) if name == "rank_reorder" else name  # the order of three images has only six p-values
    p, smallest = [], []
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(1, 60, generator=generator)
        scores = (base + torch.randn(4, 60, generator=generator)).exp()
        if name != "average_precision":
            scores[2:] = (scores[2:] - 1).relu()
        labels = 0.25 + 0.03 * torch.randn(60, 5, generator=generator) + 0.03 * torch.randn(60, 1, generator=generator)
        found = match(scores, labels, measure, permutations=permutations, seed=seed + 1000)
        p.append(found.p[:, 0])
        smallest.append(float(found.adjusted.nan_to_num(nan=1).min()))
    p = torch.stack(p).numpy()
    for unit in (0, 3):
        for alpha in (0.05, 0.25, 0.5, 0.8):
            count = int((p[:, unit] <= alpha + 1e-9).sum())
            assert stats.binom.cdf(count, repeats, alpha) > 0.0005, (unit, alpha, count)
            assert stats.binom.sf(count - 1, repeats, alpha) > 0.0005, (unit, alpha, count)
    false = int((np.array(smallest) <= 0.05 + 1e-9).sum())
    assert stats.binom.sf(false - 1, repeats, 0.05) > 0.0005
    if name != "average_precision":  # Holm's correction is conservative
        assert stats.binom.cdf(false, repeats, 0.05) > 0.0005


@pytest.mark.parametrize("name", MEASURES)
def test_planted_units_are_found(name):
    """Units that are noisy functions of concepts among units that are not."""
    generator = torch.Generator().manual_seed(1)
    labels = 0.2 + 0.04 * torch.randn(400, 20, generator=generator)
    planted = torch.tensor([3, 11, 0, 19])
    signal = (labels[:, planted].T - 0.2) / 0.04
    signal = torch.cat([signal[:2], signal[2:].relu() ** 2])  # other functions that grow with the label
    scores = torch.cat([signal + 0.3 * torch.randn(4, 400, generator=generator), torch.randn(40, 400, generator=generator)]) * 7 - 2
    # Rank reorder sees only the order among the top images, so it needs many of them.
    found = match(scores, labels, RankReorder(share=0.3) if name == "rank_reorder" else name, permutations=39, seed=2)
    assert torch.equal(found.score[:4].argmax(1), planted)
    significant = found.adjusted <= 0.05
    assert bool(significant[torch.arange(4), planted].all())
    assert int(significant.sum()) == 4


@pytest.mark.parametrize("name", ["soft_wpmi", "wpmi", "cosine_cubed", "average_precision"])
def test_true_pairs_do_not_make_others_significant(name):
    """Two units of six are functions of two concepts: they are found, and any other pair is in at most 5 % of the data sets."""
    repeats, false, hits = 50, 0, 0
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        labels, scores = 0.2 + 0.04 * torch.randn(150, 8, generator=generator), torch.randn(6, 150, generator=generator)
        scores[:2] = (labels[:, [1, 4]].T - 0.2) / 0.04 + 0.5 * torch.randn(2, 150, generator=generator)
        found = match(scores, labels, name, permutations=19, seed=seed).adjusted <= 0.05
        true = torch.zeros_like(found)
        true[0, 1] = true[1, 4] = True
        hits += int((found & true).sum())
        false += bool((found & ~true).any())
    assert hits >= 1.9 * repeats
    assert stats.binom.sf(false - 1, repeats, 0.05) > 0.0005, false


def test_the_same_seed_gives_the_same_numbers():
    scores, labels = drawn()
    first, again, other = (match(scores, labels, "soft_wpmi", permutations=9, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first.score, other.score) and not torch.equal(first.p, other.p)
    assert isinstance(MEASURES["cosine_cubed"], CosineCubed) and isinstance(MEASURES["average_precision"], TopPrecision)
