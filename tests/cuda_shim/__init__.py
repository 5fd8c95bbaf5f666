"""The CUDA kernels on the host: csrc/cuda compiled against ``cuda_runtime.h`` of this folder, which plays the execution model.

What this proves and what only a GPU can show is said in docs/kernel.md.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
LAYOUTS = ("rows", "channels")


def compiler() -> str | None:
    """The C++ compiler, or ``None``."""
    name = shlex.split(os.environ.get("CXX") or "c++")[0]
    return shutil.which(name)


def sources(csrc: Path = CSRC) -> str:
    """Everything the library is made of, in one string."""
    files = [*HERE.glob("*.cpp"), *HERE.glob("*.h"), *csrc.glob("*.h"), *(csrc / "cuda").glob("*")]
    return "".join(path.read_text() for path in sorted(files) if path.suffix in {".cpp", ".h", ".cu", ".cuh"})


def build(csrc: Path = CSRC, watched: bool = False) -> Any:
    """Compiles ``csrc`` and returns its operators; the same sources are compiled once. Mutants are compiled quickly and run slowly.

    ``watched``: races and misaligned accesses are errors, and everything takes about three times as long.
    """
    return _build(csrc, watched, hashlib.sha256(f"{sources(csrc)}{torch.__version__}{watched}".encode()).hexdigest()[:16])


def states() -> Any:
    """Compiles the operators on whole states of ``csrc/cuda/states.cpp`` alone, for tensors of the host."""
    return _build(CSRC, False, hashlib.sha256(f"{sources()}{torch.__version__} states".encode()).hexdigest()[:16], ("states",))


@functools.cache
def _build(csrc: Path, watched: bool, key: str, parts: tuple[str, ...] = ("shim", "races")) -> Any:
    folder = Path(tempfile.gettempdir()) / f"torchprobe-cuda-shim-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        include, lib = Path(torch.__file__).parent / "include", Path(torch.__file__).parent / "lib"
        flags = [
            *(("-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas") if csrc == CSRC else ("-O0", "-w")),
            "-std=c++17", "-fPIC", "-ffp-contract=off",
            f"-DSHIM=shim_{key}", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *(f"-I{path}" for path in (HERE, csrc, csrc / "cuda")), "-isystem", str(include),
        ]  # fmt: skip
        with tempfile.TemporaryDirectory(dir=folder) as made:
            objects = [Path(made) / f"{name}.o" for name in parts]
            for target in objects:
                watching = ["-fsanitize=thread,alignment"] if watched and target.stem == "shim" else []
                _run(compiler(), *flags, *watching, "-c", HERE / f"{target.stem}.cpp", "-o", target)
            _run(compiler(), "-shared", *objects, "-o", Path(made) / "shim.so", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10")
            (Path(made) / "shim.so").replace(library)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, f"shim_{key}")


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def observe(
    state: Tensor,
    x: Tensor,
    feature_dim: int = -1,
    outlier_sigma: float = 6.0,
    every: int = 1,
    mask: Tensor | None = None,
    *,
    multiprocessors: int = 3,
    shared_bytes: int = 227 << 10,
    order: int = 2,
    csrc: Path = CSRC,
    watched: bool = False,
) -> None:
    """As ``observe_``, on a device of a few multiprocessors. ``order`` 0 runs threads and blocks by number, 1 backwards, n at random."""
    build(csrc, watched).observe_(state, x, feature_dim, outlier_sigma, every, mask, multiprocessors, shared_bytes, order)


def plan(x: Tensor, feature_dim: int = -1, multiprocessors: int = 3, shared_bytes: int = 227 << 10) -> dict[str, Any]:
    """How the launches cut up a call."""
    from torchprobe.ops import new_state

    names = ("layout", "pack", "across", "warps", "tiles", "slabs", "tile_vectors", "shared_bytes")
    out = torch.zeros(len(names), dtype=torch.int64)
    build().plan(new_state(x.shape[feature_dim]), x, feature_dim, multiprocessors, shared_bytes, out)
    values = dict(zip(names, out.tolist(), strict=True))
    return {**values, "layout": LAYOUTS[values["layout"]]}
