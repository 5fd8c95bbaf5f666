"""The pictures of a report: the top images of units as thumbnails, where each unit is active, where its concept is, and its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from torchprobe.datasets.broden import ImageLabels
from torchprobe.datasets.geometry import Box, Geometry
from torchprobe.dissection.average_precision import pooled
from torchprobe.dissection.bases import same_basis
from torchprobe.dissection.batches import Preprocess, same_preprocess, stack, to_tensor
from torchprobe.dissection.evidence import attribute_dissected, scores_of
from torchprobe.dissection.facts import require_same_network, require_same_pictures
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.taps import Site, find_sites
from torchprobe.ops.overlap import upsample
from torchprobe.recording.layers import select_layers
from torchprobe.recording.reader import LayerReader
from torchprobe.rendering.dissection_page import Shown, Thumbnail, outline, reduced, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

    from torchprobe.datasets.broden import Broden

GRID = 56
"""Longest side of the grid on which regions are drawn: half of the label grid of the release, and two pixels of a thumbnail."""

WORKERS = 2
"""Threads that decode images."""

UnitsOf = Mapping[int, Mapping[int, float]]
"""Row of the data set → units that have it among their top images → their scores."""


@dataclass
class Pictures:
    """``thumbnails``: all pictures. ``shown``: unit → its top images, strongest first. ``regions``: whether the pictures show where units
    are active. ``evidence``: whether the pictures of some units show their evidence."""

    thumbnails: list[Thumbnail] = field(default_factory=list)
    shown: dict[int, list[Shown]] = field(default_factory=dict)
    regions: bool = False
    evidence: bool = False


def show_pictures(
    dissection: LayerScores,
    broden: Broden,
    labels: Mapping[int, int],
    count: int,
    encoder: nn.Module | None = None,
    basis: Tensor | SparseBasis | None = None,
    evidence: Sequence[int] = (),
    tell: Callable[[int], object] = lambda done: None,
    preprocess: Preprocess | str | None = None,
    geometry: str | Callable[[int, int], Box] | None = None,
) -> Pictures:
    """The top images of some units. Each image is decoded once, however many units show it. If the maps of the top images were not kept, it
    passes the network once more.

    Args:
        dissection: with top images.
        broden: the data set.
        labels: unit → column of its concept, or −1; the units to show.
        count: images for each unit.
        encoder: the network; without it the pictures do not show where units are active.
        basis: the directions or the encoder, if the units are directions or latents.
        evidence: the units whose evidence is shown; needs the encoder.
        tell: called with the steps done, before the evidence of each unit; all images together are the first step.
        preprocess, geometry: those of the dissection, if they were given there.

    Raises:
        ValueError: the encoder, the basis, the preprocessing or a picture that passes the network are not those of the dissection.
    """
    assert dissection.top is not None
    top_ids, top_scores = dissection.top
    ids = {unit: [row for row in top_ids[unit, :count].tolist() if row >= 0] for unit in labels}
    units_of: dict[int, dict[int, float]] = {}
    for unit, own in ids.items():
        for row, score in zip(own, top_scores[unit].tolist(), strict=False):
            units_of.setdefault(row, {})[unit] = score
    kept = {row for unit in evidence for row in ids[unit]}  # images whose pixels are needed again
    pixels: dict[int, Tensor] = {}
    found: dict[tuple[int, int], Shown] = {}  # (unit, row)
    pictures = Pictures()
    with ExitStack() as opened:
        regions: _Kept | _Regions | None = None
        if dissection.top_maps is not None and dissection.thresholds is not None:
            regions = _Kept(dissection, broden)
        elif encoder is not None and units_of and _can_be_drawn(dissection, basis):
            reader = opened.enter_context(LayerReader(encoder, select_layers(encoder, [dissection.layer])))
            regions = _Regions(dissection, broden, reader, basis)
        needed = isinstance(regions, _Regions) or bool(kept)
        if needed and encoder is not None:
            require_same_network(dissection.metadata, dissection.layer, encoder, needed=False)
            preprocess = same_preprocess(dissection.metadata, broden, encoder, preprocess)
        else:
            preprocess = None
        looked = None if preprocess is None else Geometry(preprocess, geometry)
        for rows, images in _decoded(broden, sorted(units_of), dissection.metadata.get("batch_size", 32)):
            inputs = None if preprocess is None else stack([to_tensor(preprocess, image) for image in images], broden, rows)
            outlines: Sequence[Mapping[int, str]] = [{}] * len(rows)
            if isinstance(regions, _Kept):
                outlines = regions.outlines(rows, units_of)
            elif regions is not None and inputs is not None and looked is not None:
                outlines = regions.outlines(inputs, [looked.box(*image.size) for image in images], rows, units_of)
            for i, (row, image) in enumerate(zip(rows, images, strict=True)):
                described = broden.rows[row]
                pictures.thumbnails.append(thumbnail(image, described.image, _grid(described.label_height, described.label_width)))
                concepts = _Concepts(dissection, broden.image_labels(row))
                for unit, score in units_of[row].items():
                    concept, whole = concepts.find(labels[unit])
                    found[unit, row] = Shown(len(pictures.thumbnails) - 1, score, outlines[i].get(unit), concept, whole)
                if inputs is not None and row in kept:
                    pixels[row] = inputs[i]
        pictures.regions = regions is not None
    if encoder is not None:
        for done, unit in enumerate(evidence, 1):
            tell(done)
            own_pixels = torch.stack([pixels[row] for row in ids[unit]])
            for row, score in zip(ids[unit], scores_of(dissection, unit, encoder, own_pixels, basis), strict=True):
                require_same_pictures(dissection, broden, row, {unit: score})
            heats = attribute_dissected(dissection, unit, encoder, own_pixels, basis=basis).sum(1)
            for row, heat in zip(ids[unit], heats.cpu(), strict=True):
                name = f"{broden.rows[row].image}, evidence for unit {unit}"
                pictures.thumbnails.append(thumbnail(_heat_image(heat), name, (1, 1)))
                found[unit, row] = replace(found[unit, row], evidence=len(pictures.thumbnails) - 1)
            pictures.evidence = True
    pictures.shown = {unit: [found[unit, row] for row in own] for unit, own in ids.items()}
    return pictures


def _decoded(broden: Broden, rows: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], list[Image]]]:
    """The images of some rows, in batches of the size with which the network saw them."""
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="torchprobe-images") as threads:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part, list(threads.map(broden.image, part))


def _can_be_drawn(dissection: LayerScores, basis: Tensor | SparseBasis | None) -> bool:
    return dissection.thresholds is not None and (basis is not None or not dissection.metadata.get("basis"))


def _outline(dissection: LayerScores, broden: Broden, row: int, maps: Tensor, box: Box, units: list[int]) -> dict[int, str]:
    """The outline of the active region of each unit on an image, from their maps (units, h, w) and where these lie on the picture."""
    described = broden.rows[row]
    assert dissection.thresholds is not None
    rows, columns = described.label_height, described.label_width
    levels = dissection.thresholds[units, None, None]
    if dissection.metadata.get("mode") == "netdissect":
        active = upsample(maps, rows, columns, "anchored", *dissection.metadata.get("input", (0, 0))) > levels
    else:
        placed = box.on(rows, columns)
        active = upsample(maps, rows, columns, box=placed) > levels
        if not box.whole:  # outside of what the network was shown, nothing is known
            y, x = torch.arange(rows) + 0.5, torch.arange(columns) + 0.5
            active &= ((y >= placed[0]) & (y < placed[2]))[:, None] & ((x >= placed[1]) & (x < placed[3]))
    return {unit: outline(reduced(mask, GRID)) for unit, mask in zip(units, active.numpy(), strict=True)}


class _Kept:
    """Where units are above their thresholds, from the maps that the dissection kept."""

    def __init__(self, dissection: LayerScores, broden: Broden) -> None:
        self.dissection, self.broden = dissection, broden

    def outlines(self, rows: Sequence[int], units_of: UnitsOf) -> list[dict[int, str]]:
        """For each image, the outline of the active region by unit."""
        d = self.dissection
        assert d.top is not None and d.top_maps is not None
        found = []
        for row in rows:
            units = list(units_of[row])
            place = (d.top[0][units] == row).int().argmax(1)
            maps, boxes = (part[units, place] for part in d.top_maps)
            found.append(_outline(d, self.broden, row, maps, Box(*boxes[0].tolist()), units))
        return found


class _Regions:
    """Where units are above their thresholds, as it was counted, and drawn on a coarser grid."""

    def __init__(self, dissection: LayerScores, broden: Broden, reader: LayerReader, basis: Tensor | SparseBasis | None) -> None:
        self.dissection, self.broden, self.reader, self.basis = dissection, broden, reader, basis
        self._site: Site | None = None

    def outlines(self, inputs: Tensor, boxes: Sequence[Box], rows: Sequence[int], units_of: UnitsOf) -> list[dict[int, str]]:
        """For each image (n, 3, H, W), which shows a box of its picture, the outline of the active region by unit."""
        layer = self.dissection.layer
        site = self._site = self._site or self._find_site(inputs[:1])
        maps = site.read(self.reader.activations(inputs)[layer][0], len(rows)).float().cpu()
        for row, scores in zip(rows, pooled(maps, self.dissection.metadata.get("pooling", "max")), strict=True):
            require_same_pictures(self.dissection, self.broden, row, {unit: float(scores[unit]) for unit in units_of[row]})
        return [
            _outline(self.dissection, self.broden, row, own[list(units_of[row])], box, list(units_of[row]))
            for row, own, box in zip(rows, maps, boxes, strict=True)
        ]

    def _find_site(self, image: Tensor) -> Site:
        d = self.dissection
        site = find_sites(self.reader, image, d.metadata.get("positions", "patch"))[d.layer]
        site = site.in_basis(same_basis(d.metadata, d.layer, site.features, self.basis))
        if site.units != d.units:
            raise ValueError(f"layer {d.layer!r} has {site.units} units here and {d.units} in the dissection: this is another network")
        return site


class _Concepts:
    """The outlines of the concepts of one image, each computed once."""

    def __init__(self, dissection: LayerScores, labels: ImageLabels) -> None:
        self.dissection = dissection
        self.planes = [planes.numpy() for _, planes in labels if planes.dim() == 3]
        self.whole = {int(n) for _, numbers in labels if numbers.dim() == 1 for n in numbers}
        present = self.whole.union(*(np.unique(planes).tolist() for planes in self.planes))
        self.categories = {int(c) for label, c in zip(dissection.labels, dissection.category, strict=True) if label.number in present}
        self.categories |= {dissection.categories.index(name) for name, _ in labels if name in dissection.categories}
        self._paths: dict[int, str] = {}

    def find(self, column: int) -> tuple[str | None, bool]:
        """The outline of a label, see :class:`Shown`, and whether it is a label of the whole image."""
        if column < 0 or int(self.dissection.category[column]) not in self.categories:
            return None, False
        wanted = self.dissection.labels[column].number
        if wanted in self.whole:
            return "", True
        if wanted not in self._paths:
            masks = [(planes == wanted).any(0) for planes in self.planes]
            self._paths[wanted] = outline(reduced(np.logical_or.reduce(masks), GRID)) if masks else ""
        return self._paths[wanted], False


def _grid(rows: int, columns: int) -> tuple[int, int]:
    h, w = reduced(np.empty((rows, columns), bool), GRID).shape
    return h, w


def _heat_image(heat: Tensor) -> Image:
    """Contributions (H, W) as a picture: positive warm, negative cold, zero white; 1 % of the pixels have full color."""
    from PIL import Image as pil

    smooth, width = heat[None].float(), min(heat.shape) // 24 | 1  # a thumbnail does not show single pixels
    for _ in range(2):
        smooth = torch.nn.functional.avg_pool2d(smooth, width, 1, width // 2, count_include_pad=False)
    smooth = smooth[0]
    largest = float(smooth.abs().flatten().sort().values[int(0.99 * (smooth.numel() - 1))]) or 1.0
    share = (smooth / largest).clamp(-1, 1)[..., None].numpy()
    warm, cold = np.array([184, 80, 31]), np.array([26, 111, 143])
    color = 255 + np.abs(share) * (np.where(share > 0, warm, cold) - 255)
    return pil.fromarray(color.astype(np.uint8))
