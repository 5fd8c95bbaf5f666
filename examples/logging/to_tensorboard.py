"""The main numbers of every layer as curves in TensorBoard (``pip install tensorboard``).

python examples/logging/to_tensorboard.py --output runs/kurtosis
tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchprobe


def write(writer: SummaryWriter, step: int, numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps in a point")
    parser.add_argument("--output", type=Path, default=Path("runs/kurtosis"))
    options = parser.parse_args()

    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    with torchprobe.record(model, "*") as rec, SummaryWriter(options.output) as writer:
        for step in range(1, options.steps + 1):
            x = torch.randn(32, 16)  # your data
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % options.window == 0:
                write(writer, step, rec.metrics(prefix="act/"))
                rec.snapshot(step)


if __name__ == "__main__":
    main()
