"""The CUDA compiler accepts the CUDA sources for every architecture, without spills, and with no warnings except those listed here.

The kernels are compiled once, for the wheel; these tests read the messages of the compilers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from wheels import Build

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
ACCEPTED = {  # part of a warning → why it is harmless
    "spilled to local memory in function '_ZN10torchprobe4cuda9read_rowsI": "on 7.5, two values of bfloat16 are stored before the walk "
    "and loaded after it",
    "Local memory used for function": "frames of the calls into the slow paths and the merge; the loops over elements touch none of it",
}
MOST_SPILLED = 8  # bytes that a thread of an accepted kernel may store, and may load
SPILL = re.compile(r"(\d+) bytes spill (?:stores|loads)")
# Warnings of the tools, and of the compilers about our own sources; PyTorch also has a folder csrc.
WARNING = re.compile(r"^.*(?:ptxas|nvcc|cicc|nvlink|fatbinary) warning.*$|^.*(?<!torch/)\bcsrc/\S+[:(]\d+.*\bwarning\b.*$", re.MULTILINE)

pytestmark = [
    pytest.mark.slow("compiles the wheel"),
    pytest.mark.skipif(not torch.version.cuda, reason=f"torch {torch.__version__} is a build without CUDA"),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler (nvcc is not in PATH)"),
]


def test_compiled_for_every_architecture(built: Build) -> None:
    for source in sorted((Path(__file__).parents[1] / "csrc/cuda").glob("*.cu")):
        (command,) = [line for line in built.log.splitlines() if f"{source.name} -o " in line and "nvcc" in line]
        assert {int(number) for number in re.findall(r"code=sm_(\d+)", command)} == set(ARCHITECTURES)
        assert re.findall(r"code=compute_(\d+)", command) == [str(ARCHITECTURES[-1])]
        assert "-Xptxas=-warn-spills,-warn-lmem-usage" in command
        assert "fast" not in command.partition(" -o ")[2]  # no fast mathematics


def test_no_spills_and_no_warnings(built: Build) -> None:
    warnings = {warning for warning in WARNING.findall(built.log) if not any(name in warning for name in ACCEPTED)}
    assert not warnings, "\n".join(sorted(warnings))
    sizes = [int(size) for warning in WARNING.findall(built.log) for size in SPILL.findall(warning)]
    assert sizes and max(sizes) <= MOST_SPILLED


def test_every_accepted_warning_still_occurs(built: Build) -> None:
    found = WARNING.findall(built.log)
    assert [name for name in ACCEPTED if not any(name in warning for warning in found)] == []


def test_whose_warnings_count() -> None:
    ours = "/tmp/x/csrc/cuda/plan.cpp:12:3: warning: unused variable"
    theirs = "/lib/torch/include/torch/csrc/stable/stableivalue_conversions.h:220:22: warning: unused parameter"
    assert WARNING.findall(f"{ours}\n{theirs}\n") == [ours]


def test_spills_and_warnings_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "spill.cu"
    source.write_text("""
__global__ void spill(float* x) {
  int unused;
  float a[64], sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) sum += a[i] = x[i];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = a[i] * sum;
}
""")
    flags = ["-arch=sm_80", "-maxrregcount=24", "-Xptxas=-warn-spills", "--display-error-number", "-c", source, "-o", tmp_path / "spill.o"]
    result = subprocess.run(["nvcc", *flags], capture_output=True, text=True, check=True, timeout=300)
    found = "\n".join(WARNING.findall(result.stdout + result.stderr))
    assert "spill stores" in found
    assert "#177-D" in found
