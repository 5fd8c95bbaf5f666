"""The statistic of overlap and its operator: merging, resuming, refusing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dissection_sets import CATEGORIES, category, image, pack

from torchprobe.dissection import LabelBatch, Overlap, as_maps
from torchprobe.ops import kernels, overlap_tally_
from torchprobe.ops.overlap import SCHEMA, reference

native = pytest.mark.skipif(not kernels()["cpu"].startswith("loaded"), reason=f"no native kernel: {kernels()['cpu']}")


def batch(n=6):
    rng = np.random.default_rng(1)
    images = [
        image(rng, int(rng.integers(5, 40)), int(rng.integers(5, 40)), int(rng.integers(0, 3)), int(rng.integers(0, 3))) for _ in range(n)
    ]
    return torch.randn(n, 40, 5, 4), images


def make(thresholds=None, mode="default"):
    return Overlap(torch.full((40,), 0.9) if thresholds is None else thresholds, torch.from_numpy(category()), CATEGORIES, mode)


def test_any_partition_and_any_merge_order():
    maps, images = batch()
    whole = make()
    whole.update(maps, pack(images))
    parts = [make() for _ in range(3)]
    for n in (3, 0, 5, 1, 4, 2):
        parts[n % 3].update(maps[n : n + 1], pack(images[n : n + 1]))
    merged = parts[2].merge(parts[0]).merge(parts[1])
    assert merged.images == 6 and all(torch.equal(a, b) for a, b in zip(merged.counts(), whole.counts(), strict=True))
    merged.reset()
    assert merged.images == 0 and not merged.counts().intersection.any() and not merged.truth.any()


def test_the_same_for_any_number_of_threads():
    maps, images = batch()
    threads = torch.get_num_threads()
    states = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            overlap = make()
            overlap.update(maps.repeat(1, 1, 1, 1), pack(images))
            states.append(overlap.counts())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in states[1:] for a, b in zip(states[0], other, strict=True))


def test_resume_from_a_state_dict():
    maps, images = batch()
    a, b = make(), make()
    a.update(maps[:2], pack(images[:2]))
    b.load_state_dict(a.state_dict())
    for overlap in (a, b):
        overlap.update(maps[2:], pack(images[2:]))
    assert b.images == 6 and all(torch.equal(x, y) for x, y in zip(a.counts(), b.counts(), strict=True))


def test_what_was_counted_otherwise_is_not_added():
    with pytest.raises(ValueError, match=r"mode='netdissect', but this object has mode='default'"):
        make().merge(make(mode="netdissect"))
    with pytest.raises(ValueError, match=r"other thresholds: of shape \(40,\)"):
        make().merge(make(torch.zeros(40)))
    with pytest.raises(ValueError, match=r"other thresholds: of shape \(7,\), here \(40,\)"):
        make().load_state_dict(make(torch.zeros(7)).state_dict())
    with pytest.raises(ValueError, match=r"lack images, truth"):
        make().load_state_dict({k: v for k, v in make().state_dict().items() if k not in ("truth", "images")})
    with pytest.raises(TypeError, match=r"cannot merge Overlap with int"):
        make().merge(3)
    nan = torch.full((40,), torch.nan)
    make(nan).merge(make(nan))


def test_empty_batches_and_empty_layers():
    overlap = Overlap(torch.zeros(4), torch.tensor([-1, 0]), 1)
    overlap.update(torch.zeros(0, 4, 7, 7), LabelBatch.pack([], []))
    assert overlap.images == 0 and not overlap.truth.any()
    none = Overlap(torch.zeros(0), torch.tensor([-1, 0]), 1)
    none.update(torch.zeros(1, 0, 7, 7), LabelBatch.pack([[("c", torch.ones(3, 3))]], [(3, 3)]))
    assert none.truth.tolist() == [0, 9] and none.counts().iou().shape == (0, 2)


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_words():
    plane = torch.ones(1, 4, 4, dtype=torch.int32)
    labels = LabelBatch.pack([[("c", plane)], [("c", plane)]], [(4, 4)] * 2)
    overlap = Overlap(torch.zeros(3), torch.tensor([-1, 0, 0]), 1)
    maps = torch.ones(2, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"sizes must be torch.int64 of shape \(1, 4\) for 1 maps of 3 units.*got torch.int64 of shape \(2, 4\)"
    ):
        overlap.update(maps[:1], labels)
    with pytest.raises(ValueError, match=r"\(4, 2\).*|intersection must be torch.int64 of shape \(4, 3\)"):
        overlap.update(torch.ones(2, 4, 2, 2), labels)
    with pytest.raises(ValueError, match=r"no positions"):
        overlap.update(torch.ones(2, 3, 0, 2), labels)
    with pytest.raises(
        ValueError, match=r"maps must be floating point of shape \(images, units, h, w\), got torch.float32 of shape \(2, 3\)"
    ):
        overlap.update(torch.ones(2, 3), labels)
    with pytest.raises(ValueError, match=r"maps must be floating point.*int64"):
        overlap.update(maps.long(), labels)
    for bad, number in ((-1, "-1"), (3, "3"), (2**31 - 1, "2147483647")):
        wrong = labels._replace(planes=torch.cat([plane.flatten(), plane.flatten().index_fill(0, torch.tensor([7]), bad)]))
        with pytest.raises(ValueError, match=rf"image 1 of the batch has label {number}, but labels are numbered 0 to 2"):
            overlap.update(maps, wrong)
    wrong = LabelBatch.pack([[("c", plane), ("s", [1])], [("c", plane), ("s", [9])]], [(4, 4)] * 2)
    with pytest.raises(ValueError, match=r"image 1 of the batch has label 9"):
        overlap.update(maps, wrong)
    for bad in (-2, -(2**40)):
        noted = LabelBatch.pack([[("c", plane), ("s", [-1])], [("c", plane), ("s", [1, bad])]], [(4, 4)] * 2)
        with pytest.raises(ValueError, match=rf"image 1 of the batch has label {bad}, but.* 0 to 2; whole may also hold −1 to −1"):
            overlap.update(maps, noted)
    with pytest.raises(ValueError, match=r"planes has 31 elements, but sizes require 32"):
        overlap.update(maps, labels._replace(planes=labels.planes[1:]))
    with pytest.raises(ValueError, match=r"sizes\[1\] = \[1, 0, 4, 0\]: a grid has between 1 and 1048576 rows"):
        overlap.update(maps, labels._replace(sizes=torch.tensor([[1, 4, 4, 0], [1, 0, 4, 0]])))
    with pytest.raises(ValueError, match=r"sizes\[1\].*at most 268435456 pixels"):
        Overlap(torch.zeros(3), torch.tensor([-1, 0, 0]), 1).update(
            maps, labels._replace(sizes=torch.tensor([[2, 4, 4, 0], [0, 2**17, 2**17, 0]]))
        )
    with pytest.raises(ValueError, match=r"sizes\[0\]"):
        overlap.update(maps, labels._replace(sizes=torch.tensor([[2**40, 4, 2**40, 0], [1, 4, 4, 0]])))
    assert overlap.images == 0 and not overlap.truth.any() and not overlap.activation.any()  # nothing was counted


def test_the_grid_of_the_original_asks_for_the_input():
    overlap = Overlap(torch.zeros(1), torch.tensor([-1, 0]), 1, "netdissect")
    labels = LabelBatch.pack([[("c", torch.ones(112, 112))]], [(112, 112)])
    with pytest.raises(ValueError, match=r"needs input_size"):
        overlap.update(torch.zeros(1, 1, 7, 7), labels)
    with pytest.raises(ValueError, match=r"coarser than the label grid: 200 points for 112 pixels"):
        overlap.update(torch.zeros(1, 1, 200, 200), labels, (224, 224))
    with pytest.raises(ValueError, match=r"7 × 3 is less than the 7 × 7 of the maps"):
        overlap.update(torch.zeros(1, 1, 7, 7), labels, (7, 3))
    assert not overlap.truth.any()


def test_bad_arguments_of_the_statistic():
    with pytest.raises(ValueError, match=r"mode must be one of default, netdissect, global, got 'paper'"):
        Overlap(torch.zeros(1), torch.tensor([0]), 1, "paper")
    with pytest.raises(ValueError, match=r"category holds 2, but there are 2 categories"):
        Overlap(torch.zeros(1), torch.tensor([-1, 2]), 2)
    with pytest.raises(ValueError, match=r"thresholds must be \(units,\)"):
        Overlap(torch.zeros(1, 1), torch.tensor([-1, 0]), 2)
    with pytest.raises(ValueError, match=r"image 1: object has planes of shape \(3, 4\) on a grid of 4 × 4"):
        LabelBatch.pack([[], [("object", torch.zeros(3, 4))]], [(4, 4)] * 2)
    with pytest.raises(ValueError, match=r"1 images, but 2 grids"):
        LabelBatch.pack([[]], [(4, 4)] * 2)


def test_pooled_vectors_are_sent_to_average_precision():
    with pytest.raises(ValueError, match=r"no positions.*average precision"):
        as_maps(torch.zeros(8, 512))
    with pytest.raises(ValueError, match=r"52 tokens are not a square and a class token: give the grid"):
        as_maps(torch.zeros(8, 52, 64))
    with pytest.raises(ValueError, match=r"48 tokens are not 7 × 7 patches"):
        as_maps(torch.zeros(8, 48, 64), (7, 7))
    tokens = torch.randn(2, 5 + 12, 6)
    assert torch.equal(as_maps(tokens, (3, 4))[1, 2], tokens[1, 5:, 2].view(3, 4))  # class token and registers left out
    assert as_maps(torch.zeros(2, 7, 7, 9), feature_dim=-1).shape == (2, 9, 7, 7)


# -- the operator ----------------------------------------------------------------------------------------------------------


def arguments():
    labels = LabelBatch.pack([[("c", torch.ones(5, 6)), ("s", [2])]], [(5, 6)])
    counts = [torch.zeros(shape, dtype=torch.int64) for shape in ((4, 3), (4, 2), (3,))]
    return (*counts, torch.randn(1, 4, 2, 2), torch.zeros(4), torch.tensor([-1, 0, 0]), *labels[:3])


def test_schema():
    schema = torch.ops.torchprobe.overlap_tally_.default._schema
    assert schema == torch._C.parse_schema(f"torchprobe::{SCHEMA}")
    assert [a.name for a in schema.arguments if a.alias_info] == ["intersection", "activation", "truth"] and not schema.returns


def test_opcheck():
    torch.library.opcheck(torch.ops.torchprobe.overlap_tally_.default, arguments())
    torch.library.opcheck(torch.ops.torchprobe.overlap_tally_.default, (*arguments(), "anchored", 8, 8, True))
    boxes = torch.tensor([[-1.0, 0.5, 4.0, 6.0]], dtype=torch.float64)
    torch.library.opcheck(torch.ops.torchprobe.overlap_tally_.default, (*arguments(), "half_pixel", 0, 0, False, boxes))


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read the memory high-water mark")
def test_no_map_of_pixels_is_made():
    def high_water() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    planes = LabelBatch.pack([[("c", torch.randint(0, 9, (224, 224)))]] * 4, [(224, 224)] * 4)
    overlap = Overlap(torch.full((1024,), -9.0), torch.zeros(9, dtype=torch.int64), 1)
    maps = torch.randn(4, 1024, 7, 7)
    overlap.update(maps[:, :, :2, :2].contiguous(), planes)  # workspaces are made
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    overlap.update(maps, planes)  # every unit active: 800 MB, were they interpolated at once
    assert high_water() - before < 16 << 10


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    maps, images = batch()
    cpu, gpu = make(), make(torch.full((40,), 0.9, device="cuda"))
    cpu.update(maps, pack(images))
    gpu.update(maps.cuda(), pack(images))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu.counts(), gpu.counts(), strict=True))


def test_direct_call_takes_any_float_type():
    counts = arguments()
    overlap_tally_(*counts[:3], counts[3].double(), counts[4].double(), *counts[5:])
    again = arguments()[:3]
    reference(*again, *counts[3:])
    assert all(torch.equal(a, b) for a, b in zip(counts[:3], again, strict=True))
