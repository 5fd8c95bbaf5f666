"""Processes that tests start."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# A new interpreter takes seconds to import torch. The fork server imports it once, and its children start at once. They have imported
# nothing else: torchprobe and its kernels are loaded anew, under the environment variables of the child.
FORKS = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
if FORKS.get_start_method() == "forkserver":
    FORKS.set_forkserver_preload(["torch"])


def python(code: str, *arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process of its own, as ``python -c`` does. Call it from the main thread only."""
    with tempfile.TemporaryDirectory() as folder:
        output, error = Path(folder, "output"), Path(folder, "error")
        process = FORKS.Process(target=_execute, args=(code, [str(argument) for argument in arguments], environment, output, error))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(code, timeout)
        return subprocess.CompletedProcess(code, process.exitcode or 0, output.read_text(), error.read_text())


def _execute(code: str, arguments: list[str], environment: dict[str, str], output: Path, error: Path) -> None:
    for descriptor, path in ((1, output), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
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
