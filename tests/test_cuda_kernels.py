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
    "vector": (lambda: (torch.randn(700, 256), -1), {"access": "vector", "wide": 0, "groups": 10}),
    "one tile": (lambda: (torch.randn(3, 768), -1), {"access": "vector", "tiles": 1}),
    "one group": (lambda: (torch.randn(30, 2560), -1), {"access": "vector", "wide": 0, "groups": 1}),
    "wide, vector": (lambda: (torch.randn(40, 5000), -1), {"access": "vector", "wide": 1}),
    "wide, scalar": (lambda: (torch.randn(40, 4999), -1), {"access": "scalar", "wide": 1}),
    "scalar": (lambda: (torch.randn(300, 131), -1), {"access": "scalar", "wide": 0}),
    "scalar, strided": (lambda: (torch.randn(300, 262)[:, ::2], -1), {"access": "scalar", "wide": 0}),
    "staged": (lambda: (torch.randn(4, 66, 13, 12), 1), {"access": "staged", "wide": 0}),
    "staged, odd positions": (lambda: (torch.randn(5, 40, 7, 7), 1), {"access": "staged", "wide": 0}),
    "staged, one position over": (lambda: (torch.randn(3, 12, 129), 1), {"access": "staged", "wide": 0}),
    "many tiles": (lambda: (torch.randn(30_000, 8), -1), {"access": "vector", "wide": 0}),
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


@watched
@pytest.mark.parametrize(("shared_kb", "stages", "rounds"), [(227, 2, 3), (99, 3, 1), (80, 2, 1), (60, 1, 1)])
def test_less_shared_memory_means_less_on_its_way(shared_kb: int, stages: int, rounds: int) -> None:
    x = torch.randn(400, 1536)
    plan = cuda_shim.plan(x, shared_bytes=shared_kb << 10)
    assert (plan["stages"], plan["rounds"]) == (stages, rounds)
    assert_close(observed(x, shared_bytes=shared_kb << 10), x)
    y = torch.randn(2, 300, 20, 10)
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
    plan = cuda_shim.plan(torch.randn(1, features).expand(1 << 36, features), multiprocessors=132)
    assert 0 < plan["tiles"] * plan["slabs"] < 1 << 31  # the largest grid
    assert 0 < plan["tile_vectors"] <= 512 * plan["groups"]


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


@watched
@pytest.mark.parametrize("index", range(16))
def test_the_order_of_threads_and_blocks_changes_nothing(index: int) -> None:
    name, x, dim, mask = list(hostile())[index]
    states = [observed(x, dim, mask, order=order).state for order in (0, 1, 2, 3, 4)]
    assert all(torch.equal(states[0], state) for state in states[1:]), name


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


# -- mutants ---------------------------------------------------------------------------------------------------------------------

MUTANTS = {
    "a dropped barrier: vectors are added up before all threads have written": (
        "tile.cuh",
        "    __syncthreads();\n    over_features<double, false>",
        "    over_features<double, false>",
    ),
    "a dropped barrier: the mean is used before it is there": (
        "tile.cuh",
        "    look_up(table);\n    __syncthreads();\n\n    if (group",
        "    look_up(table);\n\n    if (group",
    ),
    "a dropped barrier: what other threads fetched": ("tile.cuh", "if (A == Access::Staged) __syncthreads();  // what others fetched", ""),
    "a missing wait: a step is read before it has arrived": ("tile.cuh", "__pipeline_wait_prior(1)", "__pipeline_wait_prior(2)"),
    "a table that is written over while it is in use": (
        "steps.cuh",
        "t.table == plan.stages ? 0",
        "t.table + 1 == plan.stages ? 0",
    ),
    "a wrong lane in the sum over a warp": (
        "values.cuh",
        "x += __shfl_xor_sync(ALL_LANES, x, m);",
        "x += __shfl_xor_sync(ALL_LANES, x, m / 2);",
    ),
    "a wrong lane in the sum over features": (
        "tile.cuh",
        "a += __shfl_xor_sync(ALL_LANES, a, m);",
        "a += __shfl_xor_sync(ALL_LANES, a, 1);",
    ),
    "one vector too many at the end": (
        "steps.cuh",
        "if (at < vectors && kept(first_vector + at))",
        "if (at <= vectors && kept(first_vector + at))",
    ),
    "one vector too few at the end": (
        "steps.cuh",
        "if (at < vectors && kept(first_vector + at))",
        "if (at + 1 < vectors && kept(first_vector + at))",
    ),
    "features beyond the last": ("steps.cuh", "column(i) < features); }", "column(i) <= features); }"),
    "a missing merge of groups": ("tile.cuh", "left > 1; left = (left + 1) / 2", "left > 2; left = (left + 1) / 2"),
    "a missing merge of tiles": ("merge.cuh", "for (int half = MERGE_PARTS / 2;", "for (int half = MERGE_PARTS / 4;"),
    "a missing merge of vectors": ("kernels.cuh", "left > 1; left = (left + 1) / 2", "left > 2; left = (left + 1) / 2"),
    "a term missing in the merge": ("merge.cuh", "4 * delta * (wa * b.m3 - wb * a.m3)", "3 * delta * (wa * b.m3 - wb * a.m3)"),
    "irregular vectors left out": ("tile.cuh", "(verdict[v] == IRREGULAR)", "(verdict[v] == IRREGULAR && false)"),
    "features never summed up again": ("tile.cuh", "if (__syncthreads_or(again)) {", "if (__syncthreads_or(again) > 1) {"),
    "outliers only where they are many": ("plan.cpp", "0.999 * sigma", "99.9 * sigma"),
    "shared memory that is too small": ("plan.cpp", "take(p.mean, int64_t(8) * vectors)", "take(p.mean, int64_t(4) * vectors)"),
    "shared memory that nobody asked for": ("observe.cu", "if (shared_bytes > 48 << 10)", "if (shared_bytes > 480 << 10)"),
    "memory that is not aligned, read as if it were": ("plan.cpp", " || reinterpret_cast<uintptr_t>(call.x) % 16) return", ") return"),
    "partial sums that are not aligned, read as if they were": ("plan.cpp", "p.across < NEIGHBOURS ? p.across | 1", "true ? p.across | 1"),
    "a race that changes no result": ("tile.cuh", "    __syncthreads();\n    return value;", "    return value;"),
    "the extremes of the feature beside it": ("features.cuh", "return i % 2 ? second : first;", "return i % 2 ? first : second;"),
    "the extremes of one of two features": ("features.cuh", "i % 2 ? Pair<S>::of(other, mine)", "i % 2 ? Pair<S>::of(mine, other)"),
    "outliers that nobody looks for": ("tile.cuh", "return verdict == IRREGULAR || largest > threshold;", "return verdict == IRREGULAR;"),
    "a workspace that is too small": ("plan.cpp", "p.summaries * int64_t(sizeof(Summary))", "p.summaries * int64_t(sizeof(Summary)) - 512"),
}


def failures(csrc: Path) -> Iterator[str]:
    """What the kernels in ``csrc`` get wrong."""
    torch.manual_seed(0)
    for name, x, dim, mask in hostile():
        for order, multiprocessors in ((0, 3), (1, 1), (2, 2)):
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
