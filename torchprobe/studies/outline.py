"""The layers of an encoder, found with a forward pass of one input."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from torchprobe.encoders import Encoder
from torchprobe.recording import record
from torchprobe.recording.layers import named_layers, select_layers


@dataclass(frozen=True)
class LayerOutline:
    """One layer; the last three attributes are None for a layer that returns no tensor.

    Attributes:
        layer: its name; "" is the encoder itself.
        module: its class.
        default: whether it is recorded when no layers are named.
        features: the length of one vector.
        feature_dim: the dimension of the output that holds the features.
        vectors_per_image: number of vectors for one image.
    """

    layer: str
    module: str
    default: bool
    features: int | None = None
    feature_dim: int | None = None
    vectors_per_image: int | None = None


def outline(encoder: Encoder, layers: Iterable[str] | None = None) -> list[LayerOutline]:
    """The layers of an encoder, in the order of the model.

    Args:
        encoder: one blank image, or one short text, is run through it.
        layers: names or globs; None: all layers.

    Raises:
        ValueError: a layer that the encoder does not have.

    >>> from torch import nn
    >>> from torchvision.transforms.functional import to_tensor
    >>> encoder = Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8)), features=8, preprocess=to_tensor)
    >>> [(row.layer, row.features) for row in outline(encoder, ["visual.*"])]
    [('visual.0', 3), ('visual.1', 48), ('visual.2', 8)]
    """
    default = {layer.name for layer in select_layers(encoder)}
    wanted = {layer.name for layer in select_layers(encoder, "**" if layers is None else list(layers))}
    modules = {layer.name: type(layer.module).__name__ for layer in named_layers(encoder).values() if layer.name in wanted}
    inputs = encoder.example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that do not fire; the rows show them
        with record(encoder, lambda name, module: name in modules) as rec, torch.inference_mode():
            encoder(inputs)
    fired: dict[str, dict[str, Any]] = {}
    for row in rec.rows():  # of several tensors the first one; the dimension of the features may be unknown
        fired.setdefault(row["layer"].partition(":")[0] if row["layer"] not in modules else row["layer"], row)
    rows = []
    for name, module in modules.items():
        line = LayerOutline(name, module, default=name in default)
        if (seen := fired.get(name)) and seen["features"] is not None:
            vectors = int(seen["vectors"] + seen["constant_vectors"] + seen["invalid_vectors"])
            line = LayerOutline(name, module, name in default, seen["features"], seen["feature_dim"], vectors)
        rows.append(line)
    return rows
