"""Transforms whose steps are known by their names: those of torchvision, timm and open_clip.

Each step is run on a blank picture, so sizes are those that the library itself gives, with its own rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Edges = tuple[float, float, float, float]

LIBRARIES = ("torchvision.", "timm.", "open_clip.")

WHOLE = frozenset({"Resize", "ResizeKeepRatio", "ResizeMaxSize", "ResizeLongest"})
"""Steps after which the same part of the picture is shown, in another size."""

CENTERED = frozenset({"CenterCrop", "CenterCropOrPad"})
"""Steps that keep the center of the picture, or put a border around it."""

POINTWISE = frozenset({
    "ConvertImageDtype", "Grayscale", "Identity", "ImageToPIL", "MaskAwareNormalize", "MaybeConvertMode", "MaybePILToTensor",
    "MaybeToTensor", "Normalize", "PILToTensor", "RGB", "ToDtype", "ToImage", "ToNumpy", "ToPureTensor", "ToTensor",
})  # fmt: skip
"""Steps that leave pixels where they are."""

FUNCTIONS = frozenset({"_convert_to_rgb", "ensure_rgb"})


def carried(transform: Any, width: int, height: int) -> Edges | None:
    """Top, left, bottom and right of what is shown of a picture of this size, in fractions; None if a step is not known."""
    steps = _steps(transform)
    if steps is None:
        return None
    from PIL import Image

    image: Any = Image.new("RGB", (width, height))
    top, left, bottom, right = 0.0, 0.0, 1.0, 1.0
    for step in steps:
        name = _name(step)
        if name in POINTWISE or name in FUNCTIONS:
            continue  # the picture stays a PIL image: the geometric steps take it at any point
        before = image.size
        image = step(image)
        if not isinstance(image, Image.Image):
            return None
        if name in CENTERED or name == "Pad":
            (w, h), (new_w, new_h) = before, image.size
            y, x = (_offset(h, new_h), _offset(w, new_w)) if name in CENTERED else _border(step.padding)
            tall, wide = (bottom - top) / h, (right - left) / w
            top, left = top + y * tall, left + x * wide
            bottom, right = top + new_h * tall, left + new_w * wide
    return top, left, bottom, right


def resampling(transform: Any) -> Any:
    """How the first known step that changes the size interpolates, as it was given to the step; None: unknown."""
    for step in _steps(transform) or ():
        if _name(step) in WHOLE:
            return getattr(step, "interpolation", None)
    return None


def _offset(size: int, new: int) -> int:
    """The first pixel that stays, of a crop in the middle; negative: the width of the border before it. As the libraries round them."""
    return round((size - new) / 2.0) if new <= size else -((new - size) // 2)


def _border(padding: Any) -> tuple[int, int]:
    """The first row and column after a border, of ``Pad``; negative, since they lie before the picture."""
    left, top = (padding, padding) if isinstance(padding, int) else (padding[0], padding[min(1, len(padding) - 1)])
    return -int(top), -int(left)


def _name(step: Any) -> str:
    return getattr(step, "__name__", None) or type(step).__name__


def _steps(transform: Any) -> list[Any] | None:
    """The steps in order; None if one of them is not known."""
    module, name = str(getattr(transform, "__module__", type(transform).__module__)), _name(transform)
    if not f"{module}.".startswith(LIBRARIES):
        return None
    if name in {"Compose", "Sequential"}:
        return _all(transform.transforms)
    if name in {"ImageClassification", "SemanticSegmentation"}:  # the transforms of torchvision's weights
        from torchvision.transforms import CenterCrop, Resize

        resize = Resize(transform.resize_size, interpolation=transform.interpolation, antialias=transform.antialias)
        return [resize, CenterCrop(transform.crop_size)] if name == "ImageClassification" else [resize]
    known = name in WHOLE | CENTERED | POINTWISE | {"Pad"} or (name in FUNCTIONS and callable(transform))
    return [transform] if known else None


def _all(transforms: Iterable[Any]) -> list[Any] | None:
    found: list[Any] = []
    for part in transforms:
        steps = _steps(part)
        if steps is None:
            return None
        found += steps
    return found
