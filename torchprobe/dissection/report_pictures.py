"""The pictures of a report: top images made small, where a unit is active in them, where its concept is, and what speaks for the unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchprobe.datasets.broden import ImageLabels
from torchprobe.dissection.batches import Batches
from torchprobe.dissection.evidence import evidence
from torchprobe.dissection.taps import find_sites
from torchprobe.ops.overlap import upsample
from torchprobe.recording.layers import select_layers
from torchprobe.recording.reader import LayerReader
from torchprobe.rendering.dissection_page import Shown, Thumbnail, thumbnail
from torchprobe.rendering.outline import outline, reduced

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden
    from torchprobe.dissection.dissection import Dissection

GRID = 56
"""The longest side of the grid that regions are drawn in: half the label grid of the release, two pixels of a thumbnail."""


class Pictures:
    """The top images of some units; each image is read once, whatever the number of units it is shown for.

    Args:
        dissection: with top images.
        broden: the data set.
        label_of: unit → column of its concept, or −1.
        images: top images of each unit.
    """

    def __init__(self, dissection: Dissection, broden: Broden, label_of: Mapping[int, int], images: int) -> None:
        assert dissection.top is not None
        self.dissection, self.broden = dissection, broden
        ids, scores = (part[:, :images].tolist() for part in dissection.top)
        self.ids = {unit: [row for row in ids[unit] if row >= 0] for unit in label_of}
        self.thumbnails: list[Thumbnail] = []
        self._shown: dict[tuple[int, int], Shown] = {}  # (unit, image)
        self._units: dict[int, list[int]] = {}  # image → units
        self.regions = self.evidence = False
        for unit, own in self.ids.items():
            for row in own:
                self._units.setdefault(row, []).append(unit)
        for row, units in sorted(self._units.items()):
            described = broden.rows[row]
            grid = _grid(described.label_height, described.label_width)
            at = len(self.thumbnails)
            self.thumbnails.append(thumbnail(broden.image(row), described.image, grid))
            concepts = _Concepts(dissection, broden.image_labels(row))
            for unit in units:
                path, whole = concepts.find(label_of[unit])
                self._shown[unit, row] = Shown(at, scores[unit][self.ids[unit].index(row)], concept=path, whole=whole)

    def of(self, unit: int) -> list[Shown]:
        """What is shown of a unit, its strongest image first."""
        return [self._shown[unit, row] for row in self.ids.get(unit, ())]

    def add_regions(self, model: nn.Module, basis: Tensor | None = None) -> None:
        """Outlines where each unit is above its threshold: by the definition that was counted with, and drawn at half of its resolution.

        Raises:
            ValueError: the model does not fit the dissection.
        """
        d, facts = self.dissection, self.dissection.metadata
        if d.thresholds is None or not self._units or (facts.get("basis") and basis is None):
            return
        preprocess: Any = self.broden.transform or getattr(model, "preprocess", None)
        if preprocess is None:
            raise ValueError("nothing says how a picture becomes a tensor: give Broden a transform")
        batches = Batches(self.broden, sorted(self._units), preprocess, facts.get("batch_size", 32))
        with LayerReader(model, select_layers(model, [d.layer])) as reader:
            first = batches.image(batches.ids[0])[None].to(reader.device)
            bases = None if basis is None else {d.layer: basis}
            site = find_sites(reader, first, facts.get("positions", "patch"), bases)[d.layer]
            if site.units != d.units:
                raise ValueError(f"layer {d.layer!r} has {site.units} units here and {d.units} in the dissection: another network")
            for batch in batches.read(range(len(batches))):
                maps = site.read(reader.activations(batch.images.to(reader.device))[d.layer][0], len(batch.ids)).float().cpu()
                for row, own in zip(batch.ids, maps, strict=True):
                    self._outline(row, own, (batch.images.shape[-2], batch.images.shape[-1]))
        self.regions = True

    def _outline(self, row: int, maps: Tensor, input_size: tuple[int, int]) -> None:
        units, described = self._units[row], self.broden.rows[row]
        anchored = self.dissection.metadata.get("mode") == "netdissect"
        assert self.dissection.thresholds is not None
        level = self.dissection.thresholds[units, None, None]
        grid = ("anchored", *input_size) if anchored else ("half_pixel", 0, 0)
        active = upsample(maps[units], described.label_height, described.label_width, *grid) > level
        for unit, mask in zip(units, active.numpy(), strict=True):
            self._shown[unit, row] = replace(self._shown[unit, row], region=outline(reduced(mask, GRID)))

    def add_evidence(self, model: nn.Module, unit: int, basis: Tensor | None = None) -> None:
        """For a unit, what in each image speaks for it; see :func:`torchprobe.dissection.evidence.evidence`."""
        found = evidence(self.dissection, unit, self.broden, model, len(self.ids[unit]), basis=basis)
        for row, heat in zip(found.ids.tolist(), found.heat, strict=True):
            shown = self._shown[unit, row]
            name = f"{self.thumbnails[shown.thumbnail].name}, evidence for unit {unit}"
            self.thumbnails.append(thumbnail(_heat_image(heat), name, (1, 1)))
            self._shown[unit, row] = replace(shown, evidence=len(self.thumbnails) - 1)
        self.evidence = True


class _Concepts:
    """The outlines of the concepts of one image, each made once."""

    def __init__(self, dissection: Dissection, labels: ImageLabels) -> None:
        self.dissection = dissection
        self.planes = [planes.numpy() for _, planes in labels if planes.dim() == 3]
        self.whole = {int(n) for _, numbers in labels if numbers.dim() == 1 for n in numbers}
        present = self.whole.union(*(np.unique(planes).tolist() for planes in self.planes))
        self.categories = {int(c) for label, c in zip(dissection.labels, dissection.category, strict=True) if label.number in present}
        self._paths: dict[int, str] = {}

    def find(self, column: int) -> tuple[str | None, bool]:
        """The outline of a label, see :class:`Shown`, and whether it is one of the whole image."""
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
    shape = reduced(np.empty((rows, columns), bool), GRID).shape
    return shape[0], shape[1]


def _heat_image(heat: Tensor) -> Any:
    """Contributions (H, W) as a picture: for the unit is warm, against it cold, none is white; 1 % of the pixels are at full strength."""
    from PIL import Image

    smooth, width = heat[None].float(), min(heat.shape) // 24 | 1  # a thumbnail shows no single pixels
    for _ in range(2):
        smooth = torch.nn.functional.avg_pool2d(smooth, width, 1, width // 2, count_include_pad=False)
    smooth = smooth[0]
    largest = float(smooth.abs().flatten().sort().values[int(0.99 * (smooth.numel() - 1))]) or 1.0
    share = (smooth / largest).clamp(-1, 1)[..., None].numpy()
    warm, cold = np.array([184, 80, 31]), np.array([26, 111, 143])
    color = 255 + np.abs(share) * (np.where(share > 0, warm, cold) - 255)
    return Image.fromarray(color.astype(np.uint8))
