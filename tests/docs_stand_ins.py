"""What the code of the documentation takes for granted, page by page: small models, encoders and data sets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from broden_sets import write_trap_set
from import_sets import photo
from torch import Tensor, nn

import torchprobe
from torchprobe import analysis
from torchprobe.encoders import Encoder, Head, TextEncoder
from torchprobe.studies import scan as scan_study

WIDTH, OUTLIER, CLASSES = 48, 7, 1000
SYNSETS = ("n01440764", "n01443537", "n01484850")


def pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB").resize((32, 32)))).movedim(2, 0).float() / 255


class ZeroShot(Encoder):
    """An encoder with the head that a CLIP encoder would make of class names."""

    def zero_shot_head(self) -> Head:
        weight = torch.randn(CLASSES, self.features, generator=torch.Generator().manual_seed(1))
        return Head(nn.functional.normalize(weight, dim=1))


def transformer(width: int = WIDTH, depth: int = 12) -> ZeroShot:
    """A vision transformer of which one feature stands out."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(32, 8, embed_dim=width, depth=depth, num_heads=3, mlp_ratio=2, num_classes=0)
    with torch.no_grad():
        model.norm.bias[OUTLIER] = 40
    return ZeroShot(model, features=width, preprocess=pixels, name="stand-in").eval()


class Bag(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": torch.eye(128)[input_ids]}


def letters(texts: list[str]) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[min(ord(letter), 127) for letter in text] + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def stand_in(name: str, *_: Any, **__: Any) -> Encoder:
    if name == "hf:gpt2":
        return TextEncoder(Bag(), letters, features=128, representation="mean")
    return transformer()


class Layered(nn.Module):
    """An encoder with the layer that the README dissects."""

    name = "layered"
    preprocess = staticmethod(pixels)

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.layer4 = nn.Sequential(nn.Conv2d(3, 24, 8, stride=4), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.visual.layer4(images - 0.5).mean((2, 3))


class Blocks(nn.Module):
    """A model with blocks that hold an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.attn(x, x, x, need_weights=False)[0])


def training(steps: int = 1001) -> dict[str, Any]:
    """A model, a loader, and what a training loop calls."""
    model = nn.Sequential(OrderedDict(blocks=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
    logger = SimpleNamespace(log=lambda numbers, step: None)
    mlflow = SimpleNamespace(log_metrics=lambda numbers, step: _whole(numbers))

    def train_step(batch: Tensor) -> None:
        model(batch)

    def batches() -> Iterator[Tensor]:
        return (torch.randn(2, 4) for _ in range(steps))

    return {
        "torchprobe": torchprobe, "torch": torch, "model": model, "train_step": train_step, "logger": logger, "log": lambda numbers: None,
        "mlflow": mlflow, "validate": lambda: None, "rank": 0, "step": 0, "loader": batches(),
    }  # fmt: skip


def _whole(numbers: dict[str, float]) -> None:
    assert all(part for name in numbers for part in name.split("/"))


def _readme() -> dict[str, Any]:
    return {**training(), "encoder": Layered()}


def _encoders() -> dict[str, Any]:
    from torchprobe.datasets import image_folder

    images = image_folder("photos")
    return {"embed": analysis.embed, "scan": scan_study.scan, "encoder": transformer(), "images": images, "model": nn.Linear(3, 768),
            "transform": pixels}  # fmt: skip


def _reliability() -> dict[str, Any]:
    dataset = [(torch.randn(3, 32, 32), i) for i in range(8)]
    return {"embed": analysis.embed, "encoder": transformer(depth=2), "dataset": Named(dataset)}


class Named(list[Any]):
    """A data set of another library, which can say what it is."""

    identity: str


def _statistics() -> dict[str, Any]:
    moments = torchprobe.Moments(768)
    moments.update(torch.randn(4, 768))
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    model.forward = lambda x: model.blocks[1](model.blocks[0](x[:, :16]))
    return {"model": model, "x": torch.randn(4, 768), "other": moments, "saved": moments.state_dict()}


def _hooks() -> dict[str, Any]:
    model = Blocks()
    return {"torchprobe": torchprobe, "model": model, "block": model.blocks[0], "x": torch.randn(2, 5, 16)}


def _runs() -> dict[str, Any]:
    """Two models of which one was changed, and batches."""
    torch.manual_seed(0)
    base, tuned = (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned[2].weight += 1
    batches = [torch.randn(16, 8) for _ in range(16)]
    return {"torch": torch, "torchprobe": torchprobe, "base": base, "tuned": tuned, "batches": batches, "model_a": base, "model_b": tuned,
            "batch": batches[0]}  # fmt: skip


def _experts(block: str) -> dict[str, Any]:
    """A mixture of experts and tokens; or, for attention, a transformer and images."""
    if "record_attention" in block:
        model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2)
        return {"torchprobe": torchprobe, "model": model, "batches": [torch.randn(2, 3, 224, 224)] * 2}
    transformers = pytest.importorskip("transformers")
    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=16, vocab_size=50, **few)
    tokens, mask = torch.randint(50, (4, 12)), torch.ones(4, 12, dtype=torch.bool)
    mask[0, 8:] = False
    return {"model": transformers.MixtralForCausalLM(config), "batches": [(tokens, mask)] * 2, "tokens": tokens}


GIVEN: dict[str, Callable[..., dict[str, Any]]] = {
    "README.md": _readme,
    "docs/compare-runs.md": _runs,
    "docs/encoders.md": _encoders,
    "docs/experts-and-attention.md": _experts,
    "docs/hooks.md": _hooks,
    "docs/interpreting.md": lambda: {"np": np},
    "docs/provenance.md": dict,
    "docs/reliability.md": _reliability,
    "docs/scale.md": lambda: {"model": Blocks()},
    "docs/statistics.md": _statistics,
    "docs/training.md": training,
}
"""The names that a page takes for granted, or one of its blocks. ``load_encoder`` gives a small encoder there. On all other
pages it is the real one."""


def names_for(page: str, block: str) -> dict[str, Any]:
    given: Any = GIVEN.get(page, dict)
    return given(block) if given is _experts else given()


def furnish(folder: Path) -> None:
    """Writes the files that the pages take for granted."""
    write_trap_set(folder / "broden1_224", images=24)
    for i in range(24):
        photo(folder / "photos" / f"{i}.png", i, (40, 40))
        photo(folder / "imagenet" / "val" / SYNSETS[i % 3] / f"{i}.png", i, (40, 40))
    (folder / "captions.txt").write_text("".join(f"a photo of {i} things\n" for i in range(12)))
    rng = np.random.default_rng(0)
    h = rng.standard_normal((60, WIDTH)).astype(np.float32)
    h[:, OUTLIER] += 40
    np.save(folder / "h.npy", h)
    np.save(folder / "y.npy", rng.integers(5, size=60))
    np.save(folder / "w.npy", rng.standard_normal((5, WIDTH)).astype(np.float32))
