"""``make wheel`` in a copy of the sources, without files of earlier builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
CHANGED_BY_USERS = ("TORCH_CUDA_ARCH_LIST", "TORCHPROBE_BUILD", "TORCHPROBE_DISABLE_KERNELS", "MAKEFLAGS")


@dataclass(frozen=True)
class Build:
    """A wheel, and the messages of the compilers."""

    wheel: Path
    log: str


def copy_sources(to: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, to)
    for name in ("torchprobe", "csrc"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))


def environment() -> dict[str, str]:
    """The environment without the variables that change the build; ``python`` is the Python that runs the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in CHANGED_BY_USERS}
    return {**kept, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def make_wheel(folder: Path) -> Build:
    copy_sources(folder)
    (folder / ".venv").mkdir()
    for name in (".torch", ".ready"):  # make would prepare an environment like this one
        (folder / ".venv" / name).touch()
    result = subprocess.run(
        ["make", "wheel"],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-10_000:]
    (wheel,) = (folder / "dist").iterdir()
    return Build(wheel, result.stdout)
