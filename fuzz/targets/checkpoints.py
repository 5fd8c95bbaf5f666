"""Checkpoints of interrupted dissections, with labels and with words. A resumed run ends with the right result, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuzz.target import Target, resealed
from fuzz.targets.dissections import model, preprocess, small_broden, small_photos, use, use_words
from torchprobe.datasets import Broden, image_folder
from torchprobe.dissection import dissect
from torchprobe.dissection.words import dissect_words

_BATCHES = 3
"""Of each pass."""


def _after(batches: int) -> Callable[[], bool]:
    """Says after so many batches that the run is to stop."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > batches

    return stop


def _dissect(folder: Path, **options: Any) -> Any:
    found = dissect(
        model(), "0", Broden(folder / "set"), preprocess=preprocess, batch_size=2, top=2, quantile=0.2, iou_permutations=2,
        checkpoint=folder / "run", checkpoint_every=0, workers=1, **options,
    )  # fmt: skip
    return use(found["0"])


def _interrupted(batches: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        small_broden(folder / "set")
        try:
            _dissect(folder, stop=_after(batches))
        except KeyboardInterrupt:
            return
        raise AssertionError("the run was not interrupted")

    return make


def _resume(folder: Path) -> Any:
    return _dissect(folder, resume=True)


class _Labeler(nn.Module):
    """Embeds an image as its mean color, and a text as one of three directions."""

    name = "mean color"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.preprocess = preprocess

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ self.weight

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.weight[len(text) % 3] for text in texts]).detach()


def _words(folder: Path, **options: Any) -> Any:
    found = dissect_words(
        model(), "0", image_folder(folder / "photos"), _Labeler(), ["cat", "bird", "horse"], permutations=2, top=2, batch_size=2,
        preprocess=preprocess, checkpoint=folder / "run", checkpoint_every=0, workers=1, **options,
    )  # fmt: skip
    return use_words(found["0"])


def _make_words(folder: Path) -> None:
    small_photos(folder / "photos")
    (folder / "photos" / "damaged.png").write_bytes(b"no picture")
    try:
        _words(folder, stop=_after(_BATCHES + 3))
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not interrupted")


def _resume_words(folder: Path) -> Any:
    return _words(folder, resume=True)


def _target(name: str, files: tuple[str, ...], make: Callable[[Path], None], read: Callable[[Path], Any]) -> Target:
    paths = {f"run/{file}": "json" if file.endswith(".json") else "safetensors" for file in files}
    return Target(name, paths, make, read, (ValueError,), guarded=tuple(paths), restore=True, weight=0.05)


_FIRST = ("settings.json", "thresholds-rank0.safetensors", "thresholds-rows-0-0.safetensors", "maps-0-0-0.safetensors")
_SECOND = ("thresholds-rows-1-1.safetensors", "overlap-rank0.safetensors", "maps-0-1-1.safetensors")
_WORDS = ("settings.json", "labeler-rank0.safetensors", "labeler-rows-0-0.safetensors", "words-rank0.safetensors")

FIRST_PASS = _target("checkpoints-first-pass", _FIRST, _interrupted(_BATCHES - 1), _resume)
SECOND_PASS = _target("checkpoints-second-pass", (*_FIRST, *_SECOND), _interrupted(_BATCHES + 2), _resume)
WORDS = _target("checkpoints-words", (*_WORDS, "words-rows-1-1.safetensors"), _make_words, _resume_words)

TARGETS = [made for target in (FIRST_PASS, SECOND_PASS, WORDS) for made in (target, resealed(target))]
