"""The benchmarks run, and their contestants compute the same numbers. Only ``make bench`` measures how fast they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torchprobe import Moments

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benchmarks are not part of the installed package

from benchmarks import cka, formulas, model, observe, outliers, report  # noqa: E402
from benchmarks.networks import HookClock, Network  # noqa: E402
from benchmarks.timing import MIN_ROUNDS, TUNED_MALLOC, Timing, Waiting, race, total  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def x(request):
    return (torch.randn(300, 40).exp() + 3).to(request.param)


def expected(x):
    m = Moments(x.shape[1])
    m.update(x)
    numbers = {"mean": m.mean, "m2": m.variance, "m3": m.skewness * m.std**3, "m4": m.kurtosis * m.variance**2}
    mean_square = m.variance + m.mean**2
    return {**numbers, "min": m.min, "max": m.max, "mean_abs": m.mean_abs, "mean_square": mean_square, "vector_kurtosis": m.vector_kurtosis}


def assert_same(got, x):
    want = expected(x)
    for name, value in got.items():
        value = value.double().mean() if name == "vector_kurtosis" else value.double()
        torch.testing.assert_close(
            value, torch.as_tensor(want[name], dtype=torch.float64), rtol=2e-4, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- the same numbers ----------------------------------------------------------------------------------------------------------------------


def test_eager_formulas(x):
    before = x.clone()
    assert_same(formulas.eager(x), x)
    assert_same(formulas.mean_and_variance(x), x)
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, in torch 2.11
@pytest.mark.slow("compiles with inductor")
def test_compiled_formulas(x):
    assert_same(torch.compile(formulas.eager, fullgraph=True, dynamic=False)(x), x)


@pytest.mark.parametrize("name", formulas.PEERS)
def test_peers(name, x):
    pytest.importorskip(name)
    peer = formulas.PEERS[name](x.shape[1], CPU)
    peer.update(x)
    assert_same(peer.result(), x)


# -- every section runs --------------------------------------------------------------------------------------------------------------------


def check(section, contestants):
    assert len(section.rows) == contestants
    for row in section.rows:
        assert len(row.timing.seconds) >= MIN_ROUNDS
        assert row.target is None or row.target.verdict in ("met", "missed", "within limit", "over limit", "not resolved")
    for width in (80, 200):
        assert report.table(section, width).row_count == contestants
    json.dumps(report.as_json([section]), allow_nan=False)


def test_read_once():
    cases = (
        observe.Case((64, 32), target=1.3, limit=1.9),
        *(observe.Case((2, 32, 4, 4), x, 1, 2) for x in ("channel-major", "channels_last")),
    )
    assert not cases[-1].tensor(torch.float32, CPU).is_contiguous()
    check(observe.read(CPU, 0, cases), 3 * 4)


def test_wide():
    threads = torch.get_num_threads()
    check(observe.wide(CPU, 0, elements=5000, widths=(64, 100, observe.LOGITS)), 2 * 3)
    assert torch.get_num_threads() == threads


def test_rivals():
    section = observe.rivals(CPU, 0, shape=(64, 32), compiled=False)
    check(section, 2 * (5 + len(formulas.installed_peers())))
    ours = [row for row in section.rows if row.contestant == "observe_"]
    assert [row.ratio for row in ours] == [1, 1]


def test_hook():
    check(observe.hook(CPU, 0, layers=2, features=32), 4)


def test_model():
    pytest.importorskip("open_clip")
    network = Network("a tiny transformer", "open_clip", tiny_transformer, re.compile(r"transformer\.resblocks\.\d"), size=32)
    check(model.run(CPU, 0, network, batch=2), 6)


def tiny_transformer() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=16, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16)


def test_cka():
    section = cka.run(CPU, 0, layers=3, cases={"two": (8, 1, 2), "one": (8, 2, 1)})
    assert len(section.rows) in (2, 4)
    assert all(row.timing.median > 0 for row in section.rows)
    assert ("is not installed" in section.note) == (len(section.rows) == 2)


def test_cka_of_the_other_package_is_the_same():
    pytest.importorskip("torch_cka", reason="torch_cka is not installed; see benchmarks/cka.py")
    models = [cka.Stored.random(3, 32, 2, seed, CPU) for seed in (0, 1)]
    ours, theirs = (call() for call in cka.contestants(*models, torch.zeros(32, 1)).values())
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-4)


# -- how it is measured --------------------------------------------------------------------------------------------------------------------


def clocked(hook=None, calls=1):
    """Two blocks between the hooks of a clock, with ``hook`` in between."""
    blocks = nn.Sequential(nn.Identity(), nn.Identity())
    clock = HookClock(blocks, lambda: blocks(torch.zeros(1)))
    clock.place_first()
    for block in blocks if hook else ():
        block.register_forward_hook(hook)
    clock.place_last()
    for _ in range(calls):
        clock()
    return clock.timing(Timing((1.0,) * calls)).seconds


def test_the_clock_measures_every_call():
    seconds = clocked(lambda *_: torch.randn(1000).sort() and None, calls=2)
    assert len(seconds) == 2 and min(seconds) > 0


def test_the_clock_measures_only_the_hooks_between():
    assert clocked(lambda *_: torch.randn(100_000).sort() and None)[0] > 10 * clocked()[0] > 0


def test_race_gives_every_contestant_every_round():
    calls = []
    times = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0, CPU)
    assert calls.count("a") == calls.count("b") > MIN_ROUNDS
    assert {len(timing.seconds) for timing in times.values()} == {MIN_ROUNDS}
    measured = ["".join(calls[i : i + 2]) for i in range(len(calls) - 2 * MIN_ROUNDS, len(calls), 2)]
    assert set(measured) <= {"ab", "ba"}


def test_hot_race_calls_twice():
    calls = []
    race({"a": lambda: calls.append("a")}, 0, CPU)
    cold = len(calls)
    race({"a": lambda: calls.append("a")}, 0, CPU, hot=True)
    assert len(calls) - cold == cold + MIN_ROUNDS


def test_timing():
    timing = Timing(tuple(map(float, range(1, 102))))
    assert timing.median == 51
    assert timing.minimum == 1
    assert timing.quartiles == (26, 76)
    assert timing.interval == (41, 61)  # ranks of the binomial: 51 ± 1.96 · √101 / 2, rounded outwards
    assert timing.minus(timing).median == 0
    assert timing.per(2).median == 25.5
    assert total([timing, timing]).median == 102


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (report.Target("×", 1.2, 1.3, 1.9), "met"),
        (report.Target("×", 1.5, 1.3, 1.9), "within limit"),
        (report.Target("×", 2.0, 1.3, 1.9), "over limit"),
        (report.Target("×", 2.0, 1.3), "missed"),
        (report.Target("×", 2.0, 1.3, at_least=True), "met"),
        (report.Target("×", 1.0, 1.3, at_least=True), "missed"),
        (report.Target("×", 1.2, 1.3, interval=(1.1, 1.4)), "not resolved"),
    ],
)
def test_verdict(target, verdict):
    assert target.verdict == verdict


def test_no_verdict_where_threads_had_to_wait():
    target = report.Target("×", 1.2, 1.3)
    assert report.verdict(report.Row("", "", Timing((1.0,)), target=target)) == "met"
    assert report.verdict(report.Row("", "", Timing((1.0,), disturbed=0.5), target=target)) == "met ?"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports it")
def test_waiting_for_a_core():
    cores = os.sched_getaffinity(0)
    waiting = Waiting()
    try:
        os.sched_setaffinity(0, [min(cores)])
        busy = subprocess.Popen([sys.executable, "-c", "import time; end = time.time() + 0.5\nwhile time.time() < end: pass"])
        before = waiting.seconds()
        while busy.poll() is None:
            pass
    finally:
        os.sched_setaffinity(0, cores)
    assert waiting.seconds() - before > 0.1
    waiting.close()


# -- the command ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow("runs a benchmark as a process")
def test_command(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in TUNED_MALLOC}
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "hook", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torchprobe.record" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [section["name"] for section in figures["sections"]] == ["hook"]
    assert figures["machine"]["threads"] >= 1
    if sys.platform == "linux":
        assert figures["machine"]["allocator"] == "tuned"


def test_tables_of_outlier_rules(monkeypatch):
    monkeypatch.setattr(outliers, "WIDTHS", (64,))
    false = {name: counts[64] for name, counts in outliers.false_positives(2, 40)}
    assert false["Gaussian"] == {"classical": 0, "median": 0, "robust": 0} and false["ReLU of Gaussian"]["median"] == 2
    found = {name: shares[64] for name, background, shares in outliers.power(1, 40) if background == "Gaussian"}
    assert found["2 features, 60 σ, every vector"] == {"classical": 0, "median": 1, "robust": 1}
