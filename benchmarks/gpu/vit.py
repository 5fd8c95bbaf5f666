"""A vision transformer that trains: with and without a recorder, over the same weights."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Tower:
    """A network and where its blocks are; images are square, ``size`` wide."""

    name: str
    build: Callable[[], nn.Module]
    blocks: str
    size: int = 224

    @property
    def layers(self) -> str:
        return f"{self.blocks}.*"


def _timm() -> nn.Module:
    return importlib.import_module("timm").create_model("vit_base_patch16_224", pretrained=False)


def _open_clip() -> nn.Module:
    logging.disable(logging.WARNING)  # it warns that there are no weights, as is meant
    try:
        visual: nn.Module = importlib.import_module("open_clip").create_model("ViT-B-16", pretrained=None).visual
    finally:
        logging.disable(logging.NOTSET)
    return visual


def _torchvision() -> nn.Module:
    return importlib.import_module("torchvision.models").vit_b_16(weights=None)


TOWERS = {
    "timm": Tower("timm's ViT-B/16", _timm, "blocks"),
    "open_clip": Tower("open_clip's ViT-B/16", _open_clip, "transformer.resblocks"),
    "torchvision": Tower("torchvision's ViT-B/16", _torchvision, "encoder.layers"),
}


def installed_tower() -> Tower:
    """ViT-B/16 from the first library that is installed, at random initialisation.

    Raises:
        RuntimeError: none of them is.
    """
    for package, tower in TOWERS.items():
        if importlib.util.find_spec(package) is not None:
            return tower
    raise RuntimeError(f"there is no ViT-B/16: install one of {', '.join(TOWERS)}")


class _TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class _TinyVit(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*(_TinyBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks(self.embed(images).flatten(2).mT).mean(1))
        return out


TINY = Tower("a tiny network", _TinyVit, "blocks", size=32)
"""For ``--quick``: it shows that everything runs, no more."""


class Training:
    """Steps of AdamW under autocast, on images and labels that stay where they are. ``captured``: so that they can be in a graph."""

    def __init__(self, tower: Tower, batch: int, device: torch.device, captured: bool = False) -> None:
        torch.manual_seed(0)
        self.tower, self.device = tower, device
        self.model = tower.build().to(device).train()
        on_cuda = device.type == "cuda"
        # The rate is low: nothing is learned from noise, and nothing may diverge.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=on_cuda, capturable=on_cuda and captured)
        self.images = torch.randn(batch, 3, tower.size, tower.size, device=device)
        with torch.no_grad():
            classes = self.forward(self.model).shape[-1]
        self.labels = torch.randint(classes, (batch,), device=device)

    def twin(self) -> nn.Module:
        """Other modules over the same weights: hooks on the one leave the other as it is."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def forward(self, model: nn.Module) -> torch.Tensor:
        # A graph must not find weights that were cast outside it; each is used once, so the cache would save nothing.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            out: torch.Tensor = model(self.images)
        return out

    def step(self, model: nn.Module) -> None:
        nn.functional.cross_entropy(self.forward(model).float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.tower.blocks).children())
