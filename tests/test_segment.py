"""Units on new pictures: regions lie on the object whatever part of the picture the network sees, and what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from torchprobe.datasets import Broden, BrodenWriter, DatasetError
from torchprobe.datasets.geometry import Geometry
from torchprobe.datasets.photos import read_photo
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.detectors import choose_detectors
from torchprobe.dissection.segment import PictureError, Segmenter, segment_pictures
from torchprobe.studies.segment import find_dissections, find_pictures, segment_folder

END = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
TRANSFORMS = {
    "resize": v2.Compose([v2.Resize((96, 96)), *END]),
    "crop": v2.Compose([v2.Resize(112), v2.CenterCrop(96), *END]),
    "tall": v2.Compose([v2.Resize((128, 64)), *END]),
    "border": v2.Compose([v2.Resize(79, max_size=80), v2.CenterCrop(96), *END]),
    "no resize": v2.Compose([v2.CenterCrop(160), *END]),
}
SIZES = ((200, 200), (320, 200), (200, 410), (97, 161))


class Colors(nn.Module):
    """Units 0, 1 and 2 are the red, green and blue of 4 × 4 pixels; unit 3 is constant."""

    def __init__(self, preprocess: Any = None, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((), gain))
        self.pool = nn.AvgPool2d(4)
        self.name = "colors"
        if preprocess is not None:
            self.preprocess = preprocess

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.cat([x, torch.zeros_like(x[:, :1])], 1) * self.gain)


def picture(height: int, width: int, box: tuple[int, int, int, int] | None, channel: int = 0, seed: int = 0) -> np.ndarray:
    """Dark noise with a bright rectangle (top, left, bottom, right) in one channel."""
    made = np.random.default_rng(seed).integers(0, 60, (height, width, 3)).astype(np.uint8)
    if box is not None:
        made[box[0] : box[2], box[1] : box[3], channel] = 240
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("broden"), np.random.default_rng(0)
    with BrodenWriter(
        folder, {"color": ["red-c", "green-c"], "object": ["nothing"]}, size=None, image_format="png", min_frequency=0
    ) as writer:
        for i in range(16):
            y, x = (int(v) for v in rng.integers(50, 100, 2))
            mask = np.zeros((200, 200), int)
            mask[y : y + 40, x : x + 40] = 1 + i % 2
            other = np.zeros((200, 200), int)
            other[:2, :2] = 1
            writer.add(f"a/{i}", picture(200, 200, (y, x, y + 40, x + 40), i % 2, i), {"color": mask, "object": other})
    return folder


def dissected(root: Path, model: nn.Module, **options: Any) -> Dissection:
    levels = {"pool": torch.tensor([0.55, 0.55, 0.55, 0.0])}
    return dissect(model, "pool", Broden(root), **{"thresholds": levels, "score": ("iou", "ap"), **options})["pool"]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def bilinear(values: np.ndarray, rows: int, columns: int, edges: tuple[float, float, float, float]) -> np.ndarray:
    """In float64, by the formula: the center of pixel i is at (i + ½ − first) · n / (last − first) − ½ on the map."""

    def places(n: int, size: int, first: float, last: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(size) + 0.5 - first) * n / (last - first) - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, n - 1), at - low

    (top, bottom, y), (left, right, x) = places(len(values), rows, edges[0], edges[2]), places(values.shape[1], columns, edges[1], edges[3])
    across = values[:, left] * (1 - x) + values[:, right] * x
    return across[top] * (1 - y)[:, None] + across[bottom] * y[:, None]


# -- where regions lie -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("preprocess", ["encoder", "whole"])
def test_regions_lie_on_the_object(root: Path, name: str, preprocess: str) -> None:
    model = Colors(TRANSFORMS[name])
    found = dissected(root, model, preprocess=preprocess)
    with Segmenter(found, model, units=[0, 1]) as segmenter:
        for width, height in SIZES:
            box = (int(0.38 * height), int(0.41 * width), int(0.38 * height) + 38, int(0.41 * width) + 45)
            planted = np.zeros((height, width), bool)
            planted[box[0] : box[2], box[1] : box[3]] = True
            made = segmenter.segment(Image.fromarray(picture(height, width, box)))
            red, green = made.regions
            visible = planted & made.shown
            assert visible.sum() > 0.5 * planted.sum()
            assert overlap(red.mask, visible) > 0.6, (width, height)
            assert not green.mask.any() and green.share == 0
            assert not red.mask[~made.shown].any()
            assert red.share == pytest.approx(red.mask.sum() / made.shown.sum())
            assert made.active == [red]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_as_in_float64(root: Path, name: str) -> None:
    transform = TRANSFORMS[name]
    model = Colors(transform)
    found = dissected(root, model, preprocess="encoder")
    for width, height in SIZES:
        image = (
            Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)).resize((7, 5)).resize((width, height))
        )
        (made,) = segment_pictures(found, model, [image], units=[0, 1, 2])
        box = Geometry(transform).box(width, height)
        edges = (box.top * height, box.left * width, box.bottom * height, box.right * width)
        maps = transform(image).double().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).numpy()
        rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
        shown = ((rows >= edges[0]) & (rows < edges[2]))[:, None] & (columns >= edges[1]) & (columns < edges[3])
        assert np.array_equal(made.shown, shown)
        for region in made.regions:
            values = bilinear(maps[region.detector.unit], height, width, edges)
            sure = np.abs(values - region.detector.threshold) > 1e-4
            assert np.array_equal(region.mask[sure], ((values > region.detector.threshold) & shown)[sure])
            assert region.largest == pytest.approx(maps[region.detector.unit].max(), rel=1e-5)


def test_what_lies_outside_the_crop_is_not_marked(root: Path) -> None:
    model = Colors(TRANSFORMS["no resize"])
    found = dissected(root, model, preprocess="encoder")
    (made,) = segment_pictures(found, model, [Image.fromarray(picture(160, 480, (60, 10, 100, 60)))], concepts=["red"])
    assert not made.active and not made.regions[0].mask.any()
    numbers, names = made.concept_map()
    assert names == {0: "unsure", 1: "red-c (color)", 2: "not shown to the network"}
    assert (numbers[:, 160:320] == 0).all() and (numbers[:, :160] == 2).all() and (numbers[:, 320:] == 2).all()


def test_a_large_picture_has_a_smaller_grid(root: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    found = dissected(root, model)
    (made,) = segment_pictures(found, model, [Image.fromarray(picture(1500, 3000, (300, 600, 900, 1500)))], units=[0], longest=300)
    planted = np.zeros((150, 300), bool)
    planted[30:90, 60:150] = True
    assert made.size == (3000, 1500) and made.image.size == (300, 150)
    assert overlap(made.regions[0].mask, planted) > 0.9
    for size in ((1, 1), (1, 400), (400, 1)):
        (tiny,) = segment_pictures(found, model, [Image.new("RGB", size, "red")], units=[0])
        assert tiny.regions[0].mask.shape == size[::-1] and tiny.regions[0].mask.all()


def test_the_most_certain_unit_names_a_pixel(root: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    found = dissected(root, model)
    both = picture(200, 200, (40, 40, 120, 120), 0)
    both[80:160, 80:160, 1] = 240
    (made,) = segment_pictures(found, model, [Image.fromarray(both)])
    first, second = (region.detector for region in made.regions)
    assert {first.label, second.label} == {"red-c", "green-c"} and first.iou >= second.iou > 0.6
    numbers, names = made.concept_map()
    assert names == {0: "unsure", 1: first.concept, 2: second.concept}
    assert numbers[100, 100] == 1 and {numbers[60, 60], numbers[140, 140]} == {1, 2} and numbers[10, 10] == 0


class Tokens(nn.Module):
    """Unit 0 is the red of patches of 8 × 4 pixels, after a class token and a register; batch first or not."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 2, (8, 4), (8, 4), bias=False)
        self.block = nn.Identity()
        self.batch_first = batch_first
        with torch.no_grad():
            self.embed.weight.zero_()[0, 0] = 1 / 32

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).movedim(1, 2)
        tokens = torch.cat([torch.full_like(patches[:, :2], 9.0), patches], 1)
        return self.block(tokens if self.batch_first else tokens.movedim(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_other_precisions(root: Path, batch_first: bool, dtype: torch.dtype) -> None:
    model = Tokens(batch_first).to(dtype)
    options = {"preprocess": TRANSFORMS["crop"], "feature_dim": 2}
    found = dissect(model, "block", Broden(root), thresholds={"block": torch.tensor([0.55, 1.0])}, **options)["block"]  # type: ignore[arg-type]
    planted = np.zeros((200, 320), bool)
    planted[90:140, 120:180] = True
    (made,) = segment_pictures(found, model, [Image.fromarray(picture(200, 320, (90, 120, 140, 180)))], units=[0], **options)
    assert overlap(made.regions[0].mask, planted) > 0.6
    assert made.regions[0].largest < 1  # not the class token


def test_outside_of_its_block_it_says_so(root: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    segmenter = Segmenter(dissected(root, model), model)
    with pytest.raises(RuntimeError, match="in a block"):
        segmenter.segment(Image.new("RGB", (20, 20)))


# -- which units -------------------------------------------------------------------------------------------------------------


def test_units_and_concepts_are_chosen(root: Path) -> None:
    found = dissected(root, Colors(TRANSFORMS["resize"]))
    best = choose_detectors(found)
    assert [one.unit for one in best] == [row.unit for row in found.best() if row.score >= 0.04]
    red = next(one for one in best if one.label == "red-c")
    counts, column = found.counts, [label.name for label in found.labels].index("red-c")
    assert counts is not None
    assert red.precision == float(counts.intersection[0, column]) / float(counts.activation[0, column])
    assert red.recall == float(counts.intersection[0, column]) / float(counts.truth[column])
    assert red.iou == float(found.iou[0, column]) and red.average_precision == float(found.average_precision[0, column]) == 1.0
    assert red.caveat == "" and red.concept == "red-c (color)"
    assert [one.unit for one in choose_detectors(found, most=1)] == [best[0].unit]
    assert [(one.unit, one.label) for one in choose_detectors(found, units=[3, 1], concepts=["RED"])] == [
        (3, ""),
        (1, "green-c"),
        (0, "red-c"),
    ]
    silent = choose_detectors(found, units=[3])[0]
    assert "never active" in silent.caveat and "overlaps no concept" in silent.caveat and silent.iou == 0
    weak = choose_detectors(found, concepts=["nothing"])
    assert len(weak) == 1 and "does not count as detection" in weak[0].caveat
    for options, message in (
        ({"units": [4]}, "units 0 to 3, got 4"),
        ({"units": [-1]}, "got -1"),
        ({"concepts": ["grene-c"]}, "did you mean green-c"),
        ({"concepts": ["x"]}, "it has"),
        ({"most": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_detectors(found, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no unit of layer 'pool' has an IoU of 0.04"):
        choose_detectors(dissected(root, Colors(TRANSFORMS["resize"]), thresholds={"pool": torch.full((4,), 9.0)}))
    with pytest.raises(ValueError, match="without IoU"):
        choose_detectors(dissected(root, Colors(TRANSFORMS["resize"]), score="ap", thresholds=None))


def test_chance_is_a_caveat(root: Path) -> None:
    found = dissected(root, Colors(TRANSFORMS["resize"]), iou_permutations=3)
    assert {one.caveat for one in choose_detectors(found, concepts=["red"])} == {"not beyond chance at 0.05"}  # 3 permutations: p ≥ 1/4


def test_precision_is_a_share_also_where_pixels_count_several_times(root: Path) -> None:
    found = dissected(root, Colors(TRANSFORMS["resize"]), mode="netdissect")
    before = choose_detectors(found, units=[0])[0]
    assert 0 < before.precision <= 1 and found.counts is not None
    column = [label.name for label in found.labels].index(before.label)
    found.counts.intersection[0, column] = found.counts.activation[0, column] + 1  # as if two planes had the label
    assert np.isnan(choose_detectors(found, units=[0])[0].precision)


# -- what does not fit -------------------------------------------------------------------------------------------------------


def test_pictures_of_16_bits_are_scaled_and_others_are_named(root: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    found = dissected(root, model)
    gray = picture(200, 200, (60, 60, 100, 100))[..., 0]
    eight, sixteen = segment_pictures(found, model, [Image.fromarray(gray), Image.fromarray(gray.astype(np.uint16) * 257)])
    assert 0 < eight.regions[0].share < 0.1 and eight.regions[0].share == sixteen.regions[0].share
    with pytest.raises(PictureError, match="picture 0: pixels of mode F"):
        segment_pictures(found, model, [Image.fromarray(gray.astype(np.float32))])
    with pytest.raises(TypeError, match="picture 0 is ndarray; expected a file or a PIL image"):
        segment_pictures(found, model, [gray])  # type: ignore[list-item]


def test_one_path_is_one_picture(root: Path, tmp_path: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    found, path = dissected(root, model), tmp_path / "a.png"
    Image.new("RGB", (50, 50)).save(path)
    for one in (path, str(path)):
        assert [drawn.name for drawn in segment_pictures(found, model, one)] == [str(path)]
        assert find_pictures(one) == [("a.png", path)]


class Bad(Colors):
    """Red is nan in a part of a white picture."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 0.9:
            x = torch.cat([x[:, :1].index_fill(2, torch.arange(9), torch.nan), x[:, 1:]], 1)
        return super().forward(x)


class Odd:
    """A transform that fails for a small picture."""

    def __call__(self, image: Image.Image) -> Tensor:
        if image.size == (20, 20):
            raise ZeroDivisionError("odd")
        made: Tensor = TRANSFORMS["resize"](image)
        return made


def test_pictures_that_cannot_be_drawn_are_named_and_the_others_drawn(root: Path, tmp_path: Path) -> None:
    model, odd, photos = Bad(), Odd(), tmp_path / "photos"
    photos.mkdir()
    found = dissected(root, model, preprocess=odd)
    for name, color, size in (("a", "black", 50), ("b", "white", 50), ("c", "black", 20)):
        Image.new("RGB", (size, size), color).save(photos / f"{name}.png")
    drawn = segment_folder({"pool": found}, model, [photos], tmp_path / "out", preprocess=odd, geometry="whole")["pool"]
    assert [one["name"] for one in drawn.pictures] == ["a.png"]
    assert drawn.unreadable == [
        ("b.png", "b.png: layer 'pool' gives nan, so it is unknown where its units are active"),
        ("c.png", "c.png: the preprocessing fails (ZeroDivisionError: odd)"),
    ]
    with pytest.raises(PictureError, match="gives nan"):
        segment_pictures(found, model, [photos / "b.png"], preprocess=odd, geometry="whole")


def test_another_network_is_refused(root: Path, tmp_path: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    dissected(root, model).save(tmp_path / "a.safetensors")
    found, image = Dissection.load(tmp_path / "a.safetensors"), [Image.new("RGB", (50, 50))]
    assert segment_pictures(found, model, image)[0].active == []
    with pytest.raises(ValueError, match="another network than that of the dissection, which is colors: the weights differ"):
        segment_pictures(found, Colors(TRANSFORMS["resize"], gain=1.5), image)
    strided = Colors(TRANSFORMS["resize"])
    strided.pool = nn.AvgPool2d(4, stride=2)
    with pytest.raises(ValueError, match="the weights are the same, and its modules or their settings differ"):
        segment_pictures(found, strided, image)
    modules = found.metadata.pop("modules")
    assert segment_pictures(found, strided, image)  # as an earlier version wrote it
    found.metadata["modules"] = modules
    assert segment_pictures(found, nn.Sequential(model)[0], image)
    del found.metadata["weights"]
    with pytest.raises(ValueError, match="does not say of which network"):
        segment_pictures(found, model, image)


def test_the_preprocessing_is_found_or_refused(root: Path) -> None:
    crop, resize = TRANSFORMS["crop"], TRANSFORMS["tall"]
    image = [Image.fromarray(picture(200, 300, (80, 130, 120, 170)))]
    model = Colors(crop)
    for preprocess in ("whole", "encoder"):
        found = dissected(root, model, preprocess=preprocess)
        (made,) = segment_pictures(found, model, image)
        assert made.box.whole == (preprocess == "whole")
        assert segment_pictures(found, model, image, preprocess=preprocess)[0].box == made.box
        with pytest.raises(ValueError, match="made with another preprocessing"):
            segment_pictures(found, model, image, preprocess="encoder" if preprocess == "whole" else "whole")
    own = dissected(root, model, preprocess=resize)
    with pytest.raises(ValueError, match="another preprocessing .*Compose.*give it as preprocess="):
        segment_pictures(own, model, image)
    assert segment_pictures(own, model, image, preprocess=resize)[0].box.whole
    # A transform of torchvision is a module. It is not part of the network.
    assert segment_pictures(own, Colors(), image, preprocess=resize)[0].box.whole
    with pytest.raises(ValueError, match="another preprocessing"):
        segment_pictures(own, Colors(), image)
    with pytest.raises(ValueError, match="a function or one of whole, encoder, got 'hole'"):
        segment_pictures(own, model, image, preprocess="hole")
    del own.metadata["preprocessing"]  # a file of before, which knew only the transform of the encoder
    assert not segment_pictures(own, model, image)[0].box.whole
    gray = dissected(
        root, Colors(v2.Compose([v2.Grayscale(3), crop])), preprocess="encoder"
    )  # the whole picture with its colors: impossible
    assert not segment_pictures(gray, Colors(v2.Compose([v2.Grayscale(3), crop])), image)[0].box.whole
    # A picture may be resized a little differently by another version of Pillow.
    found = dissected(root, model)
    found.metadata["preprocessing"]["fingerprint"] = "of another version"
    assert segment_pictures(found, model, image)[0].active


def test_the_basis_is_found_or_refused(root: Path) -> None:
    model, image = Colors(TRANSFORMS["resize"]), [Image.fromarray(picture(96, 96, (30, 30, 60, 60)))]
    swap = torch.eye(4)[[1, 0, 2, 3]]
    along = dissected(root, model, basis=swap)
    assert segment_pictures(along, model, image, units=[0, 1], basis=swap)[0].active[0].detector.unit == 1
    for basis, message in ((None, "give the same basis="), (torch.eye(4), "another basis was given")):
        with pytest.raises(ValueError, match=message):
            segment_pictures(along, model, image, basis=basis)
    with pytest.raises(ValueError, match="no basis belongs to it"):
        segment_pictures(dissected(root, model), model, image, basis=swap)
    rotated = dissected(root, model, basis="rotation", seed=3, thresholds=None)
    assert segment_pictures(rotated, model, image, units=[0])[0].regions[0].detector.unit == 0  # made again from its seed


# -- files -------------------------------------------------------------------------------------------------------------------


def test_photos_of_every_kind_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((60, 40))
    for suffix in ("png", "bmp", "tif", "ppm"):
        base.save(tmp_path / f"a.{suffix}")
        assert np.array_equal(read_photo(tmp_path / f"a.{suffix}"), base)
    for suffix in ("jpg", "webp", "gif"):
        base.save(tmp_path / f"a.{suffix}")
        assert read_photo(tmp_path / f"a.{suffix}").size == (60, 40)
    base.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.asarray(read_photo(tmp_path / "cmyk.jpg"), int) - np.asarray(base, int)).mean() < 12
    base.convert("L").save(tmp_path / "gray.png")
    assert np.array_equal(read_photo(tmp_path / "gray.png"), base.convert("L").convert("RGB"))
    ramp = np.arange(0, 65536, 512, dtype=np.uint16).reshape(8, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_photo(tmp_path / "deep.png"))[..., 0], (ramp.astype(int) + 128) // 257)
    for suffix in ("jpg", "png", "tif", "webp"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            base.save(tmp_path / f"turned.{suffix}", exif=exif)
            upright = read_photo(tmp_path / f"turned.{suffix}")
            inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose, written out from the table of EXIF
            expected = base if orientation == 1 else base.transpose(Image.Transpose(inverse[orientation]))
            assert upright.size == expected.size, (suffix, orientation)
            if suffix in ("png", "tif"):
                assert np.array_equal(upright, expected), (suffix, orientation)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    from torchprobe.common import limits

    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    base.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    cases = {
        "cut.png": (data[:-200], "cannot be decoded"),
        "text.jpg": (b"hello", "not a picture in one of the formats"),
        "empty.png": (b"", "not a picture"),
        "svg.png": (b"<svg/>", "not a picture"),
        "none.png": (None, "missing"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=message) as caught:
            read_photo(tmp_path / name)
        assert name in str(caught.value)
    Image.new("1", (9_000, 8_000)).save(tmp_path / "huge.png")
    with pytest.raises(DatasetError, match="8000 × 9000 pixels.*make it smaller.*TORCHPROBE_LIMITS=picture_pixels=72000000"):
        read_photo(tmp_path / "huge.png")
    Image.new("1", (12_000, 9_000)).save(tmp_path / "huger.png")
    with warnings.catch_warnings(record=True) as caught_warnings:  # of Pillow, which is not filtered
        warnings.simplefilter("always")
        with pytest.raises(DatasetError, match="9000 × 12000 pixels.*make it smaller"):
            read_photo(tmp_path / "huger.png")
    assert [warning.category for warning in caught_warnings] == [Image.DecompressionBombWarning]
    Image.new("1", (limits.value("picture_side") + 1, 1)).save(tmp_path / "long.png")
    with pytest.raises(DatasetError, match="make it smaller"):
        read_photo(tmp_path / "long.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DatasetError, match="floating point"):
        read_photo(tmp_path / "f.tif")
    with pytest.raises(DatasetError):
        read_photo(tmp_path)


# -- a folder of pictures ----------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(picture(100, 150, (40, 60, 70, 90))).save(folder / "a.png")
    Image.fromarray(picture(100, 150, (40, 60, 70, 90), 1)).save(folder / "more" / "a.png")
    Image.fromarray(picture(100, 150, None)).save(folder / f"{HOSTILE[:8]}onerror=alert(1) b.png")
    (folder / "z.jpg").write_bytes(b"\xff\xd8 damaged")
    return folder


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_a_folder_of_pictures(root: Path, photos: Path, tmp_path: Path) -> None:
    model = Colors(TRANSFORMS["crop"])
    found, told = dissected(root, model, preprocess="encoder"), []
    result = segment_folder(
        {"pool": found}, model, [photos, photos / "a.png"], tmp_path / "out", maps=True, progress=lambda *a: told.append(a)
    )
    segments = result["pool"]
    assert told[-1] == (5, 5) and len(segments.pictures) == 4
    assert [name for name, _ in segments.unreadable] == ["z.jpg"]
    value = json.loads(segments.files["numbers"].read_text())
    assert value["unreadable"][0][0] == "z.jpg" and "not a picture" in value["unreadable"][0][1]
    assert {unit["label"] for unit in value["units"]} >= {"red-c", "green-c"}
    by_name = {one["name"]: one for one in value["pictures"]}
    assert [unit["concept"] for unit in by_name["a.png"]["units"]] == ["red-c (color)"]
    assert [unit["concept"] for unit in by_name["more/a.png"]["units"]] == ["green-c (color)"]
    assert len({one["file"] for one in value["pictures"]}) == 4
    for one in value["pictures"]:
        drawn, concepts = opened(tmp_path / "out" / one["file"]), opened(tmp_path / "out" / one["concepts"])
        names = json.loads((tmp_path / "out" / one["concepts"]).with_suffix(".json").read_text())
        numbers = np.asarray(concepts)
        assert concepts.mode == "P" and concepts.size == (150, 100) and drawn.size[0] >= 150 and drawn.size[1] >= 100
        assert {int(n) for n in np.unique(numbers)} <= {int(n) for n in names}
        assert names["0"] == "unsure" and names[str(numbers[50, 0])] == "not shown to the network"
    red = json.loads((tmp_path / "out" / by_name["a.png"]["concepts"]).with_suffix(".json").read_text())
    marked = np.asarray(opened(tmp_path / "out" / by_name["a.png"]["concepts"])) == next(int(n) for n in red if red[n] == "red-c (color)")
    planted = np.zeros((100, 150), bool)
    planted[40:70, 60:90] = True
    assert overlap(marked, planted) > 0.6
    page = segments.files["page"].read_text(encoding="utf-8")
    assert "<img" not in page and "&lt;img src" in page and "1 picture could not be drawn: z.jpg" in page
    assert page.count('<section class="picture">') == 4 and page.count('<use href="#picture-') == 3
    assert "The network was not shown the dark part" in page and "No IoU was compared with chance" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    with pytest.raises(DatasetError, match="no picture could be drawn"):
        segment_folder({"pool": found}, model, [photos / "z.jpg"], tmp_path / "none")
    with pytest.raises(DatasetError, match="there is no picture at"):
        find_pictures([photos / "nothing.png"])


def test_a_layer_without_detectors_is_left_out(root: Path, photos: Path, tmp_path: Path) -> None:
    model = Colors(TRANSFORMS["resize"])
    none, some = dissected(root, model, thresholds={"pool": torch.full((4,), 9.0)}), dissected(root, model)
    with pytest.warns(UserWarning, match="no unit of layer 'pool' has an IoU of 0.04"):
        assert [*segment_folder({"a": none, "b": some}, model, [photos / "a.png"], tmp_path / "out")] == ["b"]
    with pytest.raises(ValueError, match="no unit of layer 'pool'"):
        segment_folder({"a": none}, model, [photos / "a.png"], tmp_path / "none")


def test_many_concepts_need_16_bits(tmp_path: Path) -> None:
    from torchprobe.dissection.segment import ConceptMap
    from torchprobe.studies.segment import write_concept_map

    numbers = np.arange(600, dtype=np.uint16).reshape(20, 30)
    write_concept_map(ConceptMap(numbers, {i: str(i) for i in range(600)}), tmp_path / "a.b")
    assert np.array_equal(np.asarray(opened(tmp_path / "a.b.png")), numbers)
    assert len(json.loads((tmp_path / "a.b.json").read_text())) == 600


def test_dissections_are_found(root: Path, tmp_path: Path) -> None:
    dissected(root, Colors(TRANSFORMS["resize"])).save(tmp_path / "a.safetensors")
    assert [*find_dissections(tmp_path / "a.safetensors")] == ["pool"]
    with pytest.raises(ValueError, match="has no layer 'conv'; it has pool"):
        find_dissections(tmp_path / "a.safetensors", ["conv"])
    with pytest.raises(FileNotFoundError, match="there is no dissection at"):
        find_dissections(tmp_path / "b")
    with pytest.raises(ValueError, match="does not hold a finished dissection"):
        find_dissections(tmp_path)


# -- in a browser ------------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

VISITOR = """
addEventListener("load", () => {
  const large = document.querySelector(".all svg").getBoundingClientRect(), seen = { alerted: window.alerted === true };
  seen.image = document.querySelector(".all image").getBoundingClientRect().width === large.width;
  const region = document.querySelector(".all path.line").getBoundingClientRect();
  const share = (edge, start, size) => (region[edge] - large[start]) / large[size];
  seen.region = [["left", "left"], ["top", "top"], ["right", "left"], ["bottom", "top"]].map(
    ([edge, start]) => share(edge, start, start === "left" ? "width" : "height"),
  );
  seen.used = [...document.querySelectorAll(".one use")].map((use) => use.getBoundingClientRect().width > 50);
  seen.names = [...document.querySelectorAll(".picture h2")].map((head) => head.textContent);
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_outlines_lie_on_the_object(root: Path, tmp_path: Path) -> None:
    model = Colors(TRANSFORMS["crop"])
    found = dissected(root, model, preprocess="encoder")
    name = "<img src=x onerror=alert(1)>.png".replace("/", "")
    Image.fromarray(picture(200, 400, (60, 160, 120, 260))).save(tmp_path / name)
    page = segment_folder({"pool": found}, model, [tmp_path / name], tmp_path / "out", concepts=["red"])["pool"].files["page"]
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>window.alert = () => {{ window.alerted = true; }};{VISITOR}</script></body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    command = [
        CHROMIUM,
        *options.split(),
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--window-size=1200,1500", "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None
    seen = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["names"] == [name] and not seen["alerted"] and seen["image"] and seen["used"] == [True]
    assert seen["region"] == pytest.approx([160 / 400, 60 / 200, 260 / 400, 120 / 200], abs=0.02)  # where the rectangle was planted
