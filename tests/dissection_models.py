"""Small networks for the tests of dissection, and what the processes of test_dissect_runs.py run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, Progress, dissect
from torchprobe.statistics.quantile import MEMORY

SIZE = 32


def preprocess(image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((SIZE, SIZE)))).movedim(2, 0).float() / 255


class Net(nn.Module):
    """Maps, a branch that gives them with the features last, and a pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 12, 5, stride=4, padding=2)
        self.norm = nn.BatchNorm2d(12)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.conv(x))).flatten(1)


class ViT(nn.Module):
    """Tokens: a class token and two registers before 8 × 4 patches, batch first or not."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, (4, 8), stride=(4, 8))
        self.prefix = nn.Parameter(torch.randn(3, 8))
        self.block = nn.Linear(8, 8)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).movedim(1, 2)
        tokens = torch.cat([self.prefix.expand(len(x), -1, -1), patches], 1)
        tokens = self.block(tokens if self.batch_first else tokens.movedim(0, 1))
        return tokens[:, 0] if self.batch_first else tokens[0]


def batches_in(told: Sequence[Progress]) -> int:
    """The batches that were reported: the first report of a stage tells its start, and each other one a batch."""
    return sum(before.stage == after.stage for before, after in pairwise(told))


def run(
    root: str | Path,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    pause: float = 0.0,
    told: Connection | None = None,
    memory: int = MEMORY,
) -> dict[str, Dissection]:
    """Sends its progress, and pauses each time."""

    def slow(progress: Progress) -> None:
        if told is not None:
            told.send((progress.stage, progress.done))
        time.sleep(pause)

    return dissect(
        Net(), ["conv", "norm"], Broden(root), preprocess=preprocess, batch_size=3, top=4, quantile=0.05, keep_scores=True,
        checkpoint=checkpoint, checkpoint_every=0, resume=resume, progress=slow, memory=memory,
    )  # fmt: skip


def main(
    root: Path,
    checkpoint: Path | None,
    out: Path,
    resume: bool,
    pause: float,
    rank: int,
    ranks: int,
    port: int,
    memory: int,
    told: Connection,
) -> None:
    """One process, or one of several; saves what it found."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    for layer, dissection in run(root, checkpoint, resume, pause, told, memory).items():
        dissection.save(out / f"{layer}-{rank}.safetensors")
