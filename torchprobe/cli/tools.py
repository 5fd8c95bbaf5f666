"""What the commands share: exit codes, options, printing, progress, and interruptions."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from torchprobe.common.files import to_json
from torchprobe.common.folders import file_name, output_folder
from torchprobe.common.ranks import RankLostError, Ranks, joined
from torchprobe.common.runs import CountCallback
from torchprobe.rendering.tables import printable

if TYPE_CHECKING:
    from torchprobe.datasets import ImageSet
    from torchprobe.encoders import Encoder

OK, FAILED, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def exit_codes(check_failed: str = "") -> str:
    """The list of exit codes at the end of a help page. ``check_failed``: what code 3 means, for commands that use it."""
    codes = {
        OK: "done",
        FAILED: "failed; the message says why",
        USAGE: "wrong command line",
        CHECK_FAILED: check_failed,
        INTERRUPTED: "interrupted (Ctrl-C, SIGTERM); results so far were written, if any",
    }
    return "\n".join(["\b", "Exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in codes.items() if meaning)])


MODEL = (
    "MODEL is timm:NAME, torchvision:NAME, torchvision:NAME/WEIGHTS, open_clip:NAME/PRETRAINED, hf:NAME or hf:FOLDER (transformers), such "
    "as timm:vit_small_patch14_dinov2, torchvision:resnet50/IMAGENET1K_V2, open_clip:ViT-B-32/laion2b_s34b_b79k, hf:facebook/dinov2-small."
)

Command = TypeVar("Command", bound=Callable[..., object])


# -- options that several commands have ------------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print only JSON.")


class Where(click.ParamType):  # type: ignore[type-arg]
    """A folder, or shards, an address or a data set; see :func:`torchprobe.datasets.open_images`."""

    name = "WHERE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        from torchprobe.datasets.readers import is_elsewhere

        return str(value) if is_elsewhere(value) else Path(value)


def images_option(help: str, required: bool = False) -> Callable[[Command], Command]:
    """``--images``. ``help``: what is special about it here; the parameter is called ``folder``."""
    more = "Also tar shards, 's/{000..009}.tar'; s3://…, gs://…; hf-datasets:NAME@SPLIT."
    return click.option("--images", "folder", type=Where(), metavar="WHERE", required=required, help=f"{help} {more}")


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


class FeatureDims(click.ParamType):  # type: ignore[type-arg]
    """DIM, or LAYER=DIM."""

    name = "[LAYER=]DIM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        layer, equals, dim = str(value).rpartition("=")
        try:
            return (layer if equals else "**"), int(dim)
        except ValueError:
            self.fail(f"{value!r} is neither a dimension, such as 1, nor LAYER=DIM, such as visual.blocks.*=1", param, ctx)


feature_dim_option = click.option(
    "--feature-dim",
    "feature_dims",
    multiple=True,
    type=FeatureDims(),
    help="Which dimension of a layer holds its features, where a table says unsure: of all layers, or LAYER=DIM (a name or a glob); may "
    "be repeated.",
)


def feature_dim_of(pairs: Sequence[tuple[str, int]]) -> dict[str, int] | None:
    """The values of ``--feature-dim`` as ``feature_dim=`` takes them; what is about one layer goes before what is about all.

    >>> feature_dim_of([("visual.mixer", 1), ("**", 2)]), feature_dim_of([])
    ({'**': 2, 'visual.mixer': 1}, None)
    """
    return dict(sorted(pairs, key=lambda pair: pair[0] != "**")) or None


def features_of(text: str | None) -> tuple[int, ...] | None:
    """The features of "442,362"."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of indices such as 442,362", param_hint="--features") from None
    if min(found) < 0 or len(set(found)) < len(found):
        raise click.BadParameter(f"{text!r} has an index below 0, or one twice", param_hint="--features")
    return found


def inputs_of(folder: Path | str | None, texts: Path | None, limit: int | None, seed: int) -> ImageSet:
    """The images or the texts of a command that takes either.

    Raises:
        click.UsageError: both were given, or neither.
    """
    from torchprobe.datasets import open_images, text_file

    if folder is not None and texts is None:
        return open_images(folder, limit, seed, labels=False)
    if texts is not None and folder is None:
        return text_file(texts, limit, seed)
    raise click.UsageError("Missing option '--images' or '--texts'." if folder is None else "give either --images or --texts")


def check_layer(layer: str | None, position: str | None, representation: str | None) -> None:
    """Raises click.UsageError if options about the representation do not fit each other."""
    if layer is None and position is not None:
        raise click.UsageError("--position is one of a --layer; for the output of an hf: MODEL there is --representation")
    if layer is not None and representation is not None:
        raise click.UsageError("--layer and --representation exclude each other; --position says which part of a layer")


