"""all_reduce between processes: gloo, on this machine."""

from __future__ import annotations

import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch import multiprocessing as mp

import torchprobe

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.skip: int | None = None
        self.double()  # other shares of a batch are rounded otherwise, which float32 would show

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index != self.skip:
                x = torch.tanh(block(x))
        return self.head(x)


BATCHES = [torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(seed)).double() for seed in range(5)]


def share(rank: int) -> list[Tensor]:
    return BATCHES[:1] if rank == 0 else BATCHES[1:]  # uneven on purpose


def record(model: nn.Module, batches: list[Tensor], layers: Any = "**", snapshots: bool = False) -> torchprobe.Recorder:
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


def assert_close(a: torchprobe.Recording, b: torchprobe.Recording, but_calls: bool = False) -> None:
    assert sorted(a.layers) == sorted(b.layers)
    for layer in a:
        torch.testing.assert_close(a[layer].state[but_calls:], b[layer].state[but_calls:], rtol=1e-9, atol=1e-9)


# -- what runs on each rank; they return what the test looks at --------------------------------------------------------------


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
    record(model, share(rank)).all_reduce().save(path / f"{rank}.safetensors")


def other_layers(rank: int, path: Path) -> None:
    rec = record(Net(), share(rank), ["blocks.0", "head"] if rank == 0 else ["blocks.0", "blocks.1"])
    with pytest.raises(ValueError, match=r"rank 1 lacks \['head'\] and has \['blocks.1'\] beside those of rank 0; .*union=True"):
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


def data_parallel_training(rank: int, path: Path) -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    with torchprobe.record(model, "**") as outputs, torchprobe.record(model, "blocks.*", of="gradient") as gradients:
        for x in BATCHES[:2]:
            model(x[rank::2]).square().sum().backward()
    assert outputs.layers == ["blocks.0", "blocks.1", "blocks.2", "head", ""]
    outputs.all_reduce().save(path / f"{rank}.safetensors")
    assert gradients.all_reduce()["blocks.0"].vectors == 2 * 5 * 3


def fully_sharded_training(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    mesh = distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torchprobe.record(model, "**") as rec, torchprobe.record(model, "blocks.*", of="gradient") as gradients:
        for x in BATCHES[:2]:
            model(x[rank::2]).square().sum().backward()
    assert [row["module"] for row in rec.rows()] == ["Linear", "Linear", "Linear", "Linear", "Net"]
    rec.all_reduce().save(path / f"{rank}.safetensors")
    assert gradients.all_reduce()["blocks.0"].vectors == 2 * 5 * 3


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


# -- the test bench: both processes run every scenario, one after the other ----------------------------------------------------

SCENARIOS = (
    union_of_the_data,
    with_windows,
    one_layer_did_not_fire_on_rank_0,
    other_layers,
    other_widths,
    other_settings,
    data_parallel_training,
    fully_sharded_training,
    tensor_parallel,
)


def _rank(rank: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    try:
        for scenario in SCENARIOS:
            folder = path / scenario.__name__
            folder.mkdir(exist_ok=True)
            try:
                scenario(rank, folder)
            except BaseException:
                (folder / f"{rank}.error").write_text(traceback.format_exc())
            distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, path), nprocs=2)
    return path


def merged_by(ran: Path, scenario: Callable[[int, Path], None]) -> torchprobe.Recording | None:
    """What the ranks saved, which must be the same to the bit."""
    folder = ran / scenario.__name__
    errors = [file.read_text() for file in folder.glob("*.error")]
    assert not errors, "\n".join(errors)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    first, second = map(torchprobe.load, files)
    assert first.layers == second.layers
    assert all(torch.equal(first[layer].state, second[layer].state) for layer in first)
    return first


def test_all_reduce_equals_one_process_on_all_data(ran: Path) -> None:
    merged = merged_by(ran, union_of_the_data)
    assert merged.layers == ["blocks.0", "blocks.1", "blocks.2", "head", ""]
    assert_close(merged, record(Net(), BATCHES))


def test_all_reduce_merges_closed_windows_too(ran: Path) -> None:
    merged = merged_by(ran, with_windows)
    assert_close(merged.total, record(Net(), [*BATCHES, BATCHES[0], BATCHES[1]]))
    assert_close(merged, record(Net(), BATCHES[:2]), but_calls=True)


def test_a_layer_that_did_not_fire_on_one_rank(ran: Path) -> None:
    merged = merged_by(ran, one_layer_did_not_fire_on_rank_0)
    assert merged["blocks.1"].vectors == 4 * 15
    assert merged["blocks.0"].vectors == 5 * 15


def test_different_layers_are_an_error_on_every_rank_unless_united(ran: Path) -> None:
    merged = merged_by(ran, other_layers)
    assert {layer: merged[layer].vectors for layer in merged} == {"blocks.0": 75, "head": 15, "blocks.1": 60}


def test_different_widths_are_an_error_on_every_rank(ran: Path) -> None:
    merged_by(ran, other_widths)


def test_different_settings_are_an_error_on_every_rank(ran: Path) -> None:
    merged_by(ran, other_settings)


@pytest.mark.parametrize("scenario", [data_parallel_training, fully_sharded_training])
def test_training_wrappers(ran: Path, scenario: Callable[[int, Path], None]) -> None:
    """DistributedDataParallel, and FSDP2, which swaps the class of every module."""
    merged = merged_by(ran, scenario)
    assert_close(merged, record(Net(), BATCHES[:2]), but_calls=True)


def test_dtensor_is_read_where_it_holds_whole_vectors(ran: Path) -> None:
    merged_by(ran, tensor_parallel)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        torchprobe.record(Net()).all_reduce()
