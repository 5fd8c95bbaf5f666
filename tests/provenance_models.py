"""Small random networks of several libraries, images in and one vector out, for the tests of provenance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from open_clip.transformer import VisionTransformer as OpenClipTower
from torch import Tensor, nn

SIDE = 32


class Output(nn.Module):
    """A model of transformers, reduced to one of its outputs."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, images: Tensor) -> Tensor:
        return self.pick(self.model(images))


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with no parameter at its initial 0 or 1, so that every term of the sum counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.05 if p.dim() < 2 or "pos" in name or "token" in name else 0.0
            p.add_(spread * torch.randn(p.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def open_clip(**options: Any) -> nn.Module:
    return OpenClipTower(SIDE, 8, 48, 3, 3, 2.0, output_dim=40, **options)


def timm_vit(**options: Any) -> nn.Module:
    return timm.models.VisionTransformer(SIDE, 8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=0, **options)


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(SIDE, 8, 3, 3, 48, 96)
    model.heads = nn.Identity()
    return model


_HF = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "image_size": SIDE, "patch_size": 8}


def hf_clip() -> nn.Module:
    config = transformers.CLIPVisionConfig(**_HF, projection_dim=40)
    return Output(transformers.CLIPVisionModelWithProjection(config), lambda out: out.image_embeds)


def hf_vit() -> nn.Module:
    return Output(transformers.ViTModel(transformers.ViTConfig(**_HF), add_pooling_layer=False), lambda out: out.last_hidden_state[:, 0])


def hf_dinov2() -> nn.Module:
    return Output(transformers.Dinov2Model(transformers.Dinov2Config(**_HF, mlp_ratio=2)), lambda out: out.pooler_output)


def hf_mean() -> nn.Module:
    return Output(transformers.Dinov2Model(transformers.Dinov2Config(**_HF, mlp_ratio=2)), lambda out: out.last_hidden_state[:, 1:].mean(1))


def resnet() -> nn.Module:
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 2])
    model.fc = nn.Identity()
    return model


def bottlenecks() -> nn.Module:
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 2], width_per_group=16)
    model.fc = nn.Identity()
    return model


def hf_resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 2], layer_type="basic")
    return Output(transformers.ResNetModel(config), lambda out: out.pooler_output.flatten(1))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": open_clip,
    "open_clip, LayerScale": lambda: open_clip(ls_init_value=0.3),
    "open_clip, mean": lambda: open_clip(pool_type="avg"),
    "open_clip, norm after mean": lambda: open_clip(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
    "timm": timm_vit,
    "timm, mean": lambda: timm_vit(global_pool="avg", class_token=False),
    "timm, CLIP": lambda: timm_vit(pre_norm=True),
    "timm, DINOv2": lambda: timm_vit(init_values=1e-3, reg_tokens=2, no_embed_class=True),
    "timm, EVA": lambda: timm.models.eva.Eva(SIDE, 8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=0, init_values=0.1),
    "torchvision": torchvision_vit,
    "transformers, CLIP": hf_clip,
    "transformers, ViT": hf_vit,
    "transformers, DINOv2": hf_dinov2,
    "transformers, mean": hf_mean,
}
"""Pre-norm transformers whose representation is a sum along the stream."""

CNNS: dict[str, Callable[[], nn.Module]] = {
    "torchvision, ResNet": resnet,
    "torchvision, bottlenecks": bottlenecks,
    "timm, ResNet": lambda: timm.create_model("resnet14t", num_classes=0),
    "transformers, ResNet": hf_resnet,
}


def images(n: int = 5) -> list[Tensor]:
    return list(torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
