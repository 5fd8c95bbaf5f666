"""The tables of a Broden folder, and which labels each image shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fuzz.target import Target
from torchprobe.datasets import Broden, BrodenWriter, DatasetError, validate

_TABLES = {"index.csv": "csv", "label.csv": "csv", "category.csv": "csv", "c_object.csv": "csv"}


def _make(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with BrodenWriter(folder, {"object": ["sky", "sea", "boat"], "scene": ["beach-s"]}, size=16, image_format="png") as writer:
        for i in range(3):
            writer.add(f"mine/{i}", rng.integers(0, 256, (16, 16, 3), np.uint8), {"object": rng.integers(0, 4, (8, 8)), "scene": "beach-s"})


def _read(folder: Path) -> Any:
    broden = Broden(folder)
    presence = broden.presence(workers=1)
    names = [(label.number, label.name, label.category, label.frequency, label.coverage, label.synonyms) for label in broden.labels]
    maps = [broden.image_labels(i) for i in range(len(broden))]
    return broden.categories, names, [list(row) for row in broden.rows], presence.crow, presence.number, presence.area, maps, repr(broden)


def _validate(folder: Path) -> Any:
    return [str(finding) for finding in validate(folder, workers=1, notes=True)]


def _cached(folder: Path) -> Any:
    found = Broden(folder).presence(folder / "presence.safetensors", workers=1)
    return found.crow, found.number, found.area, found.images(1)


def _make_cached(folder: Path) -> None:
    _make(folder)
    Broden(folder).presence(folder / "presence.safetensors", workers=1)


TARGETS = [
    Target("broden", _TABLES, _make, _read, (DatasetError,), weight=0.3),
    Target("validate", _TABLES, _make, _validate, (), weight=0.3),
    Target(
        "presence", {"presence.safetensors": "safetensors"}, _make_cached, _cached, (), ("presence.safetensors",), restore=True, weight=0.3
    ),
]
