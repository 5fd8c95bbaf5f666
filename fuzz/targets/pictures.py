"""Pictures of every format that is read, as data sets and as single photos, and the label maps of Broden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fuzz.target import Target
from torchprobe.datasets import Images
from torchprobe.datasets.broden.image_files import FileError, read_image, read_labels
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.photos import read_photo

_SAVED = {f"a.{ending}": kind for ending, kind in (("jpg", "JPEG"), ("bmp", "BMP"), ("gif", "GIF"), ("ppm", "PPM"), ("tif", "TIFF"))}
_SAVED |= {"a.webp": "WEBP", "a.png": "PNG", "palette.png": "PNG", "gray.png": "PNG"}
_FILES = {name: "png" if name.endswith(".png") else "raw" for name in _SAVED}


def _make(folder: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    image = Image.fromarray(pixels)
    for name, kind in _SAVED.items():
        one = image.convert("P") if name.startswith("palette") else image
        one = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if name.startswith("gray") else one
        one.save(folder / name, kind)


def _tensor(image: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(image.resize((4, 4))))


def _data_set(folder: Path) -> Any:
    found = []
    for path in sorted(folder.iterdir()):
        (batch,) = Images([path]).batches(_tensor, 1, workers=1)
        found.append((batch.pixels, batch.names, len(batch.unreadable)))
    return found


def _photos(folder: Path) -> Any:
    return [np.asarray(read_photo(path)) for path in sorted(folder.iterdir())]


def _make_masks(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    labels = np.zeros((6, 8, 3), np.uint8)
    labels[..., :2] = rng.integers(0, 3, (6, 8, 2))
    Image.fromarray(labels).save(folder / "a.png")
    Image.fromarray(labels).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).save(folder / "photo.png")


def _masks(folder: Path) -> Any:
    return [read_labels(folder / "a.png", 6, 8), read_labels(folder / "alpha.png", 6, 8), np.asarray(read_image(folder / "photo.png"))]


TARGETS = [
    Target("pictures", _FILES, _make, _data_set, (DatasetError,), weight=0.5),
    Target("photos", _FILES, _make, _photos, (DatasetError,), weight=0.5),
    Target("masks", {"a.png": "png", "alpha.png": "png", "photo.png": "png"}, _make_masks, _masks, (FileError,)),
    Target("mask-checksums", {"a.png": "raw"}, _make_masks, lambda folder: read_labels(folder / "a.png", 6, 8), (FileError,), ("a.png",)),
]
