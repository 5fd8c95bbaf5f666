"""Compiles the driver with the sources of the kernels, once for each set of sanitizers."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SHIM = HERE.parent / "cuda_shim"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
"""GCC's OpenMP is not instrumented: the threads are those of the stand-in, which ThreadSanitizer follows."""


def compiler() -> str | None:
    """The C++ compiler, or ``None``."""
    return shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])


def units(kind: str) -> list[tuple[Path, list[str]]]:
    """What is compiled, with the options of each."""
    found = [(HERE / "driver.cpp", [])]
    found += [(path, []) for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.name != "module.cpp"]
    if kind == "address":  # the shim's fibres are one thread; it finds races itself, and has a stack for each that ASan does not know
        found += [(SHIM / "shim.cpp", ["-DSHIM=shim", "--param=asan-stack=0"])]
        found += [(SHIM / "races.cpp", ["-fno-sanitize=all", "-D__ubsan_handle_type_mismatch_v1=shim_handle_type_mismatch"])]
    return found


def build(kind: str) -> Path:
    """The driver under ``SANITIZERS[kind]``; the same sources are compiled once."""
    folder = Path(tempfile.gettempdir()) / f"torchprobe-sanitize-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    includes = [f"-I{path}" for path in (HERE / "stand_in", SHIM, CSRC, CSRC / "cuda")]
    flags = ["-std=c++17", "-g1", "-O0", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", *SANITIZERS[kind], *includes]
    objects: list[tuple[Path, list[str]]] = []
    for source, options in units(kind):
        text = "".join(path.read_text() for path in [source, *_headers(source)])
        key = hashlib.sha256(f"{flags}{options}{source}{text}".encode()).hexdigest()[:16]
        objects.append((folder / f"{key}.o", [*flags, *options, "-c", str(source)]))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(_compile, objects))
    driver = folder / hashlib.sha256("".join(target.name for target, _ in objects).encode()).hexdigest()[:16]
    if not driver.exists():
        _run(compiler(), *SANITIZERS[kind], *(target for target, _ in objects), "-pthread", "-o", driver.with_suffix(".new"))
        driver.with_suffix(".new").replace(driver)
    return driver


def _headers(source: Path) -> list[Path]:
    """What the source may include."""
    folders = [HERE / "stand_in", *([SHIM, CSRC] if source.parent == SHIM else [CSRC / "cpu"])]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    return sorted({*found, *CSRC.glob("*.h")} - ({*(CSRC / "cpu").glob("*.cpp")}))


def _compile(job: tuple[Path, list[str]]) -> None:
    target, command = job
    if not target.exists():
        new = target.with_suffix(f".{os.getpid()}")
        _run(compiler(), *command, "-o", new)
        new.replace(target)


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
