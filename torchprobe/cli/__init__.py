"""``torchprobe``: arguments, progress and exit codes. :mod:`torchprobe.studies` does the work."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

import torchprobe
from torchprobe.cli.completion_command import completion
from torchprobe.cli.concepts_command import concepts
from torchprobe.cli.diff_command import diff
from torchprobe.cli.dissect_command import dissect
from torchprobe.cli.interpret_command import compare, interpret
from torchprobe.cli.progress import loading, progress_bar, working
from torchprobe.cli.quantize_command import quantize_check
from torchprobe.cli.segment_command import segment
from torchprobe.cli.tools import (
    CHECK_FAILED,
    FAILED,
    INTERRUPTED,
    MODEL,
    OK,
    check_layer,
    check_output,
    console,
    device_named,
    device_option,
    encoder_of,
    exit_codes,
    feature_dim_of,
    feature_dim_option,
    images_option,
    inputs_of,
    interruptible,
    json_option,
    layer_option,
    output_named,
    output_option,
    position_option,
    print_files,
    print_json,
    printable_everywhere,
    representation_option,
    run_in,
    say,
    say_error,
    show_warning,
    terminable,
    texts_option,
    workers_option,
)
from torchprobe.cli.watch_command import watch
from torchprobe.cli.words_command import words
from torchprobe.common.files import watching
from torchprobe.common.folders import HIDDEN
from torchprobe.common.messages import counted
from torchprobe.common.runs import RunWarning
from torchprobe.rendering.tables import plain_table, text

if TYPE_CHECKING:
    from torchprobe.analysis.positions import Position


@click.group(
    epilog=exit_codes("doctor: a check failed; dissect --check: the folder has problems"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(torchprobe.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Read each activation of an encoder once, and say what the representation has learned."""


@cli.command(
    epilog=exit_codes(),
    short_help="List the layers of an encoder.",
    help="List the layers of MODEL: name, class, whether it is recorded by default, and its features. "
    f"Needs no weights: nothing is fetched.\n\n{MODEL}",
)
@click.argument("model")
@click.option("--layers", "pattern", multiple=True, metavar="PATTERN", help="Only layers that match this name or glob; may be repeated.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights, to see whether they fit.")
@json_option
def layers(model: str, pattern: tuple[str, ...], checkpoint: Path | None, as_json: bool) -> None:
    from torchprobe.encoders import load_encoder
    from torchprobe.studies.outline import outline

    with working("building the model", log=False):
        encoder = load_encoder(model, checkpoint, pretrained=False)
        rows = outline(encoder, pattern or None)
    if as_json:
        print_json(
            {
                "model": encoder.name if checkpoint else model,
                "features": encoder.features,
                "layers": [dataclasses.asdict(row) for row in rows],
            }
        )
        return
    heads = ("layer", "module", "default", "d", "dim", "per image")
    table = plain_table(*heads, right={"d", "dim", "per image"}, dispensable=("module",))
    for row in rows:
        numbers = ["–" if value is None else f"{value:,}" for value in (row.features, row.feature_dim, row.vectors_per_image)]
        table.add_row(*map(text, (row.layer or "(output)", row.module, "●" if row.default else "", *numbers)))
    printer = console()
    printer.print(table)
    count = counted(len(rows), "layer")
    printer.print(
        text(f"{count}. ●: recorded by default. d: features. dim: the dimension that holds them. per image: vectors of one image.")
    )
    if any(row.layer == "" for row in rows):
        printer.print(text("(output): the model itself. Its name is the empty string; select it with --layers ''."))
    if any(row.features is None for row in rows):
        printer.print(text("–: returns no tensor in a forward pass, so it cannot be recorded."))


@cli.command(
    epilog=exit_codes(),
    short_help="Find out whether an encoder has outlier features.",
    help="Does MODEL have outlier features? One pass over a folder of images gives the vector kurtosis of the representation, the "
    f"outlier features by index, and the layers, with values to compare them with. Writes a recording, CSV tables and a page.\n\n{MODEL}",
)
@click.argument("model")
@images_option("A folder of images.")
@texts_option
@representation_option
@layer_option
@position_option
@feature_dim_option
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed, batch norms calibrated on the images: the baseline.")
@click.option(
    "--layers", "pattern", multiple=True, metavar="PATTERN", help="Names or globs of layers; may be repeated.  [default: the blocks]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images in one forward pass.")
