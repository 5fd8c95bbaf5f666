"""A whole dissection: against the definition, in every mode, for maps, tokens and vectors, units and directions."""

from __future__ import annotations

import csv
from dataclasses import astuple
from pathlib import Path

import dissection_oracle as oracle
import numpy as np
import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, ViT, preprocess
from torch import nn

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, dissect, random_rotation, singular_vectors
from torchprobe.dissection.ranking import top_images
from torchprobe.ops.overlap import upsample
from torchprobe.statistics import TopInputs


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=24, seed=0)


@pytest.fixture(scope="module")
def broden(trap):
    return Broden(trap.root)


def activations(model, layer, broden, batch=3):
    """What the layer gives, computed by hand, in batches of the same size."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output.detach()))
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(broden), batch):
            model(torch.stack([preprocess(broden.image(i)) for i in range(start, min(start + batch, len(broden)))]))
    handle.remove()
    model.train(training)
    return torch.cat(found)


def images_of(trap):
    for row in trap.data_rows:
        entries = [entry for name in trap.categories for entry in row.labels.get(name, [])]
        planes = [entry for entry in entries if not isinstance(entry, int)]
        yield planes, [entry for entry in entries if isinstance(entry, int)], (row.label_height, row.label_width)


def annotated_of(row, only_empty=False):
    """The categories for which the index has a label map or a whole-image label; or those of which nothing is there."""
    given = {name for name, entries in row.labels.items() if any(not isinstance(entry, int) or entry for entry in entries)}
    return {name for name in given if not (only_empty and row.numbers(name))}


def expected(trap, maps, thresholds, mode="default", given=(32, 32)):
    primary = [-1] * (max(trap.names) + 1)
    for number, category in trap.primary.items():
        primary[number] = trap.categories.index(category)
    annotated = [[trap.categories.index(name) for name in annotated_of(row, mode == "netdissect")] for row in trap.data_rows]
    counts = oracle.overlap(maps.numpy(), thresholds.numpy(), list(images_of(trap)), primary, len(trap.categories), mode, given, annotated)
    return [torch.from_numpy(part)[..., 1:] for part in counts]


@pytest.mark.parametrize("mode", ["default", "netdissect", "global"])
def test_counts_are_those_of_the_definition(trap, broden, mode):
    model = Net()
    result = dissect(model, "norm", broden, score="iou", mode=mode, preprocess=preprocess, batch_size=3, quantile=0.05)["norm"]
    maps = activations(model, "norm", broden)
    values = maps.movedim(1, 0).flatten(1).numpy()
    method = "hazen" if mode == "netdissect" else "inverted_cdf"
    torch.testing.assert_close(result.thresholds, torch.from_numpy(np.quantile(values, 0.95, axis=1, method=method)).float())
    for found, wanted in zip(result.counts, expected(trap, maps, result.thresholds, mode), strict=True):
        assert torch.equal(found, wanted)
    assert result.average_precision is None and result.counts.intersection.sum() > 0
    assert [label.number for label in result.labels] == sorted(trap.names)


def in_float64(maps, rows, columns, mode, given=32):
    """Maps (n, h, w) on a label grid, by linear interpolation along one axis and then the other."""
    for axis, size in ((2, columns), (1, rows)):
        n = maps.shape[axis]
        points = np.arange(n) * (given // n // round(given / columns)) + given // n // 2 // round(given / columns)
        pixels = np.arange(size) if mode == "netdissect" else (np.arange(size) + 0.5) * n / size - 0.5
        points = points if mode == "netdissect" else np.arange(n)
        maps = np.apply_along_axis(lambda line, at=pixels, of=points: np.interp(at, of, line), axis, maps.astype(np.float64))
    return maps


@pytest.mark.parametrize("mode", ["default", "netdissect"])
def test_close_to_upsampling_in_float64(trap, broden, mode):
    maps = activations(Net(), "norm", broden)
    thresholds = maps.movedim(1, 0).flatten(1).quantile(0.95, dim=1)[:, None, None]
    different = active = 0
    for image, row in zip(maps, trap.data_rows, strict=True):
        size = row.label_height, row.label_width
        exact = torch.from_numpy(in_float64(image.numpy(), *size, mode)) > thresholds
        ours = upsample(image, *size, "anchored" if mode == "netdissect" else "half_pixel", 32, 32) > thresholds
        different, active = different + int((exact != ours).sum()), active + int(exact.sum())
    assert active > 10_000 and different < 1e-4 * active


def test_the_original_mode_has_the_original_quantile(broden):
    given = {"norm": torch.zeros(12)}
    assert dissect(Net(), "norm", broden, mode="netdissect", preprocess=preprocess, score="iou", top=0, thresholds=given)["norm"].metadata[
        "quantile"
    ] == "5/999"  # fmt: skip


def test_thresholds_that_were_estimated_say_so(broden, tmp_path):
    net = Net()
    exact, rough = (
        dissect(net, "conv", broden, score="iou", preprocess=preprocess, quantile=0.2, top=0, memory=memory)["conv"]
        for memory in (1 << 20, 12_000)
    )
    assert exact.metadata["threshold_error"] == 0
    assert 0 < rough.metadata["threshold_error"] < 0.1
    assert (
        dissect(net, "conv", broden, score="iou", preprocess=preprocess, thresholds={"conv": exact.thresholds})["conv"].metadata[
            "threshold_error"
        ]
        is None
    )
    pages = [Path(d.report(tmp_path / "a.html", broden)).read_text(encoding="utf-8") for d in (exact, rough)]
    assert ["estimated" in page for page in pages] == [False, True]


def test_scores_rank_the_images_annotated_for_the_category(trap, broden):
    model = Net()
    result = dissect(model, ["norm", ""], broden, score="ap", preprocess=preprocess, batch_size=3, top=5, keep_scores=True)
    counted = dissect(model, "norm", broden, score="iou", preprocess=preprocess, batch_size=3, top=5)["norm"]
    assert torch.equal(counted.top[0], result["norm"].top[0]) and torch.equal(counted.top[1], result["norm"].top[1])
    for layer, scores in (("norm", activations(model, "norm", broden).amax((2, 3))), ("", activations(model, "", broden))):
        found = result[layer]
        assert torch.equal(found.scores, scores.T) and found.counts is None
        for i, label in enumerate(found.labels):
            wholes = [row.numbers() for row in trap.data_rows]
            annotated = np.array(
                [
                    label.category in annotated_of(row) | {trap.primary[n] for n in numbers}
                    for row, numbers in zip(trap.data_rows, wholes, strict=True)
                ]
            )
            shown = np.array([label.number in numbers for numbers in wholes])
            assert found.support.images[i] == annotated.sum() and found.support.positives[i] == shown.sum()
            for unit in (0, 7):
                wanted = oracle.average_precision(scores[annotated, unit].numpy(), shown[annotated])
                np.testing.assert_allclose(found.average_precision[unit, i], wanted, rtol=1e-12)
        order = scores.argsort(dim=0, descending=True, stable=True)[:5].T
        assert torch.equal(found.top[0], order) and torch.equal(found.top[1], scores.T.gather(1, order))


@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_are_maps_of_patches(trap, broden, batch_first):
    model = ViT(batch_first)
    result = dissect(model, "block", broden, preprocess=preprocess, batch_size=3, quantile=0.05)["block"]
    tokens = torch.cat([x if batch_first else x.movedim(0, 1) for x in split(model, broden)])
    maps = tokens[:, 3:].movedim(1, 2).unflatten(2, (8, 4))
    assert result.metadata["sites"]["block"]["grid"] == [8, 4]
    assert torch.equal(result.counts.intersection, expected(trap, maps, result.thresholds)[0])


def split(model, broden):
    found = []
    handle = model.block.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    with torch.no_grad():
        for start in range(0, len(broden), 3):
            model(torch.stack([preprocess(broden.image(i)) for i in range(start, min(start + 3, len(broden)))]))
    handle.remove()
    return found


def test_the_class_token_has_scores_but_no_overlap(broden):
    model = ViT()
    with pytest.raises(ValueError, match='no positions.*score="ap"'):
        dissect(model, "block", broden, positions="class", preprocess=preprocess)
    found = dissect(model, "block", broden, positions="class", score="ap", preprocess=preprocess, batch_size=3, keep_scores=True)["block"]
    torch.testing.assert_close(found.scores.T, torch.cat(split(model, broden))[:, 0])


def test_pooled_vectors_are_refused_for_overlap(broden):
    with pytest.raises(ValueError, match="layer '' has no positions.*average precision"):
        dissect(Net(), ["norm", ""], broden, preprocess=preprocess)


def test_directions(trap, broden):
    model, basis = Net(), random_rotation(12, seed=3)
    given = dissect(model, "norm", broden, basis=basis[:5], preprocess=preprocess, batch_size=3, quantile=0.05)["norm"]
    maps = torch.einsum("kd,ndhw->nkhw", basis[:5], activations(model, "norm", broden))
    assert given.units == 5
    wanted = expected(trap, maps, given.thresholds)[0]
    assert (given.counts.intersection - wanted).abs().sum() <= 1e-3 * wanted.sum()  # products are rounded in another order
    by_name = dissect(model, "norm", broden, basis="rotation", seed=3, preprocess=preprocess, batch_size=3, quantile=0.05)["norm"]
    assert torch.allclose(by_name.thresholds[:5], given.thresholds, atol=1e-5)
    same = dissect(model, "norm", broden, basis={"norm": torch.eye(12)}, preprocess=preprocess, batch_size=3)["norm"]
    plain = dissect(model, "norm", broden, preprocess=preprocess, batch_size=3)["norm"]
    assert torch.equal(same.counts.intersection, plain.counts.intersection)


def test_singular_vectors_of_a_head():
    head = nn.Linear(6, 4)
    directions, values = singular_vectors(head)
    torch.testing.assert_close(directions @ directions.T, torch.eye(4))
    torch.testing.assert_close((head.weight @ directions.T).norm(dim=0), values)
    assert bool((directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all())
    with pytest.raises(ValueError, match="rank 4; k = 5"):
        singular_vectors(head, 5)


def test_parts_of_a_data_set_merge_to_the_whole(broden, tmp_path):
    whole = dissect(Net(), "norm", broden, preprocess=preprocess, batch_size=1, keep_scores=True, top=3)["norm"]
    parts = [
        dissect(
            Net(), "norm", broden, preprocess=preprocess, batch_size=1, keep_scores=True, top=3, rows=rows,
            thresholds={"norm": whole.thresholds},
        )["norm"]
        for rows in (range(13), range(13, len(broden)))
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the same images"):
        parts[0].merge(parts[0])
    merged = parts[0].merge(parts[1])
    for name in ("counts", "average_precision", "p_values", "support", "top", "scores", "images"):
        for found, wanted in zip(tensors(getattr(merged, name)), tensors(getattr(whole, name)), strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True, rtol=0, atol=0)
    merged.save(tmp_path / "merged.safetensors")
    assert Dissection.load(tmp_path / "merged.safetensors") == merged


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def test_merging_needs_the_same_question(broden):
    def one(rows, **options):
        return dissect(Net(), "norm", broden, preprocess=preprocess, rows=rows, quantile=0.05, **options)["norm"]

    with pytest.raises(ValueError, match="other thresholds"):
        one(range(5), score="iou").merge(one(range(5, 9), score="iou"))
    with pytest.raises(ValueError, match="keep_scores=True"):
        one(range(5), score="ap").merge(one(range(5, 9), score="ap"))
    with pytest.raises(ValueError, match="only one of the two has thresholds"):
        one(range(5)).merge(one(range(5, 9), score="ap"))
    parts = [one(rows, thresholds={"norm": torch.zeros(12)}, score="iou") for rows in (range(5), range(5, 9))]
    parts[1].metadata["modules"] = "of another stride"
    with pytest.raises(ValueError, match="same weights and other modules"):
        parts[0].merge(parts[1])
    with pytest.raises(TypeError, match="merge a Dissection with dict"):
        one(range(5), score="ap").merge({})


def test_the_table_has_the_columns_of_the_original(broden, tmp_path):
    result = dissect(Net(), "norm", broden, preprocess=preprocess, quantile=0.05)["norm"]
    with open(result.to_csv(tmp_path / "iou.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = [f"{c}-{k}" for c in broden.categories for k in ("label", "truth", "activation", "intersect", "iou")]
    assert list(rows[0]) == ["unit", "category", "label", "score", *keys]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and sorted(int(row["unit"]) for row in rows) == list(range(1, 13))
    names = [label.name for label in result.labels]
    for row, best in zip(rows, result.best(), strict=True):
        assert (int(row["unit"]) - 1, row["category"], row["label"], float(row["score"])) == astuple(best)[:4]
        for c in broden.categories:
            if row[f"{c}-label"]:
                i, unit = names.index(row[f"{c}-label"]), best.unit
                counts = result.counts
                assert int(row[f"{c}-truth"]) == counts.truth[i] and int(row[f"{c}-activation"]) == counts.activation[unit, i]
                assert int(row[f"{c}-intersect"]) == counts.intersection[unit, i] and float(row[f"{c}-iou"]) == result.iou[unit, i]
    with open(result.to_csv(tmp_path / "ap.csv", score="ap"), newline="", encoding="utf-8") as file:
        assert {"object-ap", "object-prevalence", "object-p"} <= set(next(csv.reader(file)))


def test_summaries(broden):
    result = dissect(Net(), "norm", broden, preprocess=preprocess, sign="both", keep_scores=True)["norm"]
    assert result.unique_detectors("paper").detectors >= result.unique_detectors("report").detectors
    assert result.unique_concepts(0.5, 0.05) == []  # nothing is significant among so few images
    assert len(result.unique_concepts(0.5, alpha=1)) > 0
    assert int(result.polysemanticity(0.5, alpha=1).sum()) == int(result.encoded(0.5, alpha=1).sum())
    other = dissect(ViT(), "block", broden, preprocess=preprocess)["block"]
    overlap = result.overlap(other, 0.5, alpha=1)
    assert len(overlap.shared) + len(overlap.mine) == len(result.unique_concepts(0.5, alpha=1))
    best = result.best("gain")
    assert [row.score for row in best] == sorted((row.score for row in best), reverse=True)
    assert best[0].score == float(result.gain.nan_to_num(nan=-1).amax()) and 0 < best[0].prevalence < 1
    assert bool((result.permutation_test(9).adjusted.nan_to_num(nan=1) >= 0.1).all())
    with pytest.raises(ValueError, match='score="iou"'):
        dissect(ViT(), "block", broden, score="ap", preprocess=preprocess)["block"].best()


def test_shuffled_labels_keep_what_is_there_and_lose_what_goes_together(broden):
    plain = dissect(Net(), "norm", broden, preprocess=preprocess, quantile=0.05)["norm"]
    first, again, other = (
        dissect(Net(), "norm", broden, preprocess=preprocess, quantile=0.05, shuffle_labels=seed)["norm"] for seed in (1, 1, 2)
    )
    assert first == again and not torch.equal(first.counts.intersection, other.counts.intersection)
    assert torch.equal(first.counts.truth, plain.counts.truth) and torch.equal(first.support.positives, plain.support.positives)
    assert torch.equal(first.thresholds, plain.thresholds)
    assert not torch.equal(first.average_precision.nan_to_num(), plain.average_precision.nan_to_num())


class Red(nn.Module):
    """The mean of the red channel over tiles."""

    def __init__(self):
        super().__init__()
        self.maps = nn.AvgPool2d(8)

    def forward(self, x):
        return self.maps(x[:, :1])


def test_images_with_an_empty_mask_are_negatives(tmp_path):
    """Twelve images of one category with one label; in every other one the mask is empty, and there the unit may be wrong."""
    size, lesion = 32, np.zeros((32, 32), int)
    lesion[8:16, 8:16] = 1
    reds = [200, 200, 200, 0, 200, 0, 200, 0, 200, 0, 200, 0]  # even images show the lesion; one without is as red as those with
    with BrodenWriter(tmp_path / "set", {"lesion": ["nodule"]}, size=size, segmentation_size=size, image_format="png") as writer:
        for i, red in enumerate(reds):
            image = np.zeros((size, size, 3), np.uint8)
            image[8:16, 8:16, 0] = red
            writer.add(str(i), image, {"lesion": lesion * (i % 2 == 0)})
    broden = Broden(tmp_path / "set")
    given = {"maps": torch.tensor([100.0])}
    to_tensor = lambda image: torch.from_numpy(np.array(image)).movedim(2, 0).float()  # noqa: E731
    shown = np.array([int(row.image[:-4]) % 2 == 0 for row in broden.rows])
    scores = np.array([reds[int(row.image[:-4])] for row in broden.rows])
    for mode in ("default", "netdissect", "global"):
        result = dissect(Red(), "maps", broden, preprocess=to_tensor, mode=mode, thresholds=given, keep_scores=True)["maps"]
        assert result.support.images.tolist() == [12] and result.support.positives.tolist() == [6]
        assert oracle.average_precision(scores, shown) == 6 / 7
        assert float(result.average_precision) == pytest.approx(6 / 7) and float(result.prevalence) == 0.5
        assert float(result.p_values) < 1 and result.permutation_test(19, seed=0).adjusted.isfinite().all()
        area = int(result.counts.intersection) // 6  # of the region in one image; image 1 has it as well
        assert result.counts.intersection.item() == 6 * area and result.counts.activation.item() == 7 * area
        assert result.counts.truth.item() == 6 * 64
    shuffled = dissect(Red(), "maps", broden, preprocess=to_tensor, thresholds=given, shuffle_labels=0)["maps"]
    assert shuffled.support.images.tolist() == [12] and shuffled.counts.activation.item() == result.counts.activation.item()


def test_only_the_labels_of_the_rows_are_read(broden, trap, monkeypatch):
    rows = [2, 3, 5, 8, 11, 13]
    every = dissect(Net(), "norm", broden, score="ap", preprocess=preprocess, rows=rows, shuffle_labels=1)["norm"]
    fresh, read = Broden(trap.root), set()
    labels = fresh.image_labels
    monkeypatch.setattr(fresh, "image_labels", lambda row: read.add(row) or labels(row))
    assert dissect(Net(), "norm", fresh, score="ap", preprocess=preprocess, rows=rows, shuffle_labels=1)["norm"] == every
    assert read == set(rows)
    told = []
    dissect(Net(), "norm", fresh, score="ap", preprocess=preprocess, rows=rows, progress=lambda p: told.append((p.stage, p.total)))
    assert told[-1] == ("labels", 6) and not {total for _, total in told} - {6}


def test_top_images_are_those_of_the_streaming_statistic():
    scores, ids = torch.randint(0, 4, (9, 50)).float(), torch.arange(0, 100, 2)
    for k in (1, 7, 49, 60):
        streaming = TopInputs(9, k)
        streaming.update(scores.T, ids=ids)
        found, values = top_images(scores, ids, k)
        assert torch.equal(found, streaming.ids) and torch.equal(values, streaming.scores.float())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "netdissect", "global"])
def test_cuda_counts_the_same(broden, mode):
    class Pixels(nn.Module):  # nothing that a device may round in its own way
        def __init__(self):
            super().__init__()
            self.maps = nn.MaxPool2d(4)
            self.register_buffer("place", torch.zeros(1))

        def forward(self, x):
            return self.maps(x)

    here, there = (
        dissect(Pixels(), "maps", broden, mode=mode, preprocess=preprocess, quantile=0.05, device=device)["maps"]
        for device in ("cpu", "cuda")
    )
    for name in ("thresholds", "counts", "support", "top"):
        for found, wanted in zip(tensors(getattr(there, name)), tensors(getattr(here, name)), strict=True):
            assert torch.equal(found, wanted)
    torch.testing.assert_close(there.average_precision, here.average_precision, equal_nan=True)