def output_option(command: str, of: str = "MODEL") -> Callable[[Command], Command]:
    """``--out``, also under the name ``--output``, and ``--overwrite``.

    Args:
        command: whose results go there; see :func:`output_named`.
        of: what stands for the rest of the default name.
    """
    out = click.option(
        *("--out", "--output", "out"),
        type=click.Path(path_type=Path),
        metavar="DIR",
        help=f"Folder for the results.  [default: torchprobe-{command}{of and '-' + of}]",
    )
    overwrite = click.option(
        "--overwrite", is_flag=True, help="Replace the run that is in --out: its files are removed, and no others. Without it, it is kept."
    )
    return lambda function: out(overwrite(function))


def output_named(out: Path | None, command: str, *of: str | os.PathLike[str]) -> Path:
    """The folder of ``--out``, or the default, which differs from command to command and from model to model.

    >>> str(output_named(None, "scan", "timm:vit_tiny")), str(output_named(None, "compare", "a/one", "a/two", "three"))
    ('torchprobe-scan-timm_vit_tiny', 'torchprobe-compare-one-two-and-1-more')
    """
    if out is not None:
        return out
    names = [file_name(os.fspath(one) if command in _OF_MODELS else Path(one).resolve().name) for one in of]
    more = [f"and-{len(names) - 2}-more"] if len(names) > 2 else []
    return Path("-".join(["torchprobe", command, *names[:2], *more]))


_OF_MODELS = ("scan", "quantize-check", "dissect", "words", "interpret")
"""Commands whose default folder has the name of a model; of the others, those of folders."""


@contextlib.contextmanager
def run_in(
    folder: Path,
    command: str,
    of: str,
    resume: bool | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> Iterator[None]:
    """Within the block, the folder is that of one run, which the ranks of ``torchrun`` share. See
    :func:`torchprobe.common.folders.output_folder`.

    Raises:
        click.UsageError: ``--resume`` together with ``--overwrite``, or ``torchrun`` with a command that no ranks share.
    """
    if resume and overwrite:
        raise click.UsageError("--resume continues the run in --out, and --overwrite removes it: give one of them")
    if not joined():
        raise click.UsageError(f"torchprobe {command} is one process: run it without torchrun")
    with Ranks() as ranks, output_folder(folder, command, of=of, resume=resume, overwrite=overwrite, inputs=inputs, ranks=ranks):
        yield


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
    """Prints a message on standard error. Lines after the first are indented, so that no name in it can look like a message of its own."""
    click.echo("\n  ".join(map(printable, message.splitlines() or [""])), err=True)


def say_error(error: BaseException) -> None:
    """Prints an error on standard error: the one place that does so."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"Try '{error.ctx.command_path} --help' for help.\n", err=True)
    say(f"Error: {error.format_message() if isinstance(error, click.ClickException) else str(error) or type(error).__name__}")


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    say(f"Note: {message}")


@contextlib.contextmanager
def printable_everywhere() -> Iterator[None]:
    """Within the block, standard output and error print a character that their encoding does not have as an escape, such as \\u732b. A long
    run must not fail in its last line because of a name, or of a dash, in a terminal or a file that is not UTF-8."""
    streams = [one for one in (sys.stdout, sys.stderr) if isinstance(one, io.TextIOWrapper) and one.errors == "strict"]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in streams:
            if not stream.closed:
                stream.reconfigure(errors="strict")


# -- running -------------------------------------------------------------------------------------------------------------


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


SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what ``kill``, a batch system or ``torchrun`` sends to end a process."""


@contextlib.contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles :data:`SIGNALS` during the block. Only the main thread can; in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """During the block, SIGTERM raises KeyboardInterrupt, as Ctrl-C does. An error that comes after it is the interrupt, too: compiled code
    of libraries may lose the exception and then say that something else is wrong."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    with _handling(handle):
        try:
            yield
        except Exception as error:
            if asked:
                raise KeyboardInterrupt from error
            raise


@contextlib.contextmanager
def interruptible(step: str = "batch") -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM stops the run after the present ``step``, so that the results so far are complete. The second stops it at
    once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say(f"Stopping after this {step}; Ctrl-C again stops at once.")

    with _handling(handle):
        try:
            yield lambda: asked
        except RankLostError as error:
            if asked:  # the others have stopped a batch earlier
                raise KeyboardInterrupt from error
            raise


def stopping(tell: CountCallback, stop: Callable[[], bool]) -> CountCallback:
    """Tells the progress, and raises KeyboardInterrupt if ``stop`` returns True: a step that has begun ends first."""

    def step(done: int, total: int) -> None:
        tell(done, total)
        if stop():
            raise KeyboardInterrupt

    return step


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
