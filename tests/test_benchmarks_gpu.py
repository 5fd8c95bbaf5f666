"""The benchmarks for GPUs, on the CPU: every part runs, arithmetic on known numbers, the files. With a GPU the same parts run there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import on_gpu
import pytest
import torch
from click.testing import CliRunner
from processes import python

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device, observe, results, timing, training
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, markdown, table
from benchmarks.networks import TINY, Training
from benchmarks.report import Target
from benchmarks.timing import MIN_ROUNDS, Timing

CPU = torch.device("cpu")
H200 = Device(CPU, "NVIDIA H200", "9.0", 132, 140 << 30, 60 << 20, "580.1")
PLANS = {
    "bandwidth": observe.Bandwidth((1 << 14, 1 << 15), (64, 256), 1 << 16, 1, 60, 0),
    "rivals": observe.Rivals((32,), 48, compiled=False, replay_bytes=1, seconds=0),
    "launch": observe.Launch(calls=3, rounds=5),
    "step": training.Step(lambda: TINY, 2, 0),
    "graph": training.Graph(lambda: TINY, 2, 0),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(timing, "REPLAY_CALLS", 8)
    monkeypatch.setattr(timing, "L2_MULTIPLE", 0)  # thousands of these small tensors would fit into the cache of a GPU
    for part, plan in PLANS.items():
        monkeypatch.setitem(command.PARTS, part, (command.PARTS[part][0], lambda plan=plan: plan))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request):
    return torch.device(request.param)


def named(found, name, **case):
    (figure,) = [f for f in found if f.name == name and case.items() <= f.case.items()]
    return figure


# -- every part ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")  # it warms up uncaptured
def test_every_part(where):
    found = {part: list(plan.run(device.find(str(where)))) for part, plan in PLANS.items()}
    cases = [f for f in found["bandwidth"] if f.name == "observe_"]
    assert len(cases) == len(PLANS["bandwidth"].cases()) and all(figure.value > 0 for figure in cases)
    assert named(found["bandwidth"], "copy").value > 0
    assert bool([f for f in found["bandwidth"] if "slots" in f.name]) == (where.type == "cuda")  # the clock of a CPU is unknown
    assert {f.name for f in found["rivals"]} == {"x.sum()", "observe_", "eager"}
    added = named(found["step"], "added to the step")
    low, high = added.target.interval
    assert added.target.bound == 1 and low <= added.target.measured <= high
    assert named(found["step"], "synchronizations in a recorded forward pass").value == 0
    returned, done = (named(found["launch"], f"observe_, until {until}") for until in ("it returns", "the device has done it"))
    assert 0 < returned.timing.minimum <= done.timing.minimum
    assert done.target.bound == 12 and done.target.measured == pytest.approx(done.value)
    assert named(found["graph"], "captured step, every block recorded").value > 0


def test_share_is_of_bytes_read_and_written(monkeypatch):
    seconds = {"copy": 0.5, "observe_": 0.25}
    monkeypatch.setattr(observe, "race", lambda contestants, *_: {name: Timing((seconds[name],) * 5) for name in contestants})
    found = list(observe.Bandwidth((40_000,), (), 4000, 1, 60, 0).run(Device(CPU, "a CPU")))
    assert named(found, "copy").value == 2 * 4000 / 0.5 / 1e12
    (figure,) = [
        f for f in found if f.name == "observe_" and f.case["dtype"] == "float32" and f.case["layout"] == "rows" and "strong" not in f.case
    ]
    assert figure.case["shape"] == "13 × 768"
    assert figure.value == pytest.approx(100 * (13 * 768 * 4 / 0.25) / 16_000)


def test_goals_and_issue_slots():
    """An H200 by its published numbers: 4.3 TB/s, 132 multiprocessors at 1.98 GHz."""
    case = observe.Case
    shares = {
        case("float32"): 0.93,
        case("float32", size=64 << 20): 0.7,
        case("float32", size=1 << 20): 0.1,  # too small for a goal
        case("float32", width=8192): 0.9,
        case("bfloat16"): 0.8,
        case("bfloat16", strong=8): 0.6,
        case("bfloat16", "channels", positions=49): 0.4,
    }
    assert [(f.name, f.case["dtype"], f.target.verdict) for f in observe.goals(shares)] == [
        ("share of the copy", "float32", "met"),
        ("share of the copy", "float32", "within limit"),
        ("compared with the ordinary case", "float32", "met"),
        ("share of the copy", "bfloat16", "within limit"),
        ("compared with the ordinary case", "bfloat16", "over limit"),
        ("share of small maps", "bfloat16", "over limit"),
    ]
    found = list(observe.issue_slots(shares, 132, 1.98e9, 4.3e12))
    slots = 132 * 128 * 1.98e9
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert named(found, "issue slots an element, at the speed of the copy", dtype=dtype).value == pytest.approx(slots / (4.3e12 / size))
    assert named(found, "issue slots an element, as measured", dtype="bfloat16").value == pytest.approx(slots / (0.8 * 2.15e12))


def test_every_case_is_whole_vectors_of_about_its_size(monkeypatch):
    monkeypatch.undo()
    plan = observe.Bandwidth()
    assert {case.size for case in plan.cases()[:20]} == {observe.LARGE}  # the most important first
    for case in plan.cases():
        assert 0.5 * case.size < case.nbytes <= case.size
        assert case.shape[1] == case.width
        count = timing.rotation(case.nbytes, H200.l2)
        assert count == 1 or count * case.nbytes >= 4 * H200.l2
    assert {case.strong for case in plan.cases()} == {0, 1, 8}
    assert {case.positions for case in plan.cases() if case.layout == "channels"} == {784, 196, 49}


def test_what_is_left_out_and_what_failed_is_said(monkeypatch):
    plan = observe.Bandwidth((1 << 14, 1 << 40), (), 1 << 16, 1, seconds=-1, each=0)
    found = list(plan.run(Device(CPU, "small", memory=1 << 20)))
    assert named(found, "left out").value == len(plan.cases()) - 1
    race, tried = observe.race, []

    def fails_once(*args):
        tried.append(args)
        if len(tried) == 2:
            raise torch.OutOfMemoryError("too wide")
        return race(*args)

    monkeypatch.setattr(observe, "race", fails_once)
    document = command._measure("bandwidth", Device(CPU, "a CPU"))
    assert "too wide" in document["error"]
    assert len([f for f in document["figures"] if f["name"] == "observe_"]) == len(PLANS["bandwidth"].cases()) - 1
    monkeypatch.setattr(torch, "compile", lambda *_, **__: (_ for _ in ()).throw(ImportError("no triton")))
    monkeypatch.setitem(command.PARTS, "rivals", ("Rivals", lambda: observe.Rivals((32,), 48, replay_bytes=1, seconds=0)))
    document = command._measure("rivals", Device(CPU, "a CPU"))
    assert document["error"] == "RuntimeError: inductor: ImportError: no triton"
    assert {f["name"] for f in document["figures"]} == {"x.sum()", "observe_", "eager"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, in torch 2.11
@pytest.mark.slow("compiles with inductor")
def test_rivals_with_the_compiler():
    plan = observe.Rivals((32,), 48, replay_bytes=1, seconds=0)
    assert "inductor" in {f.name for f in plan.run(Device(CPU, "a CPU"))}


# -- how it is measured --------------------------------------------------------------------------------------------------------------------


def test_capture_and_mark(where):
    total = torch.zeros((), device=where)
    replay = timing.capture(lambda: total.add_(1), where)
    total.zero_()
    first = timing.Mark(where)
    for _ in range(3):
        replay()
    assert 0 < timing.Mark(where).since(first) < 10
    assert total.item() == 3


@pytest.mark.parametrize(("size", "buffers"), [(1 << 20, 240), (60 << 20, 4), (64 << 20, 4), (240 << 20, 1), (4 << 30, 1)])
def test_rotation_is_four_times_the_cache(size, buffers, monkeypatch):
    monkeypatch.undo()
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


def test_race(where):
    ran = []
    contestants = {name: timing.Contestant(lambda name=name: ran.append(name), 10) for name in "ab"}
    times = timing.race(contestants, 0, where)
    assert {len(t.seconds) for t in times.values()} == {MIN_ROUNDS}
    assert ran.count("a") == ran.count("b") == 1 + 2 * MIN_ROUNDS
    assert all(first == second for first, second in zip(ran[2::2], ran[3::2], strict=True))  # each right after its own lead-in


def test_twins_share_their_weights():
    run = Training(TINY, 2, CPU, autocast=True, captured=True)
    twin = run.twin()
    run.blocks(twin)["blocks.0"].register_forward_hook(lambda *_: pytest.fail("the other model ran"))
    before = [p.clone() for p in twin.parameters()]
    run.step(run.model)
    assert all(a is b for a, b in zip(twin.parameters(), run.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), before, strict=True))


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
    ran.clear()
    assert on_gpu.main("racecheck") == (fails == "racecheck")
    assert [command[command.index("--tool") + 1] for command in ran] == ["racecheck"]
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: None)
    assert on_gpu.main("memcheck") == 1  # it was asked for
    assert on_gpu.main("memchek") == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main() == 2


def test_what_the_sanitizer_runs():
    """Its script, on the CPU."""
    done = python(on_gpu.CHECK, "cpu", TORCHPROBE_DISABLE_KERNELS="1")
    assert done.returncode == 1
    assert "passed rows, float32" in done.stdout
    assert "FAILED" not in done.stdout
    assert done.stderr == "the reference was checked, not the kernels: disabled: TORCHPROBE_DISABLE_KERNELS is set\n"


# -- results -------------------------------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(command.main, list(map(str, arguments)))


def test_command(where, tmp_path):
    chosen = ("--device", where, "--results", tmp_path)
    done = run(*chosen, "--only", "launch", "--only", "step")
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert list(document["parts"]) == ["launch", "step"]
    assert "/" not in document["versions"]["kernels"].partition("PyTorch")[0]  # no path of this machine
    page = path.with_suffix(".md").read_text()
    assert page in done.stdout and page == markdown(document)
    assert "| observe_, until the device has done it (1 × 768) |" in page
    run(*chosen, "--only", "launch")  # replaces itself alone
    after = json.loads(path.read_text())["parts"]
    assert after["step"] == document["parts"]["step"] and after["launch"] != document["parts"]["launch"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', None])
def test_a_file_that_does_not_fit_is_replaced(tmp_path, content):
    path, new = tmp_path / "a.json", results.document(H200.as_json(), {"torch": "2.15"})
    if content is not None:
        path.write_text(content)
    assert results.resume(path, new) == new


def test_figures_of_another_driver_are_not_kept(tmp_path):
    path, new = tmp_path / "a.json", results.document(H200.as_json(), {"torch": "2.15"})
    parts = {"launch": results.part("Launch", 1, [], None)}
    results.write(path, {**new, "parts": parts})
    assert results.resume(path, new)["parts"] == parts
    other = {**new, "device": {**new["device"], "driver": "590.1"}}
    assert results.resume(path, other)["parts"] == {}


def test_a_part_that_fails_keeps_its_figures_and_stops_no_other(monkeypatch, tmp_path):
    def broken(self, device):
        yield Figure("before", 1.0, "s")
        raise RuntimeError("it broke\nat length")

    monkeypatch.setattr(observe.Launch, "run", broken)
    done = run("--device", "cpu", "--only", "launch", "--only", "rivals", "--results", tmp_path)
    assert done.exit_code == 1
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text())["parts"]
    assert parts["launch"]["error"] == "RuntimeError: it broke"
    assert [f["name"] for f in parts["launch"]["figures"]] == ["before"]
    assert parts["rivals"]["error"] is None
    assert "**Stopped: RuntimeError: it broke**" in path.with_suffix(".md").read_text()


def test_the_table():
    timing_ = Timing((10e-6,) * 5)
    share = Figure("share", 75.0, "%", {"dtype": "float32"}, target=Target("%", 75, 92, 80, at_least=True), note="width|64")
    document = results.document(H200.as_json(), {})
    launch = results.time("observe_", timing_, {"shape": "1 × 768"}, Target("µs", 10.0, 12))
    document["parts"]["launch"] = results.part("Launch", 1, [launch, share], None)
    page = markdown(document)
    assert "| observe_ (1 × 768) | 10 µs | 10 … 10 | ≤ 12 |  | met |  |" in page
    assert "| share (float32) | 75 % |  | ≥ 92 | ≥ 80 | over limit | width\\|64 |" in page
    assert table(["a", "b"], [["x", "z"]], right=[1]) == "| a | b |\n| --- | ---: |\n| x | z |"
    with pytest.raises(ValueError, match="clock {}: nan is not a number"):
        Figure("clock", math.nan, "Hz")


# -- the device ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "message"), [("cuda", "sees none"), ("mps", "no CUDA device"), ("gpu", "is not a device")])
def test_devices_that_are_not_there(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("--device", name)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert message in done.output


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("not loaded: too old", "too old\n"),
        ("loaded: sm_90, /some/where.so; not used on cuda:0: too old", "too old\n"),
        (None, "no kernel image\n"),
    ],
)
def test_the_reference_is_not_measured(monkeypatch, status, said):
    """A GPU where the kernels are not used, or on which nothing runs."""

    def first_call(*_):
        if status is None:
            raise RuntimeError("CUDA error: no kernel image\nfor execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: None)
    monkeypatch.setattr(device, "new_state", lambda *_: None)
    monkeypatch.setattr(device, "observe_", first_call)
    monkeypatch.setattr(device, "kernels", lambda: {"cuda": status})
    done = run("--device", "cuda:0")
    assert done.exit_code == 2 and done.output.endswith(said)
    assert run("--device", "cuda:7").output == "Error: no cuda:7: there are 1 CUDA devices\n"


def test_what_nvidia_smi_says(monkeypatch):
    here = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="01234567-89ab"))
    asked = []
    monkeypatch.setattr(device.subprocess, "run", lambda command, **_: asked.append(command) or types.SimpleNamespace(stdout="580.1\n"))
    assert device.ask(here, "driver_version") == "580.1"
    assert asked[0][:3] == ["nvidia-smi", "--id=GPU-01234567-89ab", "--query-gpu=driver_version"]
    for output, clock in (("1755\n", 1.755e9), ("[N/A]\n", None)):
        asking = types.SimpleNamespace(poll=lambda: 0, communicate=lambda output=output: (output, ""))
        monkeypatch.setattr(device.subprocess, "Popen", lambda *_, asking=asking, **__: asking)
        assert device.clock_under(lambda: None, here) == clock

    def fails(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 1)

    monkeypatch.setattr(device.subprocess, "run", fails)
    assert device.ask(here, "driver_version") is None
    assert H200.slug == "nvidia-h200"
