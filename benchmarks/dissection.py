"""Dissection: thresholds, overlap and average precision, per image, compared with the usual ways of computing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from benchmarks.report import Row, Section, Target, versus
from benchmarks.synthetic_broden import GRID, IMAGES, LABELS, SyntheticBroden, smooth_maps
from benchmarks.timing import Timing, race
from torchprobe.dissection import LabelBatch, Overlap, average_precision, concept_matrix
from torchprobe.ops.average_precision import reference
from torchprobe.statistics import Quantile

QUANTILE = 0.005
_HOUR = 3600


def run(device: torch.device, seconds: float, units: int = 2048, size: int = 7, images: int = 32, quick: bool = False) -> Section:
    """A layer of ``units`` × ``size`` × ``size``; figures are per image, with an estimate for all of Broden."""
    maps = smooth_maps(images, units, size).to(device)
    # With independent positions 22 % of the units are active in an image, the most there can be; with smooth maps 15 % are.
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0)).relu_().to(device)
    thresholds = rearrange(noise, "n units h w -> units (n h w)").quantile(1 - QUANTILE, dim=1)
    layer, grid = f"{units} × {size} × {size}", f"{GRID} × {GRID}"
    before = 2 if quick else IMAGES // 2 // images
    rows = [
        *_rows(f"thresholds, {layer}", _quantiles(maps, before), seconds, device, aim=0.5),
        *_rows(f"overlap, {layer} on {grid}", _overlaps(noise, thresholds, SyntheticBroden(images)), seconds, device, aim=0.3, limit=0.8),
        *(average_precisions(device, seconds, 2000, 8) if quick else average_precisions(device, seconds)),
    ]
    note = (
        f"per image; all of Broden has {IMAGES:,} images. Average precision: also per image, for 2,048 units and {LABELS:,} concepts, "
        "extrapolated from fewer."
    )
    return Section("dissection", "dissection", rows, note)


Contestants = dict[str, tuple[float, Callable[[], object]]]
"""Name → the images in a call, and the call. The first contestant is ours."""


def _rows(
    case: str, contestants: Contestants, seconds: float, device: torch.device, aim: float | None = None, limit: float | None = None
) -> list[Row]:
    """``aim`` and ``limit``: milliseconds per image for ours."""
    times = race({name: call for name, (_, call) in contestants.items()}, seconds, device)
    per_image = {name: times[name].per(images) for name, (images, _) in contestants.items()}
    ours = next(iter(per_image.values()))
    target = None if aim is None else Target("ms", ours.median * 1e3, aim, limit)
    return [
        Row(case, name, timing, extrapolated=_broden(timing), target=target if timing is ours else None, **versus(timing, ours))
        for name, timing in per_image.items()
    ]


def _broden(timing: Timing) -> str:
    whole = timing.median * IMAGES
    return f"{whole / _HOUR:.1f} h" if whole > _HOUR else f"{whole:.0f} s"


# -- thresholds ------------------------------------------------------------------------------------------------------------


def _quantiles(maps: Tensor, before: int) -> Contestants:
    """``before``: batches already seen. After half of Broden most values lie below the kept ones; at the start none do."""
    images, units = maps.shape[:2]
    ours = Quantile(units, QUANTILE, maps.device)
    fresh = cycle([maps * (1 + scale / 8) for scale in range(8)])
    for batch, _ in zip(fresh, range(before), strict=False):
        ours.update(batch, 1)
    kept = [torch.zeros(units, 512, device=maps.device)]
    return {
        "torchprobe Quantile": (images, lambda: ours.update(next(fresh), 1)),
        "torch: topk of kept and new": (images, partial(_topk, kept, maps)),
        "loop over units, np.partition": (images, partial(_partition, maps.cpu().numpy())),
    }


def _topk(kept: list[Tensor], maps: Tensor) -> None:
    both = torch.cat([kept[0], maps.movedim(1, 0).flatten(1)], 1)
    kept[0] = both.topk(kept[0].shape[1], 1).values


def _partition(maps: np.ndarray) -> list[float]:
    """Of this batch alone, so that every value is read once."""
    level = int((1 - QUANTILE) * maps[:, 0].size)
    return [float(np.partition(maps[:, unit].ravel(), level)[level]) for unit in range(maps.shape[1])]


# -- overlap ---------------------------------------------------------------------------------------------------------------


def _overlaps(maps: Tensor, thresholds: Tensor, broden: SyntheticBroden) -> Contestants:
    images = len(maps)
    labels = [broden.image_labels(i) for i in range(images)]
    packed = LabelBatch.pack(labels, [(GRID, GRID)] * images)
    ours = Overlap(thresholds, broden.primary, len(broden.categories))
    few = 2
    return {
        "torchprobe Overlap": (images, lambda: ours.update(maps, packed)),
        "torch: interpolate active units, matmul": (images, partial(_interpolate, maps, thresholds, labels)),
        "loops over units and labels": (few, partial(_loops, maps[:few].cpu(), thresholds.cpu(), labels[:few])),
    }


def _interpolate(maps: Tensor, thresholds: Tensor, labels: list[list[tuple[str, Tensor]]]) -> Tensor:
    total = torch.zeros(maps.shape[1], LABELS + 1, device=maps.device)
    for image, found in zip(maps, labels, strict=True):
        active = (image.flatten(1).amax(1) > thresholds).nonzero()[:, 0]
        up = torch.nn.functional.interpolate(image[active][None], (GRID, GRID), mode="bilinear", align_corners=False)[0]
        mask = (up > thresholds[active, None, None]).flatten(1).float()
        planes = torch.cat([planes.flatten(1) for _, planes in found if planes.dim() == 3]).to(maps.device)
        numbers = planes.unique()
        shown = (planes[:, None] == numbers[:, None]).any(0).float()
        total[active[:, None], numbers.long()] += mask @ shown.T
    return total


def _loops(maps: Tensor, thresholds: Tensor, labels: list[list[tuple[str, Tensor]]]) -> dict[tuple[int, int], int]:
    """Unit by unit and label by label, with Pillow's bilinear resize, as the first tools did it."""
    from PIL import Image

    total: dict[tuple[int, int], int] = {}
    for image, found in zip(maps.numpy(), labels, strict=True):
        planes = [plane.numpy() for _, planes in found if planes.dim() == 3 for plane in planes]
        for unit in range(len(image)):
            if image[unit].max() <= thresholds[unit]:
                continue
            up = np.asarray(Image.fromarray(image[unit]).resize((GRID, GRID), Image.Resampling.BILINEAR))
            mask = up > float(thresholds[unit])
            for plane in planes:
                for number, count in zip(*np.unique(plane[mask], return_counts=True), strict=True):
                    total[unit, int(number)] = total.get((unit, int(number)), 0) + int(count)
    return total


