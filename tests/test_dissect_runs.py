"""Dissections that are killed, resumed, and shared between processes: the same counts."""

from __future__ import annotations

import os
import random
import signal

import dissection_models
import pytest
import torch
from broden_sets import write_trap_set
from processes import FORKS, free_port
from torch import distributed

from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock
from torchprobe.dissection import Dissection
from torchprobe.dissection.walk import Checkpoint, ImageVectors, Walk, clear_checkpoint
from torchprobe.statistics import TopInputs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=24, seed=0).root


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert finish(*start(root, None, out)) == 0
    return found(out)


def start(root, checkpoint, out, resume=False, pause=0.0, rank=0, ranks=1, port=0):
    """A process, and the connection that tells its progress."""
    told, ours = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=dissection_models.main, args=(root, checkpoint, out, resume, pause, rank, ranks, port, ours))
    process.start()
    ours.close()
    return process, told


def finish(process, told, kill=False):
    """The exit code."""
    if kill:
        process.kill()
    process.join(300)
    told.close()
    return process.exitcode


def found(out, rank=0):
    return {layer: Dissection.load(out / f"{layer}-{rank}.safetensors") for layer in ("conv", "norm")}


def test_killed_at_a_random_moment_and_resumed(root, alone, tmp_path):
    moments = random.Random(os.getpid())
    checkpoint, killed = tmp_path / "checkpoint", []
    for attempt in range(3):
        process, told = start(root, checkpoint, tmp_path, resume=attempt > 0, pause=0.02)
        steps = moments.randrange(1, 5)
        for _ in range(steps):  # of its progress: 7 batches in each of two passes, and the labels between them
            told.recv()
        killed.append((steps, finish(process, told, kill=True)))
    assert all(code == -signal.SIGKILL for _, code in killed), killed
    process, told = start(root, checkpoint, tmp_path, resume=True)
    stage, done = told.recv()
    assert finish(process, told) == 0
    assert stage == "overlap" or done > 3, (stage, done, killed)  # it did not start again
    assert found(tmp_path) == alone, killed


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_images(root, alone, tmp_path, ranks):
    """7 batches, of which the last is smaller, so no share is equal; killed once and resumed by fewer."""
    checkpoint = tmp_path / "checkpoint"
    processes = share(root, checkpoint, tmp_path, ranks)
    assert [finish(*process) for process in processes] == [0] * ranks
    for rank in range(ranks):
        assert found(tmp_path, rank) == alone
    left = sorted(path.name for path in checkpoint.glob("*-rank*"))
    assert left == ["overlap-rank0.safetensors", "thresholds-rank0.safetensors"]


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_other_ranks_go_on(root, alone, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    processes = share(root, checkpoint, tmp_path, 2, pause=0.3)
    for _, told in processes:
        told.recv()
        told.recv()
    for process in processes:
        finish(*process, kill=True)
    assert len(list(checkpoint.glob("thresholds-rank*.safetensors"))) == 2
    assert finish(*start(root, checkpoint, tmp_path, resume=True)) == 0
    assert found(tmp_path) == alone


def share(root, checkpoint, out, ranks, pause=0.0):
    port = free_port()
    return [start(root, checkpoint, out, pause=pause, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]


# -- the checkpoint itself -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_of_one_dissection(root, tmp_path):
    checkpoint = str(tmp_path / "checkpoint")
    first = dissection_models.run(root, checkpoint)
    with pytest.raises(ValueError, match="resume=True"):
        dissection_models.run(root, checkpoint)
    assert dissection_models.run(root, checkpoint, resume=True) == first  # all done: nothing is computed again
    with Ranks() as ranks:
        Checkpoint(tmp_path / "other", {"a": 1}, False, 0, ranks)
        with pytest.raises(ValueError, match="started with another a: 1, now it is 2"):
            Checkpoint(tmp_path / "other", {"a": 2}, True, 0, ranks)


def walk(folder, ranks, batches=4, resume=True):
    checkpoint = Checkpoint(folder, {}, resume, 0, ranks)
    return Walk("thresholds", {"top": lambda: TopInputs(1, 2)}, {"rows": ImageVectors(7, 1)}, batches, 2, ranks, checkpoint)


def step(walk, batch):
    ids = torch.arange(2 * batch, min(2 * batch + 2, 7))
    walk.statistics["top"].update(ids[:, None].float(), ids=ids)
    walk.vectors["rows"].put(2 * batch, ids[:, None].float())
    walk.finished(batch)


def test_what_was_merged_before_an_interruption_counts_once(tmp_path):
    with Ranks() as ranks:
        first = walk(tmp_path, ranks, resume=False)
        for batch in (0, 2):
            step(first, batch)
        (tmp_path / "thresholds-rank0.safetensors").rename(tmp_path / "thresholds-rank1.safetensors")
        second = Walk("thresholds", first._make, first.vectors, 4, 2, ranks, first.checkpoint)
        assert second.mine() == [1, 3] and not (tmp_path / "thresholds-rank1.safetensors").exists()
        (tmp_path / "thresholds-rank1.safetensors").write_bytes((tmp_path / "thresholds-rank0.safetensors").read_bytes())
        step(second, 1)  # rank 0 goes on, while the file of rank 1 is still there, as after a kill
        third = walk(tmp_path, ranks)
        assert third.mine() == [3] and third.statistics["top"].inputs == 6
        assert third.vectors["rows"].vectors[:6, 0].tolist() == [0, 1, 2, 3, 4, 5]
        step(third, 3)
        third.merge()
        assert third.statistics["top"].ids.tolist() == [[6, 5]]
        assert third.vectors["rows"].vectors[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_files_that_overlap_are_refused(tmp_path):
    with Ranks() as ranks:
        for name, batches in (("one", (3, 1)), ("other", (3, 0))):
            fresh = walk(tmp_path / name, ranks, resume=False)
            for batch in batches:
                step(fresh, batch)
        (tmp_path / "other/thresholds-rank0.safetensors").rename(tmp_path / "one/thresholds-rank1.safetensors")
        with pytest.raises(ValueError, match="another file of the folder has seen as well"):
            walk(tmp_path / "one", ranks)


def test_clearing_deletes_nothing_else(root, tmp_path):
    folder = tmp_path / "checkpoint"
    dissection_models.run(root, str(folder))
    (folder / ".thresholds-rank0.safetensors.77.part").write_text("torn")
    (folder / "mine.safetensors").write_text("mine")
    clear_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.safetensors"]
    (folder / "mine.safetensors").unlink()
    clear_checkpoint(folder)
    assert not folder.exists()


# -- the time left ---------------------------------------------------------------------------------------------------------


def test_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("torchprobe.common.runs.time.monotonic", lambda: now[0])
    told = []
    clock = Clock(told.append, stages=2)
    clock.start("thresholds", 40, 100)  # 40 were done before
    clock.tell(40)
    now[0] = 10.0
    clock.tell(60)
    assert [(p.stage, p.done, p.elapsed, p.remaining) for p in told] == [
        ("thresholds", 40, 0.0, None),
        ("thresholds", 60, 10.0, 0.5 * (40 + 100)),
    ]
    clock.finish()
    clock.start("overlap", 0, 100)
    now[0] = 20.0
    clock.tell(50)
    assert told[-1].remaining == pytest.approx(0.2 * 50)
