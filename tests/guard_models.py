"""Networks whose numbers go bad at a planted place, for the tests of guards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.recording.verdicts import Report


class Block(nn.Module):
    """A residual block. ``plant(h)`` changes its hidden activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.plant: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.down(h if self.plant is None else self.plant(h))


class Net(nn.Module):
    """(batch, 3, 8) → (batch, 3, 5)."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(8) for _ in range(depth))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed))


def nan_in_row(row: int) -> Callable[[Tensor], Tensor]:
    """Divides one row by zero, as a normalization without an epsilon does."""

    def plant(h: Tensor) -> Tensor:
        scale = torch.ones(len(h), 1, 1)
        scale[row] = 0
        return (h - h.mean((1, 2), keepdim=True)) * 0 / scale + h

    return plant


class _Poison(torch.autograd.Function):
    """The identity with a nonfinite gradient, in one row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[2] = math.inf
        return grad


def poison_gradient(h: Tensor) -> Tensor:
    return _Poison.apply(h)  # type: ignore[no-any-return]


def train(
    model: Net,
    call: Callable[[Tensor], Tensor],
    rec: torchprobe.Recorder,
    steps: int,
    at: Callable[[int], object] = lambda step: None,
    data: Callable[[int], Tensor] = batch,
) -> None:
    """Steps of SGD on a real loss; ``at(step)`` plants something before a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(steps):
        at(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(data(step)).flatten(0, 1), torch.arange(18) % 5).backward()
        optimizer.step()
        rec.step()


class Told:
    """Collects reports, as a callback."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def __call__(self, report: Report) -> None:
        self.reports.append(report)
