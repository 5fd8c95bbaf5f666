"""An encoder: images in, representations out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from torchprobe.common.runs import CountCallback
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import Head
from torchprobe.encoders.outputs import AUTO, REPRESENTATIONS, represent

Template = str | Callable[[str], str]
"""Class name → caption: a string with ``{}`` in it, or a function."""

TEXT_BATCH_SIZE = 256
"""Captions in one pass through a text tower."""


class Encoder(nn.Module):
    """An image encoder. Its output is the representation: the vector that the head sees, before normalization.

    Args:
        visual: the network without its head: images (N, 3, H, W) → (N, features), or an output that contains it: a tuple, a dict, or a
            model output of transformers. For every source its layers are named ``visual.…``, as in a CLIP model.
        features: the width of the representation.
        preprocess: PIL image → tensor (3, H, W), as the weights require.
        name: for messages, tables and pages.
        head: the trained classification layer on top of the representation. None if there is no such layer, or if it is not one linear
            layer. It moves with the encoder (``.to()``, ``.half()``), but it is not a layer of the encoder: it is not hooked, and it is
            not in parameter lists or in ``state_dict``.
        representation: which part of the output is the representation; see :data:`torchprobe.encoders.outputs.REPRESENTATIONS`.
        choices: the representations that the network has → their widths, for :meth:`choose`; None: only this one.
        special_tokens: how many positions at the start are class and register tokens, which a mean leaves out.

    Raises:
        ValueError: a head of another width, or an unknown representation.

    >>> import torch
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), features=5, preprocess=lambda image: image)
    >>> encoder(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    visual: nn.Module
    preprocess: Callable[[Any], Tensor]
    head: Head | None

    companions: ClassVar[tuple[str, ...]] = ("head",)
    """Attributes that are a module or None. They move with the encoder, but they are not layers of it."""

    head_normalizes: ClassVar[bool] = False
    """Whether a head that lies next to the encoder in a checkpoint sees vectors of length 1."""

    tower: ClassVar[str] = "visual"
    """The attribute that holds the network, and so the first part of the names of its layers."""

    inputs: ClassVar[str] = "image"
    """What one input is."""

    def __init__(
        self,
        visual: nn.Module,
        *,
        features: int,
        preprocess: Callable[[Any], Tensor],
        name: str = "encoder",
        head: Head | None = None,
        representation: str = AUTO,
        choices: Mapping[str, int] | None = None,
        special_tokens: int = 0,
    ) -> None:
        super().__init__()
        if representation not in REPRESENTATIONS:
            raise ValueError(f"there is no representation {representation!r}: choose one of {', '.join(REPRESENTATIONS)}")
        if head is not None and head.in_features != features:
            raise ValueError(f"the head of {name} takes {head.in_features} features, its representation has {features}")
        setattr(self, self.tower, visual)
        self.features = features
        self.representation = representation
        self.choices = {representation: features} if choices is None else dict(choices)
        self.special_tokens = special_tokens
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

    @property
    def network(self) -> nn.Module:
        """The network whose output contains the representation."""
        return self.get_submodule(self.tower)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → representations (N, features)."""
        return self.checked(represent(self.network(images), self.representation, special=self.special_tokens))

    def checked(self, h: Tensor) -> Tensor:
        """The representation, if it is one vector for each input.

        Raises:
            EncoderError: it is not.
        """
        if h.shape[1:] != (self.features,):
            raise EncoderError(
                f"{self.name} returned {tuple(h.shape)}, expected ({self.inputs}s, {self.features}): "
                f"it does not pool to one vector per {self.inputs}"
            )
        return h

    def choose(self, representation: str) -> Encoder:
        """Takes another part of the output as the representation, in place, and returns self. A head on the previous one is dropped.

        Args:
            representation: one of ``choices``.

        Raises:
            EncoderError: the encoder has no such representation.
        """
        if representation not in self.choices:
            has = ", ".join(self.choices)
            raise EncoderError(f"{self.name} has no representation {representation!r}; it has {has}")
        if representation != self.representation:
            self.head = None
        self.representation, self.features = representation, self.choices[representation]
        return self

    def example(self) -> Tensor:
        """A batch of one input: a gray image."""
        from PIL import Image

        return self.preprocess(Image.new("RGB", (256, 256), (120, 120, 120)))[None]

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Which positions of a batch count, bool (N, positions); None: all, as for images without padding."""
        of: Callable[[Tensor], Tensor | None] | None = getattr(self.preprocess, "mask", None)
        return None if of is None else of(inputs)

    def for_texts(self) -> Encoder:
        """The encoder of texts: the text tower of a CLIP model, or a text encoder itself.

        Raises:
            EncoderError: there is no text tower.
        """
        raise EncoderError(f"{self.name} has no text tower, so it cannot encode text")

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
        chosen = "" if self.representation == AUTO else f", representation={self.representation!r}"
        return f"{self.name!r}, features={self.features}{chosen}"


@dataclass(frozen=True)
class Built:
    """What a source of encoders returns; see :data:`torchprobe.encoders.sources.SOURCES`.

    Attributes:
        encoder: with its trained head, if its weights are trained and have one.
        head_keys: the keys of the classification layer, which a checkpoint may have although the encoder does not.
        class_names: the names of the classes that the architecture was trained on, for a head of as many rows in a checkpoint.
        rename: the tensors of a checkpoint → the same under the keys of the network, for formats that the source knows. Keys that it does
            not know stay as they are, and are named if they do not fit.
        finds_heads: whether a layer in a checkpoint that has the name of a head sees the representation.
    """

    encoder: Encoder
    head_keys: tuple[str, ...] = ()
    class_names: Sequence[str] | None = None
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    finds_heads: bool = True
