"""One wheel for everyone: what is in it, what it needs, and whether it runs with an old PyTorch as well as with the newest."""

from __future__ import annotations

import json
import re
import site
import struct
import subprocess
import sys
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from packaging.utils import parse_wheel_filename
from wheels import Build

from torchprobe.common.messages import DISTRIBUTION

OLD = ("2.10.0", "2.11.0", "2.13.0")  # the first that is available
# What manylinux promises in addition to its glibc version: the newest GLIBCXX and CXXABI of the oldest distribution that counts.
CXX = {
    17: ((3, 4, 19), (1, 3, 7)),
    28: ((3, 4, 24), (1, 3, 11)),
    31: ((3, 4, 28), (1, 3, 12)),
    34: ((3, 4, 29), (1, 3, 13)),
    35: ((3, 4, 30), (1, 3, 13)),
    39: ((3, 4, 33), (1, 3, 15)),
}
SYSTEM = {f"lib{name}" for name in ("c.so.6", "m.so.6", "gcc_s.so.1", "stdc++.so.6", "dl.so.2", "rt.so.1", "pthread.so.0")}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
TORCH = {"libc10.so", "libtorch.so", "libtorch_cpu.so"}
LIMITED_API = {f"Py{name}" for name in ("Arg_ParseTuple", "Bool_FromLong", "Err_Occurred", "Long_AsLong", "Module_Create2")}
LIMITED_API |= {"PyUnicode_FromFormat", "PyUnicode_FromString", "_Py_NoneStruct"}

pytestmark = [
    pytest.mark.slow("compiles the wheel and installs PyTorch"),
    pytest.mark.skipif(sys.platform != "linux", reason="the tags and tools are those of Linux"),
]


def tool(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, timeout=300).stdout


@dataclass(frozen=True)
class Module:
    """A compiled module of the wheel, unpacked."""

    path: Path

    @cached_property
    def dynamic(self) -> list[tuple[str, str]]:
        """Kind and value of each entry of the dynamic section that names something."""
        return re.findall(r"\((\w+)\)\s+.*\[(.*)\]", tool("readelf", "-dW", self.path))

    @property
    def needed(self) -> set[str]:
        return {value for kind, value in self.dynamic if kind == "NEEDED"}

    @cached_property
    def symbols(self) -> list[tuple[str, str, str]]:
        """Binding, section and name (with its version) of each dynamic symbol."""
        rows = [line.split() for line in tool("readelf", "--dyn-syms", "-W", self.path).splitlines()]
        return [(row[4], row[6], row[7]) for row in rows if len(row) >= 8 and row[0].rstrip(":").isdigit()]

    @property
    def undefined(self) -> list[str]:
        return [name for binding, section, name in self.symbols if section == "UND" and binding == "GLOBAL"]

    @property
    def exported(self) -> set[str]:
        return {name for binding, section, name in self.symbols if section != "UND" and binding == "GLOBAL"}

    def newest(self, prefix: str) -> tuple[int, ...]:
        """The newest version of a versioned library that a symbol asks for."""
        found = re.findall(rf"@{prefix}_([\d.]+)", "\n".join(name for _, _, name in self.symbols))
        return max((tuple(int(part) for part in version.split(".")) for version in found), default=(0,))

    def code(self) -> set[tuple[str, int]]:
        """("sm" for machine code or "compute" for PTX, architecture) of all code for GPUs. The headers in front of it have no public
        description; these fields have kept their places since CUDA 4."""
        data, found, position = self.path.read_bytes(), set(), 0
        while (position := data.find(struct.pack("<I", 0xBA55ED50), position)) >= 0:
            header, size = struct.unpack_from("<HQ", data, position + 6)
            at, position = position + header, position + header + size
            while at < position:
                kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
                found.add(({1: "compute", 2: "sm"}[kind], struct.unpack_from("<I", data, at + 28)[0]))
                at += header + size
        return found


@pytest.fixture(scope="module")
def modules(built: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Module]:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(folder)
    return {path.name.partition(".")[0]: Module(path) for path in (folder / "torchprobe").glob("*.so")}


@pytest.fixture
def cuda(modules: dict[str, Module], built: Build) -> Module:
    if "_C_cuda" not in modules:
        pytest.skip(next(line for line in built.log.splitlines() if line.startswith("torchprobe: cuda kernels not built")))
    return modules["_C_cuda"]


def glibc_of(wheel: Path) -> int:
    """The n of manylinux_2_n, the oldest of several."""
    *_, tags = parse_wheel_filename(wheel.name)
    return min(int(found[1]) for tag in tags if (found := re.match(r"manylinux_2_(\d+)_", tag.platform)))


