"""The instructions of the CUDA kernels for each element, counted in their machine code for compute capability 9.0, and what a warp takes.

At the speed of a copy, an H200 has time for 15.6 instructions for each element of 16 bits, and for twice as many in float32."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import cuda_shim
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package

from benchmarks.gpu import count

REGISTERS, SHARED = 64 << 10, 228 << 10  # of a multiprocessor
WARPS = 12  # of a multiprocessor: three for each of its schedulers

pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler (nvcc is not in PATH)"),
    pytest.mark.skipif(not count.tool("cuobjdump"), reason="no disassembler (cuobjdump is neither in PATH nor in the package triton)"),
]


@pytest.fixture(scope="module")
def counts() -> list[count.Count]:
    return [each for dtype in count.TYPES for each in count.count(dtype)]


@pytest.mark.slow("compiles the kernels for 9.0")
def test_instructions_registers_and_the_table(counts: list[count.Count]) -> None:
    assert {(c.dtype, c.layout) for c in counts} == {(d, layout) for d in ("float32", "bfloat16") for layout in ("rows", "channels")}
    for c in counts:
        assert 13 < c.plain <= count.LIMIT, c  # 12 are arithmetic; fewer than 13 would be another loop
        assert c.plain < c.moved <= c.plain + 2, c
        assert c.spilled == 0, c
        assert c.registers * 32 * WARPS <= REGISTERS, c
    assert count.markdown(counts) in (Path(__file__).parents[1] / "docs" / "performance.md").read_text()


@pytest.mark.slow("compiles the kernels for 12.0")
@pytest.mark.parametrize("dtype", count.TYPES)
def test_loops_touch_no_spilled_value(dtype: str, tmp_path: Path) -> None:
    """On 12.0, where loops have the fewest registers to spare."""
    code = count.functions(count.compile_kernels(dtype, tmp_path, 120)[0])
    found = {name: count.loops(instructions) for name, instructions in code.items() if "read_" in name}
    wide = [loops for name, loops in found.items() if f"Li{4 if dtype == 'float32' else 8}E" in name]
    assert len(wide) == 2 and all(wide)
    assert [loop for loops in found.values() for loop in loops if loop["LDL"] or loop["STL"]] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim", "blocks"), [((4096, 768), -1, 2), ((16, 64, 32, 32), 1, 3)])
def test_shared_memory_leaves_room_for_all_warps(shape: tuple[int, ...], dim: int, blocks: int, dtype: torch.dtype) -> None:
    plan = cuda_shim.plan(torch.randn(shape).to(dtype), dim)
    assert plan["warps"] * blocks == WARPS
    assert blocks * (plan["shared_bytes"] + 1024) <= SHARED
