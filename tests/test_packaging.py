"""What an installation promises: metadata, a light import, and kernels that may be absent without an error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wheels
from packaging.requirements import Requirement
from processes import python

import torchprobe
from torchprobe.common.messages import DISTRIBUTION
from torchprobe.ops import kernels, library, new_state
from torchprobe.ops.observe import reference

ROOT = Path(__file__).parents[1]
HEAVY = {"PIL", "captum", "click", "jinja2", "matplotlib", "open_clip", "rich", "scipy", "timm", "torchvision"}


def run(code: str, **environment: str) -> str:
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """The requirements of one extra, or those of the core, by name."""
    found = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    return {r.name: r for r in found if (extra is None) == (r.marker is None) and (not r.marker or r.marker.evaluate({"extra": extra}))}


def test_one_version_everywhere() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert torchprobe.__version__ == metadata.version(DISTRIBUTION) == newest[1]


def test_one_name_everywhere() -> None:
    """``torchprobe`` on the public index is another project, so no hint may install that."""
    named = re.search(r'^name = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert named is not None
    assert named[1] == DISTRIBUTION == metadata.metadata(DISTRIBUTION)["Name"]
    another = re.compile(r"\btorchprobe\[|pip install (?:-\S+ )*['\"]?torchprobe(?!-interp)\b")
    texts = [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".py", ".yaml") or path.name == "Makefile"]
    for folder in ("torchprobe", "docs", "examples", "benchmarks", "tests"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".toml", ".html", ".ipynb", ".csv")]
    assert len(texts) > 100
    assert [str(path) for path in texts if path != Path(__file__) and another.search(path.read_text(encoding="utf-8"))] == []
    for hint in ("pip install torchprobe", "pip install 'torchprobe[report]'", "pip install -U torchprobe", "needs torchprobe[demo]"):
        assert another.search(hint)
    assert not another.search(f"pip install {DISTRIBUTION}, pip install '{DISTRIBUTION}[report]', pip install torchvision")


def test_metadata() -> None:
    about = metadata.metadata(DISTRIBUTION)
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "Apache-2.0"
    assert {"vision", "captum", "report", "demo", "dev", "all"} <= set(about.get_all("Provides-Extra", []))
    core = requirements()
    assert {"torch", "numpy", "einops", "safetensors", "rich"} <= core.keys()
    assert core.keys().isdisjoint({"torchvision", "timm", "open_clip_torch", "matplotlib", "jinja2", "captum"})
    assert not core["torch"].specifier.contains("2.5.1")
    assert core["torch"].specifier.contains("2.6.0")
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= {
        line.partition(",")[0] for line in about.get_all("Project-URL", [])
    }
    description = about["Description"] or str(about.get_payload())
    assert "blob/main/docs/" in description and re.findall(r"\]\((?!https?:|#)[^)]*\)", description) == []


def test_a_torch_before_the_stable_interface_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.delenv("TORCHPROBE_DISABLE_KERNELS", raising=False)
    status = library._load("cpu", "torchprobe._C")
    assert status.startswith("not ") and ("older than 2.10" in status or "not built" in status)


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
        assert re.fullmatch(r"(loaded|not used|not loaded|not built|disabled): .+", status)


def test_import_and_kernels_leave_cuda_alone() -> None:
    code = "import torch, torchprobe.ops; torchprobe.ops.kernels(); print(torch.cuda.is_initialized())"
    assert run(code) == "False\n"


def test_kernels_can_be_disabled() -> None:
    code = """
