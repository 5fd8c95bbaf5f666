"""The units of a dissection on new pictures: where each is above its threshold, and the concept that it stands next to.

A unit was named over the images of a labeled data set. On a new picture its region is drawn, not measured: nothing says there whether the
name holds. :class:`Detector` has how far it held in the data set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from torchprobe.common.messages import reason
from torchprobe.datasets.geometry import Box, Geometry, GeometryError
from torchprobe.datasets.images import rgb
from torchprobe.datasets.photos import read_photo
from torchprobe.dissection.bases import Basis, same_basis
from torchprobe.dissection.batches import Preprocess, same_preprocess, to_tensor
from torchprobe.dissection.detectors import MOST, Detector, choose_detectors
from torchprobe.dissection.facts import require_same_network
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.taps import Site, find_sites
from torchprobe.ops.overlap import upsample
from torchprobe.recording.layers import select_layers
from torchprobe.recording.reader import LayerReader

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 1024
"""The longer side of the grid on which regions are found, in pixels; a smaller picture has a grid of its own size."""


class PictureError(ValueError):
    """Units cannot be drawn on a picture. The message names it, and says why."""


UNSURE = "unsure"
NOT_SHOWN = "not shown to the network"


class UnitRegion(NamedTuple):
    """``mask``: bool (rows, columns), where the map of the unit exceeds its threshold. ``share`` of the pixels that the network was shown.
    ``largest``: the largest value of the map of the unit, to compare with the threshold."""

    detector: Detector
    mask: NDArray[np.bool_]
    share: float
    largest: float


class ConceptMap(NamedTuple):
    """``numbers``: uint16 (rows, columns), the concept of each pixel. ``names``: number → concept; 0 is "unsure"."""

    numbers: NDArray[np.uint16]
    names: dict[int, str]


@dataclass(frozen=True, eq=False)
class SegmentedPicture:
    """The regions of one picture.

    Attributes:
        name: of the picture.
        image: PIL, RGB, in the size of the grid: rows × columns.
        size: width and height of the picture itself.
        box: the part of it that the network was shown.
        shown: bool (rows, columns), the pixels whose centers lie in that part. Regions never reach beyond it.
        regions: one for each detector, in their order; the masks of units that are not active here are empty.
    """

    name: str
    image: Image
    size: tuple[int, int]
    box: Box
    shown: NDArray[np.bool_]
    regions: Sequence[UnitRegion]

    @property
    def active(self) -> list[UnitRegion]:
        """The units that are active somewhere in the picture."""
        return [region for region in self.regions if region.share > 0]

    def concept_map(self) -> ConceptMap:
        """For each pixel the concept of the first detector that is active there. Pixels where none is are unsure; pixels that the network
        was not shown have a number of their own, the last one. Numbers are the same for all pictures with the same detectors."""
        concepts = list(dict.fromkeys(region.detector.concept for region in self.regions))
        numbers = np.zeros(self.shown.shape, np.uint16)
        for region in reversed(self.regions):
            numbers[region.mask] = concepts.index(region.detector.concept) + 1
        numbers[~self.shown] = len(concepts) + 1
        names = [UNSURE, *concepts, *([] if self.shown.all() else [NOT_SHOWN])]
        return ConceptMap(numbers, dict(enumerate(names)))


class Segmenter:
    """Draws units on pictures, one at a time. In the block the model is in eval mode, without gradients.

    Args: see :func:`segment_pictures`.

    Attributes:
        detectors: the units, most certain first.
        preprocess: PIL image → tensor, as in the dissection.

    Raises:
        ValueError: see :func:`segment_pictures`.
    """

    def __init__(
        self,
        dissection: LayerScores,
        model: nn.Module,
        *,
        units: Iterable[int] | None = None,
        concepts: Iterable[str] | None = None,
        most: int = MOST,
        preprocess: Preprocess | str | None = None,
        geometry: str | Callable[[int, int], Box] | None = None,
        basis: Basis = None,
        feature_dim: int | None = None,
        longest: int = LONGEST,
    ) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        self.detectors = choose_detectors(dissection, units, concepts, most)
        require_same_network(dissection.metadata, dissection.layer, model)
        self.preprocess = same_preprocess(dissection.metadata, None, model, preprocess)
        self.dissection, self.model, self.basis, self.longest = dissection, model, basis, longest
        self.geometry = Geometry(self.preprocess, geometry)
        self._layers = select_layers(model, [dissection.layer], feature_dim)
        self._sites: dict[tuple[int, ...], Site] = {}
        self._stack = ExitStack()
        self._reader: LayerReader | None = None

    def __enter__(self) -> Segmenter:
        self._reader = self._stack.enter_context(LayerReader(self.model, self._layers))
        return self

    def __exit__(self, *error: object) -> None:
        self._reader = None
        self._stack.close()

    def segment(self, picture: Image, name: str = "picture") -> SegmentedPicture:
        """One picture (PIL, RGB); it passes the network once.

        Raises:
            RuntimeError: outside of the block.
            PictureError: the preprocessing fails, or the layer gives nan.
            ValueError: the layer gives something else than in the dissection, or it cannot be told which part of the picture the network
                was shown.
        """
        if self._reader is None:
            raise RuntimeError("use a Segmenter in a block: with Segmenter(…) as segmenter")
        try:
            tensor = to_tensor(self.preprocess, picture)
            box = self.geometry.box(*picture.size)
        except GeometryError:
            raise
        except Exception as error:  # a transform may raise anything
            raise PictureError(f"{name}: the preprocessing fails ({reason(error)})") from error
        maps = self._maps(self._reader, tensor[None])
        if bool(maps.isnan().any()):
            raise PictureError(f"{name}: layer {self.dissection.layer!r} gives nan, so it is unknown where its units are active")
        columns, rows = (max(1, round(side * min(1.0, self.longest / max(picture.size)))) for side in picture.size)
        edges = box.on(rows, columns)
        shown = _between(edges[0], edges[2], rows)[:, None] & _between(edges[1], edges[3], columns)
        regions = []
        for detector in self.detectors:
            own = maps[detector.unit]
            mask = (upsample(own, rows, columns, box=edges) > detector.threshold).numpy() & shown
            regions.append(UnitRegion(detector, mask, float(mask.sum() / max(int(shown.sum()), 1)), float(own.amax())))
        small = picture.resize((columns, rows))
        return SegmentedPicture(name, small, picture.size, box, shown, regions)

    def _maps(self, reader: LayerReader, image: Tensor) -> Tensor:
        """The maps of all units, float32 (units, h, w)."""
        layer = self.dissection.layer
        shape = tuple(image.shape)
        if shape not in self._sites:
            self._sites[shape] = self._site(reader, image)
        return self._sites[shape].read(reader.activations(image)[layer][0], 1)[0].float().cpu()

    def _site(self, reader: LayerReader, image: Tensor) -> Site:
        d = self.dissection
        site = find_sites(reader, image, str(d.metadata.get("positions", "patch")))[d.layer]
        site = site.in_basis(same_basis(d.metadata, d.layer, site.features, self.basis))
        if site.units != d.units:
            raise ValueError(f"layer {d.layer!r} has {site.units} units here and {d.units} in the dissection: this is another network")
        return site


def segment_pictures(
    dissection: LayerScores, model: nn.Module, pictures: Iterable[str | os.PathLike[str] | Image], **options: object
) -> list[SegmentedPicture]:
    """Where the units of a dissection are above their thresholds on new pictures.

    Each picture passes the network once, prepared as in the dissection. The map of a unit is resized to the picture, bilinearly with
    half-pixel centers, on the part of the picture that the network was shown.

    Args:
        dissection: with IoU, since only then units have thresholds.
        model: the network of the dissection.
        pictures: files, or PIL images. Files are turned upright as their cameras noted; PIL images are not. Gray of 16 bits is scaled to 8.
        options: ``units``: indices, drawn in this order for their best labels. ``concepts``: names; for each of them the units with the
            highest IoU. Default: the units with the highest IoU of all, if it is 0.04 or more. ``most``: how many units are drawn, for each
            of ``concepts``; 20. ``preprocess``: needed only if the dissection had a function of its own. ``geometry``, ``basis``,
            ``feature_dim``: as for :func:`torchprobe.dissection.dissect`, if they were given there. ``longest``: the longer side of the
            grid of regions, in pixels; 1024.

    Raises:
        ValueError: the dissection has no thresholds, no unit is a detector, a unit or a concept is unknown, or the network, the
            preprocessing or the basis are not those of the dissection.
        PictureError: the preprocessing of a picture fails, the layer gives nan for it, or the range of its pixels is unknown.
        TypeError: a picture is something else.
        DatasetError: a file cannot be read; the message names it.

    >>> import tempfile, numpy as np, torch
    >>> from PIL import Image
    >>> from torchprobe.datasets import Broden, BrodenWriter
    >>> from torchprobe.dissection import dissect
    >>> def picture(row):  # a white square on black
    ...     pixels = np.zeros((32, 32, 3), np.uint8)
    ...     pixels[row : row + 8, 8:16] = 255
    ...     return pixels
    >>> folder = tempfile.mkdtemp()
    >>> with BrodenWriter(folder, {"object": ["square"]}, size=32) as writer:
    ...     for row in range(0, 24, 4):
    ...         writer.add(f"mine/{row}", picture(row), {"object": picture(row)[..., 0] // 255})
    >>> def to_tensor(image):
    ...     return torch.from_numpy(np.array(image)).movedim(2, 0) / 255
    >>> net = nn.Sequential(nn.AvgPool2d(4))
    >>> found = dissect(net, "0", Broden(folder), preprocess=to_tensor, quantile=0.07)["0"]
    >>> (new,) = segment_pictures(found, net, [Image.fromarray(picture(12))], preprocess=to_tensor)
    >>> region = new.regions[0]
    >>> region.detector.concept, round(region.detector.iou, 2), bool(region.mask[12:20, 8:16].all()), region.share
    ('square (object)', 0.46, True, 0.140625)
    """
    found = []
    if isinstance(pictures, (str, os.PathLike)):
        pictures = [pictures]
    with Segmenter(dissection, model, **options) as segmenter:  # type: ignore[arg-type]
        for number, picture in enumerate(pictures):
            if isinstance(picture, (str, os.PathLike)):
                found.append(segmenter.segment(read_photo(picture), os.fspath(picture)))
            elif hasattr(picture, "mode") and hasattr(picture, "convert"):  # a PIL image
                found.append(segmenter.segment(_rgb(picture, f"picture {number}"), f"picture {number}"))
            else:
                raise TypeError(f"picture {number} is {type(picture).__name__}; expected a file or a PIL image")
    return found


def _rgb(picture: Image, name: str) -> Image:
    try:
        return rgb(picture)
    except ValueError as error:  # of the range of its values
        raise PictureError(f"{name}: {error}") from None


def _between(first: float, last: float, size: int) -> NDArray[np.bool_]:
    """The pixels whose centers lie between two edges, as labels are cut."""
    centers = np.arange(size) + 0.5
    inside: NDArray[np.bool_] = (centers >= first) & (centers < last)
    return inside
