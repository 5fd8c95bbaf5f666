"""``torchprobe``: arguments, progress and exit codes. What the commands do is in :mod:`torchprobe.studies`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console

import torchprobe
from torchprobe.rendering.tables import plain_table, printable, text

OK, FAILED, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES = """\b
Exit codes:
  0    done
  1    it could not be done; the message says why
  2    the command line is wrong
  3    doctor: a check failed
  130  interrupted (Ctrl-C); what was seen until then was written, if anything was
"""

MODEL = (
    "MODEL is timm:NAME, torchvision:NAME, torchvision:NAME/WEIGHTS or open_clip:NAME/PRETRAINED, such as "
    "timm:vit_small_patch14_dinov2, torchvision:resnet50/IMAGENET1K_V2, open_clip:ViT-B-32/laion2b_s34b_b79k."
)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(torchprobe.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Read each activation of an encoder once, and say what the representation has learned."""


@cli.command(
    epilog=EXIT_CODES, help=f"List the layers of MODEL: class, what is recorded by default, features and where they lie.\n\n{MODEL}"
)
@click.argument("model")
@click.option("--layers", "pattern", multiple=True, metavar="PATTERN", help="Only the layers this name or glob selects; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def layers(model: str, pattern: tuple[str, ...], as_json: bool) -> None:
    from torchprobe.encoders import load_encoder
    from torchprobe.studies.outline import outline

    with _working("building the model"):
        encoder = load_encoder(model, pretrained=False)
        rows = outline(encoder, pattern or None)
    if as_json:
        _print_json({"model": model, "features": encoder.features, "layers": rows})
        return
    table = plain_table("layer", "module", "default", "d", "dim", "per image", right={"d", "dim", "per image"})
    for row in rows:
        numbers = ["–" if row[key] is None else f"{row[key]:,}" for key in ("features", "feature_dim", "vectors_per_image")]
        table.add_row(*map(text, (row["layer"] or "(output)", row["module"], "●" if row["default"] else "", *numbers)))
    out = _console()
    out.print(table)
    out.print(text(f"{len(rows)} layers; ● is recorded by default. d: features; dim: where in the output they lie; per image: vectors."))
    if any(row["features"] is None for row in rows):
        out.print(text("–: gives no tensor of its own in a forward pass, so it cannot be recorded."))


@cli.command(
    epilog=EXIT_CODES,
    help="Does MODEL have outlier features? One look at a folder of images: the vector kurtosis of the representation beside what it is "
    f"read against, the outlier features by index, and the layers. Writes a recording, CSV tables and a page.\n\n{MODEL}",
)
@click.argument("model")
@click.option("--images", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Images, in any folders below.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed: the baseline of the same architecture.")
@click.option(
    "--layers", "pattern", multiple=True, metavar="PATTERN", help="Names or globs of layers; may be repeated.  [default: the blocks]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps …; auto takes an accelerator if there is one.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Threads that decode images.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only so many of the images, chosen at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of --limit, --random-init and the interval.")
@click.option(
    "--output", type=click.Path(path_type=Path), default="torchprobe-scan", show_default=True, metavar="DIR", help="Results go here."
)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def scan(
    model: str,
    folder: Path,
    checkpoint: Path | None,
    random_init: bool,
    pattern: tuple[str, ...],
    batch_size: int,
    device: str,
    workers: int,
    limit: int | None,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    import torch

    from torchprobe.datasets import image_folder
    from torchprobe.encoders import load_encoder
    from torchprobe.rendering import page
    from torchprobe.studies import scan as study
    from torchprobe.studies.scan_text import print_scan

    if checkpoint and random_init:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    place = _device(device)
    page.require()
    images = image_folder(folder, limit, seed)
    torch.manual_seed(seed)
    with _working("loading the model"):
        encoder = load_encoder(model, checkpoint, pretrained=not random_init)
    output.mkdir(parents=True, exist_ok=True)  # rather than fail at the end
    settings = {"images": str(folder), "checkpoint": checkpoint and str(checkpoint), "random_init": random_init, "limit": limit}
    with _interruptible() as stop, _progress(f"{len(images):,} images") as progress:
        result = study.scan(
            encoder,
            images,
            pattern or None,
            batch_size=batch_size,
            device=place,
            workers=workers,
            seed=seed,
            progress=progress,
            stop=stop,
        )
        result.settings.update(settings)
        files = result.write(output)
    if as_json:
        _print_json(result.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_scan(result, _console())
        _print_files(files)
    if result.partial:
        _say(f"Interrupted: these are the first {result.images:,} of {result.total:,} images.")
        raise click.exceptions.Exit(INTERRUPTED)


@cli.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def doctor(as_json: bool) -> None:
    """Versions, which kernels are loaded or why not, and every kernel checked against the reference on this machine."""
    from torchprobe.studies.doctor import examine

    with _working("checking the kernels"):
        found = examine()
    if as_json:
        _print_json(found)
    else:
        out = _console()
        for title in ("versions", "machine", "kernels"):
            table = plain_table(title, "")
            for key, value in found[title].items():
                table.add_row(text(key), text(value or "not installed"))
            out.print(table)
        table = plain_table("check", "", "error", "tolerance", "", right={"error", "tolerance"})
        for check in found["checks"]:
            verdict = text("passed", "green") if check["passed"] else text("FAILED", "bold red")
            table.add_row(text(check["name"]), verdict, f"{check['error']:.1e}", f"{check['tolerance']:.0e}", text(check["detail"]))
        out.print(table)
        out.print(text(f"{sum(check['passed'] for check in found['checks'])} of {len(found['checks'])} checks passed."))
    if not found["passed"]:
        raise click.exceptions.Exit(CHECK_FAILED)


@cli.command(epilog=EXIT_CODES)
@click.option(
    "--output", type=click.Path(path_type=Path), default="torchprobe-demo", show_default=True, metavar="DIR", help="Results go here."
)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def demo(output: Path, as_json: bool) -> None:
    """EfficientNet-Lite0 with its ImageNet weights over real photos, beside the same network at random initialisation."""
    from torchprobe.rendering.tables import layer_table
    from torchprobe.studies import demo as study
    from torchprobe.studies.scan_text import print_representation

    output.mkdir(parents=True, exist_ok=True)  # rather than fail at the end
    with _progress("4 networks") as progress:
        result = study.demo(progress)
        files = result.write(output)
    if as_json:
        _print_json(result.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
        return
    out = _console()
    out.print(text(f"EfficientNet-Lite0 over {result.trained.images} photos, trained on ImageNet and at random initialisation", "bold"))
    out.print(text(f"Sanity: the weights name {result.correct} of the {result.labelled} labelled photos right."))
    out.print()
    out.print(layer_table(result.rows(), columns=study.layer_table_columns(), width=out.width))
    print_representation(result.trained, out, at_random=result.summary()["random"])
    _print_files(files)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with one of the codes above."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", torchprobe.RecordingWarning)
        try:
            code = cli.main(args=arguments, prog_name="torchprobe", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.exceptions.Abort, KeyboardInterrupt):
            _say("Interrupted: nothing was written.")
            code = INTERRUPTED
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            _say(f"Error: {error}")
            code = FAILED
    sys.exit(code or OK)


# -- printing ------------------------------------------------------------------------------------------------------------


def _print_files(files: dict[str, Path]) -> None:
    """The paths, the page last, each whole on its line so that it can be copied."""
    click.echo()
    for kind, path in sorted(files.items(), key=lambda item: item[0] == "page"):
        click.echo(f"{kind:<10} {printable(path.resolve())}")


def _print_json(value: object) -> None:
    from torchprobe.studies.scan import dumps

    click.echo(dumps(value))


def _console() -> Console:
    """Standard output; into a pipe or a file wide enough that names stay whole."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def _say(message: str) -> None:
    """One message on standard error."""
    click.echo("\n".join(map(printable, message.splitlines())), err=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    _say(f"Note: {message}")


# -- running -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """A sign of life on standard error while something of unknown length runs."""
    with Console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
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
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks for an end after the running batch, so that what was seen is whole; the second does not wait."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        _say("Stopping after this batch; Ctrl-C again stops at once.")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here: {str(error).splitlines()[0]}", param_hint="--device") from error
    return name


if __name__ == "__main__":
    main()
