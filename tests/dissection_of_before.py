"""A small dissection whose files are in ``tests/data/dissection``, written by torchprobe 0.1.0 before its second edition.

``python tests/dissection_of_before.py FOLDER`` writes them anew with the torchprobe that is installed: run it at commit ec21db8.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import dissect

DATA = Path(__file__).parent / "data" / "dissection"


class Pixels(nn.Module):
    """Nothing that a processor may round in its own way, and no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)


def write_set(root: Path) -> Broden:
    rng = np.random.default_rng(0)
    scenes = {"object": ["sky", "sea", "boat"], "scene": ["beach-s", "harbor-s"]}
    with BrodenWriter(root / "broden", scenes, size=16, image_format="png") as writer:
        for i in range(7):
            objects = rng.integers(0, 4, (4, 4)).repeat(2, 0).repeat(2, 1)
            image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            writer.add(f"mine/{i}", image, {"object": objects, **({"scene": scenes["scene"][i % 2]} if i < 5 else {})})
    return Broden(root / "broden")


def to_tensor(image: object) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0).float()


OPTIONS = {"preprocess": to_tensor, "batch_size": 2, "quantile": 0.1, "top": 3, "keep_scores": True, "memory": 1 << 12, "workers": 1}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        broden = write_set(Path(temporary))
        found = dissect(Pixels(), "maps", broden, checkpoint=Path(temporary) / "whole", **OPTIONS)["maps"]
        found.save(folder / "maps.safetensors")
        found.to_csv(folder / "maps.csv")
        found.to_csv(folder / "maps-ap.csv", score="ap")
        shutil.copy(Path(temporary) / "whole" / "presence.safetensors", folder)

        def interrupt(progress) -> None:
            if progress.stage == "overlap" and progress.done >= 4:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            dissect(Pixels(), "maps", broden, checkpoint=folder / "checkpoint", progress=interrupt, **OPTIONS)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
