"""Which part of a picture the input of a network shows: the same by following the steps of a transform and by test pictures."""

from __future__ import annotations

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
        (lambda image: tensor(image) ** 8, "turns, mirrors or bends"),
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
