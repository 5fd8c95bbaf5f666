"""What only a GPU can tell: ``python tests/on_gpu.py``, or ``make test-gpu``, which installs the package first.

``tests`` are the tests marked ``gpu``. ``memcheck``, ``racecheck`` and ``synccheck`` run the self-check of ``torchprobe doctor`` under that
tool of compute-sanitizer, where it is installed: every type, every layout, every kind of hard input, all of it small. Without arguments all
four run, one after the other; ``python tests/on_gpu.py memcheck`` runs one. Exit code 2: there is no GPU.

It runs with what is there: the package of this checkout, built with ``python setup.py build_ext --inplace``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # the exit code of compute-sanitizer when it has found something
CHECK = """
import sys
from torchprobe.ops import kernels, selfcheck
checks = selfcheck.run(sys.argv[1])
for check in checks:
    print("passed" if check.passed else "FAILED", check.name, check.detail)
status = kernels()[sys.argv[1]]
if not status.startswith("loaded"):
    sys.exit("the reference was checked, not the kernels: " + status)
sys.exit(not all(check.passed for check in checks))
"""


ROOT = Path(__file__).parents[1]


def main(*chosen: str) -> int:
    """Runs the ``chosen`` steps; all of them by default."""
    if unknown := set(chosen) - {"tests", *TOOLS}:
        print(f"no such step: {', '.join(sorted(unknown))}; there are tests, {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    steps = chosen or ("tests", *TOOLS)
    failed = []
    if "tests" in steps and subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, env=environment()).returncode:
        failed.append("pytest -m gpu")
    tools = [tool for tool in TOOLS if tool in steps]
    sanitizer = find_sanitizer()
    if tools and sanitizer is None:
        print(f"compute-sanitizer is neither on the PATH nor below CUDA_HOME: {', '.join(tools)} left out")
        failed += chosen and tools
    elif sanitizer is not None:
        failed += [tool for tool in tools if sanitize(sanitizer, tool)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home, "bin")))


def sanitize(sanitizer: str, tool: str) -> int:
    """The exit code; what was found is printed."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", "--launch-timeout", "120"]
    command += ["--report-api-errors", "no"]  # torch asks for functions that a driver may not have
    print(" ".join(command), flush=True)
    # Without torch's cache every tensor is an allocation of its own, so memcheck sees the end of each.
    uncached = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return subprocess.run([*command, sys.executable, "-c", CHECK, "cuda"], cwd=ROOT, env=uncached).returncode


def environment(**more: str) -> dict[str, str]:
    """That of a process which imports the package of this checkout, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), **more}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
