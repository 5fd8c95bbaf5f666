"""Models of any precision, wrapped models, and pictures and preprocessing of every kind, from the pass to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, ViT, preprocess
from PIL import Image
from torch import Tensor, nn

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.batches import same_preprocess
from torchprobe.dissection.evidence import evidence
from torchprobe.recording.reader import as_input


@pytest.fixture(scope="module")
def broden(tmp_path_factory: pytest.TempPathFactory) -> Broden:
    return Broden(write_trap_set(tmp_path_factory.mktemp("broden"), images=16, seed=0).root, transform=preprocess)


def run(model: nn.Module, layer: str, broden: Broden, **options: Any) -> Dissection:
    (found,) = dissect(model, layer, broden, batch_size=4, quantile=0.05, **options).values()
    return found


MODELS = {
    "maps": lambda dtype: (Net().to(dtype), "conv"),
    "tokens": lambda dtype: (ViT().to(dtype), "block"),
    "parallel": lambda dtype: (nn.DataParallel(Net().to(dtype)), "conv"),
    "compiled": lambda dtype: (torch.compile(Net().to(dtype), backend="eager"), "conv"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_any_precision_from_the_pass_to_the_page(broden: Broden, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, layer = MODELS[kind](dtype)
    found, usual = run(model, layer, broden), run(*MODELS[kind](torch.float32), broden)
    assert found == run(model, layer, broden, disk=0.0)
    assert found.thresholds is not None and usual.thresholds is not None and found.counts is not None
    assert found.thresholds.dtype == torch.float32
    torch.testing.assert_close(found.thresholds, usual.thresholds, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.iou, usual.iou, rtol=0, atol=1e-9 if dtype == torch.float64 else 0.2)
    page = found.report(tmp_path / "page.html", broden, model)
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_evidence_in_any_precision(broden: Broden, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("captum", reason="captum is not installed")
    (model, layer), (plain, _) = MODELS[kind](dtype), MODELS[kind](torch.float32)
    found = evidence(run(model, layer, broden, score="ap"), 1, broden, model, 2)
    usual = evidence(run(plain, layer, broden, score="ap"), 1, broden, plain, 2)
    assert found.attribution.dtype == torch.float32 and bool(found.attribution.any())
    off = float((found.attribution - usual.attribution).abs().amax() / usual.attribution.abs().amax())
    assert torch.equal(found.ids, usual.ids) and off < (1e-5 if dtype == torch.float64 else 0.3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_images_of_integers_are_named(broden: Broden) -> None:
    with pytest.raises(TypeError, match=r"Net does not take images of torch.uint8 \(.*\): make them float"):
        run(Net(), "conv", broden, preprocess=lambda image: (preprocess(image) * 255).byte())

    class Takes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    run(Takes(), "conv", broden, preprocess=lambda image: (preprocess(image) * 255).byte())


def test_preprocessing_of_another_shape_is_named(broden: Broden) -> None:
    for change, got in (
        (lambda x: x[None], r"shape \(1, 3, 32, 32\)"),
        (lambda x: x[0], r"shape \(32, 32\)"),
        (lambda x: x.numpy(), "ndarray"),
    ):
        for options in ({}, {"geometry": "whole"}):
            with pytest.raises(TypeError, match=rf"preprocess must return a tensor \(3, H, W\), got {got}"):
                run(Net(), "conv", broden, preprocess=lambda image, change=change: change(preprocess(image)), **options)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(broden: Broden, channels: int, tmp_path: Path) -> None:
    def change(image: Any) -> Tensor:
        x = preprocess(image)
        return x.mean(0, keepdim=True) if channels == 1 else torch.cat([x, torch.ones(1, *x.shape[1:])])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 6, 5, stride=4, padding=2))
    found = run(model, "0", broden, preprocess=change)
    assert found == run(model, "0", broden, preprocess=change, disk=0.0)
    assert found.report(tmp_path / "page.html", broden, model, preprocess=change).stat().st_size > 10_000


def test_types_and_strides_of_images_do_not_matter(broden: Broden) -> None:
    usual = run(Net(), "conv", broden)
    for change in (
        lambda x: x.double(),
        lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda x: x.requires_grad_(),
        lambda x: torch.cat([x, x])[:3],
    ):
        found = run(Net(), "conv", broden, preprocess=lambda image, change=change: change(preprocess(image)))
        assert found.counts is not None and usual.counts is not None
        assert all(torch.equal(a, b) for a, b in zip(found.counts, usual.counts, strict=True))
        assert torch.equal(found.average_precision.nan_to_num(-1), usual.average_precision.nan_to_num(-1))


def test_pictures_of_every_mode_and_of_tiny_sizes(tmp_path: Path) -> None:
    """The pictures of a folder, replaced by files of other modes, and pictures of a few pixels and of a line."""
    rng = np.random.default_rng(0)
    modes = ["RGB", "L", "LA", "RGBA", "P", "1", "I;16", "CMYK"]
    with BrodenWriter(tmp_path, {"object": ["a", "b"]}, size=None, image_format="png") as writer:
        for i, size in enumerate([(20, 30)] * len(modes) + [(2, 2), (3, 2), (2, 9), (300, 3)]):
            pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            writer.add(f"m/{i}", pixels, {"object": rng.integers(1, 3, size)})
    for i, mode in enumerate(modes):
        file = tmp_path / "images" / "m" / f"{i}.png"
        with Image.open(file) as opened:
            picture = opened.convert("L") if mode == "I;16" else opened.convert(mode)
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        picture.save(file, format="JPEG" if mode == "CMYK" else "PNG")
    broden = Broden(tmp_path)
    found = run(Net(), "conv", broden, preprocess=preprocess, geometry="whole")
    assert found == run(Net(), "conv", broden, preprocess=preprocess, geometry="whole", disk=0.0)
    assert found.counts is not None and int(found.counts.truth.sum()) > 0


def test_the_input_of_a_model_is_in_its_precision() -> None:
    assert as_input(torch.zeros(1, 3, dtype=torch.float64), nn.Linear(3, 1).half()).dtype == torch.float16
    assert as_input(torch.zeros(1, 3, dtype=torch.uint8), nn.Linear(3, 1).half()).dtype == torch.uint8


def test_preprocessing_that_takes_pictures_of_one_size_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with BrodenWriter(tmp_path / "set", {"object": ["a", "b"]}, size=None, image_format="png") as writer:
        for i in range(8):
            writer.add(f"m/{i}", rng.integers(0, 255, (36, 50, 3), dtype=np.uint8), {"object": rng.integers(1, 3, (36, 50))})

    def only(image: Any) -> Tensor:
        assert image.size == (50, 36)
        return preprocess(image)

    broden, model = Broden(tmp_path / "set"), Net()
    found = run(model, "conv", broden, preprocess=only)
    assert found.report(tmp_path / "page.html", broden, model, preprocess=only).stat().st_size > 10_000
    with pytest.raises(ValueError, match="made with another preprocessing"):
        same_preprocess(found.metadata, broden, model, lambda image: only(image) * 2)
    assert same_preprocess(found.metadata, broden, model, only) is only
