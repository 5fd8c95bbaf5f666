"""What can be checked here of machines that are not here: Arm processors, Clang, and systems without POSIX."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from processes import python
from sanitize import build

POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty")


def compiled(compiler: list[str], folder: Path) -> list[Path]:
    """The object files of the CPU kernels and of the driver that calls them; a warning is an error."""
    includes = [f"-I{path}" for path in (build.HERE / "stand_in", build.SHIM, build.CSRC, build.CSRC / "cuda")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *includes]
    objects: list[Path] = []
    for source, _ in build.units("thread"):
        objects.append(folder / f"{source.stem}.o")
        done = subprocess.run([*compiler, *flags, "-c", source, "-o", objects[-1]], capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
    return objects


@pytest.mark.slow("compiles the kernels for Arm, and runs them in an emulator")
def test_arm_leaves_the_bytes_of_the_baseline(tmp_path: Path) -> None:
    """Without AVX the kernels use vectors of the compiler, so an Arm processor must compute what the baseline of x86-64 computes."""
    cross, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (cross, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (on Debian: g++-aarch64-linux-gnu and qemu-user)")
    program, driver = tmp_path / "program", tmp_path / "driver"
    subprocess.run([cross, "-static", *compiled([cross], tmp_path), "-pthread", "-o", program], check=True, timeout=600)
    driver.write_text(f'#!/bin/sh\nexec {emulator} {program} "$@"\n')
    driver.chmod(0o755)
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(build.HERE.parent)!r})
from sanitize import corpus
from sanitize.__main__ import compare, run
made = corpus.calls(40)
left = run(Path({str(driver)!r}), made, threads=2)
print(len(made), len(left), sum(not one.refused for one in left) > 100, compare(made, left))
"""
    done = python(code, TORCHPROBE_ISA="baseline")
    assert done.returncode == 0, done.stderr[-3000:]
    calls, results, many, refused = done.stdout.split()
    assert calls == results and many == "True" and int(refused) > 20


@pytest.mark.slow("compiles the kernels")
def test_clang_accepts_the_kernels(tmp_path: Path) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    assert len(compiled(["clang++"], tmp_path)) > 5


def test_nothing_on_import_is_of_posix_only() -> None:
    """Windows has none of these modules: every file of the package must come without them."""
    code = f"""
import importlib, pkgutil, sys
for name in {POSIX_ONLY!r}:
    sys.modules[name] = None
import torchprobe
for module in pkgutil.walk_packages(torchprobe.__path__, "torchprobe."):
    if not module.name.rpartition(".")[2].startswith("_"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert error.name is not None and error.name.partition(".")[0] not in {POSIX_ONLY!r}, (module.name, error)
print("all")
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout == "all\n", done.stderr[-3000:]
