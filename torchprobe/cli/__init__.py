"""``torchprobe``: arguments, progress and exit codes. What the commands do is in :mod:`torchprobe.studies`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import NoReturn

import click

import torchprobe
from torchprobe.cli.dissect_command import dissect
from torchprobe.cli.interpret_command import compare, interpret
from torchprobe.cli.tools import (
    CHECK_FAILED,
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    MODEL,
    OK,
    console,
    device_named,
    interruptible,
    print_files,
    print_json,
    progress_bar,
    say,
    show_warning,
    working,
)
from torchprobe.rendering.tables import plain_table, text


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

    with working("building the model"):
        encoder = load_encoder(model, pretrained=False)
        rows = outline(encoder, pattern or None)
    if as_json:
        print_json({"model": model, "features": encoder.features, "layers": rows})
        return
    table = plain_table("layer", "module", "default", "d", "dim", "per image", right={"d", "dim", "per image"})
    for row in rows:
        numbers = ["–" if row[key] is None else f"{row[key]:,}" for key in ("features", "feature_dim", "vectors_per_image")]
        table.add_row(*map(text, (row["layer"] or "(output)", row["module"], "●" if row["default"] else "", *numbers)))
    out = console()
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
    "--out",
    "--output",
    "output",
    type=click.Path(path_type=Path),
    default="torchprobe-scan",
    show_default=True,
    metavar="DIR",
    help="Results go here.",
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
    place = device_named(device)
    page.require()
    images = image_folder(folder, limit, seed)
    torch.manual_seed(seed)
    with working("loading the model"):
        encoder = load_encoder(model, checkpoint, pretrained=not random_init)
    output.mkdir(parents=True, exist_ok=True)  # rather than fail at the end
    settings = {"images": str(folder), "checkpoint": checkpoint and str(checkpoint), "random_init": random_init, "limit": limit}
    with interruptible() as stop, progress_bar(f"{len(images):,} images") as progress:
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
        print_json(result.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_scan(result, console())
        print_files(files)
    if result.partial:
        say(f"Interrupted: these are the first {result.images:,} of {result.total:,} images.")
        raise click.exceptions.Exit(INTERRUPTED)


@cli.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def doctor(as_json: bool) -> None:
    """Versions, which kernels are loaded or why not, and every kernel checked against the reference on this machine."""
    from torchprobe.studies.doctor import examine

    with working("checking the kernels"):
        found = examine()
    if as_json:
        print_json(found)
    else:
        out = console()
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
    "--out",
    "--output",
    "output",
    type=click.Path(path_type=Path),
    default="torchprobe-demo",
    show_default=True,
    metavar="DIR",
    help="Results go here.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def demo(output: Path, as_json: bool) -> None:
    """EfficientNet-Lite0 with its ImageNet weights over real photos, beside the same network at random initialisation: a scan, and the
    dissection of two layers."""
    from torchprobe.rendering.tables import layer_table
    from torchprobe.studies import demo as study
    from torchprobe.studies.demo_dissection import demo_dissection
    from torchprobe.studies.dissect_pages import print_dissections
    from torchprobe.studies.scan_text import print_representation

    output.mkdir(parents=True, exist_ok=True)  # rather than fail at the end
    with progress_bar("4 networks") as progress:
        result = study.demo(progress)
        files = result.write(output)
    with progress_bar("5 dissections") as progress:
        dissection = demo_dissection(output, progress)
        pages = dissection.write(output / "dissection")
    if as_json:
        paths = {"files": {kind: str(path) for kind, path in [*files.items(), *pages.items()]}}
        print_json(result.summary() | {"dissection": dissection.summary()} | paths)
        return
    out = console()
    out.print(text(f"EfficientNet-Lite0 over {result.trained.images} photos, trained on ImageNet and at random initialisation", "bold"))
    out.print(text(f"Sanity: the weights name {result.correct} of the {result.labelled} labelled photos right."))
    out.print()
    out.print(layer_table(result.rows(), columns=study.layer_table_columns(), width=out.width))
    print_representation(result.trained, out, at_random=result.summary()["random"])
    out.print()
    out.print(text(f"Dissection of two layers over {len(dissection.broden)} pictures", "bold"))
    print_dissections(dissection.results, dissection.nulls, out)
    print_files(pages | files)


for command in (dissect, interpret, compare):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with one of the codes above."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        warnings.simplefilter("always", torchprobe.RecordingWarning)
        try:
            code = cli.main(args=arguments, prog_name="torchprobe", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.exceptions.Abort, KeyboardInterrupt):
            say("Interrupted: nothing was written.")
            code = INTERRUPTED
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            say(f"Error: {error}")
            code = FAILED
    sys.exit(code or OK)
