"""The scenarios that the ranks of test_distributed.py run.

As a script, under torchrun, ``ranks.py FOLDER BACKEND`` runs the scenarios for any number of ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from statistic_kinds import kinds
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import torchprobe

Scenario = Callable[[int, Path], None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.skip: int | None = None
        self.checkpointed = False
        self.double()  # other shares of a batch are rounded otherwise, which float32 would show

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index != self.skip:
                x = torch.tanh(checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.head(x)


BATCHES = [torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(seed)).double() for seed in range(8)]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")


def record(model: nn.Module, batches: Sequence[Tensor], layers: Any = "**", snapshots: bool = False) -> torchprobe.Recorder:
    rec = torchprobe.record(model, layers).start()
    for step, x in enumerate(batches):
        model(x)
        if snapshots:
            rec.snapshot(step)
    if snapshots:
        model(batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchprobe.RecordingWarning)
        rec.stop()
    return rec


# -- any number of ranks -----------------------------------------------------------------------------------------------------


def same_batches(rank: int, path: Path) -> None:
    """Every batch on one of the ranks: an equal share, or, of 8 on 4 ranks, two each."""
    mine = [x.to(device()) for x in BATCHES[rank :: distributed.get_world_size()]]
    merged = record(Net().to(device()), mine).all_reduce()
    (path / f"{rank}.json").write_text(json.dumps(merged.rows()))
    merged.save(path / f"{rank}.safetensors")


def uneven_batches(rank: int, path: Path) -> None:
    """Rank 0 sees no batch, so none of its layers fires; rank n sees n batches, the last rank the rest. Rank 1 of many skips a layer."""
    world = distributed.get_world_size()
    start = rank * (rank - 1) // 2
    mine = BATCHES[start : start + rank] if rank < world - 1 else BATCHES[start:]
    model = Net().to(device())
    model.skip = 1 if rank == 1 < world - 1 else None
    record(model, [x.to(device()) for x in mine]).all_reduce().save(path / f"{rank}.safetensors")


# -- two ranks, on the CPU ---------------------------------------------------------------------------------------------------


def share(rank: int) -> list[Tensor]:
    return BATCHES[:1] if rank == 0 else BATCHES[1:5]  # uneven on purpose


def union_of_the_data(rank: int, path: Path) -> None:
    rec = record(Net(), share(rank))
    before = {layer: rec[layer].state for layer in rec}
    merged = rec.all_reduce()
    assert all(torch.equal(rec[layer].state, state) for layer, state in before.items())
    merged.save(path / f"{rank}.safetensors")


def with_windows(rank: int, path: Path) -> None:
    record(Net(), share(rank), snapshots=True).all_reduce().save(path / f"{rank}.safetensors")


def one_layer_did_not_fire_on_rank_0(rank: int, path: Path) -> None:
    model = Net()
    model.skip = 1 if rank == 0 else None
    rec = record(model, share(rank))
    assert len(rec.metrics()) == 5 * 5 and len(rec.metrics(fields="all")) == 5 * len(rec.history.fields)  # the same keys on both
    rec.all_reduce().save(path / f"{rank}.safetensors")


def other_layers(rank: int, path: Path) -> None:
    rec = record(Net(), share(rank), ["blocks.0", "head"] if rank == 0 else ["blocks.0", "blocks.1"])
    with pytest.raises(ValueError, match=r"rank 1 lacks \['head'\] and has \['blocks.1'\] in addition to those of rank 0; .*union=True"):
        rec.all_reduce()
    rec.all_reduce(union=True).save(path / f"{rank}.safetensors")


def other_widths(rank: int, path: Path) -> None:
    model = Net()
    if rank == 1:
        model.head = nn.Linear(6, 5).double()
    with pytest.raises(ValueError, match="layer 'head' is 4 features wide on one rank and 5 on rank 1"):
        record(model, share(rank)).all_reduce()


def other_settings(rank: int, path: Path) -> None:
    with pytest.raises(ValueError, match="rank 0 recorded with .*outlier_sigma=6.0.*, rank 1 with .*outlier_sigma=3.0"):
        torchprobe.record(Net(), outlier_sigma=6.0 if rank == 0 else 3.0).all_reduce()


def of_a_part_of_the_ranks(rank: int, path: Path) -> None:
    group = distributed.new_group([1])
    rec = record(Net(), share(rank))
    if rank == 1:
        assert rec.all_reduce(group)["head"].vectors == 60
    else:
        with pytest.raises(ValueError, match="this process is not among the ranks of the group"):
            rec.all_reduce(group)


def _train(model: nn.Module, call: Callable[[Tensor], Tensor], rank: int, path: Path) -> None:
    """Two steps, each rank with its share of every batch."""
    with torchprobe.record(model, "**") as outputs, torchprobe.record(model, "blocks.*", of="gradient") as gradients:
        for x in BATCHES[:2]:
            call(x[rank::2]).square().sum().backward()
    assert [row["module"] for row in outputs.rows()] == ["Linear", "Linear", "Linear", "Linear", "Net"]
    outputs.all_reduce().save(path / f"{rank}.safetensors")
    assert gradients.all_reduce()["blocks.0"].vectors == 2 * 5 * 3


def data_parallel_training(rank: int, path: Path) -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    _train(model, model, rank, path)


def compiled_data_parallel_training(rank: int, path: Path) -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    _train(model, torch.compile(model, backend="aot_eager"), rank, path)


def fully_sharded_training(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    mesh = distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, model, rank, path)


def fully_sharded_training_with_checkpoints(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    model.checkpointed = True
    mesh = distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, model, rank, path)


def tensor_parallel(rank: int, path: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = distributed.init_device_mesh("cpu", (2,))
    x = BATCHES[0]
    plain = Net()
    model = Net()
    row = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate(), use_local_output=False)
    parallelize_module(model, mesh, {"blocks.0": row})
    with torchprobe.record(model.blocks[0], "") as rec:
        model.blocks[0](x)
    with torchprobe.record(plain.blocks[0], "") as expected:
        plain.blocks[0](x)
    torch.testing.assert_close(rec[""].mean, expected[""].mean, rtol=1e-5, atol=1e-6)
    model = Net()
    column = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"blocks.0": column})
    with (
        pytest.raises(ValueError, match="layer '': each rank holds a slice of the features of this distributed tensor"),
        torchprobe.record(model.blocks[0], ""),
    ):
        model.blocks[0](x)


def a_rank_that_does_not_come(rank: int, path: Path) -> None:
    group = distributed.new_group()
    if rank == 0:
        rec = record(Net(), share(rank))
        start = time.monotonic()
        with pytest.raises(
            RuntimeError, match=r"rank 0 of 2 got no answer from the others \(it waits 1 s\). A rank has ended, or did not call"
        ):
            rec.all_reduce(group, timeout=1)
        assert time.monotonic() - start < 10


def a_rank_is_killed(rank: int, path: Path) -> None:
    """The last scenario: rank 1 dies in its third step."""
    model = Net()
    with torchprobe.record(model, "**") as rec:
        for step, x in enumerate(BATCHES):
            model(x)
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            start = time.monotonic()
            try:
                rec.all_reduce(timeout=30)
            except RuntimeError as error:
                (path / "message").write_text(str(error))
                assert time.monotonic() - start < 30
                return
            rec.snapshot(step)
            torch.save(rec.state_dict(), path / f"{rank}.partial")
            os.replace(path / f"{rank}.partial", path / f"{rank}.pt")
    raise AssertionError("no error")


def assert_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(rows, expected, strict=True):
        numbers = {key: value for key, value in theirs.items() if not isinstance(value, str)}
        assert {key: mine[key] for key in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12, nan_ok=True)


def every_statistic(rank: int, path: Path) -> None:
    for kind in kinds().values():
        for compiled in (False, True):
            torch.compiler.reset()
            model = Net()
            call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            with torchprobe.record(model, "**", statistic=kind.statistic) as rec:
                for step, x in enumerate(BATCHES[rank::2]):
                    call(x)
                    if step == 1:
                        rec.snapshot(step)
            before = rec.total.rows()
            together = rec.all_reduce()
            assert_rows(rec.total.rows(), before)
            with torchprobe.record(model, "**", statistic=kind.statistic) as alone:
                for x in BATCHES:
                    model(x)
            assert together.layers == alone.layers
            if kind.name == "TopInputs":  # the default ids of the ranks differ
                assert torch.equal(together.total["head"].scores, alone["head"].scores)
            assert_rows(together.total.rows(), alone.rows())


TWO = (
    every_statistic,
    same_batches,
    uneven_batches,
    union_of_the_data,
    with_windows,
    one_layer_did_not_fire_on_rank_0,
    other_layers,
    other_widths,
    other_settings,
    of_a_part_of_the_ranks,
    data_parallel_training,
    compiled_data_parallel_training,
    fully_sharded_training,
    fully_sharded_training_with_checkpoints,
    tensor_parallel,
    a_rank_that_does_not_come,
    a_rank_is_killed,
)


def run(scenarios: Sequence[Scenario], rank: int, path: Path) -> None:
    """Runs all scenarios one after the other; an error is written to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for scenario in scenarios:
        folder = path / scenario.__name__
        folder.mkdir(exist_ok=True)
        try:
            scenario(rank, folder)
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
        if scenario is not a_rank_is_killed:
            distributed.barrier()


def one_of_two(rank: int, port: int, path: Path) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    run(TWO, rank, path)
    os._exit(0)  # the other rank is dead, so the process group cannot be destroyed


def main(path: str, backend: str) -> None:
    distributed.init_process_group(backend)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run((same_batches, uneven_batches), distributed.get_rank(), Path(path))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
