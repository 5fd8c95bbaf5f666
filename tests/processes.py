"""Processes that tests start."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

# A new interpreter takes seconds to import torch. The fork server imports it once, and its children start at once. They have imported
# nothing else: torchprobe and its kernels are loaded anew, under the environment variables of the child.
FORKS = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
if FORKS.get_start_method() == "forkserver":
    FORKS.set_forkserver_preload(["torch"])


@dataclass(frozen=True)
class Running:
    """A process that runs code; its output goes to files."""

    process: BaseProcess
    folder: Path

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Waits for its end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        output, error = ((self.folder / name).read_text() for name in ("output", "error"))
        shutil.rmtree(self.folder)
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode or 0, output, error)


def start(code: str, *arguments: object, **environment: str) -> Running:
    """Starts ``code`` in a process of its own, as ``python -c`` does. Call it from the main thread only."""
    folder = Path(tempfile.mkdtemp())
    process = FORKS.Process(target=_execute, args=(code, [str(argument) for argument in arguments], environment, folder))
    process.start()
    return Running(process, folder)


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` as :func:`start` does, to its end."""
    return start(code, *arguments, **environment).finish()


def group(size: int, code: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs ``code`` in processes with the environment variables that torchrun sets."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    running = [start(code, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(size)]
    return [process.finish() for process in running]


def two_ranks(main: Callable[[int, int, Path], None], path: Path, timeout: float = 240) -> list[int | None]:
    """Runs ``main(rank, port, path)`` in two processes to their end; their exit codes."""
    port = free_port()
    running = [FORKS.Process(target=main, args=(rank, port, path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout)
        assert not process.is_alive(), "a rank hangs"
    return [process.exitcode for process in running]


def each_way(rank: int, port: int, path: Path, ways: Iterable[Callable[..., Any]], run: Callable[[Callable[..., Any]], object]) -> NoReturn:
    """What one of :func:`two_ranks` does: joins the group, runs every way, and writes its error to ``path / "{way}.{rank}.error"``."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    for way in ways:
        try:
            run(way)
        except BaseException:
            (path / f"{way.__name__}.{rank}.error").write_text(traceback.format_exc())
        distributed.barrier()
    os._exit(0)


def _execute(code: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    for descriptor, name in ((1, "output"), (2, "error")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def torchrun(processes: int, *command: object, timeout: float = 300) -> None:
    """Runs a script and its arguments under torchrun on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