@device_option
@workers_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N of the images, chosen at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="For --limit, --random-init and the interval.")
@output_option("scan")
@json_option
def scan(
    model: str,
    folder: Path | str | None,
    texts: Path | None,
    representation: str | None,
    layer: str | None,
    position: Position | None,
    feature_dims: tuple[tuple[str, int], ...],
    checkpoint: Path | None,
    random_init: bool,
    pattern: tuple[str, ...],
    batch_size: int,
    device: str,
    workers: int,
    limit: int | None,
    seed: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    import torch

    from torchprobe.rendering import page
    from torchprobe.studies import scan as study
    from torchprobe.studies.calibration import recalibrate_on
    from torchprobe.studies.scan_report import print_scan, write_scan

    if checkpoint and random_init:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    check_layer(layer, position, representation)
    out = output_named(out, "scan", model)
    place = device_named(device)
    page.require()
    images = inputs_of(folder, texts, limit, seed)
    torch.manual_seed(seed)
    check_output(out)
    with loading(model, fetch=not (checkpoint or random_init)):
        encoder = encoder_of(model, checkpoint, random_init, representation, texts is not None).to(place)
        if random_init:
            recalibrate_on(encoder, images, batch_size, seed=seed)
    source = {"images": str(folder)} if texts is None else {"texts": str(texts)}
    settings = {**source, "checkpoint": checkpoint and str(checkpoint), "random_init": random_init, "limit": limit}
    with (
        run_in(out, "scan", model, overwrite=overwrite, inputs=(folder, texts, checkpoint)),
        interruptible() as stop,
        progress_bar("scan", f"{encoder.inputs}s", len(images)) as progress,
    ):
        result = study.scan(
            encoder,
            images,
            pattern or None,
            layer=layer,
            position=position,
            feature_dim=feature_dim_of(feature_dims),
            batch_size=batch_size,
            device=place,
            workers=workers,
            seed=seed,
            progress=progress,
            stop=stop,
        )
        result.settings.update(settings)
        files = write_scan(result, out)
    if as_json:
        print_json(result.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_scan(result, console())
        print_files(files)
    if result.partial:
        say(f"Interrupted: the results are about the first {result.images:,} of {counted(result.total, encoder.inputs)}.")
        raise click.exceptions.Exit(INTERRUPTED)


@cli.command(epilog=exit_codes("a check failed"), short_help="Show versions, and check the kernels on this machine.")
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, and which kernels are loaded or why not. Check every kernel against the reference on this machine."""
    from torchprobe.studies.doctor import examine

    with working("checking the kernels", log=False):
        found = examine()
    if as_json:
        print_json(found.summary())
    else:
        printer = console()
        for title, entries in (("versions", found.versions), ("machine", found.machine), ("kernels", found.kernels)):
            table = plain_table(title, "")
            for key, value in entries.items():
                table.add_row(text(key), text(value or "not installed"))
            printer.print(table)
        table = plain_table("check", "", "error", "tolerance", "", right={"error", "tolerance"})
        for check in found.checks:
            verdict = text("passed", "green") if check.passed else text("FAILED", "bold red")
            table.add_row(text(check.name), verdict, f"{check.error:.1e}", f"{check.tolerance:.0e}", text(check.detail))
        printer.print(table)
        printer.print(text(f"{sum(check.passed for check in found.checks)} of {len(found.checks)} checks passed."))
    if not found.passed:
        raise click.exceptions.Exit(CHECK_FAILED)


@cli.command(epilog=exit_codes(), short_help="Scan and dissect real networks on real photos.")
@output_option("demo", "")
@json_option
def demo(out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Scan EfficientNet-Lite0 with its ImageNet weights over real photos, and dissect two layers. Then scan a ViT that has outlier
    features, and say where they come from. The same networks at random initialization are there for comparison."""
    from torchprobe.rendering.tables import layer_table
    from torchprobe.studies import demo as study
    from torchprobe.studies.demo_dissection import demo_dissection
    from torchprobe.studies.demo_outliers import demo_outliers, print_outliers
    from torchprobe.studies.demo_vit import missing_packages
    from torchprobe.studies.dissect import print_dissections
    from torchprobe.studies.scan_report import print_representation

    out = output_named(out, "demo")
    check_output(out)
    with run_in(out, "demo", "", overwrite=overwrite):
        with progress_bar("scans", "networks") as progress:
            result = study.demo(progress)
            files = result.write(out)
        with progress_bar("dissections", "dissections") as progress:
            dissection = demo_dissection(out, progress)
            pages = dissection.write(out / "dissection")
        outliers, missing = None, missing_packages()
        if missing:
            say(f"The second network is left out: {missing}")
        else:
            with progress_bar("outlier features", "steps") as progress:
                outliers = demo_outliers(study.photos(), progress)
                pages |= {f"outliers/{kind}": path for kind, path in outliers.write(out / "outliers").items()}
    if as_json:
        paths = {"files": {kind: str(path) for kind, path in [*files.items(), *pages.items()]}}
        second = {"outliers": None if outliers is None else outliers.summary()}
        print_json(result.summary() | {"dissection": dissection.summary()} | second | paths)
        return
    printer = console()
    printer.print(text(f"EfficientNet-Lite0 over {result.trained.images} photos, trained on ImageNet and at random initialization", "bold"))
    printer.print(text(f"Sanity check: the trained network names {result.correct} of the {result.labeled} labeled photos correctly."))
    printer.print()
    printer.print(layer_table(result.rows(), columns=study.layer_table_columns(), width=printer.width))
    print_representation(result.trained, printer, at_random=result.random_kurtosis())
    printer.print()
    printer.print(text(f"Dissection of two layers over {len(dissection.broden)} pictures", "bold"))
    print_dissections(dissection.results, dissection.nulls, printer)
    if outliers is not None:
        printer.print()
        print_outliers(outliers, printer)
    print_files(pages | files)


for command in (quantize_check, dissect, segment, diff, words, concepts, interpret, compare, watch, completion):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with one of :func:`torchprobe.cli.tools.exit_codes`."""
    written: list[Path] = []

    def note(path: Path) -> None:
        if HIDDEN not in path.parts:
            written.append(path)

    with warnings.catch_warnings(), printable_everywhere(), watching(note):
        warnings.showwarning = show_warning
        warnings.simplefilter("always", torchprobe.RecordingWarning)
        warnings.simplefilter("always", RunWarning)
        try:
            with terminable():
                code = cli.main(args=arguments, prog_name="torchprobe", standalone_mode=False)
        except click.ClickException as error:
            say_error(error)
            code = error.exit_code
        except (click.exceptions.Abort, KeyboardInterrupt):
            say(f"Interrupted: {'the results are not complete' if written else 'nothing was written'}.")
            code = INTERRUPTED
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            say_error(error)
            code = FAILED
    sys.exit(code or OK)
