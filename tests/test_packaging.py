"""What an installation promises: metadata, a light import, and kernels that may be absent but never in the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import torchprobe
from torchprobe.ops import kernels

ROOT = Path(__file__).parents[1]
HEAVY = {"PIL", "captum", "click", "jinja2", "matplotlib", "open_clip", "rich", "scipy", "timm", "torchvision"}


def run(code: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """The requirements of one extra, or those of the core, by name."""
    found = [Requirement(line) for line in metadata.requires("torchprobe") or []]
    return {r.name: r for r in found if (extra is None) == (r.marker is None) and (not r.marker or r.marker.evaluate({"extra": extra}))}


def test_one_version_everywhere() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert torchprobe.__version__ == metadata.version("torchprobe") == newest[1]


def test_metadata() -> None:
    about = metadata.metadata("torchprobe")
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "Apache-2.0"
    assert {"vision", "captum", "report", "demo", "dev", "all"} <= set(about.get_all("Provides-Extra", []))
    core = requirements()
    assert {"torch", "numpy", "einops", "safetensors", "rich"} <= core.keys()
    assert core.keys().isdisjoint({"torchvision", "timm", "open_clip_torch", "matplotlib", "jinja2", "captum"})
    assert not core["torch"].specifier.contains("2.9.1")
    assert core["torch"].specifier.contains("2.10.0")


def test_command_is_installed() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="torchprobe")
    assert callable(command.load())


def test_ruff_is_pinned_alike_for_everyone() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{str(requirements('dev')['ruff'].specifier).removeprefix('==')}\n" in hooks


def test_typed() -> None:
    assert resources.files("torchprobe").joinpath("py.typed").is_file()


def test_import_brings_nothing_heavy() -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import torchprobe
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    added = json.loads(run(code))
    assert [name for name in added if name.partition(".")[0] in HEAVY] == []
    assert [name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed"))] == []


def test_kernels_are_described_in_one_line_each() -> None:
    for status in kernels().values():
        assert re.fullmatch(r"(loaded|not loaded|not built|disabled): .+", status)


def test_kernels_can_be_disabled() -> None:
    code = """
import torch
from torchprobe.ops import kernels, new_state, observe_
print(kernels()["cpu"])
state = new_state(2)
observe_(state, torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
assert state.count_nonzero() > 0
"""
    assert run(code, TORCHPROBE_DISABLE_KERNELS="1").startswith("disabled: ")


def test_kernels_were_built_if_a_build_was_demanded() -> None:
    if os.environ.get("TORCHPROBE_BUILD") != "1" or os.environ.get("TORCHPROBE_DISABLE_KERNELS"):
        pytest.skip("TORCHPROBE_BUILD=1 is not set")
    assert kernels()["cpu"].startswith("loaded: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TORCHPROBE_BUILD": "0"}, "TORCHPROBE_BUILD=0"),
        ({"CC": "/bin/false", "CXX": "/bin/false"}, "the build failed"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler was not found"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="there the compiler is not chosen by CC and CXX")
def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("torchprobe", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    (tmp_path / "torchprobe" / "_C.abi3.so").touch()  # left by an earlier editable install; must not ship
    inherited = {key: value for key, value in os.environ.items() if key != "TORCHPROBE_BUILD"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel"],
        cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("torchprobe: ")]
    assert len(said) == 1
    assert reason in said[0]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert reason in json.loads(archive.read("torchprobe/_build.json"))["cpu"]
        assert "torchprobe/py.typed" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]
