"""Overlap: exactly the counts of brute force, for all maps, labels and machines."""

from __future__ import annotations

import dissection_oracle as oracle
import numpy as np
import pytest
import torch
from dissection_sets import CATEGORIES, category, image, pack
from processes import python

from torchprobe.dissection import Counts, LabelBatch, Overlap, as_maps
from torchprobe.ops import kernels
from torchprobe.ops.overlap import overlap_tally_, reference, upsample

native = pytest.mark.skipif(not kernels()["cpu"].startswith("loaded"), reason=f"no native kernel: {kernels()['cpu']}")
MODES = ("default", "netdissect", "global")


@pytest.fixture(params=["operator", "reference"])
def overlap_class(request, monkeypatch):
    """Both implementations of the counts: the one that the dispatcher selects, and the reference."""

    def through_reference(intersection, activation, truth, maps, *arguments, **options):
        widened = maps.float() if maps.is_floating_point() else maps
        reference(intersection, activation, truth, widened, *arguments, **options)

    if request.param == "reference":
        monkeypatch.setattr("torchprobe.dissection.overlap.overlap_tally_", through_reference)
    return Overlap


def thresholds_of(maps, q):
    values = np.sort(np.nan_to_num(maps.astype(np.float32)).transpose(1, 0, 2, 3).reshape(maps.shape[1], -1))
    return values[:, min(int(q * values.shape[1]), values.shape[1] - 1)]


def assert_exact(overlap_class, maps, thresholds, images, mode, given=(0, 0), annotated=(), boxes=()):
    primary = category()
    overlap = overlap_class(torch.from_numpy(thresholds), torch.from_numpy(primary), CATEGORIES, mode)
    overlap.update(torch.from_numpy(maps), pack(images, annotated, boxes or None), given)
    primary[0] = -1
    want = oracle.overlap(maps, thresholds, images, primary, CATEGORIES, mode, given, annotated, boxes)
    got = overlap.counts()
    for name, a, b in zip(Counts._fields, got, want, strict=True):
        np.testing.assert_array_equal(a.numpy(), b, err_msg=f"{name}, {mode}")
    np.testing.assert_allclose(got.iou().numpy(), oracle.iou(*want), rtol=1e-15)
    return got


MAPS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "relu": lambda rng, shape: np.maximum(rng.standard_normal(shape), 0),
    "large offset": lambda rng, shape: rng.standard_normal(shape) + 1000,
    "ties": lambda rng, shape: rng.integers(0, 3, shape),
    "plateaus": lambda rng, shape: np.repeat(rng.standard_normal(shape), 3, -1)[..., : shape[-1]],
    "constant": lambda rng, shape: np.full(shape, 0.1),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-42,
    "huge": lambda rng, shape: rng.standard_normal(shape) * 2e38,
    "nan and inf": lambda rng, shape: rng.choice([np.nan, np.inf, -np.inf, *rng.standard_normal(30)], shape),
    "one peak": lambda rng, shape: (np.arange(np.prod(shape)) % 997 == 0).reshape(shape) * 5.0,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_brute_force(overlap_class, name, mode):
    rng = np.random.default_rng(len(name))
    images = [image(rng, 32, 32, 3, 2), image(rng, 32, 32, 0, 1), image(rng, 32, 32, 2, 0), image(rng, 32, 32, 1, 3)]
    maps = MAPS[name](rng, (4, 9, 8, 8)).astype(np.float32)
    for q in (0.5, 0.95):
        assert_exact(overlap_class, maps, thresholds_of(maps, q), images, mode, (64, 64))
        assert_exact(overlap_class, maps, thresholds_of(maps, q), images, mode, (64, 64), [(2, 0), (1,), (), (0, 1, 2, 2)])


GRIDS = [(7, 7, 112, 112), (13, 13, 113, 113), (1, 1, 9, 9), (1, 6, 5, 40), (6, 1, 40, 5), (14, 9, 17, 31), (17, 40, 5, 23), (20, 20, 8, 8),
         (3, 33, 12, 70), (5, 5, 1, 1), (16, 17, 16, 17), (2, 3, 100, 16)]  # fmt: skip


@pytest.mark.parametrize(("h", "w", "rows", "columns"), GRIDS)
def test_brute_force_on_every_grid(overlap_class, h, w, rows, columns):
    rng = np.random.default_rng(h * w)
    maps = rng.standard_normal((2, 5, h, w)).astype(np.float32)
    images = [image(rng, rows, columns, 2, 1), image(rng, columns, rows, 1, 1)]
    assert_exact(overlap_class, maps, thresholds_of(maps, 0.8), images, "default")


