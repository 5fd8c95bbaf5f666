"""Regions drawn over a picture, in colors that people with color blindness tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torchprobe.rendering.tables import printable

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#9a6324")
"""Of Okabe and Ito, Color Universal Design (2008), with a brown in place of black. Used in turn."""

FILL = 0.45
_LINE = 22
"""Height of a line of the legend, in pixels."""


def color(index: int) -> str:
    """The color of the concept with this index; they come again after eight.

    >>> color(0) == color(8)
    True
    """
    return COLORS[index % len(COLORS)]


def overlay(image: Image, numbers: NDArray[np.uint16], legend: Mapping[int, str], shown: NDArray[np.bool_] | None = None) -> Image:
    """A picture with the concept of each pixel as a color, and below it a legend, which may be wider.

    Args:
        image: PIL, RGB.
        numbers: (rows, columns), of the same size; concept i has color i − 1, and 0 stays as it is.
        legend: number → a line of text; untrusted. Pixels with other numbers stay as they are.
        shown: bool (rows, columns); pixels that are False are dark.

    >>> from PIL import Image
    >>> overlay(Image.new("RGB", (90, 30)), np.ones((30, 90), np.uint16), {1: "dog"}).size
    (90, 60)
    """
    from PIL import Image as pil
    from PIL import ImageDraw

    pixels = np.array(image.convert("RGB")).astype(float)
    if shown is not None:
        pixels[~shown] *= 0.4
    for number in legend:
        inside = numbers == number
        own = np.array(_rgb(color(number - 1)), float)
        pixels[inside] = (1 - FILL) * pixels[inside] + FILL * own
        pixels[inside & _edge(inside)] = own
    drawn = pil.fromarray(pixels.round().astype(np.uint8))
    if not legend:
        return drawn
    lines = [printable(text).encode("latin-1", "replace").decode("latin-1")[:200] for text in legend.values()]  # the font has no more
    longest = max(ImageDraw.Draw(drawn).textlength(line) for line in lines)
    whole = pil.new("RGB", (max(drawn.width, round(longest) + 34), drawn.height + 8 + _LINE * len(legend)), "white")
    whole.paste(drawn, (0, 0))
    pen = ImageDraw.Draw(whole)
    for at, (number, line) in enumerate(zip(legend, lines, strict=True)):
        top = drawn.height + 6 + _LINE * at
        pen.rectangle((6, top + 3, 18, top + 15), color(number - 1), "black")
        pen.text((26, top + 3), line, "black")
    return whole


def palette(count: int) -> list[int]:
    """The colors of 0 (black) to ``count``, flat, for a picture with a palette."""
    return [0, 0, 0, *(part for i in range(count) for part in _rgb(color(i)))]


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels that have a neighbor outside, or lie at the border."""
    padded = np.pad(inside, 1)
    kept: NDArray[np.bool_] = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return ~kept


def _rgb(code: str) -> Sequence[int]:
    return tuple(int(code[at : at + 2], 16) for at in (1, 3, 5))
