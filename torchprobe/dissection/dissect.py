"""From a model and a Broden folder to what every unit detects."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.digest import digest
from torchprobe.common.progress import ProgressCallback
from torchprobe.common.ranks import Ranks
from torchprobe.datasets.broden import Broden
from torchprobe.dissection.bases import random_rotation
from torchprobe.dissection.batches import Batches
from torchprobe.dissection.dissection import Dissection
from torchprobe.dissection.run import SCORES, Run, Settings
from torchprobe.dissection.taps import Site, Taps
from torchprobe.dissection.walk import Checkpoint
from torchprobe.recording.layers import Selection
from torchprobe.statistics.quantile import MEMORY, NETDISSECT

Basis = Tensor | Mapping[str, Tensor] | str | None


def dissect(
    model: nn.Module,
    layers: Selection,
    broden: Broden,
    *,
    score: str | Sequence[str] = SCORES,
    mode: str = "default",
    quantile: float | Fraction | None = None,
    thresholds: Mapping[str, Tensor] | None = None,
    basis: Basis = None,
    positions: str = "patch",
    feature_dim: int | Mapping[str, int] | None = None,
    pooling: str = "max",
    sign: str = "positive",
    negatives: str = "category",
    minimum_area: float = 0.0,
    top: int = 20,
    images: Iterable[int] | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    workers: int = 2,
    memory: int = MEMORY,
    seed: int = 0,
    shuffle_labels: int | None = None,
    keep_scores: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Dissection]:
    """Matches every unit of some layers with every concept of a data set: Network Dissection, and average precision.

    The images pass the network twice: first for the thresholds, the scores for average precision and the top images; then, for IoU, to
    count. No map is stored: memory is that of the counts (units × labels), the thresholds (``memory`` a layer), and the scores
    (units × images, float32). Under ``torchrun`` the ranks share the batches, and every rank returns the same: the same counts as one
    process, to the last pixel, as long as the thresholds are exact (see :class:`torchprobe.statistics.Quantile`).

    Args:
        model: an :class:`torchprobe.Encoder` or any module that takes images (N, 3, H, W). It is run in eval mode, without gradients.
        layers: see :func:`torchprobe.record`.
        broden: the images and their labels.
        score: "iou", "ap" or both. For IoU a layer must have positions: maps (N, C, H, W) or tokens (N, T, C) with a grid of patches.
        mode: of IoU, see :class:`Overlap`.
        quantile: a unit is active above the level that this share of all its values exceeds. Default 0.005; in the mode "netdissect"
            5/999, as in the original.
        thresholds: {layer: (units,)}, instead of computing them: then the counts of parts of a data set can be merged.
        basis: directions instead of units, as rows (k, features): a tensor, ``{layer: tensor}``, or "rotation", a random rotation with
            ``seed``, the control. See :func:`singular_vectors`.
        positions: which tokens: "patch" (without class token and registers), "class" or "all"; the latter two for "ap" only.
        feature_dim: see :func:`torchprobe.record`.
        pooling: how a map becomes a score for average precision and top images: "max" or "mean".
        sign, negatives, minimum_area: of average precision, see :func:`average_precision` and :func:`concept_matrix`.
        top: images to keep for each unit; 0 for none.
        images: rows of ``broden``; default: all.
        preprocess: PIL image → tensor (3, H, W). Default: the transform of ``broden``, or that of the encoder.
        batch_size: images in a batch. Part of the definition: a network gives slightly different numbers in batches of another size.
        device: where the model runs; default: where it is.
        workers: threads that decode.
        memory: bytes for the thresholds of one layer, see :class:`torchprobe.statistics.Quantile`.
        seed: of the rotation and of sampling where the thresholds are not exact.
        shuffle_labels: give the images each other's labels, at random with this seed: the null of both scores.
        keep_scores: keep scores and labels in the result, for merging average precision and for permutation tests.
        checkpoint: a folder to go on from after an interruption (``resume=True``) with the same arguments; all ranks must see it.
        checkpoint_every: seconds between savings.
        resume: go on with what is in the folder.
        progress: is told a :class:`Progress` after every batch.

    Returns:
        {layer: Dissection}, in the order of the model.

    Raises:
        ValueError: an argument does not fit, or a layer has no positions for IoU; before any image is read but the first.
        DatasetError: a picture or label map cannot be read; names the row.

    >>> import tempfile, numpy as np
    >>> from torchprobe.datasets import Broden, BrodenWriter
    >>> folder = tempfile.mkdtemp()
    >>> with BrodenWriter(folder, {"object": ["sky", "sea"]}, size=32) as writer:
    ...     for i in range(4):
    ...         writer.add(f"mine/{i}", np.full((32, 32, 3), 50 * i, np.uint8), {"object": np.eye(16, dtype=int) + i % 2})
    >>> def to_tensor(image):
    ...     return torch.from_numpy(np.array(image)).movedim(2, 0) / 255
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU())
    >>> result = dissect(net, "1", Broden(folder), preprocess=to_tensor)["1"]
    >>> result.iou.shape, result.average_precision.shape
    (torch.Size([8, 2]), torch.Size([8, 2]))
    """
    scores = (score,) if isinstance(score, str) else tuple(score)
    if quantile is None:
        quantile = NETDISSECT if mode == "netdissect" else 0.005
    settings = Settings(
        tuple(s for s in SCORES if s in scores) if set(scores) <= set(SCORES) else scores,
        mode, str(quantile), positions, pooling, sign, negatives, float(minimum_area), top, batch_size, memory, seed, shuffle_labels,
    )  # fmt: skip
    preprocess = preprocess or broden.transform or getattr(model, "preprocess", None)
    if preprocess is None:
        raise ValueError("nothing says how a picture becomes a tensor: give preprocess=, or a Broden with a transform")
    rows = list(range(len(broden))) if images is None else sorted(int(i) for i in images)
    if not rows or rows[0] < 0 or rows[-1] >= len(broden) or len(set(rows)) < len(rows):
        raise ValueError(f"images must be distinct rows of {broden!r}, at least one")
    if device is not None:
        model = model.to(device)
    place = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    of = _shuffled(rows, shuffle_labels)
    batches = Batches(broden, rows, preprocess, batch_size, workers, of.__getitem__)
    with Ranks() as ranks, Taps(model, layers, feature_dim) as taps:
        sites = _sites(taps, batches.image(rows[0])[None].to(place), settings, basis)
        known = _thresholds_given(thresholds, sites) if thresholds is not None else None
        facts = _facts(model, broden, rows, settings, sites, known)
        saved = None if checkpoint is None else Checkpoint(Path(checkpoint), facts, resume, checkpoint_every, ranks)
        return Run(taps, sites, batches, settings, of, facts, known, ranks, saved, place, progress, workers, keep_scores).result()


def _sites(taps: Taps, image: Tensor, settings: Settings, basis: Basis) -> dict[str, Site]:
    """How to read each layer, in its basis; refused are layers without positions when IoU is asked for."""
    sites = taps.sites(image, settings.positions)
    bases = _bases(basis, {name: site.features for name, site in sites.items()}, settings.seed)
    if bases:
        sites = taps.sites(image, settings.positions, bases)
    for site in sites.values():
        if "iou" in settings.score and not site.has_map:
            raise ValueError(
                f"layer {site.layer!r} has no positions (its activation has {site.dims} dimensions, positions={settings.positions!r}), so "
                'there is no overlap with label maps: score it by average precision (score="ap"), or choose a layer before the pooling'
            )
    return sites


def _bases(basis: Basis, widths: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    if basis is None:
        return {}
    if isinstance(basis, str):
        if basis != "rotation":
            raise ValueError(f'basis must be a tensor, {{layer: tensor}} or "rotation", got {basis!r}')
        return {layer: random_rotation(width, seed) for layer, width in widths.items()}
    if isinstance(basis, Tensor):
        return dict.fromkeys(widths, basis)
    if unknown := sorted(basis.keys() - widths.keys()):
        raise ValueError(f"basis has directions for layer {unknown[0]!r}, which is not dissected")
    return dict(basis)


def _thresholds_given(thresholds: Mapping[str, Tensor], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    for layer, site in sites.items():
        if layer not in thresholds or thresholds[layer].shape != (site.units,):
            given = tuple(thresholds[layer].shape) if layer in thresholds else "none"
            raise ValueError(f"layer {layer!r} needs thresholds of shape ({site.units},), got {given}")
    return {layer: thresholds[layer].detach().float().cpu() for layer in sites}


def _shuffled(rows: list[int], seed: int | None) -> dict[int, int]:
    """Row → the row whose labels it gets."""
    if seed is None:
        return {row: row for row in rows}
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return {row: rows[other] for row, other in zip(rows, order, strict=True)}


def _facts(
    model: nn.Module,
    broden: Broden,
    rows: list[int],
    settings: Settings,
    sites: Mapping[str, Site],
    thresholds: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """What the result depends on: metadata, and what a resumed run must have in common with the interrupted one."""
    described = {
        name: {
            "units": site.units,
            "grid": None if site.grid is None else list(site.grid),
            "basis": None if site.basis is None else digest([site.basis]),
            "thresholds": None if thresholds is None else digest([thresholds[name]]),
        }
        for name, site in sites.items()
    }
    data = hashlib.sha256((broden.root / "index.csv").read_bytes())
    data.update(repr((broden.split, broden.categories, rows)).encode())
    return {
        "model": str(getattr(model, "name", type(model).__name__)),
        "weights": digest([*model.parameters(), *model.buffers()]),
        "dataset": {"name": broden.root.name, "images": len(rows), "digest": data.hexdigest()},
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()},
        "sites": described,
    }
