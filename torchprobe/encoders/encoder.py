"""An image encoder: images in, representations out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from torchprobe.common.progress import CountCallback
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import Head

Template = str | Callable[[str], str]
"""What makes a caption of a class name: a string with ``{}`` in it, or a function."""

BATCH = 256
"""Captions that go through a text tower at a time."""


class Encoder(nn.Module):
    """An image encoder. Its output is the representation: the vector that the head sees, before normalisation.

    Args:
        visual: the network without its head: images (N, 3, H, W) → (N, features). Its layers are named ``visual.…``
            for every source, as within a CLIP model.
        features: the width of the representation.
        preprocess: PIL image → tensor (3, H, W), the way the weights want it.
        name: what to call it.
        head: the trained classification layer that stood on top of it; None where there is none, or it is not one
            linear layer. It moves with the encoder (``.to()``, ``.half()``), but is no layer of it: no hook, parameter
            list or ``state_dict`` sees it.

    Raises:
        ValueError: a head of another width.

    >>> import torch
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), features=5, preprocess=lambda image: image)
    >>> encoder(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    preprocess: Callable[[Any], Tensor]
    head: Head | None

    # Attributes that may be modules and are still no layers; of these the companions move with the encoder.
    _companions: ClassVar[tuple[str, ...]] = ("head",)
    _aside: ClassVar[tuple[str, ...]] = ("preprocess", *_companions)

    def __init__(
        self, visual: nn.Module, *, features: int, preprocess: Callable[[Any], Tensor], name: str = "encoder", head: Head | None = None
    ) -> None:
        super().__init__()
        if head is not None and head.in_features != features:
            raise ValueError(f"the head of {name} takes {head.in_features} features, its representation has {features}")
        self.visual = visual
        self.features = features
        self.preprocess = preprocess
        self.name = name
        self.head = head

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._aside:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        nn.Module._apply(self, fn, recurse)
        for name in self._companions:
            if (module := self.__dict__[name]) is not None:
                module._apply(fn, recurse)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → representations (N, features)."""
        output: Tensor | tuple[Tensor, ...] = self.visual(images)
        h = output[0] if isinstance(output, tuple) else output  # some towers return their tokens as well
        if h.shape[1:] != (self.features,):
            raise EncoderError(
                f"{self.name} gave {tuple(h.shape)} where (images, {self.features}) was expected: it does not pool to one vector per image"
            )
        return h

    def encode_text(self, texts: Sequence[str], batch_size: int = BATCH) -> Tensor:
        """Texts → float32 (texts, features), for a CLIP model only; see :class:`~torchprobe.encoders.ClipEncoder`.

        Raises:
            EncoderError: there is no text tower.
        """
        raise EncoderError(self._textless("so there is nothing to encode text with"))

    def zero_shot_head(
        self,
        classnames: Sequence[str] | None = None,
        templates: Sequence[Template] | None = None,
        *,
        batch_size: int = BATCH,
        progress: CountCallback | None = None,
    ) -> Head:
        """A head made of captions, for a CLIP model only; see :class:`~torchprobe.encoders.ClipEncoder`.

        Raises:
            EncoderError: there is no text tower.
        """
        raise EncoderError(self._textless("so it has no zero-shot head: take its trained one (encoder.head) or a saved one (load_head)"))

    def _textless(self, consequence: str) -> str:
        return f"{self.name} has no text tower, {consequence}"

    def extra_repr(self) -> str:
        return f"{self.name!r}, features={self.features}"
