"""What the commands share: exit codes, what they print and how, progress, interruptions."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from torchprobe.rendering.tables import printable

OK, FAILED, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES = """\b
Exit codes:
  0    done
  1    it could not be done; the message says why
  2    the command line is wrong
  3    doctor: a check failed; dissect --check: the folder has problems
  130  interrupted (Ctrl-C); what was seen until then was written, if anything was
"""

MODEL = (
    "MODEL is timm:NAME, torchvision:NAME, torchvision:NAME/WEIGHTS or open_clip:NAME/PRETRAINED, such as "
    "timm:vit_small_patch14_dinov2, torchvision:resnet50/IMAGENET1K_V2, open_clip:ViT-B-32/laion2b_s34b_b79k."
)


# -- printing ------------------------------------------------------------------------------------------------------------


def print_files(files: dict[str, Path]) -> None:
    """The paths, the page last, each whole on its line so that it can be copied."""
    click.echo()
    for kind, path in sorted(files.items(), key=lambda item: item[0] == "page"):
        click.echo(f"{kind:<10} {printable(path.resolve())}")


def print_json(value: object) -> None:
    from torchprobe.common.files import to_json

    click.echo(to_json(value))


def console() -> Console:
    """Standard output; into a pipe or a file wide enough that names stay whole."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def say(message: str) -> None:
    """One message on standard error."""
    click.echo("\n".join(map(printable, message.splitlines())), err=True)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    say(f"Note: {message}")


# -- running -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A sign of life on standard error while something of unknown length runs."""
    with Console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on standard error; nothing where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks for an end after the running batch, so that what was seen is whole; the second does not wait."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("Stopping after this batch; Ctrl-C again stops at once.")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def device_named(name: str) -> str:
    import torch

    if name == "auto":
        return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here: {str(error).splitlines()[0]}", param_hint="--device") from error
    return name


@contextlib.contextmanager
def stage_bar(quiet: bool = False, every: float = 60.0) -> Iterator[Callable[[Any], None]]:
    """For work that tells a :class:`torchprobe.dissection.Progress`: a bar with the time left on standard error; where that is no terminal,
    a line every so many seconds, so that a log shows it too."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    said = time.monotonic()
    with Progress(*columns, console=stderr, transient=True, disable=quiet or not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")

        def tell(progress: Any) -> None:
            nonlocal said
            left = "" if progress.remaining is None else f"{duration(progress.remaining)} left"
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total, left=left)
            if not (quiet or stderr.is_terminal) and time.monotonic() - said >= every:
                said = time.monotonic()
                say(f"{progress.stage}: {progress.done:,} of {progress.total:,} images{', about ' + left if left else ''}")

        yield tell


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(9), duration(75), duration(3 * 3600 + 125)
    ('0:09', '1:15', '3:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
