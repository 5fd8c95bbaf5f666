"""``torchprobe interpret`` and ``torchprobe compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from torchprobe.cli.tools import (
    EXIT_CODES,
    INTERRUPTED,
    MODEL,
    console,
    device_named,
    interruptible,
    print_files,
    print_json,
    say,
    stage_bar,
    working,
)

HELP = (
    'Repeats the analysis of "Interpreting CLIP" on MODEL: outlier features, privileged directions and pruning, concepts, effective '
    "robustness. Every part that has its input is computed – images alone give the outlier features –, the rest is listed as left out. "
    "Writes results.json, CSV tables, plots and one page; goes on after an interruption with --resume. With --suite it does so for many "
    f"encoders and compares them.\n\n{MODEL} Left out with --suite."
)

COMPARE_HELP = (
    "Puts what torchprobe interpret wrote into FOLDERS beside each other: the encoders, the differences within each backbone, rank "
    "correlations, and the concepts they share."
)


_ABOUT = ("name", "role", "backbone", "pretraining")
"""What a comparison wants to know of one MODEL."""


class NamedFolder(click.ParamType):  # type: ignore[type-arg]
    """NAME=DIR."""

    name = "NAME=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, equals, folder = str(value).partition("=")
        if not equals or not name or not folder:
            self.fail(f"{value!r} is not NAME=DIR, such as imagenet_r=data/imagenet-r", param, ctx)
        return name, Path(folder)


@click.command(epilog=EXIT_CODES, short_help="Repeat the analysis of “Interpreting CLIP” on an encoder.", help=HELP)
@click.argument("model", required=False)
@click.option("--images", required=True, type=click.Path(path_type=Path), metavar="DIR", help="One folder for each class, or just images.")
@click.option(
    "--head",
    default="auto",
    show_default=True,
    metavar="HEAD",
    help="zero-shot, own (the trained one), none, or a file; auto takes the own one where there is one, else zero-shot.",
)
@click.option(
    "--shift",
    "shifts",
    multiple=True,
    type=NamedFolder(),
    help="Images under a shift: imagenet_v2, imagenet_r, imagenet_sketch, objectnet, imagenet_a, or any name; may be repeated.",
)
@click.option("--broden", "broden_folder", type=click.Path(path_type=Path), metavar="DIR", help="Concepts, in the format of Broden.")
@click.option(
    "--baseline",
    "baseline_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="CSV",
    help="Standard models of your own: columns model, imagenet and one for each shift, in percent.",
)
@click.option(
    "--x",
    type=click.Choice(["full", "subset"]),
    default="full",
    show_default=True,
    help="Unshifted accuracy on all classes, or the shift's.",
)
@click.option("--template", "templates", multiple=True, metavar="TEXT", help="Caption with {} of a zero-shot head; may be repeated.")
@click.option("--suite", metavar="FILE", help="Many encoders: a TOML file, or paper.")
@click.option("--only", multiple=True, metavar="NAME", help="Of the suite only these; may be repeated.")
@click.option("--pairs/--no-pairs", default=True, show_default=True, help="Of a suite: CKA and interpolation within each backbone.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Layers to record over depth; may be repeated.  [default: the blocks]")
@click.option("--layer-images", type=click.IntRange(min=0), default=1024, show_default=True, help="Images to record the layers on.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only so many images of each set, chosen at random.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps …; auto takes an accelerator if there is one.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Threads that decode images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--name", help="What to call MODEL in a comparison.  [default: its own name]")
@click.option("--role", type=click.Choice(["zero-shot", "fine-tuned", "supervised", "imagenet-captions"]), help="Of MODEL in a comparison.")
@click.option("--backbone", metavar="NAME", help="Of MODEL: differences are taken within one.")
@click.option("--pretraining", metavar="NAME", help="The data MODEL saw first.")
@click.option("--out", type=click.Path(path_type=Path), default="torchprobe-interpret", show_default=True, metavar="DIR")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in --out.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def interpret(
    model: str | None,
    suite: str | None,
    only: tuple[str, ...],
    checkpoint: Path | None,
    random_init: bool,
    broden_folder: Path | None,
    baseline_file: Path | None,
    device: str,
    layers: tuple[str, ...],
    templates: tuple[str, ...],
    shifts: tuple[tuple[str, Path], ...],
    **options: Any,
) -> None:
    if (model is None) == (suite is None):
        raise click.UsageError("give either MODEL or --suite")
    if suite is not None and (checkpoint or random_init):
        raise click.UsageError("--checkpoint and --random-init are for one MODEL; the suite has its own")
    if checkpoint and random_init:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    if only and suite is None:
        raise click.UsageError("--only chooses from a --suite")
    if suite is not None and any(options[key] for key in _ABOUT):
        raise click.UsageError(f"{', '.join(f'--{key}' for key in _ABOUT)} are for one MODEL; the suite has its own")
    if len({name for name, _ in shifts}) < len(shifts):
        raise click.UsageError("two --shift have the same name")

    import torch

    from torchprobe.analysis.baseline import Baseline
    from torchprobe.common.ranks import torchrun
    from torchprobe.datasets import Broden
    from torchprobe.rendering import page
    from torchprobe.studies.suite import Inputs

    page.require()
    with torchrun() as (rank, local):
        place = device_named(f"cuda:{local}" if device == "auto" and local is not None and torch.cuda.is_available() else device)
        inputs = Inputs(
            images=options["images"],
            shifts=dict(shifts),
            broden=None if broden_folder is None else Broden(broden_folder),
            baseline=None if baseline_file is None else Baseline.from_csv(baseline_file),
            x=options["x"],
            templates=templates or None,
            limit=options["limit"],
            layers=layers or None,
            layer_images=options["layer_images"],
            batch_size=options["batch_size"],
            device=place,
            workers=options["workers"],
            seed=options["seed"],
        )
        torch.manual_seed(options["seed"])
        try:
            if suite is not None:
                _suite(suite, only, inputs, rank, **options)
            else:
                assert model is not None
                _one(model, checkpoint, random_init, inputs, rank, **options)
        except KeyboardInterrupt:
            say(f"Interrupted. The same command with --resume goes on from what is in {os.fspath(options['out'])}.")
            raise click.exceptions.Exit(INTERRUPTED) from None


def _one(
    model: str,
    checkpoint: Path | None,
    random_init: bool,
    inputs: Any,
    rank: int,
    *,
    out: Path,
    head: str,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    from torchprobe.encoders import load_encoder
    from torchprobe.studies.interpret import interpret as study
    from torchprobe.studies.interpret.inputs import gather, kept_head, load_images
    from torchprobe.studies.interpret.text import print_interpretation
    from torchprobe.studies.interpret.write import paths

    with working("loading the model"):
        load_images(inputs.images)  # before the weights are fetched
        encoder = load_encoder(model, checkpoint, pretrained=not random_init).to(inputs.device)
        images, shifts, made = gather(
            encoder, inputs.images, inputs.shifts, head, inputs.templates, inputs.limit, inputs.seed, kept_head(out, resume)
        )
    about = {key: options[key] for key in _ABOUT if options[key]}
    with interruptible() as stop, stage_bar(quiet=rank > 0) as progress:
        found = study(
            encoder,
            images,
            out,
            head=made,
            shifts=shifts,
            broden=inputs.broden,
            baseline=inputs.baseline,
            x=inputs.x,
            layers=inputs.layers,
            layer_images=inputs.layer_images,
            about={"source": model, "checkpoint": checkpoint and str(checkpoint), "random_init": random_init, **about, **inputs.about()},
            batch_size=inputs.batch_size,
            device=inputs.device,
            workers=inputs.workers,
            seed=inputs.seed,
            resume=resume,
            progress=progress,
            stop=stop,
        )
    if rank > 0:
        return
    files = paths(found)
    if as_json:
        print_json(found.results | {"files": {kind: str(path) for kind, path in files.items()}})
        return
    print_interpretation(found, console())
    print_files(files)


def _suite(
    suite: str, only: tuple[str, ...], inputs: Any, rank: int, *, out: Path, pairs: bool, resume: bool, as_json: bool, **_: Any
) -> None:
    from torchprobe.encoders.suite import load_suite
    from torchprobe.studies.suite import run_suite

    rows = load_suite(suite)
    if unknown := set(only) - {row.name for row in rows}:
        raise click.UsageError(f"the suite has no {sorted(unknown)[0]!r}; it has {', '.join(row.name for row in rows)}")
    chosen = [row for row in rows if not only or row.name in only]
    with stage_bar(quiet=rank > 0) as progress:
        found = run_suite(
            chosen, inputs, out, pairs=pairs, resume=resume, progress=progress, say=say if rank == 0 else lambda message: None
        )
    if rank == 0:
        _print_comparison(found, out, as_json)


@click.command(epilog=EXIT_CODES, short_help="Compare encoders that were interpreted.", help=COMPARE_HELP)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDERS…")
@click.option("--out", type=click.Path(path_type=Path), default="torchprobe-compare", show_default=True, metavar="DIR")
@click.option("--seed", type=int, default=0, show_default=True, help="Of bootstrap and permutations.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, nothing else.")
def compare(folders: tuple[Path, ...], out: Path, seed: int, as_json: bool) -> None:
    from torchprobe.rendering import page
    from torchprobe.studies.compare import compare as study

    page.require()
    with working("comparing"):
        found = study(folders, seed=seed)
    _print_comparison(found, out, as_json)


def _print_comparison(found: Any, out: Path, as_json: bool) -> None:
    from torchprobe.studies.compare import write
    from torchprobe.studies.compare.text import print_comparison

    files = write(found, out)
    if as_json:
        print_json(found.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_comparison(found, console())
        print_files(files)
