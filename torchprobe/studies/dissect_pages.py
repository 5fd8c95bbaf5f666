"""The pages of a dissection, one for each layer, beside what they are read against."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, random_rotation
from torchprobe.dissection.report import write_report
from torchprobe.studies.dissect import file_names

Nulls = Mapping[str, Mapping[str, Dissection]]
"""Name → layer → dissection."""

CALIBRATION = 512
"""Images from which the statistics of the batch norms of a network at random initialisation are measured."""


def write_pages(
    folder: str | os.PathLike[str],
    results: Mapping[str, Dissection],
    broden: Broden,
    encoder: nn.Module,
    nulls: Nulls | None = None,
    pictures: int = 5,
    evidence: int = 0,
    rotated: bool = False,
    progress: Any = None,
) -> dict[str, Path]:
    """Writes ``<layer>.html`` for each layer; returns {layer: path}.

    Args:
        folder: where to.
        results: see :func:`torchprobe.studies.dissect.dissect_folder`.
        broden, encoder: what they were made from.
        nulls: dissections of the same layers to read these against; layers that one does not have are left out of it.
        pictures: top images of each unit.
        evidence: units whose evidence is shown.
        rotated: the units are those of a random rotation, with the seed of the metadata.
        progress: told (steps done, steps in all): a page is one, and the evidence of each unit another.
    """
    names = file_names(results)
    files = {}
    for before, (layer, dissection) in enumerate(results.items()):
        beside = {name: layers[layer] for name, layers in (nulls or {}).items() if layer in layers}
        basis = random_rotation(dissection.units, int(dissection.metadata.get("seed", 0))) if rotated else None
        path = Path(folder) / f"{names[layer]}.html"

        def tell(done: int, steps: int, before: int = before) -> None:
            if progress is not None:
                progress(before * steps + done, len(results) * steps)

        files[layer or "(output)"] = write_report(
            dissection, path, broden, encoder, nulls=beside, images=pictures, evidence=evidence, basis=basis, progress=tell
        )
    return files


def earlier(folders: Iterable[str | os.PathLike[str]]) -> dict[str, dict[str, Dissection]]:
    """What earlier dissections found, by the name of their folder; see :func:`torchprobe.studies.dissect.dissect_folder`.

    Raises:
        ValueError: a folder holds no finished dissection, or a damaged one.
    """
    found: dict[str, dict[str, Dissection]] = {}
    for folder in map(Path, folders):
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            names = [str(layer["file"]) for layer in summary["layers"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no finished dissection: summary.json is missing or damaged ({error})") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder}: summary.json names {outside[0]!r}, which is no file of the folder")
        results = [Dissection.load(folder / f"{name}.safetensors") for name in names]
        found[_free(folder.resolve().name, found)] = {result.layer: result for result in results}
    return found


def recalibrate(encoder: nn.Module, broden: Broden, batch_size: int = 32, images: int = CALIBRATION) -> None:
    """Measures the statistics of all batch norms anew on the first images of ``broden``, whose order is random; in place.

    With the statistics of an untrained network every layer would differ in scale from the next.
    """
    preprocess: Any = broden.transform or getattr(encoder, "preprocess", None)
    rows = range(min(images, len(broden)))
    starts = range(0, len(rows), batch_size)
    recalibrate_batch_norms(
        encoder, (torch.stack([preprocess(broden.image(row)) for row in rows[start : start + batch_size]]) for start in starts)
    )


def _free(name: str, taken: Mapping[str, object]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name} ({count})"
    return free
