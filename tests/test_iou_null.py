"""The null of IoU: against an independent count, at its nominal level in simulations, and with a planted unit in it."""

from __future__ import annotations

import itertools

import dissection_oracle as oracle
import numpy as np
import pytest
import torch
from dissection_sets import CATEGORIES, category, image, pack

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, LabelBatch, Overlap, ShuffledOverlap, dissect
from torchprobe.dissection.iou_null import exchanged, images_with
from torchprobe.dissection.report import Report, write_report

UNITS, LABELS = 6, 4
CATEGORY = torch.tensor([-1, 0, 0, 1, 1])


def images_of(rng, n, sizes=(5, 9)):
    return [image(rng, *rng.integers(*sizes, 2), int(rng.integers(0, 3)), int(rng.integers(0, 3)), used=5) for _ in range(n)]


def observed_and_null(maps, labels, thresholds, batch, permutations=19, seed=0, category=CATEGORY, **options):
    """Batches of maps (n, U, h, w) and label planes (n, rows, columns)."""
    observed = Overlap(thresholds, category, 2)
    null = ShuffledOverlap(thresholds, category, 2, permutations=permutations, seed=seed)
    for start in range(0, len(maps), batch):
        part = slice(start, start + batch)
        packed = LabelBatch.pack([[("c", plane)] for plane in labels[part]], [labels.shape[1:]] * len(labels[part]))
        observed.update(maps[part], packed)
        null.update(maps[part], packed, ids=range(start, start + batch))
    return observed, null, null.test(observed.counts(), **{"minimum_positives": 1, **options})


# -- counting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "netdissect", "global"])
def test_against_an_independent_count(mode):
    """Every permutation counted by the definition, and the p-values from these counts, in NumPy."""
    rng, draws, units = np.random.default_rng(3), 9, 5
    images = [image(rng, 8, 8, int(rng.integers(0, 3)), int(rng.integers(0, 3)), used=5) for _ in range(11)]
    maps, thresholds = torch.randn(11, units, 3, 4), torch.full((units,), 0.7)
    primary = category()
    given = (8, 8) if mode == "netdissect" else (0, 0)
    observed = Overlap(thresholds, torch.from_numpy(primary), CATEGORIES, mode)
    null = ShuffledOverlap(thresholds, torch.from_numpy(primary), CATEGORIES, mode, draws, seed=4)
    batches = [range(4), range(4, 8), range(8, 11)]
    for rows in batches:
        part = slice(rows[0], rows[-1] + 1)
        observed.update(maps[part], pack(images[part]), given)
        null.update(maps[part], pack(images[part]), given, ids=rows)
    found = null.test(observed.counts(), minimum_positives=2)

    ious = []
    for b in range(draws + 1):  # the last one as observed
        order = [r if b == draws else rows[int(null.orders(len(rows), rows[0])[b, i])] for rows in batches for i, r in enumerate(rows)]
        counts = oracle.overlap(maps.numpy(), thresholds.numpy(), [images[i] for i in order], primary.tolist(), CATEGORIES, mode, given)
        ious.append(oracle.iou(*counts))
    ious, own = np.array(ious[:draws]), ious[draws]
    shows = [{int(n) for plane in planes for n in np.unique(plane)} | set(whole) for planes, whole, _ in images]
    tested = np.array([n > 0 and sum(n in shown for shown in shows) >= 2 for n in range(len(primary))])
    assert 3 < tested.sum() < 12
    np.testing.assert_allclose(found.chance, ious.mean(0), atol=1e-15)
    every = np.concatenate([own[None], ious])
    excess = np.array([one - np.delete(every, b, 0).mean(0) for b, one in enumerate(every)])  # over the mean of the others
    highest = np.maximum(excess, 0).max(1)[:, tested]
    floor = np.quantile(highest.mean(0), 0.25)
    scale = np.maximum([np.delete(highest, b, 0).mean(0) for b in range(draws + 1)], floor)
    largest = (highest / scale).max(1)[1:]
    np.testing.assert_allclose(found.scale[tested], scale[0], atol=1e-14)
    np.testing.assert_allclose(found.largest, largest, rtol=1e-12)
    p = (1 + (ious >= own).sum(0)) / (1 + draws)
    adjusted = (1 + (largest[:, None, None] >= excess[0][:, tested] / scale[0] - 1e-11).sum(0)) / (1 + draws)
    np.testing.assert_array_equal(found.p[:, tested], p[:, tested])
    np.testing.assert_array_equal(found.adjusted[:, tested], adjusted)
    assert found.p[:, ~tested].isnan().all() and found.adjusted[:, ~tested].isnan().all()


