"""Small models of open_clip: two towers whose logits are as wide as the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .case import Built, Case, Inputs, randint, randn

_TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 128, "width": 48, "heads": 4, "layers": 2}
_VISION: dict[str, dict[str, Any]] = {
    "ViT": {"layers": 2, "width": 64, "patch_size": 16, "head_width": 16},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "timm": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"},
}
SIZE = (64, 96, 128)


def cases() -> Iterator[Case]:
    for name in _VISION:
        yield Case("open_clip", f"CLIP {name}", lambda geometry, name=name: build(name, "CLIP", geometry))  # type: ignore[misc]
    yield Case("open_clip", "CustomTextCLIP ViT", lambda geometry: build("ViT", "CustomTextCLIP", geometry))
    yield Case("open_clip", "CoCa", lambda geometry: build("ViT", "CoCa", geometry))


def build(vision: str, kind: str, geometry: int) -> Built:
    import open_clip

    size = SIZE[geometry]
    text = dict(_TEXT)
    if kind == "CoCa":
        text.update(embed_cls=True, output_tokens=True, context_length=11, width=32)
    tower = {"image_size": size, **_VISION[vision]}
    if kind == "CoCa":
        tower.update(attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=4, output_tokens=True)
    arguments: dict[str, Any] = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}
    if kind == "CoCa":
        arguments["multimodal_cfg"] = {
            "context_length": 11,
            "vocab_size": 128,
            "width": 32,
            "heads": 4,
            "layers": 2,
            "attn_pooler_heads": 4,
        }
    model = getattr(open_clip, kind)(**arguments)

    def inputs(batch: int) -> Inputs:
        length = 11 if kind == "CoCa" else 12
        return (randn(batch, 3, size, size), randint(1, 120, (batch, length))), {}

    return Built(model, inputs)
