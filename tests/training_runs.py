"""Small training runs for the tests of the integrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 6
X = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])


class Classifier(nn.Module):
    """What the Trainer of transformers takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": out.square().sum(), "logits": out}


class Tagger(nn.Module):
    """Tokens with padding, as models of language take them."""

    def __init__(self, blocks: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {"loss": (x * kept.unsqueeze(-1)).square().mean(), "logits": x}


def padded(rows: int = 24, tokens: int = 7) -> list[dict[str, Tensor]]:
    """Rows of tokens, each of another length."""
    chance = torch.Generator().manual_seed(1)
    found = []
    for row in range(rows):
        kept = torch.arange(tokens) < 1 + row % tokens
        ids = torch.randint(1, 20, (tokens,), generator=chance) * kept
        found.append({"input_ids": ids, "attention_mask": kept.long(), "labels": torch.tensor(0)})
    return found


class Seen:
    """The vectors that layers gave in train mode, without padding, in float64: what a recording is compared with."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.vectors: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.kept: Tensor | None = None
        self.model = model
        for name, module in layers.items():
            module.register_forward_hook(self.note(name))
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.kept = kwargs["attention_mask"].bool()

    def note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.model.training:
                assert self.kept is not None
                self.vectors[name].append(output.detach().double()[self.kept])

        return hook

    def all(self, name: str) -> Tensor:
        return torch.cat(self.vectors[name])
