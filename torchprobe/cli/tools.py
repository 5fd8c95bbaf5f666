"""What the commands share: exit codes, options, printing, progress, and interruptions."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from torchprobe.common.files import to_json
from torchprobe.common.runs import CountCallback, Progress
from torchprobe.rendering.tables import printable

if TYPE_CHECKING:
    from torchprobe.encoders import Encoder

OK, FAILED, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def exit_codes(check_failed: str = "") -> str:
    """The list of exit codes at the end of a help page. ``check_failed``: what code 3 means, for commands that use it."""
    codes = {
        OK: "done",
        FAILED: "failed; the message says why",
        USAGE: "wrong command line",
        CHECK_FAILED: check_failed,
        INTERRUPTED: "interrupted (Ctrl-C); results so far were written, if there were any",
    }
    return "\n".join(["\b", "Exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in codes.items() if meaning)])


MODEL = (
    "MODEL is timm:NAME, torchvision:NAME, torchvision:NAME/WEIGHTS, open_clip:NAME/PRETRAINED, hf:NAME or hf:FOLDER (transformers), such "
    "as timm:vit_small_patch14_dinov2, torchvision:resnet50/IMAGENET1K_V2, open_clip:ViT-B-32/laion2b_s34b_b79k, hf:facebook/dinov2-small."
)

Command = TypeVar("Command", bound=Callable[..., object])


# -- options that several commands have ------------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps …; auto uses an accelerator if available."
)
workers_option = click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Threads that decode images.")
texts_option = click.option(
    "--texts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead of images: one text in each line, or JSONL. MODEL is a language model, a text encoder or CLIP.",
)
representation_option = click.option(
    "--representation",
    type=click.Choice(["projection", "pooler", "class", "mean", "last"]),
    help="Which output of an hf: MODEL is the representation.  [default: what its head sees; see the documentation]",
)

layer_option = click.option(
    "--layer", metavar="NAME", help="One layer as the representation, such as visual.blocks.11, instead of the output of MODEL."
)
position_option = click.option(
    "--position",
    type=click.Choice(["class", "patch", "mean", "last", "all"]),
    help="Which positions of --layer are vectors: the class token, each patch, the mean over patches or tokens, the last token, all.",
)


def check_layer(layer: str | None, position: str | None, representation: str | None) -> None:
    """Raises click.UsageError if options about the representation do not fit each other."""
    if layer is None and position is not None:
        raise click.UsageError("--position is one of a --layer; for the output of an hf: MODEL there is --representation")
    if layer is not None and representation is not None:
        raise click.UsageError("--layer and --representation exclude each other; --position says which part of a layer")


def output_option(default: str) -> Callable[[Command], Command]:
    """``--out``, also under the name ``--output``."""
    return click.option(
        *("--out", "--output", "out"),
        type=click.Path(path_type=Path),
        default=default,
        show_default=True,
        metavar="DIR",
        help="Folder for the results.",
    )


# -- printing ------------------------------------------------------------------------------------------------------------


def print_files(files: dict[str, Path]) -> None:
    """Prints the paths, the page last. Each path is on one line, so that it can be copied."""
    click.echo()
    for kind, path in sorted(files.items(), key=lambda item: item[0] == "page"):
        click.echo(f"{kind:<10} {printable(path.resolve())}")


def print_json(value: object) -> None:
    click.echo(to_json(value))


def console() -> Console:
    """Standard output; 160 characters wide in a pipe or a file, so that names are not cut."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def say(message: str) -> None:
    """Prints a message on standard error."""
    click.echo("\n".join(map(printable, message.splitlines())), err=True)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    say(f"Note: {message}")


# -- running -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows on standard error that work of unknown length continues."""
    with Console(stderr=True).status(what):
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
    with working("loading the model"):
        yield


def encoder_of(model: str, checkpoint: Path | None, random_init: bool, representation: str | None = None, texts: bool = False) -> Encoder:
    """The encoder that MODEL and its options name: of texts, or of images.

    Raises:
        click.UsageError: it is an encoder of texts, and there are images.
    """
    from torchprobe.encoders import TextEncoder, load_encoder

    encoder = load_encoder(model, checkpoint, pretrained=not random_init)
    if texts:
        encoder = encoder.for_texts()
    elif isinstance(encoder, TextEncoder):
        raise click.UsageError(f"{model} encodes texts, not images: give --texts FILE")
    return encoder if representation is None else encoder.choose(representation)


def check_output(folder: Path) -> None:
    """Checks before a long run that its results can be written, without making the folder.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"the results cannot be written to {folder}: {existing} is not a folder; choose another one with --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"the results cannot be written to {folder}: no permission to write in {existing}; choose another --out")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[CountCallback]:
    """A bar with the remaining time on standard error; nothing if standard error is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C stops the run after the present batch, so that the results so far are complete. The second stops it at once."""
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
    """The device of ``--device``.

    Raises:
        click.BadParameter: it cannot be used on this machine.
    """
    import torch

    if name == "auto":
        return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here: {str(error).splitlines()[0]}", param_hint="--device") from error
    return name


@contextlib.contextmanager
def stage_bar(quiet: bool = False, every: float = 60.0) -> Iterator[Callable[[Progress], None]]:
    """A bar with the remaining time on standard error, for work that reports :class:`torchprobe.common.runs.Progress`.

    If standard error is not a terminal, a line is printed every so many seconds, so that a log shows the progress.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    said = time.monotonic()
    with Bar(*columns, console=stderr, transient=True, disable=quiet or not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")

        def tell(progress: Progress) -> None:
            nonlocal said
            left = "" if progress.remaining is None else f"{duration(progress.remaining)} left"
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total, left=left)
            if not (quiet or stderr.is_terminal) and time.monotonic() - said >= every:
                said = time.monotonic()
                say(f"{progress.stage}: {progress.done:,} of {progress.total:,} images{', about ' + left if left else ''}")

        yield tell


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> duration(9), duration(75), duration(3 * 3600 + 125)
    ('0:09', '1:15', '3:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