import torch
from torchprobe.ops import kernels, new_state, observe_
print(kernels()["cpu"], kernels()["cuda"], sep="\\n")
state = new_state(2)
observe_(state, torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
assert state.count_nonzero() > 0
"""
    for status in run(code, TORCHPROBE_DISABLE_KERNELS="1").splitlines():
        assert status.startswith("disabled: ")


@pytest.mark.parametrize(
    ("obstacles", "status"),
    [
        ([None, None], "loaded: CUDA 13.0"),
        ([None, "an old driver"], "loaded: CUDA 13.0; not used on cuda:1: an old driver"),
        (["an old driver", "an old driver"], "not used: an old driver"),
        (["no code", "an old driver"], "not used: no code; an old driver"),
        ([], "not used: no driver"),
    ],
)
def test_gpus_that_cannot_run_the_kernels_are_named(monkeypatch: pytest.MonkeyPatch, obstacles: list[str | None], status: str) -> None:
    module = SimpleNamespace(unavailable=lambda index: obstacles[index] if obstacles else "no driver")
    monkeypatch.setitem(library.loaded, "cuda", module)
    monkeypatch.setitem(library.status, "cuda", "loaded: CUDA 13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(obstacles))
    assert kernels()["cuda"] == status


def test_the_fallback_is_the_reference_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.loaded, "cuda", SimpleNamespace(unavailable=lambda index: "an old driver"))
    monkeypatch.setattr(library, "warned", set())
    state, expected, x = new_state(5), new_state(5), torch.randn(20, 5)
    with pytest.warns(UserWarning, match="uses the PyTorch reference instead of the CUDA kernel: an old driver"):
        torch.ops.torchprobe.observe_reference_(state, x)
    torch.ops.torchprobe.observe_reference_(state, x)  # any warning would be an error
    for _ in range(2):
        reference(expected, x)
    assert torch.equal(state, expected)


def test_kernels_were_built_if_a_build_was_demanded() -> None:
    if os.environ.get("TORCHPROBE_BUILD") != "1" or os.environ.get("TORCHPROBE_DISABLE_KERNELS"):
        pytest.skip("TORCHPROBE_BUILD=1 is not set")
    assert kernels()["cpu"].startswith("loaded: ")


# -- without a compiler ----------------------------------------------------------------------------------------------------

NEITHER = {"CC": "/bin/false", "CXX": "/bin/false", "CUDA_HOME": "/nowhere"}
with_cuda = pytest.mark.skipif(not torch.version.cuda, reason=f"torch {torch.__version__} is a build without CUDA")


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A wheel of a copy of the sources, made in ``folder``."""
    wheels.copy_sources(folder)
    (folder / "torchprobe" / "_C.abi3.so").touch()  # as if from an earlier editable install; must not be in the wheel
    (folder / "torchprobe" / "_C_cuda.abi3.so").touch()
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel"],
        cwd=folder, env={**wheels.environment(), **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def old_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The home of an nvcc that is too old for any PyTorch of today."""
    nvcc = tmp_path_factory.mktemp("cuda") / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 8.0, V8.0.61\n")
    nvcc.chmod(0o755)
    return str(nvcc.parents[1])


@pytest.mark.slow("builds three wheels")
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TORCHPROBE_BUILD": "0"}, "TORCHPROBE_BUILD=0"),
        (NEITHER, "failed"),
        ({**NEITHER, "CXX": "no-such-compiler"}, "no-such-compiler was not found"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="there the compiler is not chosen by CC and CXX")
def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    result = build(tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("torchprobe: ")]
    assert [line for line in said if reason in line] == [line for line in said if line.startswith("torchprobe: cpu ")]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"{DISTRIBUTION.replace('-', '_')}-{torchprobe.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        reasons = json.loads(archive.read("torchprobe/_build.json"))
        assert reasons.keys() == {"cpu", "cuda"}
        assert reason in reasons["cpu"]
        assert len(said) == len(set(reasons.values()))
        assert "torchprobe/py.typed" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.slow("builds a wheel")
@with_cuda
def test_an_nvcc_that_does_not_suit_torch_is_no_error(tmp_path: Path, old_nvcc: str) -> None:
    result = build(tmp_path, **{**NEITHER, "CUDA_HOME": old_nvcc})
    assert result.returncode == 0, result.stderr
    assert f"torchprobe: cuda kernels not built: {old_nvcc}/bin/nvcc is from CUDA 8.0, but torch" in result.stderr


@pytest.mark.slow("builds a wheel")
@with_cuda
def test_unless_kernels_are_demanded(tmp_path: Path, old_nvcc: str) -> None:
    result = build(tmp_path, TORCHPROBE_BUILD="1", **{**NEITHER, "CUDA_HOME": old_nvcc})
    assert result.returncode != 0
    assert "TORCHPROBE_BUILD=1" in result.stderr
    assert "is from CUDA 8.0" in result.stderr


@pytest.mark.slow("builds a wheel")
def test_cuda_is_not_demanded_where_there_is_no_compiler_for_it(tmp_path: Path) -> None:
    result = build(tmp_path, TORCHPROBE_BUILD="1", **NEITHER)
    assert "nvcc was not found" not in result.stderr
    assert "TORCHPROBE_BUILD=1, but compilation failed" in result.stderr


def test_make_help_lists_what_the_docs_name() -> None:
    """Every `make TARGET` of the README and of docs/start.md is a line of `make help`, and a target."""
    makefile = (ROOT / "Makefile").read_text()
    named = set()
    for page in ("README.md", "docs/start.md"):
        named |= set(re.findall(r"^(?:[A-Z_]+=\S+ )?make ([\w-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert {"wheel", "dist-pure"} <= named
    for target in named:
        assert re.search(rf'@echo ".*\bmake {target}\b(?!-)', makefile), target
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
