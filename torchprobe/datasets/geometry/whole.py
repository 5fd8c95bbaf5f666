"""The whole picture, resized to the size of the network's input, with the colors of another transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.datasets.geometry.carried import resampling

if TYPE_CHECKING:
    from PIL.Image import Image

PROBES = {"black": (0, 0, 0), "white": (255,) * 3, "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "gray": (128,) * 3}

FILTERS = {"nearest": "NEAREST", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "box": "BOX", "hamming": "HAMMING", "lanczos": "LANCZOS"}


@dataclass(frozen=True)
class WholePicture:
    """PIL image → float32 (channels, height, width): the whole picture is resized, whatever its shape, and each channel is scaled.

    ``scale`` and ``offset`` of each channel, for values between 0 and 1; ``interpolation``: a filter of PIL, with antialiasing.

    >>> from PIL import Image
    >>> WholePicture(4, 8, (1.0,) * 3, (-0.5,) * 3)(Image.new("RGB", (100, 30), "white")).unique()
    tensor([0.5000])
    """

    height: int
    width: int
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    interpolation: str = "bilinear"

    def __call__(self, image: Image) -> Tensor:
        from PIL import Image as pil

        image = image.convert("RGB").resize((self.width, self.height), getattr(pil.Resampling, FILTERS[self.interpolation]))
        pixels = torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255
        return pixels * torch.tensor(self.scale)[:, None, None] + torch.tensor(self.offset)[:, None, None]


def whole_picture(transform: Callable[[Image], Tensor]) -> WholePicture:
    """A transform that shows the whole picture, in the size and with the colors of a given one.

    Colors are read off: what the transform makes of pictures of one color each.

    Raises:
        ValueError: the colors of the input are not those of the picture times a number plus a number, channel by channel.

    >>> from torchvision.transforms import v2
    >>> v2_transform = v2.Compose([v2.Resize(8), v2.CenterCrop(8), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    >>> whole_picture(v2_transform)
    WholePicture(height=8, width=8, scale=(1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.0), interpolation='bilinear')
    """
    from PIL import Image as pil

    seen = {}
    for name, color in PROBES.items():
        found = transform(pil.new("RGB", (256, 256), color))
        if not isinstance(found, Tensor) or found.dim() != 3:
            raise TypeError(f"the preprocessing of the encoder must return a tensor (3, H, W), got {type(found).__name__}")
        seen[name] = found.detach()[:, found.shape[1] // 2, found.shape[2] // 2].double()  # in the middle, where no border is
        height, width = int(found.shape[1]), int(found.shape[2])
    offset, scale = seen["black"], seen["white"] - seen["black"]
    for channel, name in enumerate(("red", "green", "blue")):
        wanted = offset.clone()
        if len(scale) != 3 or bool((scale == 0).any()):
            raise _error("it does not give three channels that depend on the picture")
        wanted[channel] += scale[channel]
        if not torch.allclose(seen[name], wanted, rtol=0, atol=2e-3 * float(scale.abs().amax())):
            raise _error(f"{name} does not come out in its own channel alone")
    if not torch.allclose(seen["gray"], offset + scale * 128 / 255, rtol=0, atol=5e-3 * float(scale.abs().amax())):
        raise _error("values are not in proportion to those of the picture")
    return WholePicture(height, width, tuple(_brief(v) for v in scale), tuple(_brief(v) for v in offset), _filter(resampling(transform)))


def _filter(given: Any) -> str:
    """The name of an interpolation, of torchvision's or PIL's enumeration or a text."""
    name = str(getattr(given, "value", given)).lower()
    name = name if name in FILTERS else str(getattr(given, "name", "")).lower()
    return name if name in FILTERS else "bilinear"


def _brief(value: Tensor) -> float:
    return float(f"{float(value):.7g}")  # float32 has no more digits


def _error(why: str) -> ValueError:
    return ValueError(
        f"the whole picture cannot be shown with the colors of the encoder's preprocessing: {why}. Give preprocess=, or "
        'preprocess="encoder"'
    )
