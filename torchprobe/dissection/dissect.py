"""From a model and a Broden folder to what every unit detects."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.facts import digest_of
from torchprobe.common.messages import stable_repr
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import ProgressCallback, RunOptions
from torchprobe.common.storage import digest
from torchprobe.datasets.broden import Broden
from torchprobe.datasets.broden.identity import broden_facts
from torchprobe.datasets.geometry import Box, Geometry, fingerprint
from torchprobe.dissection.bases import Basis, basis_of, check_layers, describe_basis, fitting_batch_size
from torchprobe.dissection.batches import Batches, Preprocess, find_preprocess
from torchprobe.dissection.dissection import Dissection
from torchprobe.dissection.facts import index_fact, own_modules, run_facts, transform_fact
from torchprobe.dissection.layer_tables import SCORES
from torchprobe.dissection.run import Run, Settings, estimates
from torchprobe.dissection.taps import Site, find_sites
from torchprobe.dissection.walk import Checkpoint
from torchprobe.recording.layers import Selection, select_layers
from torchprobe.recording.reader import LayerReader
from torchprobe.statistics.quantile import MEMORY, NETDISSECT


@renamed_arguments(images="rows")
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
    rows: Iterable[int] | None = None,
    preprocess: Preprocess | str | None = None,
    geometry: str | Callable[[int, int], Box] | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    workers: int = 2,
    memory: int = MEMORY,
    disk: float = 8.0,
    seed: int = 0,
    shuffle_labels: int | None = None,
    iou_permutations: int = 0,
    keep_scores: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Dissection]:
    """Compares every unit of some layers with every concept of a data set: Network Dissection, and average precision.

    The images pass the network once. This pass finds the thresholds, the scores for average precision and the top images; maps that may
    exceed their threshold wait on the disk. Then the labels are read and pixels are counted for IoU. Layers whose maps need more than
    ``disk``, such as early ones, pass the network a second time, as the progress says. The result is the same. Memory is
    needed for the counts (units × labels), the thresholds (``memory`` for each layer) and the scores (units × images, float32).

    A map is compared with the labels where the network looked: on the part of the picture that the input shows. Label pixels elsewhere are
    counted apart, in ``outside``. By default the network is shown the whole picture, as in the original.

    Under ``torchrun`` the ranks share the batches, and every rank returns the same result. If the thresholds are exact, the counts are
    those of one process, to the last pixel (see :class:`torchprobe.statistics.Quantile`). If ``memory`` is too small for that, they depend
    on the number of ranks. A run that was interrupted and resumed gives the same result as one that was not, in both cases; if thresholds
    are estimated, it must be resumed with as many ranks.

    Args:
        model: an :class:`torchprobe.Encoder` or any module that takes images (N, 3, H, W). It runs in eval mode, without gradients.
        layers: see :func:`torchprobe.record`.
        broden: the images and their labels.
        score: "iou", "ap" or both. For IoU a layer must have positions: maps (N, C, H, W), or tokens (N, T, C) with a grid of patches.
        mode: of IoU, see :class:`Overlap`.
        quantile: a unit is active above the level that this share of all its values exceeds. Default: 0.005; in the mode "netdissect"
            5/999, as in the original.
        thresholds: {layer: (units,)}: use these instead of computing them. Then the counts of parts of a data set can be merged.
        basis: directions instead of units, as rows (k, features): a tensor, ``{layer: tensor}``, or "rotation" for a random rotation with
            ``seed``, which is the control. See :func:`singular_vectors`. Or latents: a :class:`SparseBasis`, or a module from features
            to latents; the result then has their ``density``.
        positions: which tokens: "patch" (without class token and registers), "class" or "all". The last two work only for "ap".
        feature_dim: see :func:`torchprobe.record`.
        pooling: how a map becomes a score for average precision and top images: "max" or "mean".
        sign, negatives, minimum_area: of average precision, see :func:`average_precision` and :func:`concept_matrix`.
        top: top images to keep for each unit; 0 for none.
        rows: rows of ``broden`` to use; default: all.
        preprocess: PIL image → tensor (3, H, W); or "whole", the whole picture, resized to the size and with the colors of the encoder's
            transform; or "encoder", that transform itself, which may crop. Default: the transform of ``broden``, else "whole".
        geometry: which part of a picture ``preprocess`` shows, if that cannot be found out: "whole", or a function (width, height) →
            :class:`torchprobe.datasets.geometry.Box`.
        batch_size: images in a batch. The result depends on it: a network gives slightly different numbers in batches of another size.
            It is lowered if the maps of latents would need more than 256 MiB; ``metadata`` has the size used.
        device: where the model runs; default: where it is.
        workers: threads that decode images.
        memory: bytes for the thresholds of one layer, see :class:`torchprobe.statistics.Quantile`.
        disk: gigabytes for maps that wait for their thresholds, in the folder ``checkpoint`` or else in a temporary one, which is removed
            at the end. At most half of what is free is used. 0: the images pass the network twice.
        seed: of the rotation, and of the sampling of values if the thresholds are not exact.
        shuffle_labels: give every image the labels of another image, at random with this seed: the null of both scores.
        iou_permutations: read IoU against its null, with labels exchanged among the images of a batch so many times; 99 is a good number.
            Each time costs as much as counting for IoU, and 8 bytes for each unit and label. See :mod:`torchprobe.dissection.iou_null`.
        keep_scores: keep scores and labels in the result. Merging of average precision and permutation tests need them.
        checkpoint: a folder to save to, for ``resume=True`` after an interruption; all ranks must see it.
        checkpoint_every: seconds between two checkpoints.
        resume: resume from the folder ``checkpoint``. All other arguments must be as before.
        progress: called with a :class:`Progress` after every batch.
        stop: called before every batch. If it returns True, the run saves its checkpoint and ends with KeyboardInterrupt. Under
            ``torchrun`` it must return the same on all ranks.

    Returns:
        {layer: Dissection}, in the order of the model.

    Raises:
        ValueError: an argument does not fit, or a layer has no positions for IoU. Of the images only the first was read.
        DatasetError: an image or label map cannot be read; the message names the row. Or there is no image, for instance
            of the split.
        KeyboardInterrupt: ``stop`` returned True.

    >>> import tempfile, numpy as np
    >>> from torchprobe.datasets import Broden, BrodenWriter
    >>> folder = tempfile.mkdtemp()
    >>> with BrodenWriter(folder, {"object": ["sky", "sea"]}, size=32) as writer:
    ...     for i in range(4):
    ...         writer.add(f"mine/{i}", np.full((32, 32, 3), 50 * i, np.uint8), {"object": np.eye(16, dtype=int) + i % 2})
    >>> def to_tensor(image):
    ...     return torch.from_numpy(np.array(image)).movedim(2, 0) / 255
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU())
    >>> result = dissect(net, "1", Broden(folder), preprocess=to_tensor, thresholds={"1": torch.zeros(8)})["1"]
    >>> result.iou.shape, result.average_precision.shape
    (torch.Size([8, 2]), torch.Size([8, 2]))
    """
    scores = (score,) if isinstance(score, str) else tuple(score)
    if set(scores) <= set(SCORES):
        scores = tuple(name for name in SCORES if name in scores)
    if quantile is None:
        quantile = NETDISSECT if mode == "netdissect" else 0.005
    settings = Settings(
        scores,
        mode,
        str(quantile),
        positions,
        pooling,
        sign,
        negatives,
        float(minimum_area),
        top,
        batch_size,
        memory,
        seed,
        shuffle_labels,
        iou_permutations,
    )
    options = RunOptions(batch_size, device, workers, seed, resume, progress, stop)
    chosen = _chosen(broden, rows)
    labels_of = _shuffled(chosen, shuffle_labels)
    prepare = find_preprocess(broden, model, preprocess)
    looked = Geometry(prepare, geometry)
    batches = Batches(broden, chosen, prepare, batch_size, workers, labels_of.__getitem__, mode == "netdissect", looked)
    if device is not None:
        model = model.to(device)
    with Ranks() as ranks, LayerReader(model, select_layers(model, layers, feature_dim)) as reader:
        image = batches.image(chosen[0])
        sites = _sites(reader, image[None], settings, basis)
        batches.size = fitting_batch_size(sites.values(), batch_size)
        settings = replace(settings, batch_size=batches.size)
        given = _given(thresholds, sites) if thresholds is not None else None
        size = image.shape[-2], image.shape[-1]
        facts = _facts(model, broden, chosen, settings, sites, given, looked, size)
        if estimates(sites, settings, len(chosen), given is not None):
            facts["ranks"] = ranks.size
        with contextlib.ExitStack() as stack:
            saved = None
            if checkpoint is not None:
                noted = ranks.on_first(lambda: {**facts, **_further(model, broden, chosen, sites, looked, geometry)})
                saved = stack.enter_context(Checkpoint(Path(checkpoint), noted, resume, checkpoint_every, ranks))
            run = Run(reader, sites, batches, settings, options, facts, ranks, saved, given, keep_scores, size, disk)
            stack.callback(run.close)
            return run.result()


def _chosen(broden: Broden, rows: Iterable[int] | None) -> list[int]:
    broden.require_images()
    chosen = list(range(len(broden))) if rows is None else sorted(int(i) for i in rows)
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(broden) or len(set(chosen)) < len(chosen):
        raise ValueError(f"rows must be distinct rows of {broden!r}, at least one")
    return chosen


def _sites(reader: LayerReader, image: Tensor, settings: Settings, basis: Basis) -> dict[str, Site]:
    """How to read each layer, in its basis; for IoU, layers without positions are refused."""
    sites = find_sites(reader, image, settings.positions)
    check_layers(basis, sites)
    sites = {name: site.in_basis(basis_of(basis, name, site.features, settings.seed)) for name, site in sites.items()}
    for site in sites.values():
        if "iou" in settings.score and not site.has_map:
            dims = site.layout.dims
            raise ValueError(
                f"layer {site.layer!r} has no positions (its activation has {dims} dimensions, positions={settings.positions!r}), so there "
                'is no overlap with label maps: score it by average precision (score="ap", --score ap), or choose a layer before '
                "the pooling"
            )
    return sites


def _given(thresholds: Mapping[str, Tensor], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    for layer, site in sites.items():
        if layer not in thresholds or thresholds[layer].shape != (site.units,):
            given = tuple(thresholds[layer].shape) if layer in thresholds else "none"
            raise ValueError(f"layer {layer!r} needs thresholds of shape ({site.units},), got {given}")
    return {layer: thresholds[layer].detach().float().cpu() for layer in sites}


def _shuffled(rows: list[int], seed: int | None) -> dict[int, int]:
    """Row → the row whose labels it gets; without a seed its own."""
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
    geometry: Geometry,
    input_size: tuple[int, int],
) -> dict[str, Any]:
    """What the result depends on: the metadata, which must be the same in a resumed run."""
    described = {
        name: {
            "units": site.units,
            "grid": None if site.grid is None else list(site.grid),
            "basis": describe_basis(site.basis),
            "thresholds": None if thresholds is None else digest([thresholds[name]]),
        }
        for name, site in sites.items()
    }
    unused = () if settings.iou_permutations else ("iou_permutations",)  # runs and files of before do not have it
    first = broden.image(rows[0]).size
    preprocessing = {
        "transform": stable_repr(geometry.transform),
        "fingerprint": fingerprint(geometry.transform, first),
        "shows": "the whole picture" if geometry.box(*first).whole else f"a part: {_edges(geometry.box(*first), *first)}",
    }
    return {
        "model": str(getattr(model, "name", type(model).__name__)),
        "weights": digest([*model.parameters(), *model.buffers()]),
        "modules": own_modules(model),
        "dataset": {
            "name": broden.root.name,
            "images": len(rows),
            "digest": index_fact(broden, rows),
            "split": broden.split,
            "categories": [*broden.categories],
        },
        "preprocessing": preprocessing,
        "input": list(input_size),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items() if key not in unused},
        "sites": described,
    }


def _further(
    model: nn.Module,
    broden: Broden,
    rows: list[int],
    sites: Mapping[str, Site],
    looked: Geometry,
    geometry: str | Callable[[int, int], Box] | None,
) -> dict[str, Any]:
    """What the result depends on and the metadata do not say. Each file of the data set is read."""
    sizes = dict.fromkeys((broden.rows[row].width, broden.rows[row].height) for row in rows)
    return {
        **run_facts(model, sites),
        "data": broden_facts(broden, rows),
        "transform": transform_fact(looked.transform, broden.image(rows[0]).size),
        "geometry": digest_of([[*looked.box(*size)] for size in sizes]) if callable(geometry) else geometry,
    }


def _edges(box: Box, width: int, height: int) -> str:
    """A box in words, for a picture of this size."""
    top, left, bottom, right = box
    return f"rows {top:.1%} – {bottom:.1%}, columns {left:.1%} – {right:.1%} of a picture of {width} × {height} pixels"
