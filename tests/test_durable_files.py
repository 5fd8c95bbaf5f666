"""Files are on the disk before they replace others; what cannot be written is an OSError that names the file."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchprobe
from torchprobe.analysis import embed
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.common import storage
from torchprobe.common.checked import write_checked
from torchprobe.common.files import is_leftover, remove_leftovers, replacing, unfinished
from torchprobe.encoders import Head
from torchprobe.rendering.latex import write_latex
from torchprobe.rendering.tables import Column, write_csv

ROWS = [{"a": "x" * 100}] * 50


def recording() -> torchprobe.Recording:
    model = torch.nn.Sequential(torch.nn.Linear(64, 600))
    with torchprobe.record(model, "0") as rec:
        model(torch.randn(4, 64))
    return rec.total


def draw(path: Path) -> None:
    plots = pytest.importorskip("torchprobe.rendering.plots")
    pytest.importorskip("matplotlib")
    plots.write(plots.kurtosis_histogram(torch.rand(50).numpy() + 3, 64), path)


def picture(path: Path) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.effect_noise((200, 200), 90).save(temporary, "PNG")


WRITERS: dict[str, Callable[[Path], object]] = {
    "recording.safetensors": lambda path: recording().save(path),
    "embeddings.safetensors": lambda path: Embeddings.from_arrays(torch.randn(90, 64)).save(path),
    "grown.safetensors": lambda path: embed(torch.nn.Flatten(), [torch.randn(600) for _ in range(30)], path=path, batch_size=4),
    "head.safetensors": lambda path: Head(torch.randn(40, 64)).save(path),
    "stored.safetensors": lambda path: storage.write(path, "example", {"x": torch.randn(3000)}, {}),
    "stage.json": lambda path: write_checked(path, {"rows": ROWS}),
    "table.csv": lambda path: write_csv(ROWS, path),
    "table.tex": lambda path: write_latex(ROWS, [Column("a", "a", "a", "text")], path),
    "plot.pdf": draw,
    "plot.svg": draw,
    "picture.png": picture,
}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 4 kB, as if the disk were full."""
    resource = pytest.importorskip("resource", reason="no limits of file sizes on this system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, small_files: None, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old") if name != "grown.safetensors" else None
    with pytest.raises(OSError, match=rf"(File too large|cannot be written).*{name}"):
        WRITERS[name](path)
    left = {one.name for one in tmp_path.iterdir()}
    if name == "grown.safetensors":
        assert left == {f".{name}.part", f".{name}.progress"}  # what is kept for a resume
    else:
        assert left == {name} and path.read_bytes() == b"old"


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Read-only: permissions do not hold for root, so the system is asked to say no."""
    original = os.open
    real = open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, flags, *rest, **options)

    def refuse_open(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if not isinstance(path, int) and str(path).startswith(str(tmp_path)) and set(mode) & set("wax"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse_open)
    with pytest.raises(OSError, match=rf"Read-only file system: .*{name}'"):
        WRITERS[name](tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
def test_content_is_on_the_disk_before_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The order of the calls is what a power loss depends on: the content, the exchange, the folder."""
    calls: list[tuple[str, int]] = []
    sync, exchange = os.fsync, os.replace

    def fsync(number: int) -> None:
        calls.append(("sync", os.fstat(number).st_ino))
        sync(number)

    def replace(source: Any, target: Any) -> None:
        calls.append(("replace", os.stat(source).st_ino))
        exchange(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    WRITERS[name](tmp_path / name)
    file, folder = (tmp_path / name).stat().st_ino, tmp_path.stat().st_ino
    assert calls[-3:] == [("sync", file), ("replace", file), ("sync", folder)]
    assert [one.name for one in tmp_path.iterdir()] == [name]


KILLED = """
import os, sys, signal
from pathlib import Path
from torchprobe.common.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode < 0
    left = [*tmp_path.iterdir()]
    assert len(left) == 1 and is_leftover(left[0])  # the second process has removed that of the first
    mine, elsewhere = unfinished(path), tmp_path / ".a.json.elsewhere-1-0.part"
    mine.write_text("half")
    elsewhere.write_text("half")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert {one.name for one in tmp_path.iterdir()} == {"a.json", mine.name, elsewhere.name}  # those are perhaps being written
    remove_leftovers(tmp_path, alone=True)
    assert {one.name for one in tmp_path.iterdir()} == {"a.json"}


def test_tensors_read_as_they_were(tmp_path: Path) -> None:
    """The writer is our own; the reader is safetensors."""
    from safetensors.torch import load_file

    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors: dict[str, Tensor] = {str(dtype): torch.arange(-3, 4).abs().to(dtype) for dtype in types}
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "ünï ": torch.ones(2, 3).T}
    storage.save_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with pytest.raises(TypeError, match="'x' is torch.complex64, which cannot be saved"):
        storage.save_tensors(tmp_path / "b.safetensors", {"x": torch.ones(1, dtype=torch.complex64)}, {})


DRAWN = """
import sys, numpy as np
from pathlib import Path
from torchprobe.rendering import plots
plots.write(plots.kurtosis_histogram(np.linspace(3, 9, 50), 64), Path(sys.argv[1]))
"""


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png"])
def test_figures_are_the_same_in_every_process(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    digests = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.{suffix}"
        subprocess.run([sys.executable, "-c", DRAWN, str(path)], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_checksum_whose_name_is_damaged_is_missed() -> None:
    """Without a checksum, as earlier versions wrote them, values may be read; not with one under another name."""
    from torchprobe.common.checked import DamagedError, sealed, unsealed

    whole = sealed({"format": 1, "remark": "none"})
    renamed = {"cjecksum" if key == "checksum" else key: value for key, value in whole.items()}
    for required in (True, False):
        with pytest.raises(DamagedError, match="it has no checksum"):
            unsealed(renamed | {"remark": ""}, "a.json", required)
    assert unsealed({"format": 1, "remark": ""}, "a.json", required=False) == {"format": 1, "remark": ""}
