"""Small image folders, an encoder that sees their colors, and everything else an interpretation takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchprobe.datasets import BrodenWriter
from torchprobe.encoders import Encoder, Head

CLASSES = ("blue", "green", "red")  # as folders sort
FEATURES, OUTLIER = 64, 7


def color(label: int, random: np.random.Generator, strength: float) -> np.ndarray:
    """A picture (12, 12, 3) more or less in the color of a class."""
    picture = random.normal(90, 60, (12, 12, 3))
    picture[..., 2 - label] += random.normal(strength, 15)
    return picture.clip(0, 255).astype(np.uint8)


def write_classes(folder: Path, each: int = 14, strength: float = 20.0, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(color(label, random, strength)).save(folder / name / f"{i:02}.png")
    return folder


def write_concepts(folder: Path, images: int = 60) -> Path:
    random = np.random.default_rng(1)
    with BrodenWriter(folder, {"color": list(CLASSES), "scene": ["day", "night"]}, size=12, image_format="png") as writer:
        for i in range(images):
            names = {"color": CLASSES[i % 3], "scene": "day" if random.random() < 0.5 else "night"}
            writer.add(f"mine/{i:03}", color(i % 3, random, 100.0), names)
    return folder


def write_baseline(path: Path, shift: str = "noisy") -> Path:
    lines = [f"model,imagenet,{shift}"]
    lines += [f"model {i},{x},{0.8 * x + 3 * (i % 2)}" for i, x in enumerate((40, 50, 60, 70, 80, 90))]
    path.write_text("\n".join(lines) + "\n")
    return path


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


class Colors(nn.Module):
    """Random projections of the mean color; one feature is large in every image. ``fail`` makes it refuse to run."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Linear(3, FEATURES)
        self.blocks = nn.Sequential(nn.Identity(), nn.Identity())
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(FEATURES, 3, generator=generator))
            self.mix.bias.copy_(torch.randn(FEATURES, generator=generator) * 0.1)
            self.mix.bias[OUTLIER] = 40
        self.fail = False

    def forward(self, images: Tensor) -> Tensor:
        if self.fail:
            raise AssertionError("the encoder was run")
        return self.blocks(self.mix(images.mean((2, 3))))


def encoder(seed: int = 0, name: str = "colors") -> Encoder:
    return Encoder(Colors(seed), features=FEATURES, preprocess=pixels, name=name).eval()


def head(encoder: Encoder) -> Head:
    """What the encoder makes of pure colors, as a zero-shot head would be made of captions."""
    pure = torch.zeros(3, 3, 12, 12)
    for label in range(3):
        pure[label, 2 - label] = 0.7
    with torch.no_grad():
        h = encoder(pure)
    weight = nn.functional.normalize(h - h.mean(0), dim=1)
    return Head(weight, -weight @ h.mean(0), names=CLASSES)
