"""The page of the benchmarks: ratios of one run, slopes, and whether the machine was quiet."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

for name in ("PIL", "jinja2", "matplotlib"):
    pytest.importorskip(name)

from benchmarks import growth, page, quiet  # noqa: E402
from benchmarks.growth import GROWTHS, Growth  # noqa: E402
from benchmarks.timing import Timing  # noqa: E402

SIZES = {
    "features": {"sizes": (8, 16), "vectors": 4}, "images": {"sizes": (1, 2), "units": 4}, "units": {"sizes": (4, 8), "images": 2},
    "concepts": {"sizes": (3, 6), "images": 200, "units": 2}, "layers": {"sizes": (1, 2), "features": 8},
    "threads": {"sizes": (1,), "shape": (8, 8)},
}  # fmt: skip


# -- growth ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", SIZES)
def test_every_axis_is_measured(axis):
    found = GROWTHS[axis](0.0, **SIZES[axis])
    assert found.axis == axis and list(found.sizes) == list(SIZES[axis]["sizes"]) and not found.missing
    assert all(second > 0 for second in found.seconds)
    assert (found.slope is None) == (len(found.sizes) == 1)
    assert json.loads(json.dumps(found.as_json()))["expected"] == (-1 if axis == "threads" else 1)
    assert axis in str(found)


@pytest.mark.slow("starts processes")
def test_ranks_are_measured():
    found = growth.ranks(0.0, (1, 2), rows=256)
    assert not found.missing and len(found.timings) == 2 and all(second > 0 for second in found.seconds)


def test_the_slope_is_that_of_least_squares():
    def of(*seconds: float, sizes=(1, 10, 100)) -> Growth:
        return Growth("x", "work", sizes, [Timing((second, 9 * second)) for second in seconds], 1.0)

    assert of(2, 20, 200).slope == pytest.approx(1) and of(8, 0.8, 0.08).slope == pytest.approx(-1)
    assert of(1, 1, 1).slope == 0
    # y = 0, 0, 1 over x = 0, 1, 2 in powers of ten: slope Σ(x − 1)(y − 1/3) / 2 = 1/2
    assert of(1, 1, 10).slope == pytest.approx(0.5) and of(1, 1, 10).last == pytest.approx(1)
    assert of(1, sizes=(4,)).slope is None and of(1, sizes=(4,)).last is None
    assert "one size only" in str(of(1, sizes=(4,)))


# -- a quiet machine ---------------------------------------------------------------------------------------------------------


def look(load: float | None = 0.0, spread: float = 0.0, waited: float = 0.0, seconds: float = 1.0) -> quiet.Look:
    return quiet.Look(load, spread, waited, seconds)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (look(), look(load=3.0), None),  # the run itself
        (look(load=None), look(), None),
        (look(load=0.3), look(), "before: the load average is 0.30 for each core"),
        (look(spread=0.2), look(), "before: a loop of fixed work varies by 20%"),
        (look(), look(spread=0.2), "after: a loop of fixed work varies by 20%"),
        (look(), look(spread=64.0), "after: a loop of fixed work varies by a factor of 65"),
        (look(), look(waited=0.5), "after: it waited for a core 50% of the time"),
        (look(), look(seconds=1.3), "took 30% more at one end of the run"),
    ],
)
def test_what_is_not_quiet_is_said(before, after, problem):
    found = quiet.verdict(before, after)
    assert found["quiet"] == (problem is None)
    assert (quiet.sentence(found) == "The machine was quiet.") if problem is None else (problem in quiet.sentence(found))
    assert json.loads(json.dumps(found)) == found


def test_a_busy_core_is_noticed():
    found = quiet.look(0.05)
    assert found.seconds > 0 and found.spread >= 0 and found.waited >= 0
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(cores)])
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            found = quiet.look(1.0)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    finally:
        os.sched_setaffinity(0, cores)
    assert found.problems(after=True)


# -- the page ----------------------------------------------------------------------------------------------------------------


def row(case: str, contestant: str, median: float, least: float | None = None, **more: object) -> dict[str, object]:
    return {"input": case, "contestant": contestant, "median": median, "min": median if least is None else least, "disturbed": 0.0} | more


ROWS = [
    row("a", "x.sum(), float32", 1.0), row("a", "observe_, float32", 2.0, 1.6), row("a", "x.sum(), bfloat16", 0.5),
    row("a", "observe_, bfloat16", 1.5), row("b", "eager", 8.0, 8.0), row("b", "torchprobe.record", 4.0, 2.0),
    row("b", "+ a hook", 0.1, None),
]  # fmt: skip
ROWS[-1]["min"] = None  # of a difference


def test_ratios_are_of_one_input_and_type():
    found = {(one["input"], one["contestant"]): one for one in page.compared(ROWS)}
    assert found["a", "observe_, float32"]["floor"] == 2 and found["a", "observe_, bfloat16"]["floor"] == 3
    assert found["a", "x.sum(), float32"]["ours"] == 0.5
    assert found["b", "eager"]["floor"] is None and found["b", "eager"]["ours"] == 2 and found["b", "eager"]["least"] == 4
    assert found["b", "+ a hook"]["least"] is None and found["b", "+ a hook"]["ours"] == pytest.approx(0.025)


def run(quiet_too: bool) -> dict[str, object]:
    timings = [Timing((2e-3, 1e-3)), Timing((4e-3, 2e-3))]
    machine = {"processor": "<b>", "cores": 2, "threads": 1, "torch": "2", "torchprobe": "0", "python": "3", "allocator": "tuned"}
    busy = look() if quiet_too else look(spread=0.5)
    return {
        "machine": machine | {"kernels": {"cpu": "loaded"}},
        "sections": [{"name": "read", "title": "reading & co", "rows": ROWS}],
        "growth": [
            Growth("layers", "work", (1, 2), timings, 1.0).as_json(),
            Growth("ranks", "work", (), (), -1.0, "no processes here").as_json(),
        ],
        "quiet": quiet.verdict(busy, busy),
    }


def test_the_page_is_one_file_with_plots(tmp_path):
    text = page.write(run(True), tmp_path / "bench.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2 * 3  # each figure in two widths: floor, ours, layers
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "<script src" not in text and "&lt;b&gt;" in text and "<b>" not in text
    assert "The machine was quiet." in text and "no processes here" in text and "slope 1.00" in text


def test_the_page_says_when_the_machine_was_busy(tmp_path):
    text = page.write(run(False), tmp_path / "bench.html").read_text(encoding="utf-8")
    assert "The machine was not quiet" in text and "varies by 50%" in text


def test_a_run_without_growth_has_a_page(tmp_path):
    assert page.write(run(True) | {"growth": []}, tmp_path / "bench.html").exists()


@pytest.mark.slow("runs a benchmark as a process")
def test_the_command_writes_json_and_page(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "hook", "--only", "growth", "--axis", "layers"]
    files = ["--json", str(tmp_path / "new" / "a.json"), "--page", str(tmp_path / "a.html")]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "layers: slope" in done.stdout and "The machine was" in done.stdout
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    assert found["growth"][0]["axis"] == "layers" and isinstance(found["quiet"]["quiet"], bool)
    assert math.isfinite(found["growth"][0]["slope"]) and "<svg" in (tmp_path / "a.html").read_text()
