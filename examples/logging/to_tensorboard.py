"""The main numbers of every layer as curves in TensorBoard (``pip install tensorboard``).

python examples/logging/to_tensorboard.py --output runs/kurtosis
tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from torchprobe.integrations import Monitor
from torchprobe.integrations.tensorboard import to_tensorboard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps in a point")
    parser.add_argument("--output", type=Path, default=Path("runs/kurtosis"))
    options = parser.parse_args()

    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, "*", log_every=options.window, to=to_tensorboard(options.output)) as monitor:
        for _ in range(options.steps):
            x = torch.randn(32, 16)  # your data
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()


if __name__ == "__main__":
    main()
