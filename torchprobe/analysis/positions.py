"""Any layer, and any of its positions, as the representation of an encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from torchprobe.encoders import Encoder, EncoderError, Head
from torchprobe.recording.layers import Layer, canonical, matches_glob, select_layers
from torchprobe.recording.reader import LayerReader, map_sizes

Position = Literal["class", "patch", "mean", "last", "all"]
"""Which positions of a layer are vectors.

"class": the first position. "patch": each position that is no class or register token. "mean": the mean over the positions, without class
and register tokens, and without padding. "last": the last token that is not padding. "all": each position that is not padding.
"""

FeatureDim = int | Mapping[str, int] | None
"""The dimension of the features where nothing decides which one it is: of all layers, or as ``{name or glob: dim}`` of some."""

SEVERAL = ("patch", "all")
"""The positions that give several vectors for one input."""

_CLASS_TOKENS = ("class_token", "cls_token", "class_embedding")  # the names of its parameter in torchvision, timm, open_clip, transformers
_EXAMPLES = 3


class LayerEncoder(Encoder):
    """An encoder whose representation is what one of its layers gives, at one position, the mean of all, or at each of them.

    The layer is read by :class:`torchprobe.recording.LayerReader`, so the dimensions of the inputs and of the features are found, and what
    overwrites the activation in place does no harm. Layers have the names that they have in ``encoder``, whose weights are shared. There is
    no head: that of ``encoder`` sees another representation.

    Args:
        encoder: of images or texts.
        layer: the name of one layer, such as ``"visual.blocks.11"``.
        position: see :data:`Position`. None for a layer that gives one vector for each input.
        inputs: a few inputs to find out how the layer is laid out; None: ``encoder.example()``.
        feature_dim: the dimension of the features, as for :func:`torchprobe.record`, for a layer that is refused because it is unsure.

    Attributes:
        special_tokens: the number of class and register tokens at the start of this layer: as many as the network declares. A map has none,
            nor has a layer that has as many positions as there are patches, such as the one that makes them.

    Raises:
        ValueError: the encoder has no such layer, the name stands for several, or the position does not fit the layer. The message says
            what fits.

    >>> conv = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> encoder = Encoder(conv, features=4, preprocess=lambda image: image)
    >>> images = torch.randn(5, 3, 8, 8)
    >>> [tuple(LayerEncoder(encoder, "visual.0", position, images)(images).shape) for position in ("mean", "all")]
    [(5, 4), (5, 16, 4)]
    """

    source: Encoder
    reader: LayerReader

    def __init__(
        self,
        encoder: Encoder,
        layer: str,
        position: Position | None = None,
        inputs: Tensor | None = None,
        feature_dim: FeatureDim = None,
    ) -> None:
        if isinstance(encoder, LayerEncoder):
            raise ValueError(f"{encoder.name} reads a layer already: give the encoder itself")
        if position is not None and position not in get_args(Position):
            raise ValueError(f"position is one of {', '.join(get_args(Position))}, got {position!r}")
        chosen = select_layers(encoder, layer)
        if len(chosen) != 1:
            some = ", ".join(one.name for one in chosen[:3])
            raise ValueError(f"layer {layer!r} stands for {len(chosen)} layers ({some} …): name one of them")
        chosen = select_layers(encoder, layer, feature_dim)
        self.__dict__.update(tower=encoder.tower, inputs=encoder.inputs)
        where = layer if position is None else f"{layer} ({position})"
        super().__init__(encoder.network, features=1, preprocess=encoder.preprocess, name=f"{encoder.name}, {where}")
        self.__dict__["source"] = encoder  # not as a module: its network is that of this one
        self.__dict__["reader"] = LayerReader(encoder, chosen)
        self.layer, self.position, self._at, self._is_map = layer, position, chosen[0].name, False
        self.feature_dim = chosen[0].feature_dim
        self.training = encoder.training  # not by train(), which would also change the network
        example = encoder.example() if inputs is None else inputs
        example = example[:_EXAMPLES] if len(example) >= _EXAMPLES else torch.cat([example] * _EXAMPLES)[:_EXAMPLES]
        with map_sizes(encoder.network) as maps:
            x, positions = self._read(example)
        self.features = x.shape[-1]
        self.choices = {self.representation: self.features}
        self.special_tokens = special_tokens(encoder, positions or 1, self._is_map, {rows * columns for rows, columns in maps})
        if problem := self._problem(positions):
            raise ValueError(f"layer {layer!r} of {encoder.name} {problem}")

    @property
    def several(self) -> bool:
        """Whether one input gives several vectors."""
        return self.position in SEVERAL

    @property
    def facts(self) -> dict[str, str | int | None]:
        """The layer and the position, and the dimension of the features if it was given, to keep with results."""
        given = {} if self.feature_dim is None else {"feature_dim": self.feature_dim}
        return {"layer": self.layer, "position": self.position, **given}

    @property
    def why_no_head(self) -> str:
        """Why there is no accuracy."""
        return f"the head of an encoder sees its own representation, not {self.layer}" + (f" ({self.position})" if self.position else "")

    def forward(self, inputs: Any) -> Tensor:
        """Inputs → (N, features), or (N, positions, features) for "patch" and "all", with padding where texts have it."""
        x, positions = self._read(inputs)
        if positions is None:
            return x[:, 0]
        if self.position == "class":
            return x[:, 0]
        if self.position == "patch":
            return x[:, self.special_tokens :]
        mask = self._fitting(inputs, x)
        if self.position == "all":
            return x
        if self.position == "last":
            last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
            return x[torch.arange(len(x), device=x.device), last]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if mask.all():
            return wide[:, self.special_tokens :].mean(1)
        return wide.where(mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def rows(self, inputs: Any) -> tuple[Tensor, list[tuple[int, int]]]:
        """The vectors of a batch without padding, (vectors, features); and for each of them its input and its position in the layer."""
        h = self(inputs)
        if h.dim() == 2:
            return h, [(i, -1) for i in range(len(h))]
        mask = self._fitting(inputs, h)
        first = self.special_tokens if self.position == "patch" else 0
        return h[mask], [(i, first + k) for i, k in mask.nonzero().tolist()]

    def mask(self, inputs: Any) -> Tensor | None:
        """Which positions of a batch are not padding, as of the encoder."""
        return self.source.mask(inputs)

    def example(self) -> Tensor:
        """A batch of one input."""
        return self.source.example()

    def zero_shot_head(self, *args: Any, **options: Any) -> Head:
        """There is none.

        Raises:
            EncoderError: always.
        """
        raise EncoderError(f"{self.name} has no zero-shot head: captions are compared with the projection")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _read(self, inputs: Any) -> tuple[Tensor, int | None]:
        """The activation as (N, positions, features), and the number of positions; None if the layer gives one vector for each input."""
        with self.reader as reader:
            x, layout = reader.activations(inputs)[self._at]
        x = layout.images_first(x)
        self._is_map = x.dim() > 3
        pooled = x.dim() == 2 or (self._is_map and x.shape[2:].numel() == 1)
        return x.flatten(2).transpose(1, 2) if x.dim() > 2 else x[:, None], None if pooled else x[0, 0].numel()

    def _fitting(self, inputs: Any, x: Tensor) -> Tensor:
        """Which positions of ``x`` count, bool (N, positions)."""
        mask = self.mask(inputs)
        if mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"layer {self.layer!r} gives {x.shape[1]} positions for texts of {mask.shape[1]} tokens, so padding is unknown: "
                "choose a layer that gives one vector for each token"
            )
        return mask.to(x.device)

    def _problem(self, positions: int | None) -> str:
        """Why the position does not fit the layer; empty if it does."""
        image = self.inputs == "image"
        fitting = (["class"] if self._has_class() or not image else []) + (["patch"] if image else ["last"]) + ["mean", "all"]
        if positions is None and self.position is not None:
            return f"gives one vector for each {self.inputs}, so it has no positions: leave the position out"
        if positions is not None and self.position is None:
            return f"gives {positions} positions for each {self.inputs}: choose a position, one of {', '.join(fitting)}"
        if self.position == "class" and "class" not in fitting:
            return f"has no class token: choose a position, one of {', '.join(fitting)}"
        if positions is not None and self.position not in fitting:
            return f"has no position {self.position!r} for {self.inputs}s: choose one of {', '.join(fitting)}"
        return ""

    def _has_class(self) -> bool:
        return self.special_tokens > 0 and bool(getattr(self.network, "has_class_token", True))


def special_tokens(encoder: Encoder, positions: int, is_map: bool, maps: Collection[int]) -> int:
    """The number of class and register tokens at the start of a layer: those that the network of an image encoder declares.

    A map has none, nor has a layer with as many positions as a map: there, the patches are alone.

    Args:
        encoder: of images or texts; texts have none.
        positions: of the layer.
        is_map: whether the layer gives rows and columns.
        maps: the numbers of positions of the maps that convolutions of the network give.
    """
    if positions == 1 or encoder.inputs != "image" or is_map or positions in maps:
        return 0
    prefix: Any = getattr(encoder.network, "num_prefix_tokens", 0)
    declared = int(prefix) or encoder.special_tokens
    return declared or int(any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in encoder.network.named_parameters()))


@overload
def at_layer(
    encoder: Encoder, layer: str | None, position: Position | None, inputs: Tensor | None = None, feature_dim: FeatureDim = None
) -> Encoder: ...
@overload
def at_layer(
    encoder: nn.Module, layer: str | None, position: Position | None, inputs: Tensor | None = None, feature_dim: FeatureDim = None
) -> nn.Module: ...
def at_layer(
    encoder: nn.Module, layer: str | None, position: Position | None, inputs: Tensor | None = None, feature_dim: FeatureDim = None
) -> nn.Module:
    """The encoder itself, or with another layer as its representation; see :class:`LayerEncoder`. Of the ``feature_dim`` of several layers,
    what is about this one counts.

    Raises:
        TypeError: a layer of something that is not an :class:`torchprobe.Encoder`.
        ValueError: a position without a layer, or as :class:`LayerEncoder`.

    >>> at_layer(nn.Flatten(), None, None)
    Flatten(start_dim=1, end_dim=-1)
    """
    if layer is None:
        if position is not None:
            raise ValueError(f"position {position!r} is one of a layer: name the layer too (layer=, --layer)")
        return encoder
    if not isinstance(encoder, Encoder):
        raise TypeError(f"a layer is read from a torchprobe.Encoder, got {type(encoder).__name__}: make it one")
    return LayerEncoder(encoder, layer, position, inputs, _about(feature_dim, select_layers(encoder, layer)))


def recorded_dims(encoder: Encoder, layers: str | Sequence[str] | None, feature_dim: FeatureDim) -> dict[str, int] | None:
    """``feature_dim`` for :func:`torchprobe.record` of these layers of an encoder, without what is about the layer that is read from it.

    The features of the representation are always in its last dimension.

    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), features=2, preprocess=lambda image: image)
    >>> recorded_dims(encoder, "visual.*", {"visual.0": 1}), recorded_dims(encoder, None, None)
    ({'visual.0': 1, '': -1}, None)
    """
    if feature_dim is None and not isinstance(encoder, LayerEncoder):
        return None
    given = {} if feature_dim is None else dict(feature_dim) if isinstance(feature_dim, Mapping) else {"**": feature_dim}
    if isinstance(encoder, LayerEncoder):
        of_layer = _about(given, select_layers(encoder, encoder.layer)) or {}
        of_recorded = _about(given, select_layers(encoder, layers)) or {}
        given = {pattern: dim for pattern, dim in given.items() if pattern in of_recorded or pattern not in of_layer}
    return {**given, "": -1}


@overload
def _about(feature_dim: dict[str, int], layers: Sequence[Layer]) -> dict[str, int] | None: ...
@overload
def _about(feature_dim: FeatureDim, layers: Sequence[Layer]) -> FeatureDim: ...
def _about(feature_dim: FeatureDim, layers: Sequence[Layer]) -> FeatureDim:
    """What is said about one of these layers; None if nothing is."""
    if not isinstance(feature_dim, Mapping):
        return feature_dim
    names = [name for layer in layers for name in layer.names]
    found = {
        pattern: dim
        for pattern, dim in feature_dim.items()
        if any(name in (pattern, canonical(pattern)) or matches_glob(pattern, name) for name in names)
    }
    return found or None
