"""``torchprobe watch``: what it reads, the page that it serves, and the table."""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import torchprobe
from torchprobe import cli
from torchprobe.integrations import Monitor
from torchprobe.recording import History
from torchprobe.studies.watch import LAYERS, POINTS, WAITING, Watch, facts, short_names, thinned, trend
from torchprobe.studies.watch_server import serving

HOSTILE = "</script><img src=x onerror=alert(1)>"


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def recorded(path: Path, windows: int = 3, seed: int = 0, bad: int | None = None) -> torchprobe.Recorder:
    model = network()
    with torchprobe.record(model) as rec, torch.no_grad():
        for step in range(1, windows + 1):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed + step)) * step
            if step == bad:
                x[0, 0] = float("nan")
            model(x)
            rec.snapshot(10 * step)
    rec.save(path)
    return rec


def get(address: str, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=30)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


# -- what it reads -----------------------------------------------------------------------------------------------------------


def test_the_curves_are_the_history(tmp_path: Path) -> None:
    first = recorded(tmp_path / "a.safetensors")
    second = recorded(tmp_path / "b.safetensors", windows=5, seed=50)
    watch = Watch([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert watch.refresh()
    for field in ("vector_kurtosis", "std"):
        data = watch.data(field)
        assert data["field"] == field
        assert [layer["name"] for layer in data["layers"]] == ["0", "1", "2", ""]
        assert [layer["label"] for layer in data["layers"]][-1] == "(output)"
        for rec, run in zip((first, second), data["runs"], strict=True):
            for index, curve in enumerate(run["curves"]):
                assert curve["x"] == rec.history.steps
                assert curve["y"] == rec.history[field][:, index].tolist()
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert watch.data()["field"] == "vector_kurtosis"  # the headline
    assert [field["name"] for field in data["fields"]][:5] == list(torchprobe.Moments.metric_fields or ())
    assert {field["name"] for field in data["fields"]} == set(first.history.fields)


def test_layers_are_chosen_by_a_glob_or_a_part_of_the_name(tmp_path: Path) -> None:
    recorded(tmp_path / "a.safetensors")
    watch = Watch([tmp_path / "a.safetensors"])
    watch.refresh()
    chosen = {pattern: [layer["name"] for layer in watch.data("", pattern)["layers"]] for pattern in ("[01]", "2", "output", "none")}
    assert chosen == {"[01]": ["0", "1"], "2": ["2"], "output": [""], "none": []}
    with pytest.raises(ValueError, match="did you mean vector_kurtosis"):
        watch.data("vector_kurtosi")


def test_many_layers_are_counted_not_lost(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(60)])
    with torchprobe.record(model) as rec:
        model(torch.randn(4, 2))
        rec.snapshot(1)
    rec.save(tmp_path / "a.safetensors")
    watch = Watch([tmp_path / "a.safetensors"])
    watch.refresh()
    data = watch.data()
    assert (len(data["layers"]), data["hidden"]) == (LAYERS, 61 - LAYERS)
    assert f"{61 - LAYERS} more layers" in shown(watch)


def test_a_file_is_read_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    watch = Watch([path])
    assert watch.refresh()  # that it waits is news
    assert not watch.refresh()
    assert watch.data()["runs"][0]["state"] == "waiting for the file"
    recorded(path)
    assert watch.refresh() and not watch.refresh()
    assert watch.runs[0].history.steps == [10, 20, 30]
    recorded(path, windows=4)
    assert watch.refresh()
    assert watch.runs[0].history.steps == [10, 20, 30, 40]
    path.write_bytes(b"not a recording")
    assert watch.refresh() and not watch.refresh()
    (run,) = watch.data()["runs"]
    assert "safetensors" in run["problem"]
    assert run["curves"][0]["x"] == [10, 20, 30, 40]  # what was read stays
    path.unlink()
    assert watch.refresh()
    assert "waiting for the file" in watch.data()["runs"][0]["state"]
    path.mkdir()
    watch.refresh()
    assert watch.data()["runs"][0]["problem"]


def test_a_file_that_was_away_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    recorded(path)
    watch = Watch([path])
    assert watch.refresh()
    path.rename(tmp_path / "other")
    assert watch.refresh() and watch.runs[0].problem == WAITING
    (tmp_path / "other").rename(path)
    assert watch.refresh() and watch.runs[0].problem == "" and not watch.refresh()


def test_one_file_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        Watch([tmp_path / "a.safetensors", tmp_path / "b" / ".." / "a.safetensors"])
    assert short_names([tmp_path / "x" / "run.safetensors", tmp_path / "y" / "run.safetensors"]) == ["x/run", "y/run"]
    assert len(set(short_names([tmp_path / "run.a", tmp_path / "run.b"]))) == 2


# -- few numbers -------------------------------------------------------------------------------------------------------------


def test_no_peak_is_lost_in_a_long_history() -> None:
    steps = list(range(0, 100_000, 10))
    values = np.sin(np.arange(10_000) / 500)
    values[[777, 5432, 9998]] = 50, -70, 90
    values[3000:3100] = np.nan
    curve = thinned(steps, values)
    assert len(curve["x"]) <= POINTS + 2
    points = dict(zip(curve["x"], curve["y"], strict=True))
    assert {points[7770], points[54320], points[99980]} == {50, -70, 90}
    assert all(y == values[x // 10] or np.isnan(y) for x, y in points.items())
    assert any(np.isnan(y) for x, y in points.items() if 30_000 <= x < 31_000)  # a gap stays one
    assert curve["x"] == sorted(curve["x"]) and curve["x"][0] == 0 and curve["x"][-1] == 99_990


def test_facts_say_what_is_bad_and_what_changed(tmp_path: Path) -> None:
    rec = recorded(tmp_path / "a.safetensors", windows=6, bad=3)
    step, bad, change = facts(rec.history, "std")
    assert (step["value"], step["note"]) == ("60", "6 windows")
    assert bad == {"label": "nan and inf", "value": str(int(rec.history["nonfinite"].sum())), "note": "first at step 30, layer 0"}
    values = rec.history["std"]
    usual = np.median(values[:-1], axis=0)
    most = np.abs(values[-1] / usual - 1)
    at = int(most.argmax())
    assert change["label"] == "largest change of std"
    assert float(change["value"].strip("+ %")) == pytest.approx(100 * most[at], rel=1e-2)
    assert change["note"].startswith(f"layer {rec.history.layers[at] or '(output)'}: from ")
    watch = Watch([tmp_path / "a.safetensors"])
    watch.refresh()
    assert watch.data("std")["runs"][0]["curves"][0]["bad"] == [30]
    assert facts(History(), "std")[0]["value"] == "0"


def test_trend() -> None:
    assert trend(np.array([])) == ""
    assert trend(np.full(3, 2.5)) == "▁▁▁"
    assert trend(np.array([np.nan, -np.inf])) == "·!"
    assert len(trend(np.arange(100.0))) == 24


# -- the page ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page_packages() -> None:
    for package in ("jinja2", "matplotlib"):
        pytest.importorskip(package)


@pytest.mark.usefixtures("page_packages")
def test_the_page_follows_a_run(tmp_path: Path) -> None:
    path, model, seen = tmp_path / "run.safetensors", network(), []
    with serving(Watch([path])) as address:
        assert json.loads(get(address, "/data.json")[2])["runs"][0]["state"] == "waiting for the file"
        with Monitor(model, log_every=1, save=path) as monitor:
            for _ in range(3):
                model(torch.randn(8, 6))
                monitor.step()
                monitor._next_save = 0.0  # write every window
                seen.append(json.loads(get(address, "/data.json?field=std&layers=0")[2])["runs"][0]["curves"][0]["x"])
    assert seen == [[1], [1, 2], [1, 2, 3]]


@pytest.mark.usefixtures("page_packages")
def test_only_this_machine_and_two_addresses(tmp_path: Path) -> None:
    recorded(tmp_path / "run.safetensors")
    with serving(Watch([tmp_path / "run.safetensors"])) as address:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        port = address.split(":")[2].strip("/")
        for path in ("/etc/passwd", "/../../etc/passwd", "/run.safetensors", "/%2e%2e/", "/data.json/"):
            assert get(address, path)[0] == 404, path
        assert get(address, host=f"127.0.0.1:{port}")[0] == get(address, host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1"):
            status, _, body = get(address, "/data.json", host=host)
            assert status == 403 and "curves" not in body, host
        assert get(address, method="POST")[0] == 501
        status, _, body = get(address, "/data.json?field=" + "x" * 5000)
        assert status == 400 and len(body) < 1000
        status, headers, body = get(address, "/", method="HEAD")
        assert (status, body) == (200, "")
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be used .*--port"), serving(Watch([tmp_path / "b"]), int(port)):
            pass
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        pass
    assert threading.active_count() == 1 or not any("serve_forever" in thread.name for thread in threading.enumerate())


@pytest.mark.usefixtures("page_packages")
def test_readers_that_go_and_addresses_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "run.safetensors")
    with serving(Watch([tmp_path / "run.safetensors"])) as address:
        host, _, port = address.split("/")[2].partition(":")
        for _ in range(20):
            with socket.create_connection((host, int(port))) as reader:
                reader.sendall(f"GET /data.json HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
        with socket.create_connection((host, int(port)), timeout=30) as reader:
            reader.sendall(f"GET http://[::1 HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
            assert reader.recv(12) == b"HTTP/1.0 400"
        assert get(address)[0] == 200
    assert capsys.readouterr().err == ""


def test_the_page_fetches_nothing_and_escapes_names(tmp_path: Path) -> None:
    path = tmp_path / (HOSTILE.replace("/", "") + ".safetensors")
    recorded(path)
    with serving(Watch([path])) as address:
        page = get(address)[2]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", page)
    assert "<img" not in page and html.escape("<img src=x") in page
    assert "innerHTML" not in page and "document.write" not in page and "eval(" not in page


@pytest.mark.slow("starts a browser")
@pytest.mark.usefixtures("page_packages")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_every_layer_and_names_stay_text(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module(HOSTILE.replace(".", ""), nn.Linear(6, 6))
    model.forward = lambda x: getattr(model, HOSTILE.replace(".", ""))(x)  # type: ignore[method-assign]
    with torchprobe.record(model, "**") as rec:
        for step in (1, 2):
            model(torch.randn(4, 6))
            rec.snapshot(step)
    rec.save(tmp_path / "run.safetensors")
    recorded(tmp_path / "other.safetensors", bad=2)
    with serving(Watch([tmp_path / "run.safetensors", tmp_path / "other.safetensors"])) as address:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        done = subprocess.run([*command, "--virtual-time-budget=5000", "--dump-dom", address], capture_output=True, text=True, timeout=120)
    body = done.stdout.partition("<script>")[0]
    assert body.count('<figure class="chart">') == 5  # the two layers of one, and three more of the other
    assert body.count('class="line l0"') >= 2 and body.count('class="line l1"') >= 4
    assert "nan or inf at 20" in body
    assert "<img" not in body and "&lt;img src=x onerror=alert(1)&gt;" in body


# -- the command -------------------------------------------------------------------------------------------------------------


def shown(watch: Watch, *arguments: str) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(watch.terminal(*arguments))
    return capture.get()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["watch", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_the_table_of_one_run_and_of_two(tmp_path: Path) -> None:
    rec = recorded(tmp_path / "a.safetensors", windows=4)
    other = recorded(tmp_path / "b.safetensors", windows=4, seed=9)
    one, two = Watch([tmp_path / "a.safetensors"]), Watch([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    one.refresh()
    two.refresh()
    text = shown(one)
    line = next(line for line in text.splitlines() if line.split()[:1] == ["(output)"])
    expected = [rec.history[field][-1, -1] for field in ("vector_kurtosis", "nonfinite", "abs_max", "std", "kurtosis_max")]
    assert [float(part) for part in line.split()[1:6]] == pytest.approx(expected, rel=1e-3)
    assert "a: step 40, 4 windows, written just now" in text
    line = next(line for line in shown(two, "std").splitlines() if line.split()[:1] == ["0"])
    assert [float(line.split()[at]) for at in (1, 3)] == pytest.approx([r.history["std"][-1, 0] for r in (rec, other)], rel=1e-3)


def test_the_command_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rec = recorded(tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", "--terminal") == 0
    assert "vector kurtosis" in capsys.readouterr().out
    assert run(tmp_path / "a.safetensors", "--json", "--field", "std", "--layers", "0") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"][0]["curves"][0]["y"] == rec.history["std"][:, 0].tolist()
    assert run(tmp_path / "a.safetensors", "--terminal", "--field", "stdd") == 1
    assert "did you mean std" in capsys.readouterr().err
    assert run(tmp_path / "none.safetensors", "--terminal") == 1
    told = capsys.readouterr()
    assert "none.safetensors does not exist" in told.err and not told.out
    (tmp_path / "broken.safetensors").write_bytes(b"no recording")
    assert run(tmp_path / "broken.safetensors", "--terminal") == 1
    assert "broken.safetensors cannot be read" in capsys.readouterr().err
    assert run(tmp_path / "a.safetensors", tmp_path / "none.safetensors", "--terminal") == 0
    assert "none: waiting for the file" in capsys.readouterr().out
    assert run() == 2


@pytest.mark.parametrize("how", [["--terminal"], ["--json"], ["--no-browser", "--port", 0]])
def test_a_pattern_without_a_layer_is_an_error_that_names_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[object]
) -> None:
    recorded(tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", *how, "--layers", "blocks.*") == 1
    told = capsys.readouterr()
    assert "no layer matches 'blocks.*'; there are 0, " in told.err and "(output)" in told.err and not told.out


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_trend_stays_in_a_narrow_terminal(tmp_path: Path, width: int) -> None:
    recorded(tmp_path / "a.safetensors", windows=8)
    watch = Watch([tmp_path / "a.safetensors"])
    watch.refresh()
    console = Console(width=width)
    with console.capture() as capture:
        console.print(watch.terminal())
    text = capture.get()
    assert "trend of" in text and len(re.findall(r"[▁▂▃▄▅▆▇█]{8}", text)) == 4 and "vector" in text
    assert ("not fit" in text) == (width < 80)


def test_a_pattern_without_a_layer_while_the_table_follows(tmp_path: Path) -> None:
    watch = Watch([tmp_path / "a.safetensors"])
    assert watch.unmatched("blocks.*") == ""  # no layer is known yet
    recorded(tmp_path / "a.safetensors")
    watch.refresh()
    text = shown(watch, "", "blocks.*")
    assert "No layer matches 'blocks.*'; there are 0, " in text and "trend" not in text


def test_a_table_that_is_stopped_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchprobe.cli.watch_command.follow_in_terminal", stop)
    assert run(tmp_path / "a.safetensors", "--terminal") == 130
    told = capsys.readouterr().err
    assert "Stopped watching" in told and "written" not in told


@pytest.mark.usefixtures("page_packages")
def test_the_command_serves_until_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path / "a.safetensors")
    opened: list[Any] = []

    def wait(seconds: float) -> None:
        address = capsys.readouterr().out.strip()
        opened.append((address, get(address.partition("#")[0])[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr("torchprobe.cli.watch_command.time.sleep", wait)
    monkeypatch.setattr("torchprobe.cli.watch_command.webbrowser.open", opened.append)
    assert run(tmp_path / "a.safetensors", "--port", 0, "--no-browser", "--field", "std") == 130
    ((address, status),) = opened
    assert status == 200 and address.endswith("/#field=std")
    assert run(tmp_path / "a.safetensors", "--port", 0) == 130
    assert opened[1] == opened[2][0]
    assert os.listdir(tmp_path) == ["a.safetensors"]
