"""The dissection of a real network on real pictures, and its nulls: random weights, and shuffled labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchprobe.common.progress import CountCallback
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, dissect
from torchprobe.encoders import Encoder
from torchprobe.studies.demo import SEEDS, photos, trained, untrained
from torchprobe.studies.demo_broden import demo_broden
from torchprobe.studies.dissect import write
from torchprobe.studies.dissect_pages import write_pages

LAYERS = ("visual.blocks.4", "visual.bn2")
"""The middle of the network, with 14 × 14 positions, and its last map, 7 × 7."""

BATCH = 16
SHUFFLED = "trained, labels shuffled"


@dataclass
class DemoDissection:
    """``results``: the layers of the trained network. ``nulls``: name → layers. ``encoder``, ``broden``: network and data set of both."""

    results: dict[str, Dissection]
    nulls: dict[str, dict[str, Dissection]]
    encoder: Encoder
    broden: Broden

    def summary(self) -> dict[str, Any]:
        """``layers`` and ``nulls``, these by name, as plain numbers; see :meth:`Dissection.summary`."""
        nulls = {name: [layer.summary() for layer in layers.values()] for name, layers in self.nulls.items()}
        return {"layers": [layer.summary() for layer in self.results.values()], "nulls": nulls}

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Tables, results and a page for each layer; returns {layer: page}."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write(Path(folder), self.results)
        return write_pages(folder, self.results, self.broden, self.encoder, self.nulls)


def demo_dissection(folder: str | os.PathLike[str], progress: CountCallback | None = None) -> DemoDissection:
    """Dissects EfficientNet-Lite0: trained on ImageNet, the same with shuffled labels, and three random initializations.

    Args:
        folder: where the data set is written, see :func:`torchprobe.studies.demo_broden.demo_broden`.
        progress: called with (dissections done, dissections in all).
    """
    pictures = photos()
    broden = demo_broden(Path(folder) / "broden", pictures)
    encoder, _ = trained()
    total = 2 + len(SEEDS)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    results = dissect(encoder, LAYERS, broden, batch_size=BATCH)
    tell(1)
    nulls = {SHUFFLED: dissect(encoder, LAYERS, broden, batch_size=BATCH, shuffle_labels=0, top=0)}
    tell(2)
    for done, seed in enumerate(SEEDS, 3):
        nulls[f"random weights, seed {seed}"] = dissect(untrained(seed, pictures), LAYERS, broden, batch_size=BATCH, top=0)
        tell(done)
    return DemoDissection(results, nulls, encoder, broden)
