"""Small segmentation data sets in the formats of others, and what a written set shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from torchprobe.datasets import Broden

HEIGHT, WIDTH = 6, 8
EXACT = {"segmentation_size": (HEIGHT, WIDTH)}
"""Options with which the label maps have the size of the images, so that every pixel can be compared."""


def drawn(text: str) -> np.ndarray:
    """A label map from digits, one line for each row; a point is 0.

    >>> drawn("1. .2").tolist()
    [[1, 0], [0, 2]]
    """
    return np.array([[int(c) if c != "." else 0 for c in row] for row in text.split()])


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """A random image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def mask(path: Path, values: np.ndarray, palette: bool = False) -> Path:
    """A mask of 8 or 16 bits, or with a palette whose colors are nothing like the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if palette:
        image = Image.fromarray(values.astype(np.uint8)).convert("P")
        image.putpalette([(37 * i) % 256 for i in range(768)])
    else:
        image = Image.fromarray(values.astype(np.uint16 if values.max() > 255 else np.uint8))
    image.save(path)
    return path


def colors(path: Path, red, green=0, blue=0) -> Path:
    """A PNG in color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack(np.broadcast_arrays(red, green, blue), -1).astype(np.uint8)).save(path)
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, ensure_ascii="\\ud800" in json.dumps(value)), encoding="utf-8")
    return path


def shown(root: Path, image: str) -> dict[str, dict[str, np.ndarray]]:
    """What a data set shows of an image: category → label → pixels, from all planes; whole-image labels are scalars.

    A category for which the image is annotated, and that shows nothing, is empty; others are missing.
    """
    broden = Broden(root)
    names = {label.number: label.name for label in broden.labels}
    index = next(i for i, row in enumerate(broden.rows) if row.image.rpartition(".")[0] == image)
    found: dict[str, dict[str, np.ndarray]] = {}
    for category, labels in broden.image_labels(index):
        numbers = labels.numpy()
        for number in np.unique(numbers):
            own = found.setdefault(category, {})
            if number:
                own[names[int(number)]] = (numbers == number).any(0)
    return found


def assert_shows(root: Path, image: str, expected: dict[str, dict[str, np.ndarray]]) -> None:
    """Every label and every pixel."""
    found = shown(root, image)
    assert {category: set(labels) for category, labels in found.items()} == {c: set(labels) for c, labels in expected.items()}
    for category, labels in expected.items():
        for label, pixels in labels.items():
            np.testing.assert_array_equal(found[category][label], np.asarray(pixels, bool), err_msg=f"{image}: {category}: {label}")


def rows(root: Path) -> list[str]:
    """The images of a data set, sorted."""
    return sorted(row.image for row in Broden(root).rows)


def reasons(remarks) -> dict[str, int]:
    """What happened, by its first words, and how often."""
    return {f"{remark.what}: {remark.reason}": remark.count for remark in remarks}
