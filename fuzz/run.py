"""Runs cases in a process of their own, and says what is a fault."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fuzz.mutation import mutate
from fuzz.target import Target, targets

SLOWEST = 10.0
"""Seconds of one case: of work, or six times as many by the clock, since a busy machine is no fault."""
MOST_MEMORY = 1 << 30
"""Bytes that one case may take."""
_ADDRESSES = 4 << 30  # beyond what the process has, so that a fault does not take the machine's memory

NEVER = (
    AssertionError, AttributeError, IndexError, KeyError, MemoryError, NameError, OverflowError, RecursionError, UnicodeError,
    ZeroDivisionError,
)  # fmt: skip
"""Never the documented error, unless a target names one of them itself."""


@dataclass(frozen=True)
class Fault:
    """``kind``: "exception", "believed", "memory", "hang" or "crash". ``where``: equal for equal faults."""

    target: str
    seed: int
    case: int
    kind: str
    what: str
    where: str


@dataclass
class Tally:
    """``cases``: how many ran. ``refused``: with a documented error. ``equal``, ``different``: read, with the result of the valid file or
    another. ``faults``: the first of each kind and place; ``counts``: how many there were of each."""

    cases: int = 0
    refused: int = 0
    equal: int = 0
    different: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def fault(self, fault: Fault) -> None:
        key = f"{fault.kind} {fault.where}"
        self.counts[key] += 1
        if self.counts[key] == 1:
            self.faults.append(fault)


class Case:
    """The files of one target in a folder, of which one is changed for each case."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        folder.mkdir(parents=True)
        target.make(folder)
        self.valid = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        if missing := [name for name in target.files if folder / name not in self.valid]:
            raise FileNotFoundError(f"{target.name} does not make its file {missing[0]}")
        self.right = digest(target.read(folder))
        self._restore()

    def change(self, seed: int, number: int) -> tuple[str, bytes]:
        """The file that a case changes, and its content."""
        rng = random.Random(f"{self.target.name}/{seed}/{number}")
        name = rng.choice(sorted(self.target.files))
        return name, mutate(self.valid[self.folder / name], self.target.files[name], rng)

    def run(self, seed: int, number: int, tally: Tally) -> None:
        """Runs a case and counts its result."""
        name, content = self.change(seed, number)
        path = self.folder / name
        path.unlink(missing_ok=True)  # a mapped file is never changed below its reader
        path.write_bytes(content)
        before, began, worked = _peak(), time.perf_counter(), time.process_time()
        try:
            found = digest(self.target.read(self.folder))
        except self.target.errors as error:
            tally.refused += 1
            self._judge(error, seed, number, tally)
        except Exception as error:
            tally.fault(self._fault(seed, number, "exception", error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            tally.fault(self._fault(seed, number, "exception", error))  # a panic of a Rust library is no Exception
        else:
            same = found == self.right
            tally.equal += same
            tally.different += not same
            if not same and name in self.target.guarded:
                what = f"{name} was changed and read without an error, with another result"
                tally.fault(Fault(self.target.name, seed, number, "believed", what, name))
        tally.cases += 1
        took = max(time.process_time() - worked, (time.perf_counter() - began) / 6)
        if took > SLOWEST:
            tally.fault(Fault(self.target.name, seed, number, "hang", f"{took:.0f} seconds", name))
        if (grown := _peak() - before) > MOST_MEMORY:
            tally.fault(
                Fault(self.target.name, seed, number, "memory", f"{grown / 2**30:.1f} GiB for a file of {len(content):,} bytes", name)
            )
        if self.target.restore:
            self._restore()
        else:
            path.unlink(missing_ok=True)
            path.write_bytes(self.valid[path])

    def _judge(self, error: BaseException, seed: int, number: int, tally: Tally) -> None:
        """A documented error may be a wrong one, or hide that memory was asked for."""
        if isinstance(error, NEVER) and not any(type(error) is kind for kind in self.target.errors):
            tally.fault(self._fault(seed, number, "exception", error))
        chain: BaseException | None = error
        while chain is not None:
            if isinstance(chain, MemoryError) or "allocate memory" in str(chain):
                tally.fault(self._fault(seed, number, "memory", error))
                return
            chain = chain.__cause__ or chain.__context__

    def _fault(self, seed: int, number: int, kind: str, error: BaseException) -> Fault:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "torchprobe" in frame.filename] or frames
        where = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
        lines = traceback.format_exception(error)
        return Fault(self.target.name, seed, number, kind, "".join(lines)[-6000:], where)

    def _restore(self) -> None:
        shutil.rmtree(self.folder)
        for path, content in self.valid.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def digest(value: Any) -> str:
    """A digest of plain values, arrays and tensors, nan equal to nan."""
    state = hashlib.sha256()
    _add(state, value)
    return state.hexdigest()


def _add(state: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        state.update(b"{")
        for key in value:
            _add(state, key)
            _add(state, value[key])
    elif isinstance(value, (list, tuple)):
        state.update(b"[%d" % len(value))
        for item in value:
            _add(state, item)
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        state.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        state.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):
        state.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        state.update(f"{type(value).__name__}{value!r}".encode("utf-8", "surrogatepass"))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- processes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """The cases ``first`` … ``last`` − 1 of a target, or as many of them as ``minutes`` allow."""

    target: str
    seed: int
    first: int
    last: int
    minutes: float | None = None


def run(jobs: Sequence[Job], found: Mapping[str, Target] | None = None) -> dict[str, Tally]:
    """Runs jobs one after the other in a process that is replaced when it hangs or crashes.

    ``found``: the targets by name, importable at the top of a module; default: those of :mod:`fuzz.targets`.
    """
    tallies = {job.target: Tally() for job in jobs}
    waiting = list(jobs)
    while waiting:
        waiting = _supervise(waiting, tallies, found)
    return tallies


def _supervise(jobs: list[Job], tallies: dict[str, Tally], found: Mapping[str, Target] | None) -> list[Job]:
    """Runs jobs in one process; returns what is left to do if it was lost."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, jobs, found), daemon=True)
    process.start()
    theirs.close()
    at, number, kind = 0, jobs[0].first - 1, "hang"
    silence = time.monotonic() + 60 * SLOWEST  # imports take a while
    try:
        while kind == "hang":
            if ours.poll(1.0):
                try:
                    message = ours.recv()
                except EOFError:
                    kind = "crash"
                    break
                silence = time.monotonic() + 6 * SLOWEST
                if message[0] == "start":
                    at, number = message[1], message[2]
                elif message[0] == "tally":
                    _add_up(tallies[jobs[message[1]].target], message[2])
                elif message[0] == "broken":
                    raise RuntimeError(f"not the reader, but the target {jobs[at].target} or the runner failed:\n{message[1]}")
                else:
                    return []
            elif time.monotonic() > silence:
                break
    finally:
        if kind == "hang":
            process.kill()
        process.join()
    job = jobs[at]
    what = f"the process ended with {process.exitcode}" if kind == "crash" else f"no answer for {6 * SLOWEST:.0f} seconds"
    tallies[job.target].fault(Fault(job.target, job.seed, number, kind, what, "the process"))
    rest = Job(job.target, job.seed, max(number + 1, job.first), job.last, job.minutes)
    return [rest, *jobs[at + 1 :]] if rest.first < rest.last else jobs[at + 1 :]


def _work(connection: Connection, jobs: Sequence[Job], found: Mapping[str, Target] | None) -> None:
    warnings.simplefilter("ignore")
    os.fsync = lambda fd: None  # the disk is not tested here, and takes most of the time
    try:
        found = targets() if found is None else found
        with tempfile.TemporaryDirectory(prefix="torchprobe-fuzz-") as folder:
            for at, job in enumerate(jobs):
                _carry_out(connection, at, job, Case(found[job.target], Path(folder, f"{at}")))
    except Exception:
        connection.send(("broken", traceback.format_exc()))
    else:
        connection.send(("done",))


def _carry_out(connection: Connection, at: int, job: Job, case: Case) -> None:
    _bound_addresses()
    started = told = time.monotonic()
    tally = Tally()
    for number in range(job.first, job.last):
        connection.send(("start", at, number))
        case.run(job.seed, number, tally)
        now = time.monotonic()
        if now - told > 5 or tally.faults:  # so that little is lost with the process
            tally.seconds = now - told
            connection.send(("tally", at, tally))
            tally, told = Tally(), now
        if job.minutes is not None and now - started > 60 * job.minutes:
            break
    tally.seconds = time.monotonic() - told
    connection.send(("tally", at, tally))


def _add_up(total: Tally, part: Tally) -> None:
    total.cases += part.cases
    total.refused += part.refused
    total.equal += part.equal
    total.different += part.different
    total.seconds += part.seconds
    seen = set(total.counts)
    total.faults += [fault for fault in part.faults if f"{fault.kind} {fault.where}" not in seen]
    total.counts += part.counts


def _bound_addresses() -> None:
    """Bounds the addresses of this process to what it has and :data:`_ADDRESSES` more, where the system says how much that is."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ADDRESSES, hard))
