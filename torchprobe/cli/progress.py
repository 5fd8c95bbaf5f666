"""What the commands say while they work: a bar on a terminal, and lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from torchprobe.cli.tools import say
from torchprobe.common.runs import Clock, CountCallback, Progress

EVERY = 30.0
"""Seconds between two lines in a log, at first; later a twentieth of the time since the start, so that a long run has a short log."""


@contextlib.contextmanager
def working(what: str, quiet: bool = False, log: bool = True) -> Iterator[None]:
    """Shows on standard error that work of unknown length continues: a spinner on a terminal, one line in a log.

    Args:
        what: the work.
        quiet: show nothing.
        log: False for work of a few seconds, which needs no line.
    """
    stderr = Console(stderr=True)
    if log and not stderr.is_terminal and not quiet:
        say(f"{what[:1].upper()}{what[1:]} …")
    with stderr.status(what) if stderr.is_terminal and not quiet else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def loading(model: str, fetch: bool, quiet: bool = False) -> Iterator[None]:
    """Shows on standard error that a model is loaded, and first that its weights may be fetched: without a network this takes minutes.

    Args:
        model: the name of the encoder.
        fetch: whether its weights come from its library, and not from a local file or a random generator.
        quiet: do not say it, because another rank does.
    """
    if fetch and not quiet and not Path(model.partition(":")[2]).expanduser().is_dir():
        say(f"Fetching the weights of {model}, unless they are in the local cache.")
    with working(f"loading {model}", quiet):
        yield


@contextlib.contextmanager
def progress_bar(what: str, unit: str = "images", total: int = 0) -> Iterator[CountCallback]:
    """:func:`stage_bar` of one stage that counts; ``total`` is 0 if it is not known before."""
    with stage_bar() as tell:
        yield stage(tell, what, unit, total)


def stage(tell: Callable[[Progress], object], what: str, unit: str = "images", total: int = 0) -> CountCallback:
    """Counts a stage in a :func:`stage_bar` that is there."""
    clock = Clock(tell, stages=1)
    clock.start(what, 0, total, unit)
    return clock.count


@contextlib.contextmanager
def stage_bar(quiet: bool = False, every: float = EVERY) -> Iterator[Callable[[Progress], None]]:
    """A bar with the remaining time on standard error, for work that reports :class:`torchprobe.common.runs.Progress`.

    If standard error is not a terminal, each stage is a line in the log at once, and then one line every so many seconds.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    start = said = time.monotonic()
    stage: str | None = None
    with Bar(*columns, console=stderr, transient=True, disable=quiet or not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")

        def tell(progress: Progress) -> None:
            nonlocal said, stage
            left = "" if progress.remaining is None else f"{duration(progress.remaining)} left"
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total or None, left=left)
            if quiet or stderr.is_terminal:
                return
            now = time.monotonic()
            if progress.stage != stage or now - said >= max(every, (now - start) / 20):
                said, stage = now, progress.stage
                count = f": {progress.done:,} of {progress.total:,} {progress.unit}" if progress.total else " …"
                say(f"{progress.stage}{count}{', about ' + left if left else ''}")

        yield tell


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> duration(9), duration(75), duration(3 * 3600 + 125)
    ('0:09', '1:15', '3:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
