"""Interruptions of real processes: SIGTERM is handled as Ctrl-C, a kill costs at most a batch, and a lost rank is said in words."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import free_port
from torch import distributed

from torchprobe.cli.tools import interruptible, terminable
from torchprobe.common.folders import record
from torchprobe.common.ranks import RankLostError, Ranks

FORKS = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
SIGNALS = [signal.SIGINT, signal.SIGTERM]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


# -- the handlers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_ends(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with interruptible() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before and "Stopping after this batch" in capsys.readouterr().err


def test_outside_of_a_run_a_signal_ends_at_once() -> None:
    with terminable(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_in_other_threads_nothing_is_handled() -> None:
    asked: list[bool] = []

    def run() -> None:
        with terminable(), interruptible() as stop:
            asked.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]


def test_a_rank_that_is_lost_after_a_signal_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankLostError), interruptible():
        raise RankLostError
    with pytest.raises(KeyboardInterrupt), interruptible():
        _killed(signal.SIGTERM)


def _killed(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    raise RankLostError


# -- ranks -----------------------------------------------------------------------------------------------------------------


def one_of_two(rank: int, port: int, told: Connection) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    ranks = Ranks().__enter__()
    ranks.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for action in (lambda: ranks.from_first(1), lambda: [*ranks.to_first(1)], ranks.barrier, lambda: ranks.on_first(lambda: 1)):
        told.send(_message(action))
    os._exit(0)


def _message(action: Callable[[], object]) -> str:
    try:
        action()
    except RankLostError as error:
        return str(error)
    return "no error"


def test_a_lost_rank_is_said_in_words() -> None:
    mine, theirs = FORKS.Pipe()
    port = free_port()
    processes = [FORKS.Process(target=one_of_two, args=(rank, port, theirs)) for rank in range(2)]
    for process in processes:
        process.start()
    messages = [mine.recv() for _ in range(4)]
    for process in processes:
        process.join()
    lost = [message for message in messages if message != "no error"]  # a broadcast may still leave this process
    assert len(lost) >= 3
    assert all(message.startswith("rank 0 of 2 lost the others: a rank has ended, and its own message says why.") for message in lost)


# -- commands ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number in range(300):
        pixels = np.random.default_rng(number).integers(0, 256, (160, 160, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torchprobe", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and the messages of a process."""
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def wait_for(path: Path, size: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size >= size):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def interpreting(photos: Path, out: Path, *more: object) -> tuple[Any, ...]:
    images = ("interpret", "timm:test_vit", "--random-init", "--head", "none", "--images", photos, "--layer-images", 0)
    return (*images, "--batch-size", 4, "--workers", 1, "--device", "cpu", "--out", out, *more)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in ("checksum", "about")}


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run."""
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("whole") / "out"
    code, err = ended(started(*interpreting(photos, out)))
    assert code == 0, err
    return out


@pytest.mark.slow("runs whole commands in processes of their own")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_an_interpretation_is_stopped_and_resumed(photos: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    process = started(*interpreting(photos, out))
    wait_for(out / "embeddings" / ".imagenet.safetensors.progress", 2000, process)
    process.send_signal(number)
    code, err = ended(process)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130, err
        assert "Stopping after this batch" in err and "with --resume continues the run" in err
    known = record(out)
    assert known is not None and not known["finished"] and not (out / "results.json").exists()
    done = len((out / "embeddings" / ".imagenet.safetensors.progress").read_text().splitlines()) - 1
    assert 0 < done < 75
    if number == signal.SIGTERM:
        code, err = ended(started(*interpreting(photos, out)))
        assert code == 1 and "an unfinished run of torchprobe interpret" in err
    code, err = ended(started(*interpreting(photos, out, "--resume")))
    assert code == 0, err
    assert results(out) == results(whole)
    for name in ("kurtosis.csv", "features.csv", "embeddings/imagenet.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not [path for path in out.rglob(".*") if path.is_file() and ".torchprobe" not in path.parts]


@pytest.mark.slow("runs whole commands in processes of their own")
def test_a_scan_that_is_ended_writes_what_it_has(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    process = started(
        "scan", "timm:test_vit", "--random-init", "--images", photos, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "out"
    )
    assert process.stderr is not None
    said = next((line for line in process.stderr if line.startswith("scan:")), "")  # it begins: 150 batches are ahead of it
    process.send_signal(signal.SIGTERM)
    code, err = ended(process)
    assert code == 130, said + err
    if (tmp_path / "out").exists():  # a batch was seen
        assert "Interrupted: the results are about the first" in err
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["partial"]


@pytest.mark.slow("runs whole commands in processes of their own")
def test_two_ranks_are_stopped_and_resumed(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def ranks(*more: object) -> subprocess.Popen[str]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "torchprobe"]
        command = [sys.executable, *launch, *map(str, interpreting(photos, out, *more))]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    process = ranks()
    wait_for(out / "embeddings" / ".imagenet.safetensors.progress", 2000, process)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on to both
    _, err = ended(process)
    assert "Stopping after this batch" in err and "gloo" not in err.lower(), err
    known = record(out)
    assert known is not None and not known["finished"]
    code, err = ended(ranks("--resume"))
    assert code == 0, err
    assert results(out) == results(whole)
