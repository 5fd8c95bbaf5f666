"""Dissect a layer with your own concepts: images with label maps in, a page out. No download; one minute on two cores.

    python examples/dissect.py

The images are drawn here: discs and squares in four colors on noise. They are written in the format of Broden. A small network is trained
to predict the area of the discs, whatever their color. Its middle layer is dissected before training, after training, and with shuffled
labels. Needs pillow and the packages of ``torchprobe-interp[report]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import dissect
from torchprobe.dissection.report import write_report

SIZE = 64
COLORS = {"red-c": (200, 40, 40), "green-c": (50, 160, 60), "blue-c": (50, 80, 200), "yellow-c": (230, 210, 60)}
SHAPES = ("disc", "square")


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (64, 64, 3), and the shape and color of each pixel, counted from 1; 0 is background."""
    image = rng.integers(90, 160, (SIZE, SIZE, 3)).astype(np.uint8)
    shape, color = np.zeros((2, SIZE, SIZE), int)
    y, x = np.mgrid[:SIZE, :SIZE]
    for _ in range(rng.integers(1, 6)):
        (cy, cx), r = rng.integers(8, SIZE - 8, 2), rng.integers(4, 9)
        kind, tint = rng.integers(2), rng.integers(4)
        inside = np.hypot(y - cy, x - cx) < r if kind == 0 else np.maximum(abs(y - cy), abs(x - cx)) < r
        image[inside] = np.clip(np.array(list(COLORS.values())[tint]) + rng.integers(-20, 20, (inside.sum(), 3)), 0, 255)
        shape[inside], color[inside] = kind + 1, tint + 1
    return image, shape, color


def to_tensor(image: object) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0) / 255 - 0.5


def network() -> nn.Sequential:
    def block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    return nn.Sequential(block(3, 16), block(16, 32), block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("shapes"))
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(options.images)]
    folder = options.output / "broden"
    if not (folder / "index.csv").exists():
        with BrodenWriter(folder, {"object": SHAPES, "color": list(COLORS)}, size=SIZE, image_format="png") as writer:
            for i, (image, shape, color) in enumerate(drawn):
                writer.add(f"shapes/{i:04d}", image, {"object": shape, "color": color})
    broden = Broden(folder, transform=to_tensor)

    torch.manual_seed(0)
    model = network()
    images = torch.stack([to_tensor(image) for image, _, _ in drawn])
    discs = torch.tensor([[(shape == 1).mean() * 20] for _, shape, _ in drawn], dtype=torch.float32)
    with torch.no_grad():
        model(images)  # gives the batch norms their first statistics
    before = dissect(model, "1", broden)["1"]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(32):
            loss = nn.functional.mse_loss(model(images[batch]), discs[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"after {options.epochs} epochs: squared error of the area {loss.item():.3f}, variance {discs.var():.3f}")

    after = dissect(model, "1", broden)["1"]
    nulls = {"before training": before, "labels shuffled": dissect(model, "1", broden, shuffle_labels=0)["1"]}
    for name, d in {"after training": after, **nulls}.items():
        found = d.unique_detectors("report")
        print(f"{name:<16} {found.detectors:>2} of {d.units} units are detectors, of {found.unique} concepts; the best:", end=" ")
        print(", ".join(f"{row.unit} {row.label} {row.score:.2f}" for row in d.best()[:3]))
    after.to_csv(options.output / "units.csv")
    print(write_report(after, options.output / "index.html", broden, model, nulls=nulls).resolve())


if __name__ == "__main__":
    main()
