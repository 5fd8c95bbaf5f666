"""An image encoder: images in, representations out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from torchprobe.common.runs import CountCallback
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import Head

Template = str | Callable[[str], str]
"""Class name → caption: a string with ``{}`` in it, or a function."""

TEXT_BATCH_SIZE = 256
"""Captions in one pass through a text tower."""


class Encoder(nn.Module):
    """An image encoder. Its output is the representation: the vector that the head sees, before normalization.

    Args:
        visual: the network without its head: images (N, 3, H, W) → (N, features). For every source its layers are named
            ``visual.…``, as in a CLIP model.
        features: the width of the representation.
        preprocess: PIL image → tensor (3, H, W), as the weights require.
        name: for messages, tables and pages.
        head: the trained classification layer on top of the representation. None if there is no such layer, or if it is not one linear
            layer. It moves with the encoder (``.to()``, ``.half()``), but it is not a layer of the encoder: it is not hooked, and it is
            not in parameter lists or in ``state_dict``.

    Raises:
        ValueError: a head of another width.

    >>> import torch
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), features=5, preprocess=lambda image: image)
    >>> encoder(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    preprocess: Callable[[Any], Tensor]
    head: Head | None

    companions: ClassVar[tuple[str, ...]] = ("head",)
    """Attributes that are a module or None. They move with the encoder, but they are not layers of it."""

    head_normalizes: ClassVar[bool] = False
    """Whether a head that lies next to the encoder in a checkpoint sees vectors of length 1."""

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
        if name == "preprocess" or name in self.companions:
            self.__dict__[name] = value  # nn.Module would make it a layer
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        nn.Module._apply(self, fn, recurse)
        for name in self.companions:
            if (module := self.__dict__[name]) is not None:
                module._apply(fn, recurse)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → representations (N, features)."""
        output: Tensor | tuple[Tensor, ...] = self.visual(images)
        h = output[0] if isinstance(output, tuple) else output  # some towers return their tokens as well
        if h.shape[1:] != (self.features,):
            raise EncoderError(
                f"{self.name} returned {tuple(h.shape)}, expected (images, {self.features}): it does not pool to one vector per image"
            )
        return h

    def encode_text(self, texts: Sequence[str], batch_size: int = TEXT_BATCH_SIZE) -> Tensor:
        """Texts → float32 (texts, features), for a CLIP model only; see :class:`~torchprobe.encoders.ClipEncoder`.

        Raises:
            EncoderError: there is no text tower.
        """
        raise EncoderError(f"{self.name} has no text tower, so it cannot encode text")

    def zero_shot_head(
        self,
        classnames: Sequence[str] | None = None,
        templates: Sequence[Template] | None = None,
        *,
        batch_size: int = TEXT_BATCH_SIZE,
        progress: CountCallback | None = None,
    ) -> Head:
        """A head made of captions, for a CLIP model only; see :class:`~torchprobe.encoders.ClipEncoder`.

        Raises:
            EncoderError: there is no text tower.
        """
        raise EncoderError(
            f"{self.name} has no text tower, so it has no zero-shot head: use its trained head (encoder.head) or a saved one (load_head)"
        )

    def load_companions(self, weights: Mapping[str, Tensor], prefix: str, checkpoint: str | os.PathLike[str]) -> set[str]:
        """Loads what a checkpoint has besides the image tower and the head. :func:`torchprobe.encoders.load_encoder` calls this.

        Args:
            weights: the content of the checkpoint.
            prefix: where the image tower lies in it, such as ``"model.visual."``.
            checkpoint: the file, for messages.

        Returns:
            The keys that were loaded.
        """
        return set()

    def extra_repr(self) -> str:
        return f"{self.name!r}, features={self.features}"


@dataclass(frozen=True)
class Built:
    """What a source of encoders returns; see :data:`torchprobe.encoders.load.SOURCES`.

    Attributes:
        encoder: with its trained head, if its weights are trained and have one.
        head_keys: the keys of the classification layer, which a checkpoint may have although the encoder does not.
    """

    encoder: Encoder
    head_keys: tuple[str, ...] = ()
