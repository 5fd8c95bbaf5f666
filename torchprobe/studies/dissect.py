"""What do the units of an encoder detect? A folder in the format of Broden in, a folder with tables for every layer out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchprobe.common.deprecation import renamed
from torchprobe.common.files import replacing, to_json
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.walk import clear_checkpoint

__all__ = ["dissect_folder", "file_names", "write"]

_CHECKPOINT = "checkpoint"


def dissect_folder(
    encoder: nn.Module,
    broden: Broden | str | os.PathLike[str],
    layers: str | Iterable[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    **options: Any,
) -> dict[str, Dissection]:
    """Dissects layers of an encoder and writes its files: for each layer ``<layer>.safetensors`` (see :meth:`Dissection.load`),
    ``<layer>.csv`` (IoU, with the columns of the original) and ``<layer>-ap.csv``; for all layers one ``summary.json``.

    During the run, checkpoints are in ``out/checkpoint``; they are deleted at the end. Under ``torchrun`` all ranks call this with a folder
    that all of them see; the first rank writes.

    Args:
        encoder: see :func:`torchprobe.dissection.dissect`.
        broden: the data set, or its folder.
        layers: names or globs.
        out: a folder; created if missing.
        resume: resume an interrupted run in ``out``; without one, a new run starts.
        options: for :func:`torchprobe.dissection.dissect`, such as ``batch_size``, ``progress`` and ``stop``.

    Raises:
        ValueError: ``out`` holds an unfinished run and ``resume`` is False, or a finished run and ``resume`` is True; and the errors of
            :func:`torchprobe.dissection.dissect`.

    >>> import tempfile, numpy as np, torch
    >>> from torchprobe.datasets import BrodenWriter
    >>> folder, out = tempfile.mkdtemp(), Path(tempfile.mkdtemp())
    >>> with BrodenWriter(folder, {"object": ["sky", "sea"]}, size=32) as writer:
    ...     for i in range(4):
    ...         writer.add(f"mine/{i}", np.full((32, 32, 3), 50 * i, np.uint8), {"object": np.eye(16, dtype=int) + i % 2})
    >>> def to_tensor(image):
    ...     return torch.from_numpy(np.array(image)).movedim(2, 0) / 255
    >>> _ = dissect_folder(nn.Sequential(nn.Conv2d(3, 8, 5, stride=4)), folder, "0", out, preprocess=to_tensor)
    >>> sorted(path.name for path in out.iterdir())
    ['0-ap.csv', '0.csv', '0.safetensors', 'summary.json']
    """
    broden = broden if isinstance(broden, Broden) else Broden(broden)
    selected = layers if isinstance(layers, str) else list(layers)
    folder = Path(out)
    if resume and (folder / "summary.json").exists() and not (folder / _CHECKPOINT).exists():
        raise ValueError(f"the dissection in {folder} is finished: there is nothing to resume")
    folder.mkdir(parents=True, exist_ok=True)
    results = dissect(encoder, selected, broden, checkpoint=folder / _CHECKPOINT, resume=resume, **options)
    with Ranks() as ranks:
        if ranks.first:
            write(folder, results)
            clear_checkpoint(folder / _CHECKPOINT)
        ranks.barrier()
    return results


def write(folder: Path, results: Mapping[str, Dissection]) -> dict[str, Path]:
    """Writes the files of :func:`dissect_folder`; each replaces an older one. Returns {layer: path of its safetensors file}."""
    names = file_names(results)
    for layer, dissection in results.items():
        if dissection.counts is not None:
            dissection.to_csv(folder / f"{names[layer]}.csv")
        if dissection.average_precision is not None:
            dissection.to_csv(folder / f"{names[layer]}-ap.csv", score="ap")
        dissection.save(folder / f"{names[layer]}.safetensors")
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(to_json({"layers": [{"file": names[name], **d.summary()} for name, d in results.items()]}), encoding="utf-8")
    return {layer: folder / f"{names[layer]}.safetensors" for layer in results}


def file_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer → a file name without suffix that is valid on every system; different layers get different names.

    >>> file_names(["", "visual.layer4", "a/b", "a:b"])
    {'': 'output', 'visual.layer4': 'visual.layer4', 'a/b': 'a_b', 'a:b': 'a_b-2'}
    """
    names: dict[str, str] = {}
    for layer in layers:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", layer).strip(".")[:100] or "output"
        count, name = 1, plain
        while name.lower() in {other.lower() for other in names.values()} | {"summary"}:
            count += 1
            name = f"{plain}-{count}"
        names[layer] = name
    return names


def summary(dissection: Dissection, thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)) -> dict[str, Any]:
    """Deprecated: :meth:`Dissection.summary`."""
    warnings.warn("torchprobe.studies.dissect.summary is deprecated, use Dissection.summary()", DeprecationWarning, stacklevel=2)
    return dissection.summary(thresholds)


__getattr__ = renamed(__name__, {"Progress": "torchprobe.common.progress:Progress"})
