"""Dissections: results, tables of the original, summaries, soft labels and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fuzz.target import Target, resealed
from torchprobe.datasets import Broden, BrodenWriter, DatasetError, image_folder
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.words import SoftLabels, WordDissection, dissect_words, read_concepts
from torchprobe.dissection.words.soft_labels import read_soft_labels
from torchprobe.studies.dissect import earlier

_WORDS = ["cat", "dog", "sea"]


def preprocess(image: Any) -> torch.Tensor:
    """Pixels between 0 and 1."""
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


def model() -> nn.Sequential:
    """Four units with maps."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4))


def small_broden(folder: Path) -> Broden:
    """Six pictures of noise, with labels of noise."""
    rng = np.random.default_rng(0)
    with BrodenWriter(folder, {"object": ["sky", "sea"], "scene": ["beach-s", "city-s"]}, size=16, image_format="png") as writer:
        for i in range(6):
            labels = {"object": rng.integers(0, 3, (8, 8)), "scene": ("beach-s", "city-s")[i % 2]}
            writer.add(f"mine/{i}", rng.integers(0, 256, (16, 16, 3), np.uint8), labels)
    return Broden(folder)


def small_photos(folder: Path) -> None:
    """Six pictures of noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")


def _dissect(broden: Broden, **options: Any) -> dict[str, Dissection]:
    return dissect(model(), "0", broden, preprocess=preprocess, batch_size=2, top=2, quantile=0.2, **options)


def use(found: Dissection) -> Any:
    """What a dissection says."""
    rows = [str(row) for row in (*found.best(), *found.concepts())]
    return found.iou, found.average_precision, found.thresholds, found.summary(), rows


def _make(folder: Path) -> None:
    (found,) = _dissect(small_broden(folder / "set")).values()
    found.save(folder / "0.safetensors")


def _read(folder: Path) -> Any:
    return use(Dissection.load(folder / "0.safetensors"))


def _make_csv(folder: Path) -> None:
    (found,) = _dissect(small_broden(folder / "set")).values()
    found.to_csv(folder / "iou.csv")
    found.to_csv(folder / "ap.csv", score="ap")


def _read_csv(folder: Path) -> Any:
    found = [Dissection.from_csv(folder / name) for name in ("iou.csv", "ap.csv")]
    return [(one.iou, one.average_precision, [str(row) for row in one.best()]) for one in found]


def _make_summary(folder: Path) -> None:
    (found,) = _dissect(small_broden(folder / "set")).values()
    (folder / "run").mkdir()
    found.save(folder / "run" / "0.safetensors")
    (folder / "run" / "summary.json").write_text(json.dumps({"layers": [{"file": "0", "units": 4}]}))


def _read_summary(folder: Path) -> Any:
    return [(name, layer, found.iou) for name, layers in earlier([folder / "run"]).items() for layer, found in layers.items()]


def _make_words(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = SoftLabels(torch.rand(6, 3, generator=generator), _WORDS, [f"{i}.png" for i in range(6)])
    labels.save(folder / "labels.safetensors")
    np.save(folder / "labels.npy", labels.values.numpy())
    (folder / "concepts.txt").write_text("# animal\ncat\ndog\n# place\nsea\n")


def _read_words(folder: Path) -> Any:
    concepts = read_concepts(folder / "concepts.txt")
    one, two = read_soft_labels(folder / "labels.safetensors", concepts), read_soft_labels(folder / "labels.npy", concepts)
    return concepts.names, concepts.kinds, concepts.remarks, one.values, one.images, two.values


def _make_word_dissection(folder: Path) -> None:
    small_photos(folder / "photos")
    labels = SoftLabels(torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), _WORDS, [f"{i}.png" for i in range(6)])
    found = dissect_words(model(), "0", image_folder(folder / "photos"), labels, permutations=2, preprocess=preprocess, keep_scores=True)
    found["0"].save(folder / "words.safetensors")


def _read_word_dissection(folder: Path) -> Any:
    return use_words(WordDissection.load(folder / "words.safetensors"))


def use_words(found: WordDissection) -> Any:
    """What a dissection with words says."""
    return found.score, found.p_values, [str(row) for row in found.rows()], found.summary()


DISSECTIONS = Target("dissections", {"0.safetensors": "safetensors"}, _make, _read, (ValueError,), guarded=("0.safetensors",), weight=0.3)
SOFT_LABELS = Target(
    "soft-labels",
    {"labels.safetensors": "safetensors", "labels.npy": "npy", "concepts.txt": "raw"},
    _make_words,
    _read_words,
    (ValueError, DatasetError),
    guarded=("labels.safetensors",),
)
WORDS = Target(
    "words",
    {"words.safetensors": "safetensors"},
    _make_word_dissection,
    _read_word_dissection,
    (ValueError,),
    guarded=("words.safetensors",),
    weight=0.5,
)

TARGETS = [
    DISSECTIONS,
    resealed(DISSECTIONS),
    Target("dissection-tables", {"iou.csv": "csv", "ap.csv": "csv"}, _make_csv, _read_csv, (ValueError,), weight=0.2),
    Target("dissection-summaries", {"run/summary.json": "json"}, _make_summary, _read_summary, (ValueError,)),
    SOFT_LABELS,
    resealed(SOFT_LABELS),
    WORDS,
    resealed(WORDS),
]