def test_chance_is_the_mean_over_all_assignments():
    rng = np.random.default_rng(0)
    maps = torch.randn(5, UNITS, 2, 2)
    labels = torch.from_numpy(rng.integers(0, LABELS + 1, (5, 4, 4)))
    thresholds = torch.full((UNITS,), 0.3)
    every = []
    for order in itertools.permutations(range(5)):
        overlap = Overlap(thresholds, CATEGORY, 2)
        overlap.update(maps, LabelBatch.pack([[("c", labels[i])] for i in order], [(4, 4)] * 5))
        every.append(overlap.counts().iou())
    exact, spread = torch.stack(every).mean(0), torch.stack(every).std(0)
    null = observed_and_null(maps, labels, thresholds, 5, permutations=2000)[2]
    assert ((null.chance - exact).abs() <= 5 * spread / 2000**0.5 + 1e-12).all()


def test_labels_are_exchanged_whole():
    rng = np.random.default_rng(1)
    images = images_of(rng, 7)
    order = torch.randperm(7)
    found, wanted = exchanged(pack(images), order), pack([images[i] for i in order])
    for name in ("planes", "sizes", "whole"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    boxes = torch.arange(28.0, dtype=torch.float64).view(7, 4)
    assert found.boxes is None and torch.equal(exchanged(pack(images)._replace(boxes=boxes), order).boxes, boxes[order])
    annotated = pack(images)
    whole = annotated.whole.clone()
    whole[0] = -2  # an annotation without a label travels too
    assert sorted(exchanged(annotated._replace(whole=whole), order).whole.tolist()) == sorted(whole.tolist())
    shows = [{int(n) for plane in planes for n in np.unique(plane)} | set(wholes) for planes, wholes, _ in images]
    assert images_with(pack(images), 301).tolist() == [0] + [sum(n in shown for shown in shows) for n in range(1, 301)]


# -- levels ------------------------------------------------------------------------------------------------------------------


def unrelated(rng, images=64, bottom=True):
    """Units and labels that both prefer the lower half of the picture, and images in which either is large; but independent."""
    position = np.linspace(0, 1.5, 6)[:, None] if bottom else 0.0
    size = rng.exponential(1, (images, 1, 1, 1))
    maps = rng.standard_normal((images, UNITS, 6, 6)) * size + position
    field = rng.standard_normal((images, 6, 6)) * rng.exponential(1, (images, 1, 1)) + position
    labels = np.digitize(field, [0.5, 1.0, 1.5, 2.0])
    return torch.from_numpy(maps).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("batch", [32, 7])
def test_p_is_uniform_and_the_family_holds_its_level_under_the_null(batch):
    rng, runs = np.random.default_rng(0), 200
    p, family = [], []
    for run in range(runs):
        maps, labels = unrelated(rng)
        null = observed_and_null(maps, labels, torch.full((UNITS,), 2.0), batch, seed=run)[2]
        p.append(null.p[:, 1:].numpy())
        family.append(float(null.adjusted[:, 1:].min()))
    for level in (0.05, 0.25, 0.5, 0.75):  # one pair in each data set: independent
        single = np.mean([one.flat[run % one.size] <= level for run, one in enumerate(p)])
        assert abs(single - level) < 3.5 * (level * (1 - level) / runs) ** 0.5
    for level in (0.05, 0.2):
        assert np.mean(np.array(family) <= level) <= level + 3 * (level * (1 - level) / runs) ** 0.5
    assert np.mean(np.array(family) <= 0.2) > 0.1  # not only because it never says anything


def test_a_planted_unit_is_found_and_only_it():
    rng, found, others = np.random.default_rng(1), 0, 0
    for run in range(20):
        maps, labels = unrelated(rng)
        maps[:, 2] += 2.5 * (labels == 3)
        null = observed_and_null(maps, labels, torch.full((UNITS,), 2.0), 32, seed=run)[2]
        significant = null.adjusted[:, 1:] <= 0.05
        found += bool(significant[2, 2])
        significant[2] = False
        others += bool(significant.any())
    assert found == 20 and others <= 4


def test_a_rare_label_does_not_decide_for_the_others():
    """Six images are annotated for the category of label 4: by chance it overlaps some unit far more than other labels do."""
    rng = np.random.default_rng(2)
    maps, labels = unrelated(rng, images=128)
    labels[labels == 4] = 0
    labels[:60:10, :, :3] = 4
    maps[:, 2] += 0.6 * (labels == 1)
    observed, _, null = observed_and_null(maps, labels, torch.full((UNITS,), 2.0), 32, 59, category=torch.tensor([-1, 0, 0, 0, 1]))
    highest = [float((null.chance + null.margin())[:, label].amin()) for label in (1, 4)]
    assert null.scale[1] < null.scale[4] / 2 and highest[0] < highest[1]
    iou = observed.counts().iou()
    assert iou[2, 1] - null.chance[2, 1] < null.margin()[4]  # not enough for a label that is rare
    assert null.adjusted[2, 1] <= 0.05 and (null.adjusted[:, 4] > 0.05).all()


def test_the_margin_decides_as_the_adjusted_p_values():
    maps, labels = unrelated(np.random.default_rng(5))
    maps[:, 1] += 2.0 * (labels == 2)
    observed, _, null = observed_and_null(maps, labels, torch.full((UNITS,), 2.0), 16, permutations=39)
    iou = observed.counts().iou()
    for alpha in (0.025, 0.05, 0.1, 0.5):
        assert torch.equal((iou > null.chance + null.margin(alpha))[:, 1:], (null.adjusted <= alpha)[:, 1:])
    assert null.margin(0.01)[1:].isinf().all() and null.margin(0.01)[0].isnan() and bool(null.adjusted[1, 2] == 1 / 40)


def test_rare_labels_are_not_tested_and_nothing_to_exchange_is_never_significant():
    maps, labels = unrelated(np.random.default_rng(6), images=12)
    labels[labels == 4] = 0
    labels[:2, 0, 0] = 4
    _, null, found = observed_and_null(maps, labels, torch.full((UNITS,), 1.0), 4, minimum_positives=3)
    assert null.shown[4] == 2 and found.p[:, 4].isnan().all() and not found.p[:, 1].isnan().any()
    alone = observed_and_null(maps, labels, torch.full((UNITS,), 1.0), 1)[2]
    assert (alone.p[:, 1:] == 1).all() and (alone.adjusted[:, 1:] == 1).all()
    none = null.test(Overlap(torch.zeros(UNITS), CATEGORY, 2).counts(), minimum_positives=100)
    assert none.adjusted.isnan().all() and none.margin().isnan().all() and (none.chance >= 0).all()


# -- the contract of a statistic ---------------------------------------------------------------------------------------------


def some(batches, state=None, permutations=5, seed=2):
    rng = np.random.default_rng(7)
    maps, labels = unrelated(rng, images=24)
    null = ShuffledOverlap(torch.full((UNITS,), 1.0), CATEGORY, 2, permutations=permutations, seed=seed)
    if state is not None:
        null.load_state_dict(state)
    for b in batches:
        part = slice(8 * b, 8 * b + 8)
        null.update(maps[part], LabelBatch.pack([[("c", p)] for p in labels[part]], [(6, 6)] * 8), ids=range(8 * b, 8 * b + 8))
    return null


def assert_same(a, b):
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_any_order_any_partition_and_a_resumed_run():
    whole = some([0, 1, 2])
    assert_same(some([2, 0]).merge(some([1])), whole)
    assert_same(some([1, 2], state=some([0]).state_dict()), whole)
    whole.reset()
    assert_same(whole, some([]))
    assert "5 permutations" in repr(whole)


def test_what_does_not_fit_is_refused():
    null = some([0])
    with pytest.raises(ValueError, match="the other permutations are 5 with seed 3, but this object has 5 with seed 2"):
        null.merge(some([1], seed=3))
    with pytest.raises(ValueError, match="are 4 with seed 2"):
        null.load_state_dict(some([1], permutations=4).state_dict())
    with pytest.raises(TypeError, match="cannot merge ShuffledOverlap with dict"):
        null.merge({})
    state = null.state_dict()
    del state["shown"]
    with pytest.raises(ValueError, match="lack shown"):
        null.load_state_dict(state)
    state = null.state_dict()
    for wrong in ({"shown": torch.zeros(2)}, {"truth": state["truth"][:2]}, {"thresholds": state["thresholds"] + 1}):
        before = null.state_dict()
        with pytest.raises(ValueError, match="shown|parts|thresholds"):
            null.load_state_dict({**state, **wrong})
        assert torch.equal(before["intersection"], null.state_dict()["intersection"])
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        some([], permutations=0)


# -- a whole dissection ------------------------------------------------------------------------------------------------------


class Red(torch.nn.Module):
    """Unit 0 follows the red channel; the others are noise that depends on the picture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = torch.nn.Conv2d(3, 5, 4, stride=4, bias=False)
        self.maps.weight.data[0] = 0
        self.maps.weight.data[0, 0] = 1 / 16

    def forward(self, x):
        return self.maps(x)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).movedim(2, 0).float() / 255


@pytest.fixture(scope="module")
def broden(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("red"), np.random.default_rng(0)
    with BrodenWriter(folder, {"object": ["red", "other"]}, size=32, image_format="png") as writer:
        for i in range(40):
            pixels, mask = rng.integers(0, 60, (32, 32, 3)).astype(np.uint8), np.zeros((32, 32), int)
            y, x, v, w = 4 * rng.integers(0, 6, 4)
            mask[v : v + 8, w : w + 8] = 2
            mask[y : y + 8, x : x + 8] = 1
            pixels[y : y + 8, x : x + 8, 0] = 255
            writer.add(f"a/{i}", pixels, {"object": mask})
    return Broden(folder)


def test_in_a_dissection(broden, tmp_path):
    plain = dissect(Red(), "maps", broden, preprocess=to_tensor, quantile=0.07, batch_size=10)["maps"]
    found = dissect(Red(), "maps", broden, preprocess=to_tensor, quantile=0.07, batch_size=10, iou_permutations=39)["maps"]
    for mine, other in zip(found.counts, plain.counts, strict=True):
        assert torch.equal(mine, other)
    assert plain.iou_null is None and "iou_permutations" not in plain.metadata and found.metadata["iou_permutations"] == 39
    names = [label.name for label in found.labels]
    red, other = names.index("red"), names.index("other")
    assert found.iou_null.adjusted[0, red] == 1 / 40 and found.iou_null.chance[0, red] < 0.1 < found.iou[0, red]
    assert (found.iou_null.adjusted[:, other] > 0.05).all()
    best = found.best()[0]
    assert (best.unit, best.label, best.iou_p_value) == (0, "red", 1 / 40) and best.iou_chance == found.iou_null.chance[0, red]
    assert found.beyond_chance().tolist()[0][red] and found.summary()["iou_null"]["detectors"] >= 1
    found.save(tmp_path / "red.safetensors")
    assert Dissection.load(tmp_path / "red.safetensors") == found
    report = Report(found)
    facts = {fact.label: fact.value for fact in report.facts()}
    assert int(facts["Detectors beyond chance"]) >= 1
    text = write_report(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "39 permutations" in text and "chance IoU" in text
    with pytest.raises(ValueError, match="permutations"):
        found.merge(found)
    with pytest.raises(ValueError, match="iou_permutations"):
        dissect(Red(), "maps", broden, preprocess=to_tensor, score="ap", iou_permutations=9)


def test_a_resumed_dissection_has_the_same_null(broden, tmp_path):
    options = {"preprocess": to_tensor, "quantile": 0.07, "batch_size": 10, "iou_permutations": 9, "score": "iou"}
    whole = dissect(Red(), "maps", broden, **options)["maps"]
    calls = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        dissect(Red(), "maps", broden, checkpoint=tmp_path / "run", stop=lambda: next(calls) >= 6, **options)
    assert dissect(Red(), "maps", broden, checkpoint=tmp_path / "run", resume=True, **options)["maps"] == whole
