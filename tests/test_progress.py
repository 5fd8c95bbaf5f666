"""What a command says in a log: each part at once, then how far it is and how long it will take, now and then."""

from __future__ import annotations

from typing import Any

import pytest

from torchprobe.cli import progress
from torchprobe.common.runs import Clock, Progress, counting


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_lines_of_a_log(time: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.stage_bar() as tell:
        clock = Clock(tell, stages=2)
        clock.start("images: imagenet", 0, 2000)
        assert capsys.readouterr().err == "images: imagenet: 0 of 2,000 images\n"  # before the first batch is done
        for done in range(100, 2001, 100):
            time[0] += 10
            clock.tell(done)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "images: imagenet: 300 of 2,000 images, about 6:10 left"  # 0.1 s each, and the next stage as long
        assert len(lines) == 6  # every 30 s of 200 s
        clock.finish()
        clock.start("captions of the zero-shot head", 0, 1000, "classes")
        clock.start("measures", 0, 0)
        assert capsys.readouterr().err.splitlines() == ["captions of the zero-shot head: 0 of 1,000 classes", "measures …"]


def test_a_long_run_has_a_short_log(time: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.stage_bar() as tell:
        clock = Clock(tell, stages=1)
        clock.start("scan", 0, 86_400)
        for second in range(1, 86_400):
            time[0] = second
            clock.tell(second)
    assert 100 < len(capsys.readouterr().err.splitlines()) < 200  # of a day


def test_a_stage_after_the_last_has_no_negative_time(time: list[float]) -> None:
    told: list[Progress] = []
    clock = Clock(told.append, stages=1)
    clock.start("images", 0, 10)
    clock.finish()
    clock.start("layers", 0, 10)
    time[0] = 5
    clock.tell(5)
    assert told[-1].remaining == 5
    clock.count(6, 0)
    assert told[-1].remaining is None and told[-1].total == 0


def test_counts_begin_when_something_is_done() -> None:
    told: list[tuple[int, int]] = []
    report = counting(lambda *pair: told.append(pair))
    assert report is not None
    for done in (0, 1, 2):
        report(Progress("scan", done, 2, 0.0, None))
    assert told == [(1, 2), (2, 2)] and counting(None) is None


@pytest.mark.parametrize(("quiet", "expected"), [(False, "Loading timm:x …\nscans …\n"), (True, "scans …\n")])
def test_short_and_unknown_work(quiet: bool, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.loading("timm:x", fetch=False, quiet=quiet):
        pass
    with progress.working("checking", log=False):
        pass
    with progress.progress_bar("scans", "networks") as tell:
        tell(1, 4)
    assert capsys.readouterr().err == expected


def test_the_demo_writes_to_a_log_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from torchprobe.cli import main

    def demo(tell: Any) -> None:
        assert capsys.readouterr().err == "scans …\n"  # before anything is loaded
        raise RuntimeError("seen")

    monkeypatch.setattr("torchprobe.studies.demo.demo", demo)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(tmp_path / "out")])
    assert left.value.code == 1 and "seen" in capsys.readouterr().err


def test_captions_report_and_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchprobe.common.runs import RunOptions
    from torchprobe.studies.interpret.inputs import caption_progress

    told: list[Progress] = []
    asked = [False]
    tell = caption_progress(RunOptions(progress=told.append, stop=lambda: asked[0]))
    tell(0, 0)
    tell(3, 1000)
    assert [(one.stage, one.done, one.total, one.unit) for one in told] == [
        ("captions of the zero-shot head", 0, 0, "classes"),
        ("captions of the zero-shot head", 3, 1000, "classes"),
    ]
    asked[0] = True
    with pytest.raises(KeyboardInterrupt):
        tell(6, 1000)
