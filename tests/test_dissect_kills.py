"""Dissections that are killed at any moment, in one process or several, with maps on the disk: the same result, and nothing is left."""

from __future__ import annotations

import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, preprocess
from processes import FORKS, free_port
from torch import Tensor, distributed

from torchprobe.common import storage
from torchprobe.common.checked import read_checked, write_checked
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, Overlap, dissect
from torchprobe.dissection.spool import Spool
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.statistics import Quantile

LAYERS = ["conv", "norm"]
KILLS = 6
OPTIONS = {"preprocess": preprocess, "batch_size": 3, "top": 4, "quantile": 0.005, "keep_scores": True}
SMALL_BUFFER = 2000  # bytes: files of maps are written often


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=36, seed=0).root


def child(
    root: Path, out: Path, temporary: Path, rank: int, ranks: int, port: int, told: Connection, buffer: int, options: Mapping[str, Any]
) -> None:
    """One process of a run. It says when it begins, and saves what it found."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(temporary)
    import torchprobe.dissection.spool as spool

    spool._BUFFER = buffer
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    told.send("begins")
    for layer, dissection in dissect(Net(), LAYERS, Broden(root), **OPTIONS, **options).items():
        dissection.save(out / f"{layer}-{rank}.safetensors")
    told.send("ended")


def rest(progress: object) -> None:
    """Most kills then come between two batches, when a checkpoint has just been written."""
    time.sleep(0.05)


class Runs:
    """Runs of one dissection in processes, over one checkpoint."""

    def __init__(self, root: Path, folder: Path, buffer: int = SMALL_BUFFER, **options: Any) -> None:
        self.root, self.folder, self.buffer, self.options = root, folder, buffer, options
        self.checkpoint, self.out, self.temporary = folder / "checkpoint", folder / "out", folder / "temporary"
        self.out.mkdir()
        self.temporary.mkdir()

    def start(self, ranks: int) -> list[tuple[Any, Connection]]:
        """The processes, which have begun."""
        port, running = free_port(), []
        resume = (self.checkpoint / "settings.json").exists()
        options = {"checkpoint": self.checkpoint, "checkpoint_every": 0.0, "resume": resume, **self.options}
        for rank in range(ranks):
            told, theirs = FORKS.Pipe(duplex=False)
            process = FORKS.Process(
                target=child, args=(self.root, self.out, self.temporary, rank, ranks, port, theirs, self.buffer, options)
            )
            process.start()
            theirs.close()
            running.append((process, told))
        for _, told in running:
            assert told.recv() == "begins"
        return running

    def kill(self, ranks: int, delay: float, first: int) -> bool:
        """Kills a run after ``delay`` seconds: one of its processes, and the others a moment later. Whether it was still running."""
        running = self.start(ranks)
        time.sleep(delay)
        running[first % ranks][0].kill()
        if ranks > 1:
            time.sleep(delay / 10)
        for process, _ in running:
            process.kill()
        for process, told in running:
            process.join(60)
            told.close()
        return all(process.exitcode == -signal.SIGKILL for process, _ in running)

    def finish(self, ranks: int) -> tuple[list[dict[str, Dissection]], float]:
        """What every process of a whole run found, and the seconds that it took since it began."""
        running, begun = self.start(ranks), time.monotonic()
        for process, told in running:
            process.join(300)
            told.close()
        took = time.monotonic() - begun
        assert [process.exitcode for process, _ in running] == [0] * ranks
        return [{layer: Dissection.load(self.out / f"{layer}-{rank}.safetensors") for layer in LAYERS} for rank in range(ranks)], took

    def assert_nothing_is_left(self) -> None:
        """Only what a finished checkpoint holds, and that can be cleared."""
        names = {path.name for path in self.checkpoint.iterdir()}
        assert not [name for name in names if name.startswith("maps-") or ".part" in name], names
        assert not list(self.temporary.iterdir())
        clear_checkpoint(self.checkpoint)
        assert not self.checkpoint.exists()


def killed_often(runs: Runs, kills: Sequence[int], seconds: float) -> list[tuple[int, float, bool]]:
    """Kills runs of so many ranks one after the other, each at a random moment of the time that a whole run takes."""
    seed = int(os.environ.get("TORCHPROBE_KILL_SEED", os.getpid()))
    moments, told = random.Random(seed), []
    for ranks in kills:
        delay = moments.uniform(0.0, seconds / 3)  # a resumed run has less to do
        told.append((ranks, delay, runs.kill(ranks, delay, moments.randrange(ranks))))
    return [*told, (seed, 0.0, False)]


def assert_same(found: Dissection, alone: Dissection, told: object) -> None:
    """Everything but the time."""
    assert found == alone, told
    assert found.top is not None and alone.top is not None
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.top, alone.top, strict=True)), told
    assert torch.equal(found.average_precision.nan_to_num(-1), alone.average_precision.nan_to_num(-1)), told


BUDGETS = {"one pass": 8.0, "two passes": 0.0, "maps are dropped": 1e-4, "given up": 6e-5}


@pytest.mark.slow("six kills in each of several runs in processes of their own")
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize(
    ("ranks", "budget"), [*((1, budget) for budget in BUDGETS), (2, "one pass"), (2, "maps are dropped"), (4, "one pass")]
)
def test_exact_thresholds(root: Path, tmp_path: Path, ranks: int, budget: str) -> None:
    alone = dissect(Net(), LAYERS, Broden(root), **OPTIONS, disk=0.0)
    runs = Runs(root, tmp_path, disk=BUDGETS[budget])
    _, seconds = runs.finish(ranks)
    clear_checkpoint(runs.checkpoint)
    told = killed_often(runs, [ranks] * KILLS, seconds)
    for found in runs.finish(ranks)[0]:
        for layer in LAYERS:
            assert_same(found[layer], alone[layer], told)
    runs.assert_nothing_is_left()


@pytest.mark.slow("six kills of runs in processes of their own")
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_other_ranks_and_budgets_go_on(root: Path, tmp_path: Path) -> None:
    """Each run has other ranks and another budget than the one before."""
    small = BUDGETS["maps are dropped"]
    alone = dissect(Net(), LAYERS, Broden(root), **OPTIONS, disk=0.0)
    runs = Runs(root, tmp_path, disk=small)
    _, seconds = runs.finish(2)
    clear_checkpoint(runs.checkpoint)
    told = []
    budgets = itertools.cycle([small, 8.0, small, 0.0])
    for ranks, disk in zip((2, 1, 4, 2, 1, 4, 2, 4, 1, 2), budgets, strict=False):
        runs.options["disk"] = disk
        told += killed_often(runs, [ranks], seconds)
    runs.options["disk"] = 0.0
    for found in runs.finish(2)[0]:
        for layer in LAYERS:
            assert_same(found[layer], alone[layer], told)
    runs.assert_nothing_is_left()


ESTIMATED = {"memory": 4_000}


def assert_estimates_survive(root: Path, folder: Path, ranks: int, disk: float, kills: int) -> None:
    """Estimates depend on which process saw which batch, in which order. As many processes go on as if none had been killed."""
    (folder / "whole").mkdir()
    whole, seconds = Runs(root, folder / "whole", disk=0.0, **ESTIMATED, progress=rest).finish(ranks)
    assert any(float(found.metadata["threshold_error"]) > 0 for found in whole[0].values())
    runs = Runs(root, folder, disk=disk, **ESTIMATED, progress=rest)
    told = killed_often(runs, [ranks] * kills, seconds)
    for found in runs.finish(ranks)[0]:
        for layer in LAYERS:
            assert_same(found[layer], whole[0][layer], told)
    runs.assert_nothing_is_left()


@pytest.mark.slow("six kills in each of several runs in processes of their own")
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize(("ranks", "disk"), [(1, 8.0), (2, 0.0), (4, 8.0)])
def test_estimated_thresholds(root: Path, tmp_path: Path, ranks: int, disk: float) -> None:
    assert_estimates_survive(root, tmp_path, ranks, disk, KILLS)


def test_estimates_are_not_resumed_by_another_number_of_processes(root: Path, tmp_path: Path) -> None:
    told: list[object] = []
    options = {**OPTIONS, **ESTIMATED, "checkpoint": tmp_path, "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        dissect(Net(), LAYERS, Broden(root), **options, progress=told.append, stop=lambda: len(told) == 5)
    settings = tmp_path / "settings.json"
    facts = read_checked(settings)["facts"]
    write_checked(settings, {"facts": {**facts, "ranks": 2}})
    with pytest.raises(ValueError, match="another ranks: 2, now it is 1"):
        dissect(Net(), LAYERS, Broden(root), **options, resume=True)


@pytest.mark.parametrize("estimated", [{}, ESTIMATED])
@pytest.mark.parametrize("kind", [Quantile, Overlap])
def test_an_interruption_in_the_midst_of_a_batch(
    root: Path, tmp_path: Path, estimated: Mapping[str, int], kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has seen the batch, the second has not: that state is not saved, so nothing counts twice."""
    options = {**OPTIONS, **estimated, "disk": 0.0}
    alone = dissect(Net(), LAYERS, Broden(root), **options)
    update, calls = kind.update, itertools.count(1)

    def interrupted(*arguments: Any, **named: Any) -> None:
        if next(calls) == 8:  # the second layer of the fourth batch
            raise KeyboardInterrupt
        update(*arguments, **named)

    monkeypatch.setattr(kind, "update", interrupted)
    saved = {"checkpoint": tmp_path, "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        dissect(Net(), LAYERS, Broden(root), **options, **saved)
    found = dissect(Net(), LAYERS, Broden(root), **options, **saved, resume=True)
    for layer in LAYERS:
        assert_same(found[layer], alone[layer], kind)


# -- maps on the disk that several processes share -------------------------------------------------------------------------

UNKNOWN = torch.full((3,), -torch.inf)


def maps_of(batch: int) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(batch))


