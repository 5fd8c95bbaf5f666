"""What the two ranks of test_decision_ranks.py run: a small training whose weights jump in one step, watched in every way at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from guard_models import Net, batch
from processes import each_way
from torch import Tensor, nn

import torchprobe
from torchprobe.recording.jumps import Jump
from torchprobe.statistics import Exponents, Moments

LAYERS = ["blocks.*", "head"]
STEPS, JUMP = 170, 150


def eager(model: Net) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: Net) -> Any:
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")


WAYS = (eager, compiled)


def train(rank: int, way: Callable[[Net], Any], path: Path) -> None:
    """Each rank has half of every batch. Its outputs are kept, too: what the head's exponents are counted from."""
    torch.compiler.reset()
    model, teacher = Net(depth=2), Net(depth=1).requires_grad_(False)
    call, told, outputs = way(model), list[Jump](), list[Tensor]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with torchprobe.record(call, LAYERS, statistic=[Moments, Exponents], keep=STEPS) as rec:
        rec.guard(on=lambda report: told.append(report))
        jumps = rec.watch_jumps(on=told.append)
        for step in range(STEPS):
            if step == JUMP:
                with torch.no_grad():
                    model.blocks[1].down.weight.mul_(30)
            x = batch(2 * step + rank, rows=32)
            y = call(x)
            outputs.append(y.detach().flatten(0, -2))
            optimizer.zero_grad()
            (y - teacher(x)).square().mean().backward()
            optimizer.step()
            rec.step()
            rec.snapshot(step)
    assert told == jumps.found, told  # and no alarm of the guard
    assert told and all(jump.layer in ("blocks.1", "head") and JUMP <= jump.step < STEPS for jump in told), told
    assert any(jump.layer == "blocks.1" and jump.since == JUMP for jump in told), told
    folder = path / way.__name__
    folder.mkdir(exist_ok=True)
    rec.save(folder / f"{rank}.safetensors")
    torch.save(torch.cat(outputs), path / f"{way.__name__}.{rank}.outputs")


def one_of_two(rank: int, port: int, path: Path) -> None:
    each_way(rank, port, path, WAYS, lambda way: train(rank, way, path))