@pytest.mark.parametrize(("n", "given", "size"), [(7, 224, 112), (13, 227, 113), (6, 227, 113), (12, 384, 192), (5, 64, 64), (1, 64, 32)])
def test_brute_force_on_the_grid_of_the_original(overlap_class, n, given, size):
    rng = np.random.default_rng(n)
    maps = rng.standard_normal((1, 4, n, n)).astype(np.float32)
    assert_exact(overlap_class, maps, thresholds_of(maps, 0.9), [image(rng, size, size, 2, 1)], "netdissect", (given, given))


# -- maps that lie in a box on the label grid -----------------------------------------------------------------------------------


def random_box(rng, rows, columns):
    """Of many kinds: inside, beyond an edge, all around, within one pixel, far away, exactly the grid, aligned with pixels, in quarters."""
    kind, grid = rng.integers(0, 9), np.array([rows, columns], float)
    low, high = np.sort(rng.uniform(-1.5, 2.5, (2, 2)) * grid, 0)
    if kind == 0:
        low, high = np.sort(rng.uniform(0, 1, (2, 2)) * grid, 0)
    elif kind == 1:
        low, high = -rng.uniform(0, 3, 2) * grid, (1 + rng.uniform(0, 3, 2)) * grid
    elif kind == 2:
        low = rng.uniform(0, 1, 2) * grid
        high = low + rng.uniform(1e-9, 1, 2)
    elif kind == 3:
        low = rng.uniform(-1, 1, 2) * 2**23
        high = low + rng.uniform(1, 2**20, 2)
    elif kind == 4:
        low, high = np.zeros(2), grid
        if rng.integers(0, 2):
            high = high + rng.choice([0, 1e-12, -1e-12], 2)
    elif kind == 5:
        low, high = np.floor(low), np.floor(high) + 1
    elif kind == 6:
        low, high = np.floor(low * 4) / 4, np.floor(high * 4) / 4 + 0.25
    elif kind == 7:
        low, high = np.array([-0.0, 0.0]), np.array([rows, columns * rng.uniform(0.5, 2)])
    high = np.maximum(high, np.nextafter(low, np.inf))
    return [float(low[0]), float(low[1]), float(high[0]), float(high[1])]


@pytest.mark.parametrize("mode", ["default", "global"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_brute_force_in_boxes(overlap_class, name, mode):
    rng = np.random.default_rng(len(name))
    for _ in range(4):
        h, w = (int(n) for n in rng.choice([1, 2, 3, 7, 14, 33], 2))
        grids = [tuple(int(n) for n in rng.integers(1, 36, 2)) for _ in range(3)]
        images = [image(rng, rows, columns, int(rng.integers(0, 3)), int(rng.integers(0, 2))) for rows, columns in grids for _ in range(2)]
        boxes = [random_box(rng, *grid) for _, _, grid in images]
        boxes[1] = boxes[0]  # same grid, same box
        maps = MAPS[name](rng, (len(images), 5, h, w)).astype(np.float32)
        for q in (0.5, 0.9):
            assert_exact(overlap_class, maps, thresholds_of(maps, q), images, mode, boxes=boxes)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.0, 2.0**126, 3e38])
def test_nothing_exceeds_the_largest_value_of_its_map_in_a_box(scale):
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for _ in range(30):
        maps = ((torch.rand(20, 5, 6, generator=generator) - 0.25) * scale).float()
        up = upsample(maps, 21, 40, box=random_box(rng, 21, 40))
        assert (up.amax((1, 2)) <= maps.amax((1, 2))).all()


