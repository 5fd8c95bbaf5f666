"""What is done to runs. Each trial is one attempt: how often the thing took place, and the faults that it found."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .commands import COMMANDS, paint
from .processes import Ended, Running, Setting, differences, tree

MOST_KILLS = 8
"""A run is killed fewer times than this before it may end."""

MOST_ATTEMPTS = 8
"""Attempts for each time that a trial shall take place."""

FINISHED = ("nothing to resume", "holds the results of")
"""What a command says that was killed when all was done, if it resumes and if it does not. The results are there, and are compared."""

SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGINT, signal.SIGTERM)


class Told(NamedTuple):
    """``count``: how often something took place. ``faults``: what went wrong."""

    count: int
    faults: list[str]


@dataclass
class Subject:
    """A command with its inputs, the right results, and the seconds that a run takes."""

    name: str
    folder: Path
    moments: random.Random
    right: dict[str, str] = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.inputs, self.place = self.folder / "inputs", 0
        self.inputs.mkdir(parents=True)
        COMMANDS[self.name].prepare(self.inputs)
        self.right, self.seconds = self.whole(self.inputs)
        again, _ = self.whole(self.inputs)
        if wrong := differences(again, self.right):
            raise AssertionError(f"{self.name}: two runs that nobody disturbed differ: {wrong[:5]}")

    def out(self) -> Path:
        """A new output folder, in a folder of its own."""
        self.place += 1
        folder = self.folder / f"{self.place:05}"
        folder.mkdir()
        return folder / "out"

    def start(self, out: Path, setting: Setting | None = None, inputs: Path | None = None) -> Running:
        return Running(self.name, inputs or self.inputs, out, setting or Setting(resume=out.exists()))

    def whole(self, inputs: Path) -> tuple[dict[str, str], float]:
        """The results of a run that nobody disturbs."""
        out = self.out()
        running, begun = self.start(out, inputs=inputs), time.monotonic()
        ended, seconds = running.end(), time.monotonic() - begun
        if any(one.how != "ended" for one in ended):
            raise AssertionError(f"{self.name} does not run: {ended}; see {out.parent / 'log'}")
        found = tree(out)
        shutil.rmtree(out.parent)
        return found, seconds

    def finish(self, out: Path, right: dict[str, str] | None = None) -> list[str]:
        """Resumes what is there, to the end; the faults."""
        ended = self.start(out).end()
        faults = [f"resume: {one.how} {one.kind}: {one.error[:300]}" for one in ended if not _whole(one)]
        faults = faults or differences(tree(out), self.right if right is None else right)
        if not faults and (left := [path.name for path in (out.parent / "temporary").iterdir()]):
            faults = [f"temporary files are left: {left[:3]}"]
        if not faults:
            shutil.rmtree(out.parent)
        return faults

    def disturbed(self, disturb: Callable[[Running, Path], object], setting: Setting | None = None) -> tuple[Path, list[Ended]]:
        """A new run that is disturbed while it runs: its folder, and how its ranks ended."""
        out = self.out()
        running = self.start(out, setting)
        disturb(running, out)
        return out, running.end()


def _whole(one: Ended) -> bool:
    """Whether it made the results, or says that they are there."""
    return one.how == "ended" or any(said in one.error for said in FINISHED)


def kills(subject: Subject) -> Told:
    """A run is killed at a random moment of the time that a whole run takes, and resumed, a few times; then it ends."""
    out, told, ended, faults = subject.out(), list[str](), list[Ended](), list[str]()
    for _ in range(subject.moments.randrange(1, MOST_KILLS)):
        running = subject.start(out)
        time.sleep(subject.moments.uniform(0, subject.seconds))
        number = subject.moments.choice([one for one in SIGNALS if one != signal.SIGINT or not COMMANDS[subject.name].partial])
        alive = running.alive
        running.kill(number)
        ended = running.end()
        if not alive or all(one.how == "ended" for one in ended):
            break
        told.append(signal.Signals(number).name)
        if wrong_errors := [one for one in ended if one.how == "raised" and not one.clear]:
            faults.append(f"{told[-1]}: {wrong_errors[0].kind}: {wrong_errors[0].error[:300]}; see {out.parent}")
    if any(one.how != "ended" for one in ended):
        ended = subject.start(out).end()
    if refused := [one for one in ended if not _whole(one)]:
        faults.append(f"after {told}: {refused[0].how} {refused[0].kind}: {refused[0].error[:300]}; see {out.parent}")
    elif wrong := differences(tree(out), subject.right):
        faults.append(f"after {told}: {wrong[:5]}; see {out.parent}")
    if not faults:
        shutil.rmtree(out.parent)
    return Told(len(told), faults)


def full_disk(subject: Subject) -> Told:
    """No file may become larger than a random size. What was saved before is resumed with room."""
    most = int(2 ** subject.moments.uniform(6, 18))
    out, ended = subject.disturbed(lambda running, out: None, Setting(most=most))
    if all(one.how == "ended" for one in ended):  # there was room for all of it
        return Told(0, differences(tree(out), subject.right))
    if unclear := [one for one in ended if one.how != "ended" and not one.clear]:
        return Told(1, [f"files of {most} bytes at most: {unclear[0]}; see {out.parent}"])
    wrong = subject.finish(out)
    return Told(1, [f"files of {most} bytes at most, then resumed: {wrong[:5]}; see {out.parent}"] if wrong else [])


def read_only(subject: Subject) -> Told:
    """A folder with half a run, in which nothing can be written."""
    out, halves = subject.disturbed(lambda running, out: (_wait(subject), running.kill()))
    if not out.exists():
        out.mkdir()
    before, modes = tree(out), {path: path.stat().st_mode for path in (out, *out.rglob("*"))}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    ended = subject.start(out, Setting(resume=True, ordinary=True)).end()
    for path, mode in modes.items():
        path.chmod(mode)
    faults = list[str]()
    if any(not one.clear and one.how != "ended" for one in ended):
        faults.append(f"read-only: {ended[0]}; see {out.parent}")
    elif tree(out) != before:
        faults.append(f"read-only, but changed: {differences(tree(out), before)[:5]}; see {out.parent}")
    elif wrong := subject.finish(out):
        faults.append(f"was read-only: {wrong[:5]}; see {out.parent}")
    return Told(int(any(one.how != "ended" for one in halves)), faults)


def removed(subject: Subject) -> Told:
    """The output folder is removed while the run writes to it."""
    took_place = False

    def remove(running: Running, out: Path) -> None:
        nonlocal took_place
        _wait(subject)
        took_place = running.alive and out.exists()
        shutil.rmtree(out, ignore_errors=True)

    out, ended = subject.disturbed(remove)
    if unclear := [one for one in ended if one.how != "ended" and not one.clear]:
        return Told(1, [f"removed: {unclear[0]}; see {out.parent}"])
    shutil.rmtree(out, ignore_errors=True)  # what the run wrote after that is not known to be whole
    wrong = subject.finish(out)
    return Told(int(took_place), [f"after it was removed: {wrong[:5]}; see {out.parent}"] if wrong else [])


def two_processes(subject: Subject) -> Told:
    """A second run of the same folder begins while the first one is there: it is refused, or comes after it."""
    out = subject.out()
    first = subject.start(out)
    _wait(subject)
    second = subject.start(out, Setting(resume=True))
    both, faults = first.alive, list[str]()
    ended = [*first.end(), *second.end()]
    if unclear := [one for one in ended if one.how != "ended" and not one.clear]:
        faults.append(f"two processes: {unclear[0]}; see {out.parent}")
    elif all(one.how != "ended" for one in ended):
        faults.append(f"two processes, and none ended: {ended[0].error[:200]} and {ended[-1].error[:200]}; see {out.parent}")
    elif wrong := differences(tree(out), subject.right):
        faults.append(f"two processes: {wrong[:5]}; see {out.parent}")
    else:
        shutil.rmtree(out.parent)
    return Told(int(both), faults)


def replaced(subject: Subject) -> Told:
    """An input is replaced between a stop and a resume: refused, or the results of a run of the inputs that are there now."""
    inputs = subject.folder / "replaced"
    shutil.rmtree(inputs, ignore_errors=True)
    shutil.copytree(subject.inputs, inputs)
    out, faults = subject.out(), list[str]()
    running = subject.start(out, inputs=inputs)
    _wait(subject)
    running.kill()
    if all(one.how == "ended" for one in running.end()):
        shutil.rmtree(out.parent)
        return Told(0, [])
    files = sorted(path for pattern in COMMANDS[subject.name].pictures for path in inputs.glob(pattern))
    changed = subject.moments.choice(files)
    facts, before = changed.stat(), changed.read_bytes()
    paint(changed, subject.moments)
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    took_place = changed.read_bytes() != before
    ended = subject.start(out, inputs=inputs).end()
    if unclear := [one for one in ended if one.how != "ended" and not one.clear]:
        faults.append(f"{changed.name} replaced: {unclear[0]}; see {out.parent}")
    elif any(one.how == "ended" for one in ended) and (wrong := differences(tree(out), subject.whole(inputs)[0])):
        faults.append(f"{changed.name} replaced, and mixed: {wrong[:5]}; see {out.parent}")
    else:
        shutil.rmtree(out.parent)
    return Told(int(took_place), faults)


def lost_rank(subject: Subject) -> Told:
    """One of several ranks is killed: the others say so, and the run is resumed."""
    lost = subject.moments.randrange(COMMANDS[subject.name].ranks)
    out, ended = subject.disturbed(lambda running, out: (_wait(subject), running.kill(ranks=[lost])))
    if ended[lost].how == "ended":
        return Told(0, [])
    if wrong_ones := [one for rank, one in enumerate(ended) if rank != lost and one.how != "ended" and not one.clear]:
        return Told(1, [f"rank {lost} lost: {wrong_ones[0]}; see {out.parent}"])
    wrong = subject.finish(out)
    return Told(1, [f"rank {lost} lost, then resumed: {wrong[:5]}; see {out.parent}"] if wrong else [])


def _wait(subject: Subject) -> None:
    time.sleep(subject.moments.uniform(0, subject.seconds))


TRIALS: dict[str, Callable[[Subject], Told]] = {
    "kills": kills,
    "full disk": full_disk,
    "read-only": read_only,
    "removed": removed,
    "two processes": two_processes,
    "replaced": replaced,
    "lost rank": lost_rank,
}


def attempt(subject: Subject, trial: str, count: int, until: float = math.inf) -> Told:
    """Repeats a trial until it took place so often, or the time (monotonic) is over.

    Attempts that came too late, when the run had ended, count only by their faults.
    """
    if trial == "lost rank" and COMMANDS[subject.name].ranks < 2:
        return Told(0, [])
    done, faults = 0, list[str]()
    for _ in range(MOST_ATTEMPTS * count):
        if done >= count or time.monotonic() > until:
            break
        told = TRIALS[trial](subject)
        done += told.count
        faults += told.faults
    return Told(done, faults)