# -- average precision -----------------------------------------------------------------------------------------------------


def average_precisions(device: torch.device, seconds: float, images: int = IMAGES, units: int = 32) -> list[Row]:
    """Each contestant gets as many units and concepts as it can do in reasonable time; figures are for 2,048 × 1,197, per image."""
    broden = SyntheticBroden(images)
    presence = broden.presence()
    crow, col = presence.crow.to(device), presence.number.long().to(device)
    matrix = concept_matrix(crow, col, LABELS + 1)
    scores = torch.rand(units, images, generator=torch.Generator().manual_seed(0)).to(device)
    contestants: Contestants = {  # the share of all pairs that a call does, times its images
        "torchprobe average_precision": (units / 2048 * images, lambda: average_precision(scores, matrix)),
        "torch: the reference": (4 / 2048 * images, lambda: reference(scores[:4], crow, col, LABELS + 1)),
    }
    try:
        from sklearn.metrics import average_precision_score
    except ImportError:
        pass
    else:
        shown = np.zeros(images, bool)
        shown[::50] = True
        one = scores[0].cpu().numpy()
        contestants["sklearn, pair by pair"] = (images / (2048 * LABELS), lambda: average_precision_score(shown, one))
    aims = {"aim": 3e3 / IMAGES, "limit": 6e3 / IMAGES} if images == IMAGES else {}
    return _rows(f"average precision, {images:,} images", contestants, seconds, device, **aims)