def test_close_to_a_box_in_float64():
    """The definition, against interpolation in float64 at the exact place."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        rows, columns = (int(n) for n in rng.integers(2, 30, 2))
        values = rng.standard_normal((5, 7)).astype(np.float32)
        low = rng.uniform(-10, 10, 2)
        box = (low[0], low[1], low[0] + rng.uniform(0.5, 40), low[1] + rng.uniform(0.5, 40))
        up = upsample(torch.from_numpy(values), rows, columns, box=box).numpy()
        for y in range(rows):
            for x in range(columns):
                v, u = (y + 0.5 - box[0]) / (box[2] - box[0]) * 5 - 0.5, (x + 0.5 - box[1]) / (box[3] - box[1]) * 7 - 0.5
                assert up[y, x] == pytest.approx(oracle.bilinear(values.astype(float), v, u), abs=2e-5)


@pytest.mark.parametrize("bad", [(np.nan, 0, 1, 1), (0, 0, np.inf, 1), (0, 1, 4, 1), (2, 0, 1, 4), (0, -np.inf, 4, 4), (0, 0, 4, 2**25)])
def test_impossible_boxes(overlap_class, bad):
    overlap = overlap_class(torch.zeros(2), torch.tensor([-1, 0]), 1)
    labels = LabelBatch.pack([[("c", torch.ones(4, 4))]] * 2, [(4, 4)] * 2, boxes=[(0, 0, 4, 4), bad])
    with pytest.raises(ValueError, match=r"boxes\[1\] = .* must be top < bottom and left < right"):
        overlap.update(torch.ones(2, 2, 3, 3), labels)
    assert not overlap.activation.any() and not overlap.truth.any()


@native
@pytest.mark.parametrize(("isa", "name"), [("avx512", "AVX-512"), ("avx2", "AVX2"), ("baseline", "baseline")])
def test_every_instruction_set(isa, name):
    script = "import sys, pytest; from torchprobe.ops import kernels; print(kernels()['cpu']); sys.exit(pytest.main(sys.argv[1:]))"
    chosen = "brute_force and operator and not netdissect and not global"
    done = python(script, "-q", "-p", "no:cacheprovider", __file__, "-k", chosen, TORCHPROBE_ISA=isa)
    if name not in done.stdout.partition("\n")[0]:
        pytest.skip(f"this processor has no {name}: {done.stdout.partition(chr(10))[0]}")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_a_plateau_never_exceeds_itself(overlap_class):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2000, generator=generator) * torch.logspace(-20, 20, 2000)
    maps = value[None, :, None, None].expand(1, -1, 7, 7)
    overlap = overlap_class(value, torch.tensor([-1, 0]), 1)
    overlap.update(maps, LabelBatch.pack([[("c", torch.ones(50, 31))]], [(50, 31)]))
    assert overlap.activation.sum() == 0
    below = overlap_class(torch.nextafter(value, torch.tensor(-torch.inf)), torch.tensor([-1, 0]), 1)
    below.update(maps, LabelBatch.pack([[("c", torch.ones(50, 31))]], [(50, 31)]))
    assert (below.intersection[:, 1] == 50 * 31).all()


def test_nothing_exceeds_the_largest_value_of_its_map():
    for scale in (1e-40, 1e-3, 1.0, 1e30):
        maps = (torch.randn(300, 5, 6) * scale + torch.randn(300, 1, 1) * 1000 * scale).float()
        up = upsample(maps, 67, 131)
        assert (up.amax((1, 2)) <= maps.amax((1, 2))).all() and (up.amin((1, 2)) >= maps.amin((1, 2)) - maps.abs().amax() * 2e-7).all()


def test_close_to_upsampling_in_float64():
    maps = torch.relu(torch.randn(1, 200, 7, 7))
    thresholds = maps.flatten(2)[0].quantile(0.95, 1)
    exact = (
        torch.nn.functional.interpolate(maps.double(), (112, 112), mode="bilinear", align_corners=False)[0]
        > thresholds[:, None, None].double()
    )
    ours = upsample(maps, 112, 112)[0] > thresholds[:, None, None]
    assert (exact != ours).sum() < 1e-4 * exact.sum()


def test_the_grid_of_the_original_is_its_spline():
    interpolate = pytest.importorskip("scipy.interpolate")
    maps = torch.randn(3, 7, 7)
    centers = np.arange(7) * 16 + 8
    for map_, ours in zip(maps, upsample(maps, 112, 112, "anchored", 224, 224), strict=True):
        spline = interpolate.RectBivariateSpline(centers, centers, map_.numpy().astype(np.float64), kx=1, ky=1)
        np.testing.assert_allclose(ours.numpy(), spline(np.arange(112), np.arange(112)), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_widened_and_strides_do_not_matter(overlap_class, dtype):
    rng = np.random.default_rng(0)
    images = [image(rng, 20, 24, 2, 1), image(rng, 11, 13, 1, 0)]
    tokens = torch.randn(2, 1 + 12, 6).to(dtype)
    maps = as_maps(tokens, (3, 4))
    want = assert_exact(overlap_class, maps.float().contiguous().numpy(), thresholds := np.full(6, 0.7, np.float32), images, "default")
    for view in (maps, maps.contiguous(memory_format=torch.channels_last), torch.stack([maps, maps], -1)[..., 1]):
        overlap = overlap_class(torch.from_numpy(thresholds), torch.from_numpy(category()), CATEGORIES)
        overlap.update(view, pack(images))
        assert all(torch.equal(a, b) for a, b in zip(overlap.counts(), want, strict=True))


def test_what_is_given_twice_counts_twice_in_the_original():
    """A label in two planes at one pixel, a whole-image label that a plane has too, one listed twice: counted once, or each time."""
    plane = torch.tensor([[1, 1, 0, 0]], dtype=torch.int32)
    labels = LabelBatch.pack([[("object", plane), ("part", plane), ("scene", [1, 2, 2, 0])]], [(1, 4)])
    maps = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    once = Overlap(torch.tensor([0.5]), torch.tensor([-1, 0, 1]), 2)
    once.update(maps, labels)
    assert once.truth.tolist() == [0, 4, 4] and once.intersection.tolist() == [[0, 2, 2]] and once.activation.tolist() == [[2, 2, 2]]
    often = Overlap(torch.tensor([0.5]), torch.tensor([-1, 0, 1]), 2, "netdissect")
    often.update(maps, labels, (4, 4))
    assert often.truth.tolist() == [0, 8, 8] and often.intersection.tolist() == [[0, 6, 4]] and often.activation.tolist() == [[2, 2, 2]]


def test_activation_counts_in_images_of_the_category():
    first = [("object", torch.tensor([[1, 0]], dtype=torch.int32))]
    labels = LabelBatch.pack([first, [("scene", [2])], [("scene", [0])]], [(1, 2)] * 3)
    maps = torch.ones(3, 1, 1, 1)
    counts = {}
    for mode in ("default", "global"):
        overlap = Overlap(torch.tensor([0.0]), torch.tensor([1, 0, 1, -1]), 2, mode)
        overlap.update(maps, labels)
        counts[mode] = overlap.counts().activation.tolist()
    assert counts == {"default": [[0, 2, 2, 0]], "global": [[6, 6, 6, 6]]}


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_is_an_annotation(overlap_class, mode):
    """Four images of two pixels, all active: a mask with the label, an empty one, none, and one with a label that another category owns."""
    full, empty, foreign = (torch.tensor([[n, 0]], dtype=torch.int32) for n in (1, 0, 2))
    images = [[("lesion", full)], [("lesion", empty), ("lesion", empty)], [("organ", full * 2)], [("lesion", foreign)]]
    labels = LabelBatch.pack(images, [(1, 2)] * 4, ["lesion", "organ"], only_empty=mode == "netdissect")
    overlap = overlap_class(torch.tensor([0.0]), torch.tensor([-1, 0, 1]), 2, mode)
    overlap.update(torch.ones(4, 1, 1, 1), labels, (2, 2))
    counts = overlap.counts()
    # The original looks at the labels alone, so that in the last image it takes lesions for not annotated.
    lesion, organ = {"default": (6, 4), "netdissect": (4, 4), "global": (8, 8)}[mode]
    assert counts.activation.tolist() == [[8 if mode == "global" else 0, lesion, organ]]
    assert counts.intersection.tolist() == [[0, 1, 2]] and counts.truth.tolist() == [0, 1, 2]
    assert counts.iou()[0, 1] == 1 / lesion


def test_packing_notes_what_is_annotated():
    empty, whole = torch.zeros(1, 2), [0, 3]
    pack_one = lambda labels, **options: LabelBatch.pack([labels], [(1, 2)], ["a", "b", "c"], **options)  # noqa: E731
    assert pack_one([("b", empty), ("c", whole)]).whole.tolist() == [0, 3, -2, -3]
    assert pack_one([("b", empty), ("c", whole)]).sizes.tolist() == [[1, 1, 2, 4]]
    assert pack_one([("b", empty), ("c", whole)], only_empty=True).whole.tolist() == [0, 3, -2]
    assert pack_one([("b", empty), ("b", [3])], only_empty=True).whole.tolist() == [3]
    assert pack_one([("c", [0]), ("b", []), ("other", empty)]).whole.tolist() == [0]  # 0 for the whole image: unlabeled


@pytest.mark.parametrize("run", ["native", "reference"])
def test_counts_at_the_end_of_int64_go_on_at_its_other_end(run):
    """As those of PyTorch do, in every part: an overflow is undefined in C++."""
    end = 2**63 - 1
    intersection, activation, truth = (torch.full(shape, end) for shape in ((1, 2), (1, 2), (2,)))
    tally = overlap_tally_ if run == "native" else reference
    planes, sizes = torch.ones(4, dtype=torch.int32), torch.tensor([[1, 2, 2, 0]])
    tally(intersection, activation, truth, torch.ones(1, 1, 1, 1), torch.zeros(1), torch.tensor([-1, 0]), planes, sizes, truth.new_empty(0))
    assert intersection.tolist() == [[end, end + 4 - 2**64]] and activation.tolist() == [[end + 4 - 2**64] * 2]
    assert truth.tolist() == [end, end + 4 - 2**64]


@pytest.mark.parametrize(("part", "value"), [("truth", -1), ("activation", 2**53 + 1), ("intersection", 5)])
def test_impossible_counts_are_not_loaded(part, value):
    overlap = Overlap(torch.tensor([0.5]), torch.from_numpy(category()), CATEGORIES)
    state = overlap.state_dict()
    state["truth"][1] = 4
    overlap.load_state_dict(state)
    state[part].view(-1)[1] = value
    with pytest.raises(ValueError, match=f"{part} of the saved counts holds"):
        overlap.load_state_dict(state)
    assert overlap.truth[1] == 4 and not overlap.intersection.any()
