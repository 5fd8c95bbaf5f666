"""Suites of encoders in TOML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fuzz.target import Target
from torchprobe.encoders import EncoderError
from torchprobe.encoders.suite import load_suite

_TEXT = """[[encoder]]
name = "ViT-B-32/openai"
role = "zero-shot"
backbone = "ViT-B-32"
pretraining = "OpenAI"
source = "open_clip:ViT-B-32/openai"
accuracy = { imagenet = 63.3, imagenet_v2 = 55.9 }

[[encoder]]
name = "fine-tuned"
role = "fine-tuned"
backbone = "ViT-B-32"
pretraining = "OpenAI"
source = "open_clip:ViT-B-32/openai"
checkpoint = "weights/a.pt"
head = "own"
normalize = true
"""


def _make(folder: Path) -> None:
    (folder / "suite.toml").write_text(_TEXT)


def _read(folder: Path) -> Any:
    rows = load_suite(folder / "suite.toml")
    return [(dataclasses.asdict(row), row.missing()) for row in rows]


TARGETS = [Target("suite", {"suite.toml": "toml"}, _make, _read, (EncoderError,))]
