"""The source of the CUDA kernels, run on the host: every cut of a call, any order of threads, no races, nothing misaligned, and
mutants that must not go unnoticed.

tests/test_ops.py holds the same kernels against the oracle on every type, layout and hostile value.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_shim
import pytest
import torch
from oracle import assert_close
from torch import Tensor

from torchprobe import Moments

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
watched = pytest.mark.slow("the race detector watches every access of the kernels")
NAN = float("nan")


def observed(x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, sigma: float = 6.0, **device: object) -> Moments:
    m = Moments(x.shape[feature_dim], outlier_sigma=sigma)
    cuda_shim.observe(m.state, x, feature_dim, sigma, 1, mask, watched=True, **device)
    return m


# -- the cuts of a call ----------------------------------------------------------------------------------------------------------

CUTS: dict[str, tuple[Callable[[], tuple[Tensor, int]], dict[str, object]]] = {
    "rows": (lambda: (torch.randn(700, 256), -1), {"layout": "rows", "pack": 4, "across": 32}),
    "rows of 8 lanes": (lambda: (torch.randn(701, 64), -1), {"layout": "rows", "pack": 4, "across": 8}),
    "rows of 16 lanes": (lambda: (torch.randn(200, 384), -1), {"layout": "rows", "pack": 4, "across": 16}),
    "one vector": (lambda: (torch.randn(1, 768), -1), {"layout": "rows", "tiles": 1, "slabs": 3}),
    "few features": (lambda: (torch.randn(30_000, 8), -1), {"layout": "rows", "pack": 4, "across": 8}),
    "an end of a slab": (lambda: (torch.randn(90, 260), -1), {"layout": "rows", "pack": 4}),
    "wide": (lambda: (torch.randn(24, 5120), -1), {"layout": "rows", "pack": 4, "across": 32, "slabs": 20}),
    "very wide": (lambda: (torch.randn(9, 8192), -1), {"layout": "rows", "pack": 4, "slabs": 32}),
    "a vocabulary": (lambda: (torch.randn(2, 50_257), -1), {"layout": "rows", "pack": 1, "slabs": 197}),
    "wide, one by one": (lambda: (torch.randn(24, 4999), -1), {"layout": "rows", "pack": 1}),
    "rows, one by one": (lambda: (torch.randn(300, 131), -1), {"layout": "rows", "pack": 1}),
    "rows with gaps": (lambda: (torch.randn(300, 262)[:, ::2], -1), {"layout": "rows", "pack": 1}),
    "runs of rows": (lambda: (torch.randn(5, 40, 128)[:, 1:], -1), {"layout": "rows", "pack": 4}),
    "maps": (lambda: (torch.randn(4, 66, 28, 28), 1), {"layout": "channels", "pack": 4, "warps": 4}),
    "maps of 14 × 14": (lambda: (torch.randn(2, 40, 14, 14), 1), {"layout": "channels", "pack": 4}),
    "maps of 7 × 7": (lambda: (torch.randn(5, 40, 7, 7), 1), {"layout": "channels", "pack": 1}),
    "one position over": (lambda: (torch.randn(3, 12, 129), 1), {"layout": "channels", "pack": 1}),
    "many channels": (lambda: (torch.randn(1, 1100, 8), 1), {"layout": "channels", "warps": 1}),
}


@watched
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_of_a_call(name: str, dtype: torch.dtype) -> None:
    make, expected = CUTS[name]
    x, dim = make()
    x = (2 * x + 1).to(dtype) if x.is_contiguous() else x.to(dtype)
    if dtype == torch.float32:
        plan = cuda_shim.plan(x, dim)
        assert {key: plan[key] for key in expected} == expected
    assert_close(observed(x, dim), x, dim, rtol=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("dtype", "pack"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4)])
def test_maps_of_14_are_copied_by_four(dtype: torch.dtype, pack: int) -> None:
    assert cuda_shim.plan(torch.randn(2, 16, 14, 14).to(dtype), 1)["pack"] == pack


@watched
@pytest.mark.parametrize(("shared_kb", "warps"), [(227, 6), (60, 4), (48, 3)])
def test_less_shared_memory_means_fewer_warps(shared_kb: int, warps: int) -> None:
    x = torch.randn(400, 1536)
    assert cuda_shim.plan(x, shared_bytes=shared_kb << 10)["warps"] == warps
    assert_close(observed(x, shared_bytes=shared_kb << 10), x)
    y = torch.randn(2, 60, 20, 32)
    assert_close(observed(y, 1, shared_bytes=shared_kb << 10), y, 1)


@watched
@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_any_size_of_device(multiprocessors: int) -> None:
    x = torch.randn(5000, 48) * 3 + 10
    assert_close(observed(x, multiprocessors=multiprocessors), x)


@watched
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    far, values = (1 << 30) + 64, torch.randn(5, 48).bfloat16()
    sparse = tmp_path / "sparse"  # of its 10 GB next to nothing is there
    memory = torch.from_file(str(sparse), shared=True, size=5 * far, dtype=torch.bfloat16)
    for step in (1, 2):
        x = memory.as_strided((5, 48), (far, step))
        x.copy_(values)
        assert_close(observed(x), values)  # as vectors far apart
        assert_close(observed(x, 0), values, 0)  # as features far apart


@pytest.mark.parametrize("features", [8, 5000])
def test_a_call_of_any_length_is_one_launch(features: int) -> None:
    plan = cuda_shim.plan(torch.randn(1, features).expand((1 << 36) // features, features), multiprocessors=132)
    assert 0 < plan["tiles"] * plan["slabs"] < 1 << 31  # the largest grid
    assert 0 < plan["tile_vectors"] <= 512 * plan["warps"] * 32 // plan["across"]  # no lane sums up more than 512 in float32


# -- the order of threads --------------------------------------------------------------------------------------------------------


def hostile() -> Iterator[tuple[str, Tensor, int, Tensor | None]]:
    """Small calls that between them go through every path of the kernels."""
    x = torch.randn(420, 120)
    x[:, 9] *= 50
    x[7, 3], x[300], x[31] = NAN, float("inf"), 2.5
    x[100:140] *= 1e-9
    yield "rows", x, -1, None
    yield "rows, masked", x, -1, torch.rand(420) < 0.6
    yield "rows, scalar", x[:, 1:], -1, None
    y = torch.randn(3, 70, 11, 13)
    y[:, 5] *= 80
    y[1, 9, 3, 3], y[0, :, 2, 2] = NAN, 0.25
    yield "maps", y, 1, None
    yield "maps, cut", y[:, :, 1:, :-2], 1, torch.rand(3, 10, 11) < 0.8
    yield "bfloat16", torch.randn(300, 96).mul(3).bfloat16(), -1, None
    yield "maps of bfloat16", y.bfloat16(), 1, None
    yield "float64", torch.randn(100, 33, dtype=torch.float64), -1, None
    z = torch.randn(30, 5000)
    z[:, 77] *= 100
    z[3, 4000], z[5] = NAN, 1.0
    yield "wide", z, -1, None
    yield "one tile", torch.randn(2, 40), -1, None
    yield "wide of float16", z[:9].clamp(-1000, 1000).half(), -1, None
    yield "wide, not aligned", torch.randn(9 * 5000 + 1)[1:].view(9, 5000), -1, None
    yield "rows of 768", torch.randn(70, 768) + 2, -1, None
    yield "rows, not aligned", torch.randn(40 * 64 + 3).bfloat16()[3:].view(40, 64), -1, None
    yield "tails", torch.randn(1001, 28), -1, None
    yield "tails of float16", x[:301].half(), -1, None
    w = torch.randn(200, 768)
    w[:, ::100] *= 60  # eight strong features
    yield "strong features", w, -1, None
    yield "strong features, about a shift", (w[:60, :512] / 8 + 30).contiguous(), -1, torch.rand(60) < 0.9
    yield "maps about a shift", torch.randn(2, 24, 16, 16).exp() + 20, 1, None
    yield "large maps", torch.randn(1, 9, 8, 160) * 1e6, 1, None
    yield "rows of every length", (torch.randn(130, 264) * torch.logspace(-3, 3, 130)[:, None]).bfloat16(), -1, None


@watched
@pytest.mark.parametrize("index", range(21))
def test_the_order_of_threads_and_blocks_changes_nothing(index: int) -> None:
    name, x, dim, mask = list(hostile())[index]
    states = [observed(x, dim, mask, order=order).state for order in (0, 1, 2, 3, 4)]
    assert all(torch.equal(states[0], state) for state in states[1:]), name


# -- samples that mislead ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.45, -3.0, 1000.0])
@pytest.mark.parametrize("values", ["two", "normal", "heavy"])
def test_samples_that_mislead(values: str, offset: float) -> None:
    """Shifts and scales come from vectors at fixed places; there, every value is an outlier."""
    x = {"two": torch.randint(0, 2, (640, 64)) * 2.0 - 1, "normal": torch.randn(640, 64), "heavy": torch.randn(640, 64).exp()}[
        values
    ] + offset
    x += 1e-3 * torch.randn(640, 64)
    tile = cuda_shim.plan(x)["tile_vectors"]
    for first in range(0, 640, tile):
        rows = min(tile, 640 - first)
        for sample in range(32):
            x[first + rows * sample // 32] += 30 if sample % 4 else -30
    for y, dim in ((x, -1), (x.T.contiguous()[None], 1)):
        m = Moments(64)
        cuda_shim.observe(m.state, y, dim)
        assert_close(m, y, dim)


def test_a_shift_that_all_samples_agree_on_but_few_values() -> None:
    """Twenty standard deviations from the mean: without the check, the variance is wrong by 4e-5."""
    x = torch.randn(12_288, 8)
    tile = cuda_shim.plan(x, multiprocessors=1)["tile_vectors"]
    for first in range(0, len(x), tile):
        for sample in range(32):
            x[first + min(tile, len(x) - first) * sample // 32] += 1000
    m = Moments(8)
    cuda_shim.observe(m.state, x, multiprocessors=1)
    assert_close(m, x)


# -- calls -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 500])
def test_calls_are_counted_on_the_device(rows: int) -> None:
    parts = torch.randn(7, rows, 16)
    m = Moments(16)
    for part in parts:
        cuda_shim.observe(m.state, part, every=3)
    assert m.calls == 7
    assert_close(m, parts[[0, 3, 6]].reshape(-1, 16))


def test_a_state_goes_on_where_it_was() -> None:
    x = torch.randn(900, 40) * torch.linspace(1, 9, 900)[:, None] + 3
    m = Moments(40)
    for part in x.split([1, 2, 497, 400]):
        cuda_shim.observe(m.state, part)
    assert_close(m, x)


def test_no_memory_for_the_workspace_is_what_pytorch_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = re.search(r'"(torchprobe: no memory for) "', (cuda_shim.CSRC / "cuda" / "binding.cpp").read_text())
    assert said

    def fails(*_: object) -> None:
        raise RuntimeError(f"{said[1]} 4096 bytes of workspace on cuda:0")

    monkeypatch.setattr(torch.ops.torchprobe, "observe_", fails)
    with pytest.raises(torch.OutOfMemoryError, match="4096 bytes of workspace"):
        Moments(4).update(torch.randn(3, 4))


# -- mutants ---------------------------------------------------------------------------------------------------------------------

MUTANTS = {
    "a dropped barrier: a warp adds up what its lanes have not yet written": (
        "rows.cuh",
        "  __device__ void flush(int step) {\n    __syncwarp();",
        "  __device__ void flush(int step) {",
    ),
    "a dropped barrier: a lane writes over what others have not yet added up": (
        "rows.cuh",
        "[out + step * groups] = note;\n    }\n    __syncwarp();",
        "[out + step * groups] = note;\n    }",
    ),
    "a dropped barrier: channels are added up before all lanes have written": (
        "channels.cuh",
        "  __device__ void flush(int channels) {\n    __syncwarp();",
        "  __device__ void flush(int channels) {",
    ),
    "a dropped barrier: a turn begins before its shifts are there": (
        "channels.cuh",
        "marks_to += FLUSH;\n    __syncthreads();",
        "marks_to += FLUSH;",
    ),
    "a dropped barrier: the block adds up before all warps are done": (
        "rows.cuh",
        "= taken;\n    __syncthreads();\n",
        "= taken;\n",
    ),
    "a dropped barrier: a race that changes no result": (
        "rows.cuh",
        "    __pipeline_wait_prior(0);\n    __syncwarp();\n",
        "    __pipeline_wait_prior(0);\n",
    ),
    "a dropped fence: the last block reads what others may not have written": (
        "merge.cuh",
        "= mine;\n    __threadfence();",
        "= mine;",
    ),
    "a missing wait: a batch is read before it has arrived": (
        "walk.cuh",
        "__pipeline_wait_prior(STAGES - 1)",
        "__pipeline_wait_prior(STAGES)",
    ),
    "a batch that is written over while it is in use": ("walk.cuh", "here = other, other = before;", "here = other;"),
    "a wrong lane in the sum over a warp": (
        "values.cuh",
        "x += other_lane(x, m);",
        "x += other_lane(x, m / 2);",
    ),
    "a wrong lane in the sums of a row": ("rows.cuh", "add_lane(all, m), quiet", "add_lane(all, 8), quiet"),
    "a wrong lane in the sums of a channel": ("channels.cuh", "all.add_lane(m);", "all.add_lane(8);"),
    "one vector too many at the end": ("rows.cuh", "row < view.vectors)\n        bits", "row <= view.vectors)\n        bits"),
    "one vector too few at the end": ("rows.cuh", "row < view.vectors)\n        bits", "row + 1 < view.vectors)\n        bits"),
    "one position too many at the end": (
        "channels.cuh",
        "unsigned(vector(i) < vectors && (!call.mask",
        "unsigned(vector(i) <= vectors && (!call.mask",
    ),
    "features beyond the last": ("rows.cuh", "column(place, k * N) < features; }", "column(place, k * N) <= features; }"),
    "a missing merge of warps": ("totals.cuh", "w < share.plan.warps; ++w)", "w + 1 < share.plan.warps; ++w)"),
    "a missing merge of rows side by side": (
        "rows.cuh",
        "for (int m = across; m < 32; m *= 2) {",
        "for (int m = across; m < 16; m *= 2) {",
    ),
    "a missing merge of tiles": ("merge.cuh", "(part + 1) * plan.tiles / PARTS, j)", "part * plan.tiles / PARTS, j)"),
    "a missing merge of threads": ("merge.cuh", "for (int half = MERGE_THREADS / 2;", "for (int half = MERGE_THREADS / 4;"),
    "a dropped barrier: threads merge what others have not yet written": (
        "merge.cuh",
        "    __syncthreads();\n    if (int(threadIdx.x) < half)",
        "    if (int(threadIdx.x) < half)",
    ),
    "a term missing in the merge": ("merge.cuh", "4 * delta * (wa * b.m3 - wb * a.m3)", "3 * delta * (wa * b.m3 - wb * a.m3)"),
    "irregular vectors left out": ("judge.cuh", "__ballot_sync(ALL_LANES, irregular)", "__ballot_sync(ALL_LANES, irregular && false)"),
    "features never summed up again": ("totals.cuh", "__ballot_sync(ALL_LANES, again)", "__ballot_sync(ALL_LANES, again && false)"),
    "a dropped barrier: what is computed again is written over": (
        "totals.cuh",
        "  __syncwarp();\n  for (unsigned rest",
        "  for (unsigned rest",
    ),
    "outliers of the lane beside it, in rows": (
        "rows.cuh",
        "found |= 1u << (share * 8 % across + k);",
        "found |= 1u << (share * 8 % across + (k ^ 1));",
    ),
    "outliers that nobody looks for in rows": ("rows.cuh", "Note<T> note{bound, 0};", "Note<T> note{T(0), 0};\n    quiet = INFINITY;"),
    "outliers that nobody looks for in maps": (
        "channels.cuh",
        "beyond(all.low, all.high, unit.scale, base, lowest_limit)",
        "beyond(all.low, all.high, unit.scale, base, 1e9f * lowest_limit)",
    ),
    "outliers of the lane beside it, in maps": (
        "judge.cuh",
        "% plan.warp_vectors / plan.pack % 32)",
        "% plan.warp_vectors / plan.pack % 32 ^ 1)",
    ),
    "outliers counted once for all lanes": ("judge.cuh", "double(__popc(same))", "1.0"),
    "shared memory that is too small": ("plan.cpp", "FLUSH * pitch_of(p.layout) * 4", "FLUSH * (pitch_of(p.layout) - 1) * 4"),
    "shared memory that nobody asked for": ("plan.cpp", "if (shared_bytes > 48 << 10 &&", "if (shared_bytes > 480 << 10 &&"),
    "memory that is not aligned, read as if it were": (
        "plan.cpp",
        "if (reinterpret_cast<uintptr_t>(call.x) % size_t(pack * element_size(call.dtype))) return false;",
        "",
    ),
    "the extremes of one of two elements": ("values.cuh", "high = larger(high, other_high);", "other_high = high;"),
    "a workspace that is too small": ("plan.cpp", "p.slabs * vectors * 4 * compute", "p.slabs * vectors * 4 * compute - 512"),
}


def failures(csrc: Path) -> Iterator[str]:
    """What the kernels in ``csrc`` get wrong. Most mutants are caught in the first order of threads, so it comes first for all calls."""
    torch.manual_seed(0)
    calls = list(hostile())
    for order, multiprocessors in ((0, 3), (1, 1), (2, 2)):
        for name, x, dim, mask in calls:
            if error := failure(x, dim, mask, order=order, multiprocessors=multiprocessors, csrc=csrc):
                yield f"{name}, order {order}: {error}"


def failure(x: Tensor, dim: int, mask: Tensor | None, **device: object) -> str | None:
    try:
        assert_close(observed(x, dim, mask, **device), x, dim, mask, rtol=1e-10 if x.dtype == torch.float64 else 1e-5)
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return None


@watched
def test_the_kernels_as_they_are_pass() -> None:
    assert list(failures(cuda_shim.CSRC)) == []


def try_mutant(csrc: Path) -> str:
    """What is found wrong with the kernels in ``csrc`` first, by a process of its own, as a mutant may crash."""
    code = "import sys, pathlib, test_cuda_kernels as t; print(next(t.failures(pathlib.Path(sys.argv[1])), ''))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code, str(csrc)], env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout.strip() or (f"exit {done.returncode}: {done.stderr}" if done.returncode else "")


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """All mutants at work, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {}
        for name, (file, old, new) in MUTANTS.items():
            csrc = tmp_path_factory.mktemp("mutant") / "csrc"
            shutil.copytree(cuda_shim.CSRC, csrc)
            text = (csrc / "cuda" / file).read_text()
            assert text.count(old) == 1, f"{name}: has lost its place in {file}"
            (csrc / "cuda" / file).write_text(text.replace(old, new))
            running[name] = pool.submit(try_mutant, csrc)
        yield running


@pytest.mark.slow("compiles the kernels once for each mutant")
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name: str, mutants: dict[str, Future[str]]) -> None:
    found = mutants[name].result()
    assert found
    assert "error:" not in found, "the mutant does not compile"


def test_kernels_do_not_ask_where_they_run() -> None:
    for path in [*(cuda_shim.CSRC / "cuda").glob("*.cu*"), cuda_shim.CSRC / "cuda" / "plan.h", cuda_shim.CSRC / "cuda" / "plan.cpp"]:
        assert not re.search(r"#\s*(if|ifdef|ifndef|elif)\b", path.read_text()), path.name