def spooled(folder: Path, batches: Sequence[int], bound: Tensor = UNKNOWN, budget: int = 10**6) -> Spool:
    spool = Spool("0", folder, budget)
    for batch in batches:
        spool.put(batch, maps_of(batch), bound)
        spool.flush()
    return spool


def test_ranks_read_each_others_maps(tmp_path: Path) -> None:
    first, second = spooled(tmp_path, [0, 2]), spooled(tmp_path, [1, 3])
    assert not first.holds(range(4))
    for spool in (first, second):
        spool.find()
        assert spool.holds(range(4)) and spool.serves(torch.zeros(3))
        for batch in range(4):
            assert torch.equal(spool.get(batch, UNKNOWN), maps_of(batch))
    second.give_up()  # removes only its own files
    assert not first.serves(torch.zeros(3)) and len(list(tmp_path.iterdir())) == 2


def test_a_budget_is_for_the_files_of_a_process(tmp_path: Path) -> None:
    other = spooled(tmp_path, range(8))
    mine = spooled(tmp_path, [8], budget=sum(path.stat().st_size for path in tmp_path.iterdir()) // 4)
    mine.find()
    mine.put(9, maps_of(9), UNKNOWN)
    mine.flush()
    assert mine.alive and mine.holds(range(10)) and other.holds(range(8))


def test_only_maps_of_finished_batches_are_taken_over(tmp_path: Path) -> None:
    spooled(tmp_path, range(4))
    (tmp_path / "maps-0-9-9.safetensors").write_bytes(b"damaged")
    spool = Spool("0", tmp_path, 10**6)
    spool.adopt([0, 1, 3])
    assert spool.holds([0, 1, 3]) and not spool.holds([2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"maps-0-{n}-{n}.safetensors" for n in (0, 1, 3)]


def test_the_bound_of_maps_survives_that_they_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that an earlier run compared with a higher level are not taken for those of a lower one."""
    monkeypatch.setattr("torchprobe.dissection.spool._KEPT", 1e9)
    spooled(tmp_path, [0], torch.full((3,), 1.5))
    again = Spool("0", tmp_path, 1)
    again.adopt([0])
    assert not again.serves(torch.ones(3)) and again.serves(torch.full((3,), 1.5))
    again.budget = 10  # the files are written again
    again.put(1, maps_of(1) * 0, torch.ones(3))
    again.flush()
    third = Spool("0", tmp_path, 10**6)
    third.adopt([0, 1])
    assert not third.serves(torch.ones(3))


def test_a_full_disk_means_a_second_pass(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, told = dissect(Net(), LAYERS, Broden(root), **OPTIONS, disk=0.0), []
    write = storage.write

    def full(path: Path, kind: str, *arguments: Any) -> None:
        if "spool" in kind:
            told.append(path)
            raise OSError(28, "No space left on device")
        write(path, kind, *arguments)

    monkeypatch.setattr(storage, "write", full)
    found = dissect(Net(), LAYERS, Broden(root), **OPTIONS, checkpoint=tmp_path / "c", checkpoint_every=0.0)
    assert len(told) == len(LAYERS)
    for layer in LAYERS:
        assert_same(found[layer], alone[layer], told)


@pytest.mark.parametrize("disk", [0.0, 8.0, 6e-5])
def test_a_run_with_another_budget_leaves_nothing(root: Path, tmp_path: Path, disk: float) -> None:
    told: list[object] = []
    options = {"checkpoint": tmp_path / "c", "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        dissect(Net(), LAYERS, Broden(root), **OPTIONS, **options, progress=told.append, stop=lambda: len(told) == 5)
    assert list((tmp_path / "c").glob("maps-*"))
    dissect(Net(), LAYERS, Broden(root), **OPTIONS, **options, disk=disk, resume=True)
    assert not list((tmp_path / "c").glob("maps-*"))


def test_a_run_that_fails_leaves_no_temporary_maps(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("torchprobe.dissection.spool._BUFFER", SMALL_BUFFER)
    seen: list[int] = []

    def tell(progress: object) -> None:
        seen.append(len(list(tmp_path.iterdir())))
        if len(seen) == 10:
            raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        dissect(Net(), LAYERS, Broden(root), **OPTIONS, progress=tell)
    assert max(seen) == len(LAYERS) and not list(tmp_path.iterdir())
    dissect(Net(), LAYERS, Broden(root), **OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("budget", "thinned", "gave_up"), [("one pass", False, False), ("maps are dropped", True, False), ("given up", True, True)]
)
def test_the_budgets_of_these_tests_do_what_they_say(
    root: Path, budget: str, thinned: bool, gave_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchprobe.dissection.spool._BUFFER", SMALL_BUFFER)
    monkeypatch.setattr("torchprobe.dissection.run.worthwhile", lambda *arguments: True)
    written: list[tuple[str, Path]] = []
    write = storage.write

    def note(path: Path, *arguments: Any) -> None:
        written.append(("", path))
        write(path, *arguments)

    monkeypatch.setattr(storage, "write", note)
    told: list[Any] = []
    dissect(Net(), LAYERS, Broden(root), **OPTIONS, disk=BUDGETS[budget], progress=told.append)
    assert (len({path for _, path in written}) < len(written)) == thinned
    assert any(progress.stage == "second pass" for progress in told) == gave_up
