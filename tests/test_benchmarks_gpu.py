"""The logic of the benchmarks for GPUs, on the CPU, and on a pretended GPU where the code needs one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import on_gpu
import pretended_gpu
import pytest
import torch
from click.testing import CliRunner
from processes import python

import torchprobe

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device, observe, results, timing, training
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, markdown, quantity, table
from benchmarks.networks import TINY, VIT_B_16, Training
from benchmarks.report import Target
from benchmarks.timing import MIN_ROUNDS, Timing

CPU = torch.device("cpu")
H200 = Device(CPU, "NVIDIA H200", "9.0", 132, 140 << 30, 60 << 20, 1.98e9, "580.1")
PLANS = {
    "bandwidth": observe.Bandwidth((1 << 14, 1 << 15), (64, observe.TYPICAL), 1 << 15, 1 << 16, 1, 60, 0),
    "rivals": observe.Rivals((32,), 48, compiled=False, replay_bytes=1, seconds=0),
    "launch": observe.Launch(calls=3, rounds=5, seconds=0),
    "step": training.Step.quick(),
    "graph": training.Graph.quick(),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(timing, "REPLAY_CALLS", 8)
    for part, plan in PLANS.items():
        monkeypatch.setattr(command.PARTS[part][1], "quick", lambda plan=plan: plan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request, monkeypatch):
    """The device that is measured: the CPU, a pretended GPU, or a real one."""
    if request.param == "pretended":
        pretended_gpu.install(monkeypatch)
        pretend_kernels(monkeypatch)
        with pretended_gpu.OnTheCpu():
            yield torch.device("cuda", 0)
    else:
        monkeypatch.setattr(timing, "L2_MULTIPLE", 0)  # thousands of these small tensors would fit into the cache of a GPU
        yield torch.device(request.param)


def pretend_kernels(monkeypatch, status="loaded: CUDA 13.0 for sm_80, sm_90, /some/where.so"):
    monkeypatch.setattr(device, "kernels", lambda: {"cuda": status})
    monkeypatch.setattr(device.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="580.1, 1980\n"))
    monkeypatch.setattr(
        device.subprocess, "Popen", lambda *_, **__: types.SimpleNamespace(poll=lambda: 0, communicate=lambda: ("1755\n", ""))
    )


def figures(part, where):
    return list(PLANS[part].run(device.find(str(where))))


def named(found, name, **case):
    (figure,) = [f for f in found if f.name == name and case.items() <= f.case.items()]
    return figure


# -- every part ----------------------------------------------------------------------------------------------------------------------------


def test_bandwidth(where):
    found = figures("bandwidth", where)
    cases = [f for f in found if f.name == "observe_"]
    assert len(cases) == 2 * 2 * 2 * 3  # sizes, widths, layouts, types
    assert all(figure.value > 0 for figure in cases)
    assert named(found, "copy").value > 0
    assert len([f for f in found if f.name.startswith("smallest share")]) == 3 * 2 * 2
    if where.type == "cuda":
        assert {f.case["size"] for f in found if f.name == "observe_, x in L2"} >= {1 << 14}
        assert named(found, "issue slots an element, as measured", dtype="bfloat16").value > 0
    else:
        assert not [f for f in found if "slots" in f.name]  # the clock of a CPU is unknown


def test_share_is_of_bytes_read_and_written(monkeypatch):
    seconds = {"copy": 0.5, "cold": 0.25}
    monkeypatch.setattr(observe, "race", lambda contestants, *_: {name: Timing((seconds[name],) * 5) for name in contestants})
    plan = observe.Bandwidth((1000,), (64,), 1000, 4000, 1, 60, 0)
    found = list(plan.run(Device(CPU, "a CPU")))
    assert named(found, "copy").value == 2 * 4000 / 0.5
    figure = named(found, "observe_", dtype="float32", layout="row-major")
    assert figure.case["shape"] == "3 × 64"
    assert figure.value == (3 * 64 * 4 / 0.25) / 16_000


def test_rivals(where):
    found = figures("rivals", where)
    assert {(f.name, f.case["dtype"]) for f in found} == {(n, d) for n in ("x.sum()", "observe_", "eager") for d in ("float32", "bfloat16")}


@pytest.mark.slow("compiles with inductor")
def test_rivals_with_the_compiler():
    plan = observe.Rivals((32,), 48, replay_bytes=1, seconds=0)
    assert "inductor" in {f.name for f in plan.run(Device(CPU, "a CPU"))}


def test_rivals_without_a_compiler(monkeypatch):
    def broken(*args, **kwargs):
        raise ImportError("no triton")

    monkeypatch.setattr(torch, "compile", broken)
    found = []
    with pytest.raises(RuntimeError, match="inductor: ImportError: no triton"):
        found.extend(iter_into(observe.Rivals((32,), 48, replay_bytes=1, seconds=0).run(Device(CPU, "a CPU")), found))
    assert {f.name for f in found} == {"x.sum()", "observe_", "eager"}


def iter_into(generator, found):
    for figure in generator:
        found.append(figure)
        yield from ()


def test_launch(where):
    found = figures("launch", where)
    returned, done = (named(found, f"observe_, until {until}") for until in ("it returns", "the device has done it"))
    assert 0 < returned.timing.minimum <= done.timing.minimum
    assert done.target.bound == 12
    assert done.target.measured == pytest.approx(1e6 * done.value)
    assert named(found, "observe_, on the device").note.startswith("8 calls")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_step(where, monkeypatch):
    watched, watch = [], torch.cuda.set_sync_debug_mode
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: watched.append(mode) or watch(mode))
    found = figures("step", where)
    for name in ("added, from outside: recorded − plain", "added, from inside: the recorder's hooks"):
        figure = named(found, name)
        assert figure.target.bound == 1 and figure.target.measured == pytest.approx(100 * figure.value)
        low, high = figure.target.interval
        assert low <= figure.target.measured <= high
    assert named(found, "synchronizations in a recorded forward pass").value == 0
    if where.type == "cuda":
        assert watched == ["error", "default"]
        added = named(found, "peak memory, added").value
        assert added == named(found, "peak memory, recorded").value - named(found, "peak memory, plain").value


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")  # it warms up uncaptured
def test_graph(where):
    found = figures("graph", where)
    error = named(found, "relative error of the statistics")
    assert error.value <= 1e-5 and error.target.verdict == "met"
    assert error.note.startswith("3 replays of 2 layers")
    assert named(found, "captured step, every block recorded").value > 0


def test_graph_notices_wrong_statistics():
    x = torch.randn(50, 8)
    want, got = torchprobe.Moments(8), torchprobe.Moments(8)
    want.update(x)
    got.update(x)
    assert training.disagreement("a", got, want) == 0
    got.update(x[:5])
    with pytest.raises(RuntimeError, match="blocks.3: the graph recorded 55 vectors, but its outputs have 50"):
        training.disagreement("blocks.3", got, want)
    got.reset()
    got.update(2 * x + x**2)
    assert training.disagreement("a", got, want) > 0.01


# -- how it is measured --------------------------------------------------------------------------------------------------------------------


def test_mark(where):
    first = timing.Mark(where)
    torch.randn(200_000, device=where).sort()
    seconds = timing.Mark(where).since(first)
    assert 1e-5 < seconds < 10


def test_events_are_in_milliseconds(monkeypatch):
    pretended_gpu.install(monkeypatch)
    first, second = timing.Mark(torch.device("cuda")), timing.Mark(torch.device("cuda"))
    first._event.time, second._event.time = 1.0, 3.5
    assert second.since(first) == 2.5


def test_capture_replays(where):
    total = torch.zeros((), device=where)
    replay = timing.capture(lambda: total.add_(1), where)
    total.zero_()
    for _ in range(3):
        replay()
    assert total.item() == 3


@pytest.mark.parametrize(("size", "buffers"), [(1 << 20, 240), (60 << 20, 4), (64 << 20, 4), (240 << 20, 1), (4 << 30, 1)])
def test_rotation_is_four_times_the_cache(size, buffers):
    assert timing.rotation(size, H200.l2) == buffers
    assert timing.rotation(size, 0) == 1


def test_rotating():
    seen = []
    a, b, c = (torch.full((4,), float(i)) for i in range(3))
    contestant = timing.rotating(lambda x: seen.append(int(x[0])), [a, b, c], CPU, replay_bytes=100)  # 48 bytes a round
    contestant.run()
    assert seen == [0, 1, 2, 0, 1, 2]
    assert contestant.calls == 6
    assert timing.rotating(lambda x: None, [a], CPU, replay_bytes=1 << 30).calls == timing.REPLAY_CALLS
    assert timing.rotating(lambda x: None, [a, b, c], CPU, replay_bytes=1).calls == 3


def test_race(where):
    ran = []
    contestants = {name: timing.Contestant(lambda name=name: ran.append(name), 10) for name in "ab"}
    times = timing.race(contestants, 0, where)
    assert {len(t.seconds) for t in times.values()} == {MIN_ROUNDS}
    assert ran.count("a") == ran.count("b") == 1 + 2 * MIN_ROUNDS
    assert all(first == second for first, second in zip(ran[2::2], ran[3::2], strict=True))  # each right after its own lead-in
    ran.clear()
    timing.race(contestants, 0, where, lead_in=False)
    assert ran.count("a") == 1 + MIN_ROUNDS


def test_race_counts_calls(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    times = timing.race({"a": timing.Contestant(lambda: None, 4)}, 0, CPU)
    assert set(times["a"].seconds) == {0.25}


@pytest.mark.parametrize("layout", observe.LAYOUTS)
@pytest.mark.parametrize("dtype", observe.DTYPES)
def test_every_case_fits_its_pool(dtype, layout):
    plan = observe.Bandwidth()
    pool = observe.pool_bytes(max(plan.sizes), H200)
    for width in plan.widths:
        for size in plan.sizes:
            case = observe.Case(dtype, layout, width, size)
            assert 0.5 * size < case.nbytes <= size  # whole vectors, and whole maps
            assert case.shape[case.feature_dim] == width
            count = timing.rotation(case.nbytes, H200.l2)
            assert count * case.nbytes <= pool
            assert count == 1 or count * case.nbytes >= 4 * H200.l2
            assert case.nbytes % 128 == 0  # so every buffer is as well aligned as the first


def test_buffers_do_not_overlap():
    case = observe.Case("float32", "channel-major", 64, 64 * 4 * 1000)
    assert case.shape == (1, 64, 784)
    pool = torch.arange(3.0 * math.prod(case.shape) + 5)
    buffers = case.buffers(pool, 3)
    assert [x[0, 0, 0].item() for x in buffers] == [i * 64 * 784 for i in range(3)]
    assert all(x.is_contiguous() and x.shape == case.shape for x in buffers)


def test_the_plan_covers_what_is_asked():
    plan = observe.Bandwidth()
    assert (min(plan.sizes), max(plan.sizes)) == (1 << 20, 4 << 30)
    assert (min(plan.widths), max(plan.widths)) == (64, 65_536)
    cases = plan.cases()
    assert len(cases) == 7 * 7 * 2 * 3
    large = [case.size >= plan.large or case.width == 768 for case in cases]
    assert large == sorted(large, reverse=True)


def test_shares_and_issue_slots():
    """An H200 by its published numbers: 4.3 TB/s, 132 multiprocessors at 1.98 GHz."""
    plan, seen = observe.Bandwidth(), observe.Found()
    seen.copies = [2 * plan.copy_bytes / 4.3e12] * 5
    for dtype, share in (("float32", 0.93), ("bfloat16", 0.75)):
        seen.shares[observe.Case(dtype, "row-major", 768, 64 << 20)] = share
        seen.shares[observe.Case(dtype, "row-major", 768, 1 << 20)] = 0.1  # too small to count
        seen.shares[observe.Case(dtype, "row-major", 65_536, 4 << 30)] = share / 2
    found = list(plan.summary(seen, H200))
    assert named(found, "copy").value == pytest.approx(4.3e12)
    verdicts = {(f.case["dtype"], f.case["at"]): f.target.verdict for f in found if f.name == "smallest share from 64 MB on"}
    assert verdicts == {
        ("float32", "width 768"): "met",
        ("float32", "every width"): "over limit",
        ("bfloat16", "width 768"): "within limit",
        ("bfloat16", "every width"): "over limit",
    }
    assert named(found, "clock").note.startswith("the highest")
    slots = 132 * 128 * 1.98e9
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert named(found, "issue slots an element, at the speed of the copy", dtype=dtype).value == pytest.approx(slots / (4.3e12 / size))
    assert named(found, "largest share the issue slots allow", dtype="float32").value == 1
    assert named(found, "largest share the issue slots allow", dtype="bfloat16").value == pytest.approx(
        slots / (4.3e12 / 2) / observe.INSTRUCTIONS["bfloat16"]
    )
    measured = named(found, "issue slots an element, as measured", dtype="bfloat16")
    assert measured.value == pytest.approx(slots / (0.75 * 4.3e12 / 2))
    assert "132 multiprocessors × 128 lanes × 1.980 GHz" in measured.note


def test_bandwidth_says_what_it_left_out():
    plan = observe.Bandwidth((1 << 14, 1 << 40), (64,), 1 << 15, 1 << 16, 1, seconds=-1, each=0)
    found = list(plan.run(Device(CPU, "small", memory=1 << 20)))
    assert [(f.name, f.value) for f in found] == [("left out", 12)]


def test_bandwidth_survives_a_case_that_fails(monkeypatch):
    measure, tried = observe.Bandwidth.measure, []

    def fails_once(self, case, *args):
        tried.append(case)
        if len(tried) == 2:
            raise torch.OutOfMemoryError("too wide")
        yield from measure(self, case, *args)

    monkeypatch.setattr(observe.Bandwidth, "measure", fails_once)
    found = []
    with pytest.raises(RuntimeError, match="too wide"):
        found.extend(iter_into(PLANS["bandwidth"].run(Device(CPU, "a CPU")), found))
    assert len([f for f in found if f.name == "observe_"]) == 23


@pytest.mark.slow("imports three packages and builds a ViT-B of each")
@pytest.mark.parametrize("network", VIT_B_16, ids=lambda network: network.package)
def test_networks(network):
    pytest.importorskip(network.package)
    model = network.build()
    assert len(network.blocks(model)) == 12
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(86e6, rel=0.02)


def test_twins_share_their_weights():
    run = Training(TINY, 2, CPU, autocast=True, captured=True)
    twin = run.twin()
    run.blocks(twin)["blocks.0"].register_forward_hook(lambda *_: pytest.fail("the other model ran"))
    before = [p.clone() for p in twin.parameters()]
    run.step(run.model)
    assert all(a is b for a, b in zip(twin.parameters(), run.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), before, strict=True))
    assert all(p.grad is None for p in twin.parameters())


# -- the tests that need a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fails", "code"), [(None, 0), ("pytest", 1), ("racecheck", 1)])
def test_everything_on_a_gpu_is_one_command(monkeypatch, capsys, fails, code):
    ran = []

    def pretend(command, **options):
        ran.append(command)
        if "--tool" in command:
            assert options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return types.SimpleNamespace(returncode=1 if fails in command else 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu.subprocess, "run", pretend)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name, path=None: f"/cuda/bin/{name}")
    assert on_gpu.main() == code
    assert ran[0][1:] == ["-m", "pytest", "-q", "-m", "gpu"]
    assert [command[command.index("--tool") + 1] for command in ran[1:]] == ["memcheck", "racecheck", "synccheck"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("failed" if code else "all passed")


def test_nothing_runs_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(on_gpu.subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    assert on_gpu.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_the_sanitizer_runs():
    """Its script, on the CPU."""
    done = python(on_gpu.CHECK, "cpu", TORCHPROBE_DISABLE_KERNELS="1")
    assert done.returncode == 1
    assert "passed rows, float32" in done.stdout
    assert "FAILED" not in done.stdout
    assert done.stderr == "the reference was checked, not the kernels: disabled: TORCHPROBE_DISABLE_KERNELS is set\n"


# -- results -------------------------------------------------------------------------------------------------------------------------------

FIGURE = {
    "name": str,
    "value": (int, float),
    "unit": str,
    "case": dict,
    "timing": (dict, type(None)),
    "target": (dict, type(None)),
    "note": str,
}
TIMING = {"rounds": int, "median": float, "quartiles": list, "interval_of_median": list, "minimum": (float, type(None))}
TARGET = {
    "what": str,
    "measured": (int, float),
    "bound": (int, float),
    "limit": (int, float, type(None)),
    "at_least": bool,
    "interval": (list, type(None)),
    "verdict": str,
}
PART = {"title": str, "date": str, "seconds": (int, float), "figures": list, "error": (str, type(None))}
DOCUMENT = {"format": int, "date": str, "quick": bool, "device": dict, "versions": dict, "parts": dict}


def assert_schema(document):
    def fits(value, schema):
        assert value.keys() == schema.keys()
        for key, kind in schema.items():
            assert isinstance(value[key], kind), (key, value[key])

    fits(document, DOCUMENT)
    assert document["format"] == 1
    assert {"name", "capability", "multiprocessors", "memory", "l2", "clock", "driver"} == document["device"].keys()
    assert {"torchprobe", "torch", "cuda", "python", "kernels"} <= document["versions"].keys()
    for part in document["parts"].values():
        fits(part, PART)
        for figure in part["figures"]:
            fits(figure, FIGURE)
            assert math.isfinite(figure["value"])
            if figure["timing"]:
                fits(figure["timing"], TIMING)
                assert figure["timing"]["rounds"] >= MIN_ROUNDS
            if figure["target"]:
                fits(figure["target"], TARGET)


def run(*arguments):
    return CliRunner().invoke(command.main, list(map(str, arguments)))


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_command(where, tmp_path):
    done = run("--device", where, "--quick", "--results", tmp_path)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert_schema(document)
    assert list(document["parts"]) == list(command.PARTS)
    assert document["quick"] is True
    assert "/" not in document["versions"]["kernels"].partition("PyTorch")[0]  # no path of this machine
    page = path.with_suffix(".md").read_text()
    assert page in done.stdout
    assert page == markdown(document)
    assert "A quick run" in page
    for part in document["parts"].values():
        assert f"## {part['title']}" in page
    assert "| observe_, until the device has done it (1 × 768) |" in page


def test_pretended_device(monkeypatch, tmp_path):
    pretended_gpu.install(monkeypatch)
    pretend_kernels(monkeypatch)
    with pretended_gpu.OnTheCpu():
        done = run("--quick", "--only", "launch", "--results", tmp_path)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "nvidia-pretended-1.json").read_text())
    assert document["device"] == {
        "name": "NVIDIA Pretended 1",
        "capability": "9.0",
        "multiprocessors": 132,
        "memory": 16 << 30,
        "l2": 1 << 15,
        "clock": 1.98e9,
        "driver": "580.1",
    }
    assert document["versions"]["kernels"] == "loaded: CUDA 13.0 for sm_80, sm_90"


def test_parts_replace_themselves_alone(tmp_path):
    run("--device", "cpu", "--quick", "--only", "launch", "--only", "step", "--results", tmp_path)
    (path,) = tmp_path.glob("*.json")
    before = json.loads(path.read_text())["parts"]
    run("--device", "cpu", "--quick", "--only", "launch", "--results", tmp_path)
    after = json.loads(path.read_text())["parts"]
    assert after.keys() == {"launch", "step"}
    assert after["step"] == before["step"]
    assert after["launch"] != before["launch"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', None])
def test_a_file_that_does_not_fit_is_replaced(tmp_path, content):
    path, new = tmp_path / "a.json", results.document(H200.as_json(), {"torch": "2.15"}, False)
    if content is not None:
        path.write_text(content)
    assert results.resume(path, new) == new


def test_figures_of_another_driver_are_not_kept(tmp_path):
    path, new = tmp_path / "a.json", results.document(H200.as_json(), {"torch": "2.15"}, False)
    results.write(path, {**new, "parts": {"launch": {"seconds": 1}}})
    assert results.resume(path, new)["parts"] == {"launch": {"seconds": 1}}
    other = {**new, "device": {**new["device"], "driver": "590.1"}}
    assert results.resume(path, other)["parts"] == {}


def test_a_part_that_fails_keeps_its_figures_and_stops_no_other(monkeypatch, tmp_path):
    def broken(self, device):
        yield Figure("before", 1.0, "s")
        raise RuntimeError("it broke\nat length")

    monkeypatch.setattr(observe.Launch, "run", broken)
    done = run("--device", "cpu", "--quick", "--only", "launch", "--only", "graph", "--results", tmp_path)
    assert done.exit_code == 1
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text())["parts"]
    assert parts["launch"]["error"] == "RuntimeError: it broke"
    assert [f["name"] for f in parts["launch"]["figures"]] == ["before"]
    assert parts["graph"]["error"] is None
    assert "**Stopped: RuntimeError: it broke**" in path.with_suffix(".md").read_text()


def test_a_figure_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="clock {}: nan is not a number"):
        Figure("clock", math.nan, "Hz").as_json()


def test_quick_writes_nothing_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert run("--device", "cpu", "--quick", "--only", "launch").exit_code == 0
    assert list(tmp_path.iterdir()) == []


# -- the device ----------------------------------------------------------------------------------------------------------------------------


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run()
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "no CUDA device" in done.output


def test_no_gpu_as_a_command():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(("name", "message"), [("cuda:7", "there are 1"), ("mps", "python -m benchmarks"), ("gpu", "is not a device")])
def test_devices_that_are_not_there(monkeypatch, name, message):
    pretended_gpu.install(monkeypatch)
    done = run("--device", name)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize("before", ["not used: ", "not loaded: ", "loaded: sm_90, /some/where.so; not used on cuda:0: "])
def test_the_reference_is_not_measured(monkeypatch, before):
    pretended_gpu.install(monkeypatch)
    pretend_kernels(monkeypatch, before + "the driver is too old")
    with pretended_gpu.OnTheCpu():
        done = run()
    assert done.exit_code == 2
    assert done.output.endswith("the driver is too old\n")


def test_a_gpu_on_which_nothing_runs(monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    pretended_gpu.install(monkeypatch)
    monkeypatch.setattr(device, "observe_", broken)
    with pretended_gpu.OnTheCpu():
        done = run()
    assert done.exit_code == 2
    assert done.output == "Error: nothing runs on cuda:0: CUDA error: no kernel image is available\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("580.1, 1980\n", ("580.1", 1.98e9)),
        ("580.1, [N/A]\n", ("580.1", None)),
        ("no devices were found\n", (None, None)),
        ("", (None, None)),
    ],
)
def test_what_nvidia_smi_says(monkeypatch, output, said):
    pretended_gpu.install(monkeypatch)
    asked = []
    monkeypatch.setattr(device.subprocess, "run", lambda command, **_: asked.append(command) or types.SimpleNamespace(stdout=output))
    answer = device.ask(torch.device("cuda", 0), "driver_version", "clocks.max.sm")
    assert (answer["driver_version"], device.number(answer["clocks.max.sm"], 1e6)) == said
    assert asked[0][:3] == [
        "nvidia-smi",
        "--id=GPU-01234567-89ab-cdef-0123-456789abcdef",
        "--query-gpu=driver_version,clocks.max.sm",
    ]


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 1), subprocess.CalledProcessError(9, "x")])
def test_no_nvidia_smi(monkeypatch, error):
    def fails(*_, **__):
        raise error

    pretended_gpu.install(monkeypatch)
    monkeypatch.setattr(device.subprocess, "run", fails)
    assert device.ask(torch.device("cuda", 0), "driver_version") == {"driver_version": None}


def test_slug():
    assert H200.slug == "nvidia-h200"
    assert Device(CPU, "NVIDIA GeForce RTX 4090 (Laptop)").slug == "nvidia-geforce-rtx-4090-laptop"


# -- the table -----------------------------------------------------------------------------------------------------------------------------


def test_grid():
    shares = {(64, 1 << 20): (0.385, 0.712), (64, 64 << 20): (0.934, None), (768, 64 << 20): (0.95, None)}
    found = []
    for (width, size), (cold, hot) in shares.items():
        case = {"dtype": "float32", "layout": "row-major", "width": width, "size": size}
        found.append(Figure("observe_", cold, "share", case))
        if hot:
            found.append(Figure("observe_, x in L2", hot, "share", case))
    document = results.document(H200.as_json(), {"torch": "2.15"}, False)
    document["parts"]["bandwidth"] = results.part("Bandwidth", 1, found, None)
    page = markdown(document)
    assert page.startswith("# NVIDIA H200\n")
    assert "| driver | 580.1 |" in page
    assert "| float32, row-major | 1 MB | 64 MB |" in page
    assert "| 64 | 38 (71) | 93 |" in page
    assert "| 768 |  | 95 |" in page


def test_limits():
    timing_ = Timing((10e-6,) * 5)
    target = Target("µs", 10.0, 12)
    share = Figure(
        "share", 0.75, "share", {"dtype": "float32"}, target=Target("% of the copy", 75, 92, 80, at_least=True), note="at width 64"
    )
    document = results.document(H200.as_json(), {}, False)
    document["parts"]["launch"] = results.part("Launch", 1, [results.time("observe_", timing_, {"shape": "1 × 768"}, target), share], None)
    page = markdown(document)
    assert "| observe_ (1 × 768) | 10 µs | ≤ 12 |  | met |  |" in page
    assert "| share (float32) | 75 % of the copy | ≥ 92 | ≥ 80 | over limit | at width 64 |" in page
    assert "| observe_ (1 × 768) | 10.0 µs | 10.0 µs … 10.0 µs | 5 |  |" in page


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.55e-3, "s", "1.55 ms"),
        (2.5e-7, "s", "250 ns"),
        (-3.2e-6, "s", "-3.20 µs"),
        (0, "s", "0 s"),
        (0.934, "share", "93.4 %"),
        (0.0004, "share", "0.04 %"),
        (4 << 30, "B", "4 GB"),
        (1 << 20, "B", "1 MB"),
        (-(5 << 19), "B", "-2.50 MB"),
        (4.3e12, "B/s", "4.30 TB/s"),
        (1.98e9, "Hz", "1.98 GHz"),
        (15.6, "slots", "15.6 slots"),
        (3.6e-7, "", "3.6e-07"),
        (0, "", "0"),
    ],
)
def test_quantity(value, unit, text):
    assert quantity(value, unit) == text


def test_cells_are_data():
    assert table(["a", "b"], [["x|y", "z"]], right=[1]) == "| a | b |\n| --- | ---: |\n| x\\|y | z |"
