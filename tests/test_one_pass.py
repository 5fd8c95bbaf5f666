"""One pass through the network: the same result as with two, whatever fits the disk, and whenever a run is stopped."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import dissection_oracle as oracle
import numpy as np
import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, batches_in, preprocess
from torch import Tensor, nn
from torchvision.transforms import v2

from torchprobe.common import storage
from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.datasets.geometry import Box, GeometryError
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.framing import frame
from torchprobe.dissection.spool import Spool, worthwhile


class Counting(Net):
    """Counts the batches that pass the network."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x) > 1
        return super().forward(x)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=40, seed=0).root


def run(root: Path, model: nn.Module | None = None, **options: object) -> dict[str, Dissection]:
    chosen = {"preprocess": preprocess, "batch_size": 4, "quantile": 0.02, **options}
    return dissect(model or Net(), ["conv", "norm"], Broden(root), **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{}, {"score": "iou"}, {"score": "iou", "top": 0}, {"mode": "netdissect"}, {"mode": "global"}, {"quantile": 0.5}]
)
def test_the_same_as_two_passes(root: Path, options: dict[str, object]) -> None:
    once, twice = Counting(), Counting()
    found = run(root, once, **options)
    assert found == run(root, twice, disk=0.0, **options)
    batches = -(-len(Broden(root)) // 4)
    assert (once.calls, twice.calls) == (batches, 2 * batches)


def test_estimated_thresholds_fall_back_to_a_second_pass_where_a_map_may_be_missing(root: Path) -> None:
    for memory in (20_000, 40_000, 10**6):
        assert run(root, memory=memory) == run(root, memory=memory, disk=0.0)


def test_given_thresholds(root: Path) -> None:
    levels = {layer: d.thresholds for layer, d in run(root).items()}
    model = Counting()
    found = run(root, model, thresholds=levels)
    assert found == run(root, Counting(), thresholds=levels, disk=0.0)
    assert model.calls == -(-len(Broden(root)) // 4)
    assert all(torch.equal(d.counts.intersection, run(root)[layer].counts.intersection) for layer, d in found.items())


@pytest.mark.parametrize("budget", [1e-6, 2e-5, 1e-4])
def test_a_disk_that_is_too_small(root: Path, budget: float, tmp_path: Path) -> None:
    assert run(root, disk=budget, checkpoint=tmp_path, checkpoint_every=0.0) == run(root)


def test_a_disk_that_fills_up(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, kind: str, *parts: object) -> None:
        if Path(path).name.startswith("maps-1-3-"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, kind, *parts)  # type: ignore[arg-type]

    write = storage.write
    monkeypatch.setattr(storage, "write", full)
    model = Counting()
    assert run(root, model, checkpoint=tmp_path, checkpoint_every=0.0) == run(root, Counting())
    assert model.calls == 2 * -(-len(Broden(root)) // 4)  # that layer passed a second time
    assert not list(tmp_path.glob("maps-1-*"))


@pytest.mark.parametrize("stop_at", [0, 1, 5, 9, 10, 11, 15, 17])
@pytest.mark.parametrize("lost", [False, True])
def test_stopped_at_any_batch(root: Path, tmp_path: Path, stop_at: int, lost: bool) -> None:
    whole, told = run(root), []
    options = {"checkpoint": tmp_path / "c", "progress": told.append}
    with pytest.raises(KeyboardInterrupt):
        run(root, stop=lambda: batches_in(told) == stop_at, checkpoint_every=0.0 if stop_at % 2 else 60.0, **options)
    if lost:  # the maps were on a disk that is gone
        for path in (tmp_path / "c").glob("maps-*"):
            path.unlink()
    assert run(root, resume=True, **options) == whole
    assert run(root, resume=True, **options) == whole  # all is done


def test_another_preprocessing_is_not_resumed(root: Path, tmp_path: Path) -> None:
    def scaled(by: float) -> object:
        return lambda image: preprocess(image) * by

    told: list[object] = []
    with pytest.raises(KeyboardInterrupt):
        run(root, preprocess=scaled(1.0), checkpoint=tmp_path / "c", progress=told.append, stop=lambda: len(told) == 3)
    with pytest.raises(ValueError, match="made with another preprocessing: [a-z]+: [^{]*, now it is [^{]*$"):
        run(root, preprocess=scaled(2.0), checkpoint=tmp_path / "c", resume=True)
    assert run(root, preprocess=scaled(1.0), checkpoint=tmp_path / "c", resume=True) == run(root, preprocess=scaled(1.0))


# -- where the network looked ----------------------------------------------------------------------------------------------


class Red(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x[:, :1])


def planted(folder: Path, size: tuple[int, int], count: int = 24, seed: int = 0) -> Broden:
    """Pictures with a red square each, which is labeled."""
    rng, (h, w) = np.random.default_rng(seed), size
    with BrodenWriter(folder, {"object": ["red"]}, size=None, image_format="png") as writer:
        for i in range(count):
            pixels, mask = np.zeros((h, w, 3), np.uint8), np.zeros(size, int)
            side = h // 4
            y, x = rng.integers(0, h - side), rng.integers(0, w - side)
            pixels[y : y + side, x : x + side, 0], mask[y : y + side, x : x + side] = 255, 1
            writer.add(f"a/{i}", pixels, {"object": mask})
    return Broden(folder)


VIEWS = {
    "whole": [v2.Resize((128, 128))],
    "crop": [v2.Resize(160), v2.CenterCrop(128)],
    "odd crop": [v2.Resize(131), v2.CenterCrop((104, 72))],
    "border": [v2.Resize(120, max_size=128), v2.CenterCrop(128)],
    "no resize": [v2.CenterCrop(96)],
}


@pytest.mark.parametrize("size", [(128, 256), (192, 128), (150, 150)])
@pytest.mark.parametrize("name", VIEWS)
def test_planted_squares_are_found_whatever_the_network_is_shown(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    view = v2.Compose([*VIEWS[name], v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    broden = planted(tmp_path, size)
    found = dissect(Red(), "pool", broden, score="iou", preprocess=view, thresholds={"pool": torch.tensor([0.5])})["pool"]
    assert float(found.iou[0, 0]) > 0.68, found.counts
    assert found.counts is not None and found.outside is not None
    labels = sum(int((dict(broden.image_labels(row))["object"] > 0).sum()) for row in range(len(broden)))
    assert int(found.counts.truth[0] + found.outside[0]) == labels
    cut = (name not in ("whole", "border") and "crop" in name) or (name == "no resize")
    assert (int(found.outside[0]) > 0) == cut


def test_counts_in_a_box_are_those_of_the_definition(tmp_path: Path) -> None:
    """In float64 by hand: each label pixel whose center is in the crop looks up the map at its own place."""
    broden = planted(tmp_path, (120, 200), count=6)
    view = v2.Compose([v2.Resize(96), v2.CenterCrop(64), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    found = dissect(Red(), "pool", broden, score="iou", preprocess=view, thresholds={"pool": torch.tensor([0.4123])})["pool"]
    box = Box((96 - 64) / 2 / 96, (160 - 64) / 2 / 160, (96 + 64) / 2 / 96, (160 + 64) / 2 / 160)
    intersection = activation = truth = 0
    for row in range(len(broden)):
        values = Red()(view(broden.image(row))[None])[0, 0].double().numpy()
        plane = dict(broden.image_labels(row))["object"][0].numpy()
        for y in range(plane.shape[0]):
            for x in range(plane.shape[1]):
                v, u = (
                    ((y + 0.5) / plane.shape[0] - box.top) / (box.bottom - box.top),
                    ((x + 0.5) / plane.shape[1] - box.left) / (box.right - box.left),
                )
                if not (0 <= v < 1 and 0 <= u < 1):
                    continue
                active = oracle.bilinear(values, v * values.shape[0] - 0.5, u * values.shape[1] - 0.5) > 0.4123
                labeled = plane[y, x] > 0
                intersection, activation, truth = intersection + (active and labeled), activation + active, truth + labeled
    assert found.counts is not None
    got = [int(part.flatten()[0]) for part in (found.counts.intersection, found.counts.activation, found.counts.truth)]
    assert got[2] == truth and abs(got[0] - intersection) <= 2 and abs(got[1] - activation) <= 2  # float32 may differ at the threshold


def test_a_concept_that_is_cropped_away_is_not_shown(tmp_path: Path) -> None:
    with BrodenWriter(tmp_path, {"object": ["left", "middle"]}, size=None, image_format="png") as writer:
        for i in range(8):
            mask = np.zeros((64, 128), int)
            mask[:, :8] = 1 if i % 2 else 0
            mask[20:40, 60:70] = 2
            writer.add(f"a/{i}", np.full((64, 128, 3), 10 * i, np.uint8), {"object": mask})
    view = v2.Compose([v2.CenterCrop(64), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    found = dissect(Red(), "pool", Broden(tmp_path), preprocess=view, thresholds={"pool": torch.tensor([0.1])})["pool"]
    names = [label.name for label in found.labels]
    assert found.support is not None and found.outside is not None
    assert found.support.positives[names.index("left")] == 0 and found.support.positives[names.index("middle")] == 8
    assert int(found.outside[names.index("left")]) == 4 * 32 * 4 and int(found.outside[names.index("middle")]) == 0


def test_the_mode_of_the_original_needs_the_whole_picture(tmp_path: Path) -> None:
    view = v2.Compose([v2.Resize(160), v2.CenterCrop(128), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    with pytest.raises(ValueError, match="counts on the grid of the whole picture"):
        dissect(Red(), "pool", planted(tmp_path, (150, 150)), mode="netdissect", preprocess=view)


@pytest.mark.parametrize("seed", range(20))
def test_frames_of_random_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = (int(n) for n in rng.integers(1, 30, 2))
    (top, bottom), (left, right) = (np.sort(rng.uniform(-0.4, 1.4, 2)) for _ in range(2))
    planes = rng.integers(0, 5, (3, rows, columns))
    framed = frame(
        [("a", torch.from_numpy(planes[:2])), ("b", torch.from_numpy(planes[2:])), ("c", torch.tensor([7]))],
        rows,
        columns,
        Box(top, left, bottom, right),
    )
    inside = np.zeros((rows, columns), bool)
    for y in range(rows):
        for x in range(columns):
            inside[y, x] = top <= (y + 0.5) / rows < bottom and left <= (x + 0.5) / columns < right
    if inside.any():
        ys, xs = np.nonzero(inside)
        assert (framed.rows, framed.columns) == (np.ptp(ys) + 1, np.ptp(xs) + 1)
        np.testing.assert_array_equal(framed.labels[0][1], planes[:2, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
        assert framed.box == pytest.approx(
            (top * rows - ys.min(), left * columns - xs.min(), bottom * rows - ys.min(), right * columns - xs.min())
        )
        lost = {label: int(((planes == label).any(0) & ~inside).sum()) for label in range(1, 5)}
        assert dict(framed.outside.tolist()) == {label: count for label, count in lost.items() if count}
    else:
        assert framed.rows >= 1 and framed.columns >= 1
    assert framed.labels[2][1].tolist() == [7]


# -- maps on the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10**9, 6000])
@pytest.mark.parametrize("place", [True, False])
def test_every_map_above_its_threshold_comes_back(tmp_path: Path, budget: int, place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchprobe.dissection.spool._BUFFER", 5000)
    generator = torch.Generator().manual_seed(0)
    spool, batches = Spool("0", tmp_path if place else None, budget), []
    final = torch.tensor([1.5, -torch.inf, torch.inf, torch.nan, 3.0])
    for number in range(30):
        maps = torch.randn(4, 5, 3, 3, generator=generator)
        maps[0, 1, 0, 0], maps[1, 4, 2, 2], maps[2, 0, 1, 1] = torch.nan, torch.inf, 2.0**127
        batches.append(maps)
        spool.put(number, maps, torch.minimum(final.where(~final.isnan(), -torch.inf), torch.tensor(number / 10 - 1.0)))
    if budget > 10**6:
        assert spool.holds(range(30)) and spool.serves(final)
        for number in (0, 17, 29, 3):
            found, maps = spool.get(number, final), batches[number]
            above = maps > final[:, None, None]
            assert torch.equal(found > final[:, None, None], above)
            assert torch.equal(found[above], maps[above])
        assert not spool.serves(final - 10)
    else:
        assert not spool.alive and not list(tmp_path.glob("maps-*"))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    spool = Spool("0", tmp_path, 10**6)
    spool.put(0, torch.randn(2, 3, 4, 4), torch.full((3,), -torch.inf))
    spool.flush()
    (file,) = tmp_path.glob("maps-*")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(file.name)):
        spool.get(0, torch.zeros(3))


def test_a_layer_whose_maps_cannot_fit_is_not_begun() -> None:
    from fractions import Fraction

    assert worthwhile(63305, 2048, 49, Fraction("0.005"), 8 * 10**9)
    assert not worthwhile(63305, 256, 3136, Fraction("0.005"), 8 * 10**9)


@pytest.mark.parametrize("box", [(0, 0, math.inf, 1), (0, math.nan, 1, 1), (0.5, 0, 0.5, 1), (1, 0, 0, 1), (-1e30, 0, 1, 1)])
def test_a_box_that_is_none_is_refused(box: tuple[float, ...]) -> None:
    """From a function of the caller's, or a checkpoint that was changed."""
    with pytest.raises(GeometryError, match="no part of a picture has the edges"):
        frame([("object", torch.ones(1, 2, 4, dtype=torch.int64))], 2, 4, Box(*box))
