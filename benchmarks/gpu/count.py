"""``python -m benchmarks.gpu.count``: instructions of the CUDA kernels for each element, counted in their machine code. It needs no GPU.

A multiprocessor issues four instructions of 32 lanes in a cycle, so at the speed of a copy there is time for a number of them that follows
from its clock and from the bandwidth (``docs/performance.md``). The kernels are compiled for compute capability 9.0 and disassembled. Each
loop over elements has a fast form, which holds no rare path; rare paths are called, or lie in other loops. Its instructions are counted,
those of calls that are made once for several warps too, and divided by the elements that a lane has in a turn.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.results import table

CSRC = Path(__file__).parents[2] / "csrc"
TYPES = ("float32", "bfloat16")
TURN = 64  # elements of a lane in a turn: FLUSH steps of COLUMNS (csrc/cuda/plan.h)
LIMIT = 17.5
COPIES = ("LDGSTS",)  # what a loop over elements has, and no other
POWERS = ("FFMA",)


@dataclass(frozen=True)
class Count:
    """One kernel. ``plain``: instructions an element, powers about 0. ``moved``: about a shift or with a scale. ``masked``: with a mask."""

    dtype: str
    layout: str
    plain: float
    moved: float
    masked: float
    registers: int
    spilled: int


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit; triton brings those that disassemble."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which(name, path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


def compile_kernels(dtype: str, folder: Path, architecture: int = 90) -> tuple[Path, str]:
    """The machine code for 9.0, or for another compute capability, and the messages of the assembler."""
    cubin = folder / f"{dtype}.cubin"
    command = ["nvcc", f"-arch=sm_{architecture}", "-cubin", "-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-Xptxas=-v"]
    done = subprocess.run([*command, str(CSRC / "cuda" / f"observe_{dtype}.cu"), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return cubin, done.stderr


def functions(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Name → (address, instruction) of every kernel."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        raise RuntimeError("no disassembler: cuobjdump is neither in the PATH nor in the package triton")
    text = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        if name := re.search(r"Function : (.+)$", line):
            current = found.setdefault(name[1], [])
        elif instruction := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;\s*/\*", line):
            current.append((int(instruction[1], 16), instruction[2]))
    return found


def loops(instructions: list[tuple[int, str]]) -> list[collections.Counter[str]]:
    """Instructions by name of every loop over elements that has no other loop inside."""
    spans = []
    for address, text in instructions:
        back = re.search(r"BRA(?:\.\w+)* (?:!?U?P\w+, )?(0x[0-9a-f]+)", text)
        if back and int(back[1], 16) < address:
            spans.append((int(back[1], 16), address))
    innermost = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    counts = (collections.Counter(_name(text) for address, text in instructions if begin <= address <= end) for begin, end in innermost)
    return [count for count in counts if any(count[name] for name in COPIES) and any(count[name] >= TURN for name in POWERS)]


def count(dtype: str) -> list[Count]:
    """The two kernels of a type that copy 16 bytes at a time."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, messages = compile_kernels(dtype, Path(folder))
        code = functions(cubin)
    found = []
    for layout in ("rows", "channels"):
        pack = 4 if dtype == "float32" else 8
        (name,) = [name for name in code if f"read_{layout}" in name and f"Li{pack}E" in name]
        # In this order: about 0, about a shift or with a scale, and in channels with a mask.
        plain, moved, masked = [*sorted(loop.total() / TURN for loop in loops(code[name])), 0.0][:3]
        used = re.search(rf"{name}\n.*?(\d+) bytes spill stores.*\n.*?Used (\d+) registers", messages)
        assert used, f"ptxas said nothing of {name}"
        found.append(Count(dtype, layout, plain, moved, masked or moved, int(used[2]), int(used[1])))
    return found


def markdown(counts: list[Count]) -> str:
    """The table of docs/performance.md."""
    head = ["", "powers about 0", "about a shift, or with a scale", "with a mask", "registers"]
    rows = [[f"{c.dtype}, {c.layout}", *(f"{slots:.1f}" for slots in (c.plain, c.moved, c.masked)), str(c.registers)] for c in counts]
    return table(head, rows, right=range(1, len(head)))


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


if __name__ == "__main__":
    print(markdown([each for dtype in TYPES for each in count(dtype)]))
