"""What only a GPU can tell, in one command: ``make test-gpu``, or ``python tests/on_gpu.py``.

First the tests marked ``gpu``. Then, where compute-sanitizer is installed, the self-check of ``torchprobe doctor`` – every type, every
layout, every kind of hard input, all of it small – under memcheck, racecheck and synccheck. Exit code 2: there is no GPU.
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


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    root = Path(__file__).parents[1]
    failed = ["pytest -m gpu"] if subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=root).returncode else []
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is neither on the PATH nor below CUDA_HOME: left out")
    else:
        failed += [tool for tool in TOOLS if sanitize(sanitizer, tool)]
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
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run([*command, sys.executable, "-c", CHECK, "cuda"], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
