"""One line of JSON for every window of a training run. It needs no other package, and a killed run loses no line.

python examples/logging/to_jsonl.py --output run.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import nn

import torchprobe


def write(path: Path, step: int, numbers: dict[str, float]) -> None:
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
    with torchprobe.record(model, "*") as rec:
        for step in range(1, options.steps + 1):
            x = torch.randn(32, 16)  # your data
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % options.window == 0:
                write(options.output, step, rec.metrics(prefix="act/"))
                rec.snapshot(step)


if __name__ == "__main__":
    main()
