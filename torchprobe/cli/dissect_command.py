"""``torchprobe dissect``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchprobe.cli.progress import loading, progress_bar, stage, stage_bar
from torchprobe.cli.segment_command import draw_units
from torchprobe.cli.tools import (
    CHECK_FAILED,
    INTERRUPTED,
    MODEL,
    check_output,
    console,
    device_named,
    device_option,
    exit_codes,
    interruptible,
    json_option,
    output_named,
    output_option,
    print_files,
    print_json,
    run_in,
    say,
    stopping,
    workers_option,
)
from torchprobe.rendering.tables import printable

if TYPE_CHECKING:
    from torchprobe.datasets import Broden
    from torchprobe.dissection import Dissection

HELP = (
    "What do the units of MODEL detect? Compares every unit of some layers with every concept of a labeled data set in the format of "
    "Broden. The scores are the overlap of the activated region with the concept (iou), and the ranking of the images by the unit (ap). "
    "Writes tables, results and a page for each layer. --resume continues an interrupted run.\n\n"
    f"{MODEL} Not needed with --check, and with --segment only if the dissection does not name it."
)


class Scores(click.ParamType):  # type: ignore[type-arg]
    """ "iou", "ap" or both, with a comma."""

    name = "SCORES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        found = value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))
        if not found or set(found) - {"iou", "ap"}:
            self.fail(f"{value!r} is not iou, ap or iou,ap", param, ctx)
        return found


@click.command(
    epilog=exit_codes("--check: the folder has problems"), short_help="Find out which concepts the units of an encoder detect.", help=HELP
)
@click.argument("model", required=False)
@click.option("--layers", multiple=True, metavar="PATTERN", help="Name or glob of layers; may be repeated. See torchprobe layers.")
@click.option("--broden", "folder", type=click.Path(path_type=Path), metavar="DIR", help="A folder in the format of Broden.")
@output_option("dissect")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in --out.")
@click.option("--score", type=Scores(), default="iou,ap", show_default=True, help="iou needs layers with positions.")
@click.option("--check", is_flag=True, help="Only list every problem of the data set.")
@click.option(
    "--segment",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PICTURE",
    help="Draw the units of the finished dissection in --out on this picture, or on those of a folder; may be repeated. torchprobe segment "
    "has more options.",
)
@click.option("--index", default="index.csv", show_default=True, metavar="FILE", help="Another index in the folder of --broden.")
@click.option("--split", type=click.Choice(["train", "val"]), help="Only this part of the images.")
@click.option("--category", "categories", multiple=True, metavar="NAME", help="Only this category; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N images; their order is random.")
@click.option("--mode", type=click.Choice(["default", "netdissect", "global"]), default="default", show_default=True)
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of activations above the threshold.  [default: 0.005]",
)
@click.option(
    "--sign", type=click.Choice(["positive", "negative", "both"]), default="positive", show_default=True, help="Sign of a unit, for ap."
)
@click.option(
    "--negatives",
    type=click.Choice(["category", "all"]),
    default="category",
    show_default=True,
    help="Images to rank for ap: those annotated for the category, or all.",
)
@click.option("--pooling", type=click.Choice(["max", "mean"]), default="max", show_default=True, help="How a map becomes a score, for ap.")
@click.option(
    "--minimum-area",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Smallest share of an image that a concept must cover, for ap.",
)
@click.option(
    "--gain-threshold",
    type=click.FloatRange(max=1),
    metavar="G",
    help="Smallest gain of ap over prevalence with which a unit encodes a concept.  [default: 0.8]",
)
@click.option(
    "--positions",
    type=click.Choice(["patch", "class", "all"]),
    default="patch",
    show_default=True,
    help="Which tokens; class and all only for ap.",
)
@click.option("--rotate", is_flag=True, help="Dissect a random rotation of each layer (--seed): the control for its axes.")
@click.option(
    "--basis",
    "basis_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A sparse autoencoder, or directions, instead of the units.",
)
@click.option(
    "--iou-permutations",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="B",
    help="Test IoU against labels exchanged among images, B times; 99 is a good number. Each time costs as much as counting.",
)
@click.option("--shuffle-labels", type=int, metavar="SEED", help="Shuffle the labels of the images: a null.")
@click.option(
    "--null",
    "nulls",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="An earlier --out to compare with.",
)
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed, batch norms calibrated on the images: a null.")
@click.option("--pictures", type=click.IntRange(min=0), default=5, show_default=True, help="Top images of each unit on the page.")
@click.option("--evidence", type=click.IntRange(min=0), default=0, show_default=True, help="Units with integrated gradients on the page.")
@click.option(
    "--preprocess",
    type=click.Choice(["whole", "encoder"]),
    default="whole",
    show_default=True,
    help="What the network is shown: the whole picture, resized, or what the encoder's own transform shows, which may crop.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Memory for the thresholds of a layer; if it is too small, they are estimated.  [default: 256]",
)
@click.option(
    "--disk",
    type=click.FloatRange(min=0),
    default=8.0,
    show_default=True,
    metavar="GB",
    help="Space in --out for maps during the run; layers that need more pass the network twice.",
)
@device_option
@workers_option
@click.option("--seed", type=int, default=0, show_default=True, help="For --random-init and --rotate.")
@json_option
def dissect(model: str | None, layers: tuple[str, ...], folder: Path | None, check: bool, as_json: bool, **options: Any) -> None:
    pictures = options.pop("segment")
    if pictures:
        if check or folder:
            raise click.UsageError("--segment draws the units of a finished dissection: it needs --out, and neither --broden nor --check")
        out, basis, overwrite = options["out"], options["basis_file"], options["overwrite"]
        if out is None:
            raise click.UsageError("--segment needs --out, the folder of a finished dissection")
        weights, device = options["checkpoint"], options["device"]
        where = out / "segments"
        return draw_units(out, pictures, model, weights, layers, where, device, as_json, basis_file=basis, overwrite=overwrite)
    if folder is None:
        raise click.UsageError("Missing option '--broden'.")
    if check:
        return _check(folder, options["index"], options["workers"], as_json)
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'; only --check works without it.")
    if not layers:
        raise click.UsageError("--layers is missing; torchprobe layers MODEL lists the layers")
    if options["rotate"] and options["basis_file"]:
        raise click.UsageError("--rotate and --basis exclude each other")
    if options["checkpoint"] and options["random_init"]:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    options["out"] = output_named(options["out"], "dissect", model)
    _dissect(model, layers, folder, as_json, **options)


def _check(folder: Path, index: str, workers: int, as_json: bool) -> None:
    from torchprobe.datasets import validate

    with progress_bar("checking") as progress:
        findings = validate(folder, workers, progress, index, notes=True)
    problems = [finding for finding in findings if not finding.note]
    if as_json:
        print_json([{"file": f.file, "row": f.row, "what": f.what, "fix": f.fix} for f in problems])
    for finding in findings if not as_json else findings[len(problems) :]:
        click.echo(printable(finding), err=as_json)
    if not as_json:
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}" if problems else "No problem"
        click.echo(f"{count} in {printable(folder)}.")
    if problems:
        raise click.exceptions.Exit(CHECK_FAILED)


def _dissect(
    model: str,
    layers: tuple[str, ...],
    folder: Path,
    as_json: bool,
    *,
    out: Path,
    overwrite: bool,
    index: str,
    split: str | None,
    categories: tuple[str, ...],
    limit: int | None,
    rotate: bool,
    basis_file: Path | None,
    nulls: tuple[Path, ...],
    checkpoint: Path | None,
    random_init: bool,
    pictures: int,
    evidence: int,
    preprocess: str,
    memory: int | None,
    gain_threshold: float | None,
    device: str,
    seed: int,
    **options: Any,
) -> None:
    import torch

    from torchprobe.common.ranks import torchrun
    from torchprobe.datasets import Broden
    from torchprobe.dissection.sparse_file import read_basis
    from torchprobe.encoders import load_encoder
    from torchprobe.rendering import page
    from torchprobe.studies.dissect import DISSECT, dissect_folder, earlier, print_dissections, recalibrate, write_pages

    page.require()
    check_output(out)
    basis = None if basis_file is None else read_basis(basis_file)
    broden: Broden = Broden(folder, split, categories or None, index=index)
    broden.require_images()
    against = earlier(nulls)
    read = (folder, checkpoint, basis_file, *nulls)
    with torchrun() as (rank, local), run_in(out, DISSECT, model, options["resume"], overwrite, read):
        place = device_named(f"cuda:{local}" if device == "auto" and local is not None and torch.cuda.is_available() else device)
        torch.manual_seed(seed)
        with loading(model, fetch=not (checkpoint or random_init), quiet=rank > 0):
            encoder = load_encoder(model, checkpoint, pretrained=not random_init).to(place)
            if random_init:
                recalibrate(encoder, broden, options["batch_size"], preprocess=preprocess)
        options["rows"] = None if limit is None else range(min(limit, len(broden)))
        options["basis"] = "rotation" if rotate else basis
        if memory is not None:
            options["memory"] = memory << 20
        files: dict[str, Path] = {}
        try:
            with interruptible() as stop, stage_bar(quiet=rank > 0) as progress:

                def pages(results: dict[str, Dissection]) -> None:
                    shown = pictures, evidence, rotate, stopping(stage(progress, "pages", "pages"), stop), gain_threshold, basis
                    files.update(write_pages(out, results, broden, encoder, against, *shown))

                results = dissect_folder(
                    encoder, broden, layers, out, seed=seed, preprocess=preprocess, progress=progress, stop=stop, pages=pages, **options
                )
        except KeyboardInterrupt:
            say(f"Interrupted. To continue from {os.fspath(out)}, run the same command with --resume.")
            raise click.exceptions.Exit(INTERRUPTED) from None
        if rank > 0:
            return
    if as_json:
        print_json(
            {"layers": [result.summary() for result in results.values()], "files": {kind: str(path) for kind, path in files.items()}}
        )
    else:
        is_null = random_init or rotate or options["shuffle_labels"] is not None
        print_dissections(results, against, console(), gain_threshold, is_null)
        print_files(files)