def test_name_and_tags(built: Build, modules: dict[str, Module]) -> None:
    name, _, _, tags = parse_wheel_filename(built.wheel.name)
    assert name == DISTRIBUTION
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("cp310", "abi3")}
    assert all(tag.platform.startswith("manylinux_2_") for tag in tags)
    assert {module.path.name for module in modules.values()} <= {"_C.abi3.so", "_C_cuda.abi3.so"}
    assert "_C" in modules


def test_contents(built: Build) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")]
        reasons = json.loads(archive.read("torchprobe/_build.json"))
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"torchprobe", DISTRIBUTION.replace("-", "_")}
    assert {"torchprobe/py.typed", "torchprobe/ops/observe.py"} <= set(names)
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp", ".h", ".pyc"))]
    assert "Root-Is-Purelib: false" in metadata
    assert set(reasons) == ({"cuda"} if "torchprobe/_C_cuda.abi3.so" not in names else set())


def test_dependencies(modules: dict[str, Module]) -> None:
    for name, module in modules.items():
        assert module.needed - SYSTEM - TORCH == ({"libtorch_cuda.so"} if name == "_C_cuda" else set())
        assert not [kind for kind, _ in module.dynamic if kind in ("RPATH", "RUNPATH")]


def test_symbols_fit_the_tag(built: Build, modules: dict[str, Module]) -> None:
    glibc = glibc_of(built.wheel)
    glibcxx, cxxabi = CXX[max(version for version in CXX if version <= glibc)]
    for module in modules.values():
        assert module.newest("GLIBC") <= (2, glibc)
        assert module.newest("GLIBCXX") <= glibcxx
        assert module.newest("CXXABI") <= cxxabi


def test_of_torch_only_the_stable_interface_is_used(modules: dict[str, Module]) -> None:
    for module in modules.values():
        unversioned = {name for name in module.undefined if "@" not in name}
        assert {name for name in unversioned if not name.startswith(("aoti_torch_", "torch_"))} <= LIMITED_API


def test_nothing_but_the_module_is_exported(modules: dict[str, Module]) -> None:
    """The CUDA runtime inside must not meet the one of PyTorch."""
    for name, module in modules.items():
        assert module.exported == {f"PyInit_{name}"}


def test_no_path_of_the_machine_that_built_it(built: Build, modules: dict[str, Module]) -> None:
    folder = str(built.wheel.parents[1]).encode()
    assert [name for name, module in modules.items() if folder in module.path.read_bytes()] == []


def test_code_for_every_architecture(cuda: Module) -> None:
    assert cuda.code() == {*(("sm", number) for number in (75, 80, 86, 89, 90, 100, 120)), ("compute", 120)}


# -- in clean environments ---------------------------------------------------------------------------------------------------

RECORDING = """
import json, os, warnings
import torch
import torchprobe
from torchprobe.ops import kernels, new_state, observe_

assert not torch.cuda.is_initialized()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.ReLU(), torch.nn.Linear(300, 8))
error = 0.0
for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
    outputs = []
    model.to(device)[0].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach().double()))
    with torchprobe.record(model, ["0", "2"]) as rec:
        for _ in range(3):
            model(torch.randn(64, 16, device=device))
    x = torch.cat(outputs)
    d = x - x.mean(-1, keepdim=True)
    expected = (d.pow(4).mean(-1) / d.square().mean(-1).square()).mean().item()
    error = max(error, abs(rec["0"].vector_kurtosis / expected - 1))
    assert rec["0"].vectors == 192

# Where the CUDA kernels cannot run, the call runs the reference. No tensor is on such a device here, so the test names the dispatch key.
fallback = None
if kernels()["cuda"].startswith("not used"):
    key, x, mask = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.randn(6, 7, 5), torch.rand(6, 14)[:, ::2] < 0.5
    state, expected = new_state(5), new_state(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.ops.torchprobe.observe_.default.redispatch(key, state, x, -1, 6.0, 1, mask)
            torch.ops.torchprobe.observe_reference_(expected, x, -1, 6.0, 1, mask)
    assert torch.equal(state, expected) and state[0] == 2 and state[1] == 2 * mask.sum()
    fallback = [str(warning.message) for warning in caught]

covered = None
if torch.version.cuda and not kernels()["cuda"].startswith("not built"):
    from torchprobe import _C_cuda
    covered = [n / 10 for n in range(50, 140) if _C_cuda.covers(*divmod(n, 10))]

print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "devices": torch.cuda.device_count(), "error": error,
                  "file": torchprobe.__file__, "kernels": kernels(), "fallback": fallback, "covered": covered}))
"""


