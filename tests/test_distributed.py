"""all_reduce between processes on this machine: two with gloo, four under torchrun, and as many as there are GPUs with nccl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from processes import torchrun, two_ranks
from ranks import BATCHES, Net, Scenario, record
from torch import distributed

import torchprobe

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")


def assert_close(a: torchprobe.Recording, b: torchprobe.Recording, but_calls: bool = False) -> None:
    assert sorted(a.layers) == sorted(b.layers)
    for layer in a:
        torch.testing.assert_close(a[layer].state[but_calls:], b[layer].state[but_calls:], rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes run every scenario, one after the other; in the last the second one is killed."""
    path = tmp_path_factory.mktemp("ranks")
    assert two_ranks(ranks.one_of_two, path) == [0, -9]
    return path


def merged_by(ran: Path, scenario: Scenario) -> torchprobe.Recording | None:
    """The recording that all ranks saved, which must be bitwise the same."""
    folder = ran / scenario.__name__
    errors = [file.read_text() for file in folder.glob("*.error")]
    assert not errors, "\n".join(errors)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    first, *rest = map(torchprobe.load, files)
    for other in rest:
        assert first.layers == other.layers
        assert all(torch.equal(first[layer].state, other[layer].state) for layer in first)
    return first


def assert_same_table(path: Path, ranks_: int) -> None:
    """The table is within 1e-9 of that of one process that saw all batches."""
    expected = record(Net(), BATCHES).rows()
    files = sorted((path / ranks.same_batches.__name__).glob("*.json"))
    assert len(files) == ranks_
    for file in files:
        rows = json.loads(file.read_text())
        assert [row["layer"] for row in rows] == [row["layer"] for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            for field, value in row.items():
                if isinstance(value, float):
                    assert value == pytest.approx(other[field], rel=1e-9, abs=1e-9, nan_ok=True)
                else:
                    assert value == other[field]


def assert_uneven(path: Path, skipped: int) -> None:
    merged = merged_by(path, ranks.uneven_batches)
    assert {layer: merged[layer].vectors for layer in merged} == {
        "blocks.0": 120,
        "blocks.1": 120 - 15 * skipped,
        "blocks.2": 120,
        "head": 120,
        "": 120,
    }


def test_one_rank_is_the_process_itself(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        (tmp_path / "same_batches").mkdir()
        ranks.same_batches(0, tmp_path / "same_batches")
    finally:
        distributed.destroy_process_group()
    assert_same_table(tmp_path, 1)


def test_two_ranks_give_the_table_of_one_process(ran: Path) -> None:
    assert merged_by(ran, ranks.same_batches) is not None
    assert_same_table(ran, 2)
    assert_uneven(ran, 0)


@pytest.mark.parametrize(
    ("backend", "count"),
    [pytest.param("gloo", 4, marks=pytest.mark.slow("starts torchrun")), pytest.param("nccl", 0, marks=pytest.mark.gpu)],
)
def test_torchrun_gives_the_table_of_one_process(tmp_path: Path, backend: str, count: int) -> None:
    count = count or torch.cuda.device_count()
    torchrun(count, ranks.__file__, tmp_path, backend)
    assert merged_by(tmp_path, ranks.same_batches) is not None
    if backend == "gloo":
        assert_same_table(tmp_path, count)
        assert_uneven(tmp_path, 1)


def test_all_reduce_equals_one_process_on_all_data(ran: Path) -> None:
    merged = merged_by(ran, ranks.union_of_the_data)
    assert merged.layers == ["blocks.0", "blocks.1", "blocks.2", "head", ""]
    assert_close(merged, record(Net(), BATCHES[:5]))


def test_all_reduce_merges_closed_windows_too(ran: Path) -> None:
    merged = merged_by(ran, ranks.with_windows)
    assert_close(merged.total, record(Net(), [*BATCHES[:5], BATCHES[0], BATCHES[1]]))
    assert_close(merged, record(Net(), BATCHES[:2]), but_calls=True)


def test_a_layer_that_did_not_fire_on_one_rank(ran: Path) -> None:
    merged = merged_by(ran, ranks.one_layer_did_not_fire_on_rank_0)
    assert merged["blocks.1"].vectors == 4 * 15
    assert merged["blocks.0"].vectors == 5 * 15


def test_different_layers_are_an_error_on_every_rank_unless_united(ran: Path) -> None:
    merged = merged_by(ran, ranks.other_layers)
    assert {layer: merged[layer].vectors for layer in merged} == {"blocks.0": 75, "head": 15, "blocks.1": 60}


@pytest.mark.parametrize(
    "scenario", [ranks.every_statistic, ranks.other_widths, ranks.other_settings, ranks.of_a_part_of_the_ranks], ids=lambda s: s.__name__
)
def test_what_does_not_fit_is_an_error_on_every_rank(ran: Path, scenario: Scenario) -> None:
    merged_by(ran, scenario)


@pytest.mark.parametrize(
    "scenario",
    [
        ranks.data_parallel_training,
        ranks.compiled_data_parallel_training,
        ranks.fully_sharded_training,
        ranks.fully_sharded_training_with_checkpoints,
    ],
    ids=lambda s: s.__name__,
)
def test_training_wrappers(ran: Path, scenario: Scenario) -> None:
    """DistributedDataParallel, and FSDP2, which swaps the class of every module."""
    merged = merged_by(ran, scenario)
    assert_close(merged, record(Net(), BATCHES[:2]), but_calls=True)


def test_dtensor_is_read_where_it_holds_whole_vectors(ran: Path) -> None:
    merged_by(ran, ranks.tensor_parallel)


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(ran: Path) -> None:
    merged_by(ran, ranks.a_rank_that_does_not_come)


def test_a_killed_rank_leaves_a_clear_error_and_the_last_checkpoint(ran: Path) -> None:
    merged_by(ran, ranks.a_rank_is_killed)
    folder = ran / ranks.a_rank_is_killed.__name__
    message = (folder / "message").read_text()
    assert "all_reduce: rank 0 of 2 got no answer from the others" in message
    assert "start all processes again (torchrun does), and resume from the last checkpoint" in message
    model = Net()
    rec = torchprobe.record(model, "**")
    rec.load_state_dict(torch.load(folder / "0.pt", weights_only=True))
    assert rec.history.steps == [0, 1]
    assert rec.total["head"].vectors == 30


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        torchprobe.record(Net()).all_reduce()
