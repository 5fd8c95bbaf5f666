"""Which part of a picture the input of a network shows: the same by following the steps of a transform and by test pictures."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm.data
import torch
import torchvision.transforms as v1
from open_clip import transform as open_clip
from PIL import Image
from torchvision import models
from torchvision.transforms import v2

from torchprobe.datasets.geometry import Box, Geometry, GeometryError, fingerprint, whole_picture
from torchprobe.datasets.geometry.carried import carried
from torchprobe.datasets.geometry.measured import measured

SIZES = ((256, 256), (480, 240), (113, 200), (64, 64), (331, 97))
END = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]


def timm_transform(mode: str, share: float) -> Any:
    return timm.data.create_transform(224, is_training=False, crop_mode=mode, crop_pct=share, interpolation="bicubic")


TRANSFORMS = {
    "v1": v1.Compose([v1.Resize(256), v1.CenterCrop(224), v1.ToTensor(), v1.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.25])]),
    "v2": v2.Compose([v2.Resize(256), v2.CenterCrop(224), *END]),
    "nested": v2.Compose([v2.Compose([v2.Resize(100), v2.CenterCrop((130, 95))]), *END]),
    "squash": v2.Compose([v2.Resize((90, 120)), *END]),
    "no resize": v2.Compose([v2.CenterCrop(60), *END]),
    "border": v2.Compose([v2.Resize(100, max_size=150), v2.Pad([5, 9, 7, 3]), *END]),
    "odd": v2.Compose([v2.Resize(61), v2.CenterCrop(32), *END]),
    "weights": models.ResNet50_Weights.DEFAULT.transforms(),
    "segmentation": models.segmentation.FCN_ResNet50_Weights.DEFAULT.transforms(),
    **{f"timm {mode} {share}": timm_transform(mode, share) for mode in ("center", "border", "squash") for share in (0.875, 1.0)},
    **{
        f"open_clip {mode}": open_clip.image_transform_v2(open_clip.PreprocessCfg(size=224, resize_mode=mode), is_train=False)
        for mode in ("shortest", "longest", "squash")
    },
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_followed_and_measured_agree(name: str) -> None:
    transform = TRANSFORMS[name]
    for width, height in SIZES:
        followed, seen = carried(transform, width, height), measured(transform, width, height)
        assert followed is not None
        rows, columns = transform(Image.new("RGB", (width, height))).shape[1:]
        off = [
            abs(a - b) * n / abs(followed[i % 2 + 2] - followed[i % 2])
            for i, (a, b, n) in enumerate(zip(followed, seen, (rows, columns) * 2, strict=True))
        ]
        assert max(off) < 0.3, (name, width, height, followed, seen)  # pixels of the input


def test_known_boxes() -> None:
    box = Geometry(TRANSFORMS["v2"]).box
    assert box(256, 256) == (1 / 16, 1 / 16, 15 / 16, 15 / 16)
    assert box(512, 256) == (1 / 16, (512 - 224) / 2 / 512, 15 / 16, (512 + 224) / 2 / 512)
    assert Geometry(TRANSFORMS["squash"]).box(77, 301).whole and Geometry(END[0]).box(9, 4).whole
    assert Geometry(TRANSFORMS["border"]).box(200, 100) == pytest.approx((-9 / 75, -5 / 150, 1 + 3 / 75, 1 + 7 / 150))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2), (16384, 1)])
def test_the_whole_picture_is_known_without_a_look(size: tuple[int, int]) -> None:
    assert Geometry(whole_picture(TRANSFORMS["v2"])).box(*size).whole


@pytest.mark.parametrize(
    "kind", ["CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "ConvNextImageProcessor", "BitImageProcessor"]
)
def test_processors_of_transformers(kind: str) -> None:
    import transformers

    processor = getattr(transformers, kind)()

    def transform(image: Any) -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    box, cut = Geometry(transform).box(480, 240), kind in ("CLIPImageProcessor", "BitImageProcessor")
    assert box == pytest.approx((0, 0.25, 1, 0.75) if cut else (0, 0, 1, 1), abs=1e-3)
    assert whole_picture(transform).scale == pytest.approx([1 / s for s in processor.image_std], rel=1e-3)


def test_what_cannot_be_told() -> None:
    tensor = v2.Compose(END)
    for transform, why in (
        (lambda image: tensor(image).flip(2), "turns, mirrors or bends"),
        (lambda image: tensor(image).transpose(1, 2), "turns, mirrors or bends"),
        (lambda image: tensor(image) ** 8, "values are not in proportion"),
        (lambda image: tensor(image) + torch.rand(1), "random"),
        (lambda image: tensor(image) - tensor(image).mean() if tensor(image).std() == 0 else tensor(image), "black and white"),
        (v2.Compose([v2.RandomResizedCrop(50), *END]), "random"),
        (v2.Compose([v2.RandomRotation((90, 90)), *END]), "turns, mirrors or bends"),
    ):
        with pytest.raises(GeometryError, match=why):
            Geometry(transform).box(90, 60)
        assert Geometry(transform, "whole").box(90, 60).whole
    given = Geometry(tensor, lambda width, height: Box(0.1, 0.0, 0.9, width / 100))
    assert given.box(50, 7) == (0.1, 0.0, 0.9, 0.5)
    with pytest.raises(ValueError, match='must be "whole" or a function'):
        Geometry(tensor, "all")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_whole_picture_has_the_same_colors(name: str) -> None:
    whole, color = whole_picture(TRANSFORMS[name]), (200, 31, 90)
    image = Image.new("RGB", (300, 200), color)
    own, found = TRANSFORMS[name](image), whole(image)
    middle = own[:, own.shape[1] // 2, own.shape[2] // 2]
    torch.testing.assert_close(found, middle[:, None, None].expand_as(found), atol=2e-3, rtol=1e-3)
    assert Geometry(whole).box(300, 200).whole and found.shape[1:] == TRANSFORMS[name](Image.new("RGB", (256, 256))).shape[1:]


def test_colors_that_are_mixed_are_refused() -> None:
    with pytest.raises(ValueError, match="in its own channel"):
        whole_picture(v2.Compose([v2.Grayscale(3), *END]))
    with pytest.raises(ValueError, match="in its own channel"):
        whole_picture(lambda image: v2.Compose(END)(image).flip(0))
    with pytest.raises(ValueError, match="in proportion"):
        whole_picture(lambda image: v2.Compose(END)(image) ** 2)


def test_a_fingerprint_is_what_a_transform_does() -> None:
    def scaled(by: float) -> Any:
        return lambda image: v2.Compose(END)(image) * by

    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0)) != fingerprint(scaled(2.5))
    assert repr(scaled(2.0)).partition(" at ")[0] == repr(scaled(2.5)).partition(" at ")[0]
    with pytest.raises(ValueError, match="preprocess is random"):
        fingerprint(v2.Compose([v2.RandomCrop(20), *END]))


# -- hostile transforms ----------------------------------------------------------------------------------------------------

CROP = v2.Compose([v2.Resize(64), v2.CenterCrop(64), *END])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: (x * 255).byte(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.flip(0),
        lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda x: x.mean(0, keepdim=True),
        lambda x: torch.cat([x, torch.ones(1, 64, 64)]),  # the opacity does not depend on the picture
        lambda x: torch.cat([torch.full((2, 64, 64), 0.3), -x]),
        lambda x: 1 - x,
        lambda x: x.requires_grad_(),
    ],
)
def test_any_type_and_any_channels(change: Any) -> None:
    geometry = Geometry(lambda image: change(CROP(image)))
    assert geometry.box(100, 100) == pytest.approx((0, 0, 1, 1), abs=0.002)
    assert geometry.box(200, 100) == pytest.approx((0, 0.25, 1, 0.75), abs=0.002)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "HSV", "YCbCr", "F", "I"])
def test_transforms_that_change_the_mode(mode: str) -> None:
    convert = v2.Compose([v2.Resize(64), v2.CenterCrop(64)])
    geometry = Geometry(lambda image: v2.functional.pil_to_tensor(convert(image).convert(mode)).float())
    assert geometry.box(200, 100) == pytest.approx((0, 0.25, 1, 0.75), abs=0.002)


def test_contrast_that_depends_on_the_picture_is_no_coordinate() -> None:
    """It would give a plausible box that is wrong."""
    for step in (v2.RandomAutocontrast(1.0), v2.RandomEqualize(1.0)):
        with pytest.raises(GeometryError, match="or depend on its contrast"):
            Geometry(lambda image, step=step: CROP(step(image))).box(200, 100)
    with pytest.raises(GeometryError, match="depend on its contrast"):
        Geometry(lambda image: (CROP(image) > 0.5).float()).box(200, 100)


@pytest.mark.parametrize("step", [v2.Resize((32, 32)), v2.Resize((2, 2)), v2.Resize((1, 1)), v2.Identity(), v2.Pad(3), v2.CenterCrop(16)])
def test_tiny_pictures_are_measured_or_refused(step: Any) -> None:
    transform = v2.Compose([step, *END])
    for width, height in ((1, 1), (1, 7), (2, 2), (3, 2), (5, 3)):
        followed = carried(transform, width, height)
        try:
            seen = measured(transform, width, height)
        except GeometryError:
            assert min(width, height) == 1
            continue
        rows, columns = transform(Image.new("RGB", (width, height))).shape[1:]
        assert followed is not None
        for i, n in enumerate((rows, columns) * 2):
            pixel = (followed[i % 2 + 2] - followed[i % 2]) / n
            assert seen[i] == pytest.approx(followed[i], abs=0.3 * pixel), (width, height)


def test_transforms_that_do_not_take_test_pictures() -> None:
    def only(image: Any) -> torch.Tensor:
        if image.size != (200, 100):
            raise RuntimeError(f"not {image.size}")
        return CROP(image)

    with pytest.raises(GeometryError, match=r"it fails on a test picture \(RuntimeError: not \(90, 60\)\)"):
        Geometry(only).box(90, 60)
    assert Geometry(only).box(200, 100) == pytest.approx((0, 0.25, 1, 0.75), abs=0.002)
    assert fingerprint(only) == "unknown" != fingerprint(only, (200, 100)) != fingerprint(lambda image: only(image) * 2, (200, 100))

    def named(image: Any) -> torch.Tensor:
        return CROP(image) * len(image.filename)

    assert fingerprint(named, (200, 100)) == "unknown" and Geometry(named, "whole").box(9, 4).whole


def test_threads_look_at_each_size_once() -> None:
    calls: Counter[tuple[int, int]] = Counter()

    def transform(image: Any) -> torch.Tensor:
        time.sleep(0.001)
        calls[image.size] += 1  # not safe in threads by itself
        return CROP(image)

    geometry, sizes = Geometry(transform), [(40 + i % 5, 30 + i % 5) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        boxes = list(threads.map(lambda size: geometry.box(*size), sizes))
    assert boxes == [geometry.box(*size) for size in sizes] and max(calls.values()) == min(calls.values()) < 15