@dataclass(frozen=True)
class Environment:
    """A separate environment, with pip."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *arguments: object) -> str:
        """Installs something; returns the error messages, or an empty text."""
        options = ["--disable-pip-version-check", "--quiet", "--only-binary=:all:", "--no-compile"]  # little of it is ever imported
        command = [self.python, "-m", "pip", "install", *options, *arguments]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1200)
        return result.stdout + result.stderr if result.returncode else ""

    def version(self, requirement: str) -> str:
        """The version that pip would install for a requirement; empty if there is none."""
        options = ["--quiet", "--dry-run", "--no-deps", "--only-binary=:all:", "--report=-"]
        result = subprocess.run([self.python, "-m", "pip", "install", *options, requirement], capture_output=True, text=True, timeout=300)
        return "" if result.returncode else str(json.loads(result.stdout)["install"][0]["metadata"]["version"])

    def record(self, wheel: Path, *options: str) -> dict[str, object]:
        """Installs the wheel and runs a recording outside the sources."""
        assert self.pip(*options, wheel) == ""
        result = subprocess.run([self.python, "-I", "-c", RECORDING], cwd=self.folder, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        (line,) = result.stdout.splitlines()
        return json.loads(line)


def check(result: dict[str, object], environment: Environment, with_cuda: bool) -> None:
    assert str(result["file"]).startswith(str(environment.folder))
    assert isinstance(result["error"], float)
    assert result["error"] < 1e-5
    kernels = result["kernels"]
    assert isinstance(kernels, dict)
    assert kernels["cpu"].startswith("loaded: ")
    assert "\n" not in kernels["cuda"]
    if not with_cuda:
        assert kernels["cuda"].startswith("not built: ")
    elif not result["cuda"]:
        assert kernels["cuda"] == f"not loaded: torch {result['torch']} is a build without CUDA"
    else:
        assert result["covered"] == [n / 10 for n in (*range(75, 110), *range(120, 140))]  # 11.x is code for neither 10.x nor 12.0
    if result["fallback"] is not None:
        reason = kernels["cuda"].removeprefix("not used: ")
        assert reason
        assert result["fallback"] == [f"torchprobe: cuda:-1 uses the PyTorch reference instead of the CUDA kernel: {reason}"]
    assert (result["fallback"] is None) == (bool(result["devices"]) or not with_cuda or not result["cuda"])


def test_runs_with_an_old_torch(built: Build, modules: dict[str, Module]) -> None:
    with tempfile.TemporaryDirectory(prefix="torchprobe-") as name:  # several GB: not one of the folders that pytest keeps
        venv.create(name, with_pip=True)
        environment = Environment(Path(name))
        for version in OLD:
            if not (obstacle := environment.pip(f"torch=={version}")):
                break
        else:
            pytest.skip(f"pip installs none of torch {', '.join(OLD)}: {obstacle}")
        result = environment.record(built.wheel)
        assert str(result["torch"]).startswith(version)
        check(result, environment, "_C_cuda" in modules)


def test_runs_with_a_torch_without_cuda(built: Build, modules: dict[str, Module]) -> None:
    with tempfile.TemporaryDirectory(prefix="torchprobe-") as name:
        venv.create(name, with_pip=True)
        environment = Environment(Path(name))
        version = next((found for version in reversed(OLD) if (found := environment.version(f"torch=={version}")).endswith("+cpu")), None)
        if version is None:
            pytest.skip(f"pip is offered none of torch {', '.join(OLD)} as a build without CUDA")
        assert environment.pip(f"torch=={version}") == ""
        result = environment.record(built.wheel)
        assert result["torch"] == version
        check(result, environment, "_C_cuda" in modules)


def test_runs_with_the_newest_torch(tmp_path: Path, built: Build, modules: dict[str, Module]) -> None:
    """The newest is what the tests themselves run with. To save the time of installing it again, the environment sees it, and what else
    torchprobe needs, through a .pth file; torchprobe itself comes from the wheel."""
    venv.create(tmp_path / "env", with_pip=True)
    environment = Environment(tmp_path / "env")
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (own / "shared.pth").write_text("\n".join(site.getsitepackages()))
    result = environment.record(built.wheel, "--no-deps")
    assert result["torch"] == torch.__version__
    check(result, environment, "_C_cuda" in modules)
