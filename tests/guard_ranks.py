"""What the two ranks of test_guard_ranks.py run. Rank 1 divides by zero in block 1, in the third step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from guard_models import Net, Told, batch, nan_in_row
from processes import each_way
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import torchprobe

LAYERS = ["blocks.*", "head"]


def parallel(model: Net) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def compiled_parallel(model: Net) -> Any:
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")


def sharded(model: Net) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded_with_checkpoints(model: Net) -> Any:
    for block in model.blocks:
        block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]
    return sharded(model)


def _checkpointed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[no-any-return]


WAYS = (parallel, compiled_parallel, sharded, sharded_with_checkpoints)


def finds_it(rank: int, way: Callable[[Net], Any]) -> None:
    torch.compiler.reset()
    model, told = Net(), Told()
    call = way(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.record(call, LAYERS) as rec:
        rec.guard(on=told)
        for step in range(4):
            model.blocks[1].plant = nan_in_row(rank + 2) if (rank, step) == (1, 2) else None
            optimizer.zero_grad()
            nn.functional.cross_entropy(call(batch(2 * step + rank)).flatten(0, 1), torch.arange(18) % 5).backward()
            optimizer.step()
            rec.step()
        together = rec.guard_report(ranks=True, timeout=60)
    first = told.reports[0].first
    assert together is not None
    if rank == 1:
        assert (first.layer, first.kind, first.verdict, first.step, first.call) == ("blocks.1", "activation", "made here", 2, 2), str(first)
        assert (first.rank, first.rows, first.after) == (1, (3,), "blocks.0")
    else:  # the gradients of rank 1 have reached its weights, or its own gradients
        assert first.rank == 0 and first.step >= 2 and first.layer != "blocks.1", str(first)
    found = together.first
    assert (found.layer, found.rank, found.step, found.rows, found.verdict) == ("blocks.1", 1, 2, (3,), "made here"), str(together)


def one_of_two(rank: int, port: int, path: Path) -> None:
    each_way(rank, port, path, WAYS, functools.partial(finds_it, rank))
