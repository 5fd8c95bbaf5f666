"""Files of embeddings, those of an interrupted run, and representations that were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz.target import Target, resealed
from torchprobe.analysis import Embeddings
from torchprobe.analysis.embeddings_file import GrowingFile, Part, metadata
from torchprobe.analysis.given_files import open_given, open_head

_GENERATOR = torch.Generator().manual_seed(0)
_H = torch.randn(6, 3, generator=_GENERATOR)
_FACTS = {"encoder": "tiny", "data": "a"}


def _make(folder: Path) -> None:
    ids = [f"{i}.png" for i in range(6)]
    classes, groups = (0, 1, 2), {0: (0, 2)}
    Embeddings(_H, torch.arange(6) % 3, ids, [("b.png", "damaged")], classes, groups, _FACTS).save(folder / "h.safetensors")


def _read(folder: Path) -> Any:
    found = Embeddings.load(folder / "h.safetensors")
    return found.h.clone(), found.y, found.ids, found.skipped, found.classes, found.groups, found.provenance, found.partial


def _growing(folder: Path) -> GrowingFile:
    return GrowingFile(folder / "h.safetensors", metadata(_FACTS, None, None), 12)


def _make_progress(folder: Path) -> None:
    file = _growing(folder)
    file.open(resume=False)
    for i in range(2):
        file.append(_part(i))
    file.close()


def _part(i: int) -> Part:
    return Part(_H[3 * i : 3 * i + 3], [0, 1, 2], [f"{3 * i + k}.png" for k in range(3)], [("bad.png", "damaged")])


def _resume(folder: Path) -> Any:
    """What a resumed run ends with: damaged batches are computed again."""
    file = _growing(folder)
    try:
        for i in range(file.open(resume=True), 2):
            file.append(_part(i))
        return file.rows, file.features, file.y, file.ids, file.skipped, file.so_far(file.rows, file.features).clone()
    finally:
        file.close()


def _make_given(folder: Path) -> None:
    np.savez(folder / "h.npz", h=_H.numpy(), y=np.arange(6) % 3, ids=np.array([f"{i}" for i in range(6)]))
    np.save(folder / "head.npy", _H.numpy())


def _given(folder: Path) -> Any:
    found = open_given(folder / "h.npz")
    head = open_head(folder / "head.npy", 3)
    return found.h.clone(), found.y, found.ids, found.provenance, head.weight


_PROGRESS = {".h.safetensors.progress": "lines", ".h.safetensors.part": "raw"}

EMBEDDINGS = Target("embeddings", {"h.safetensors": "safetensors"}, _make, _read, (ValueError,), guarded=("h.safetensors",))
PROGRESS = Target("progress", _PROGRESS, _make_progress, _resume, (ValueError,), guarded=tuple(_PROGRESS), restore=True)

TARGETS = [
    EMBEDDINGS,
    resealed(EMBEDDINGS),
    PROGRESS,
    resealed(PROGRESS),
    Target("given", {"h.npz": "zip", "head.npy": "npy"}, _make_given, _given, (ValueError,)),
]
