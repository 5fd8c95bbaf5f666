"""One line of JSON for every window of a training run. It needs no other package, and a killed run loses no line.

python examples/logging/to_jsonl.py --output run.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from torchprobe.integrations import Monitor


def write(path: Path, numbers: Mapping[str, float], step: int) -> None:
    """Appends one line. Numbers that are not finite become null, because JSON has no nan."""
    line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps in a line")
    parser.add_argument("--output", type=Path, default=Path("run.jsonl"))
    options = parser.parse_args()

    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, "*", log_every=options.window, to=lambda numbers, step: write(options.output, numbers, step)) as monitor:
        for _ in range(options.steps):
            x = torch.randn(32, 16)  # your data
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()


if __name__ == "__main__":
    main()
