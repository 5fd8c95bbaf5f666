"""The layers of an encoder, as a forward pass of one blank image shows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from torchprobe.encoders import Encoder
from torchprobe.recording import record
from torchprobe.recording.layers import named_layers, select_layers


def outline(encoder: Encoder, layers: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One row per layer, in the order of the model: ``layer``, ``module`` (its class), ``default`` (recorded when no layers are named),
    ``features``, ``feature_dim``, ``vectors_per_image``; the last three None for a layer that gives no tensor.

    Args:
        encoder: any; one blank image is run through it.
        layers: only those that these names or globs select.

    Raises:
        ValueError: a layer the encoder does not have.
    """
    from PIL import Image

    default = {layer.name for layer in select_layers(encoder)}
    wanted = {layer.name for layer in select_layers(encoder, "**" if layers is None else list(layers))}
    modules = {layer.name: type(layer.module).__name__ for layer in named_layers(encoder).values() if layer.name in wanted}
    image = encoder.preprocess(Image.new("RGB", (256, 256), (120, 120, 120)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the layers that do not fire, which the rows show
        with record(encoder, list(modules)) as rec, torch.inference_mode():
            encoder(image[None])
    seen = {row["layer"]: row for row in rec.rows()}
    rows = []
    for name, module in modules.items():
        row = seen.get(name)
        rows.append(
            {
                "layer": name,
                "module": module,
                "default": name in default,
                "features": row and row["features"],
                "feature_dim": row and row["feature_dim"],
                "vectors_per_image": row and int(row["vectors"] + row["constant_vectors"] + row["invalid_vectors"]),
            }
        )
    return rows
