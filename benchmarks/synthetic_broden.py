"""A data set of Broden's size and statistics, without pictures: labels and maps are generated."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from PIL import Image
from torch import Tensor, nn

from torchprobe.datasets.broden import Broden, Label, Presence, Row
from torchprobe.datasets.broden.presence import image_areas

IMAGES, LABELS, GRID = 63_305, 1_197, 112
CATEGORIES = {"color": 11, "object": 500, "part": 150, "material": 32, "texture": 47, "scene": 457}
_TEMPLATES = 512


def image_labels(generator: torch.Generator) -> list[tuple[str, Tensor]]:
    """About 15 labels in coherent regions: a plane of colors, one of objects, often one or two of parts, and a scene."""

    def plane(category: str, labels: int, cell: int) -> Tensor:
        # Frequent labels are much more frequent than rare ones, as in Broden.
        chosen = _FIRST[category] + (CATEGORIES[category] * torch.rand(labels, generator=generator) ** 3).int()
        coarse = chosen[torch.randint(labels, (-(-GRID // cell), -(-GRID // cell)), generator=generator)]
        return repeat(coarse, "h w -> (h a) (w b)", a=cell, b=cell)[:GRID, :GRID]

    found = [("color", plane("color", 9, 7)[None]), ("object", plane("object", 10, 14)[None])]
    if float(torch.rand((), generator=generator)) < 0.35:
        found.append(("part", torch.stack([plane("part", 3, 16) for _ in range(int(torch.randint(1, 3, (), generator=generator)))])))
    found.append(("scene", _FIRST["scene"] + torch.randint(CATEGORIES["scene"], (1,), generator=generator, dtype=torch.int32)))
    return found


_FIRST = {name: 1 + sum(list(CATEGORIES.values())[:i]) for i, name in enumerate(CATEGORIES)}


class SyntheticBroden(Broden):
    """``images`` rows with the labels of 512 pictures in turn, and different scenes so that rows differ. A "picture" is one pixel, whose
    color is its number."""

    def __init__(self, images: int = IMAGES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.root = Path(tempfile.mkdtemp(prefix="torchprobe-"))
        (self.root / "index.csv").write_text(f"synthetic {images} {seed}\n")
        self.index, self.split, self.transform, self._presence = "index.csv", None, None, None
        self.categories = tuple(CATEGORIES)
        names = [(name, first + i) for name, first in _FIRST.items() for i in range(CATEGORIES[name])]
        self.labels = tuple(Label(number, f"{name} {number}", name, (name,), 10, 1.0) for name, number in names)
        self.label_size = LABELS + 1
        self.primary = torch.tensor([5, *(list(CATEGORIES).index(label.category) for label in self.labels)])
        self.rows = [Row(i + 2, f"{i}.jpg", "train", 2 * GRID, 2 * GRID, GRID, GRID, ()) for i in range(images)]
        self._templates = [image_labels(generator) for _ in range(_TEMPLATES)]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Any:
        return Image.new("RGB", (1, 1), (index & 255, index >> 8 & 255, index >> 16))

    def content(self, index: int, labels: bool = False) -> int:
        return index

    def annotated(self) -> Tensor:
        known = torch.zeros(len(self), len(CATEGORIES), dtype=torch.bool)
        for index in range(len(self)):
            known[index, [self.categories.index(name) for name, _ in self._templates[index * 7919 % _TEMPLATES]]] = True
        return known

    def image_labels(self, index: int) -> list[tuple[str, Tensor]]:
        *planes, (_, scene) = self._templates[index * 7919 % _TEMPLATES]
        moved = (scene - _FIRST["scene"] + index) % CATEGORIES["scene"] + _FIRST["scene"]
        return [*planes, ("scene", moved)]

    def presence(self, cache: Any = None, workers: int = 2, progress: Any = None, rows: Sequence[int] | None = None) -> Presence:
        """From the areas of the templates, without decoding anything."""
        if self._presence is None:
            areas = [image_areas(planes[:-1], self.label_size) for planes in self._templates]
            numbers, shares, counts = [], [], [0]
            for index in range(len(self)):
                number, share = areas[index * 7919 % _TEMPLATES]
                numbers += [number, self.image_labels(index)[-1][1]]
                shares += [share, torch.ones(1)]
                counts.append(len(number) + 1)
            self._presence = Presence(torch.tensor(counts).cumsum(0), torch.cat(numbers), torch.cat(shares))
        return self._presence if rows is None else self._presence.take(rows)


class GeneratedMaps(nn.Module):
    """A network's stand-in: numbers of pictures (N, 1, 1, 1) → rectified maps (N, units, h, w), different for each picture."""

    def __init__(self, units: int = 2048, size: int = 7, bank: int = 64) -> None:
        super().__init__()
        self.maps = nn.Identity()
        self.register_buffer("bank", smooth_maps(bank, units, size))

    def forward(self, numbers: Tensor) -> Tensor:
        index = numbers.flatten().long()
        scale = 1 + ((index * 2654435761) % 65537) / 65537
        bank = self.get_buffer("bank")
        maps: Tensor = self.maps(bank[index % len(bank)] * scale[:, None, None, None])
        return maps


def smooth_maps(images: int, units: int, size: int, seed: int = 0) -> Tensor:
    """Rectified maps with similar neighbors, like those of a last convolution."""
    noise = torch.randn(images, units, size, size, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.avg_pool2d(noise, 3, 1, 1) * 3 - 1).relu_()


def number(picture: Any) -> Tensor:
    """The preprocessing: a picture's number, which is its color, as a tensor (1, 1, 1)."""
    red, green, blue = picture.getpixel((0, 0))
    return torch.tensor([[[float(red + (green << 8) + (blue << 16))]]])
