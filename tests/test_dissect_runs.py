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

from torchprobe.common import storage
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock
from torchprobe.dissection import Dissection
from torchprobe.dissection.walk import Checkpoint, ImageVectors, Walk, clear_checkpoint
from torchprobe.statistics import TopInputs
from torchprobe.statistics.quantile import MEMORY


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=24, seed=0).root


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert finish(*start(root, None, out)) == 0
    return found(out)


def start(root, checkpoint, out, resume=False, pause=0.0, rank=0, ranks=1, port=0, memory=MEMORY):
    """A process, and the connection that tells its progress."""
    told, ours = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=dissection_models.main, args=(root, checkpoint, out, resume, pause, rank, ranks, port, memory, ours))
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
        steps = moments.randrange(2, 6)
        for _ in range(steps):  # of its progress: the start of a stage, 7 batches in each of two passes, and the labels between them
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
        for _ in range(3):  # the start, and two batches
            told.recv()
    for process in processes:
        finish(*process, kill=True)
    assert len(list(checkpoint.glob("thresholds-rank*.safetensors"))) == 2
    assert finish(*start(root, checkpoint, tmp_path, resume=True)) == 0
    assert found(tmp_path) == alone


def share(root, checkpoint, out, ranks, **options):
    port = free_port()
    return [start(root, checkpoint, out, rank=rank, ranks=ranks, port=port, **options) for rank in range(ranks)]


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_estimated_thresholds_survive_a_kill(root, tmp_path):
    """Each of two processes goes on with its own images and its own random numbers."""
    (tmp_path / "whole").mkdir()
    estimated = {"memory": 4_000}
    assert [finish(*process) for process in share(root, None, tmp_path / "whole", 2, **estimated)] == [0, 0]
    whole = found(tmp_path / "whole")
    assert whole["conv"].metadata["threshold_error"] > 0 and whole["conv"].metadata["ranks"] == 2
    processes = share(root, tmp_path / "checkpoint", tmp_path, 2, pause=0.3, **estimated)
    for _, told in processes:
        for _ in range(3):  # the start, and two batches
            told.recv()
    for process in processes:
        finish(*process, kill=True)
    processes = share(root, tmp_path / "checkpoint", tmp_path, 2, resume=True, **estimated)
    assert [finish(*process) for process in processes] == [0, 0]
    assert found(tmp_path, 0) == found(tmp_path, 1) == whole


def test_estimates_after_a_merge_that_was_interrupted(tmp_path):
    """The first of two ranks has saved everything, and the file of the other is still there: its values count once."""
    checkpoint = tmp_path / "c"

    class Second(Ranks):
        """The second rank of two, to whom the first says that all is merged."""

        def on_first(self, action):
            return True

        def from_first(self, value):
            return torch.ones(4, dtype=torch.bool) if isinstance(value, torch.Tensor) else value

    with Ranks() as ranks:
        step(walk(checkpoint, ranks, resume=False), 1)
    (checkpoint / "thresholds-rank0.safetensors").rename(checkpoint / "thresholds-rank1.safetensors")
    second = Second()
    second.rank, second.size = 1, 2
    empty = {"top": lambda: TopInputs(1, 2)}
    with Ranks() as ranks:
        saved = checkpoint_in(checkpoint, {}, True, ranks)
    stale = Walk("thresholds", empty, {"rows": ImageVectors(7, 1)}, 4, 2, second, saved, ordered=True)
    assert stale.mine() == [] and not stale.done.any() and stale.statistics["top"].inputs == 0


# -- the checkpoint itself -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_of_one_dissection(root, tmp_path):
    checkpoint = str(tmp_path / "checkpoint")
    first = dissection_models.run(root, checkpoint)
    with pytest.raises(ValueError, match="resume=True"):
        dissection_models.run(root, checkpoint)
    assert dissection_models.run(root, checkpoint, resume=True) == first  # all done: nothing is computed again
    with Ranks() as ranks:
        checkpoint_in(tmp_path / "other", {"a": 1}, False, ranks)
        with pytest.raises(ValueError, match="made with another a: 1, now it is 2"):
            checkpoint_in(tmp_path / "other", {"a": 2}, True, ranks)


def checkpoint_in(folder, facts, resume, ranks):
    """A checkpoint that is no longer locked."""
    with Checkpoint(folder, facts, resume, 0, ranks) as checkpoint:
        return checkpoint


def walk(folder, ranks, batches=4, resume=True):
    checkpoint = checkpoint_in(folder, {}, resume, ranks)
    return Walk("thresholds", {"top": lambda: TopInputs(1, 2)}, {"rows": ImageVectors(7, 1)}, batches, 2, ranks, checkpoint)


def step(walk, batch):
    ids = torch.arange(2 * batch, min(2 * batch + 2, 7))
    with walk.showing(batch):
        walk.statistics["top"].update(ids[:, None].float(), ids=ids)
        walk.vectors["rows"].put(2 * batch, ids[:, None].float())


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


@pytest.mark.parametrize("batches", [[True], [4], [-1], ["0"], [None], [[]], [0.0], [10**30]])
def test_batches_that_are_none_are_refused(tmp_path, batches):
    with Ranks() as ranks:
        fresh = walk(tmp_path, ranks, resume=False)
        step(fresh, 0)
        noted = {"run": fresh.checkpoint.run, "batches": batches}
        path = tmp_path / "thresholds-rows-0-0.safetensors"
        storage.write(path, "torchprobe.dissection.walk", {"rows": fresh.vectors["rows"].vectors[:2]}, noted)
        with pytest.raises(ValueError, match=r"thresholds-rows-0-0.safetensors, 'batches': batches are numbered 0 to 3"):
            walk(tmp_path, ranks)


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
    clock.start("thresholds", 40, 100)  # 40 were done before; the start is reported at once
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
