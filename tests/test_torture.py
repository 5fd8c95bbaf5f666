"""A short form of ``make torture``: some kills of each command, and some changed checkpoints."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from threads import threads
from torch import distributed
from torture.checkpoints import mutate
from torture.commands import COMMANDS
from torture.mutations import mutated
from torture.processes import Ended, differences
from torture.trials import TRIALS, Subject, Told, attempt

for package in ("PIL", "matplotlib", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.slow("runs in processes of their own, killed and hindered")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(tmp_path: Path, name: str) -> None:
    if COMMANDS[name].ranks > 1 and not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    seed = random.SystemRandom().randrange(1 << 30)
    subject = Subject(name, tmp_path / "subject", random.Random(seed))
    for trial in TRIALS:
        count, faults = attempt(subject, trial, 3 if trial == "kills" else 1)
        assert not faults, (trial, count, seed, faults)


@pytest.mark.slow("runs in processes of their own")
def test_a_run_that_had_finished_when_it_was_killed(tmp_path: Path) -> None:
    """A scan is not resumed, and says that its results are there. They are compared all the same."""
    subject = Subject("scan", tmp_path / "subject", random.Random(0))
    whole, spoiled = subject.out(), subject.out()
    for out in (whole, spoiled):
        assert [one.how for one in subject.start(out).end()] == ["ended"]
    (spoiled / "summary.json").write_text("{}")
    assert subject.finish(whole) == [] and subject.finish(spoiled)


def test_dissect_is_killed(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    subject = Subject("dissect", tmp_path / "subject", random.Random(seed))
    count, faults = attempt(subject, "kills", 2)
    assert count >= 2 and not faults, (seed, faults)


def test_changed_checkpoints(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    with threads(1):
        told, faults = mutate(tmp_path, 30, seed)
    assert not faults, (seed, faults)
    assert told["refused"] > 10


def test_a_mutation_is_one() -> None:
    data, moments = bytes(range(256)) * 4, random.Random(0)
    assert all(mutated(data, moments) != data for _ in range(500))


def test_the_runner_sees_faults() -> None:
    """Files that are missing, left or different, and errors that no user can read."""
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b differs", "c is missing"]
    assert differences({"a": "1", "x": "2"}, {"a": "1"}) == ["x is left"]
    assert not Ended("raised", "'key'", "KeyError", ("KeyError", "LookupError", "Exception")).clear
    assert not Ended("hangs").clear
    assert Ended("raised", "no space", "OSError", ("OSError", "Exception")).clear


def test_only_what_took_place_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that came too late is tried again, and its faults are told."""
    told = iter([Told(0, []), Told(1, []), Told(0, ["late"]), Told(3, [])])
    monkeypatch.setitem(TRIALS, "kills", lambda subject: next(told))
    assert attempt(object.__new__(Subject), "kills", 4) == (4, ["late"])
    monkeypatch.setitem(TRIALS, "kills", lambda subject: Told(0, []))
    assert attempt(object.__new__(Subject), "kills", 4) == (0, [])
    assert attempt(object.__new__(Subject), "kills", 4, until=0.0) == (0, [])
