"""Networks whose blocks are recorded: how to build them, how to train them, and clocks around the hooks on their blocks."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Timing, gaussian


@dataclass(frozen=True)
class Network:
    """A network with random weights.

    Args:
        title: for tables.
        package: the module that builds it.
        build: builds it.
        pattern: matches the names of its blocks.
        size: height and width of its images.
        feature_dim: of the output of a block; 1 for maps (N, C, H, W).
    """

    title: str
    package: str
    build: Callable[[], nn.Module]
    pattern: re.Pattern[str]
    size: int = 224
    feature_dim: int = -1

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """Name → block."""
        return {name: module for name, module in model.named_modules() if self.pattern.fullmatch(name)}

    def images(self, batch: int, device: torch.device) -> Tensor:
        return gaussian(batch, 3, self.size, self.size, device=device)


def _open_clip(name: str) -> nn.Module:
    logging.disable(logging.WARNING)  # it warns that there are no weights; random weights are intended
    try:
        visual: nn.Module = importlib.import_module("open_clip").create_model(name, pretrained=None).visual
    finally:
        logging.disable(logging.NOTSET)
    return visual


def _timm() -> nn.Module:
    model: nn.Module = importlib.import_module("timm").create_model("vit_base_patch16_224", pretrained=False)
    return model


def _torchvision(name: str) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(weights=None)
    return model


RESBLOCKS = re.compile(r"transformer\.resblocks\.\d+")
VIT_B_32 = Network("open_clip's ViT-B/32", "open_clip", lambda: _open_clip("ViT-B-32"), RESBLOCKS)
RESNET_50 = Network("torchvision's ResNet-50", "torchvision", lambda: _torchvision("resnet50"), re.compile(r"layer\d\.\d+"), feature_dim=1)
VIT_B_16 = (
    Network("timm's ViT-B/16", "timm", _timm, re.compile(r"blocks\.\d+")),
    Network("open_clip's ViT-B/16", "open_clip", lambda: _open_clip("ViT-B-16"), RESBLOCKS),
    Network("torchvision's ViT-B/16", "torchvision", lambda: _torchvision("vit_b_16"), re.compile(r"encoder\.layers\.\w+")),
)
"""The same network from three libraries; a benchmark takes the first that is installed."""


def installed_vit_b_16() -> Network:
    """ViT-B/16 from the first library that is installed.

    Raises:
        RuntimeError: none of them is.
    """
    for network in VIT_B_16:
        if network.installed:
            return network
    raise RuntimeError(f"no ViT-B/16: install one of {', '.join(network.package for network in VIT_B_16)}")


class _TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return out


class _TinyVit(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*(_TinyBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = rearrange(self.embed(images), "n c h w -> n (h w) c")
        out: Tensor = self.head(reduce(self.blocks(tokens), "n t c -> n c", "mean"))
        return out


TINY = Network("a tiny network", "torch", _TinyVit, re.compile(r"blocks\.\d+"), size=32)
"""For quick runs, which only show that everything works."""


def twin(model: nn.Module) -> nn.Module:
    """Other modules over the same weights: hooks on one do not run in the other."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Training:
    """Steps of AdamW on images and labels that never change. All models of one training share their weights and the optimizer.

    Args:
        network: what is trained.
        batch: images in a step.
        device: where it runs.
        autocast: bfloat16.
        captured: the step can be captured in a CUDA graph.
    """

    def __init__(self, network: Network, batch: int, device: torch.device, autocast: bool = False, captured: bool = False) -> None:
        torch.manual_seed(0)
        self.network, self.device, self.autocast, self.captured = network, device, autocast, captured
        self.model = network.build().to(device).train()
        on_gpu = device.type == "cuda"
        # The rate is low, so that training on noise does not diverge.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=on_gpu, capturable=on_gpu and captured)
        self.images = network.images(batch, device)
        with torch.no_grad():
            self.labels = torch.arange(batch, device=device) % self.forward(self.model).shape[-1]

    def twin(self) -> nn.Module:
        return twin(self.model)

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        return self.network.blocks(model)

    def forward(self, model: nn.Module) -> Tensor:
        # A graph must not use weights that were cast outside it. Each is used once, so the cache would save nothing.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            out: Tensor = model(self.images)
        return out

    def step(self, model: nn.Module) -> None:
        loss = functional.cross_entropy(self.forward(model).float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.captured:
            self.optimizer.zero_grad()  # a graph must not leave gradients in its memory for the next one


def block_outputs(blocks: Iterable[nn.Module], forward: Callable[[], object]) -> list[Tensor]:
    """Copies of what the blocks return in one forward pass."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone())) for block in blocks]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return outputs


class HookClock:
    """The time between two hooks on each block, summed over the blocks in one call of ``run``.

    Place the first hooks, then the hooks to be measured, then the last ones.
    """

    def __init__(self, blocks: Iterable[nn.Module], run: Callable[[], object]) -> None:
        self.blocks, self.run = list(blocks), run
        self.began = self.total = 0.0
        self.totals: list[float] = []

    def place_first(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(self._begin)

    def place_last(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(self._end)

    def __call__(self) -> None:
        self.total = 0.0
        self.run()
        self.totals.append(self.total)

    def timing(self, calls: Timing) -> Timing:
        """The time between the hooks in each of the calls that were timed."""
        return replace(calls, seconds=tuple(self.totals[-len(calls.seconds) :]))

    def _begin(self, module: nn.Module, args: object, output: object) -> None:
        self.began = perf_counter()

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self.total += perf_counter() - self.began
