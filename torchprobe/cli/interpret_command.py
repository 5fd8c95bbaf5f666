"""``torchprobe interpret`` and ``torchprobe compare``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchprobe.cli.progress import loading, stage_bar, working
from torchprobe.cli.tools import (
    INTERRUPTED,
    MODEL,
    Where,
    check_layer,
    check_output,
    console,
    device_named,
    device_option,
    encoder_of,
    exit_codes,
    feature_dim_of,
    feature_dim_option,
    features_of,
    images_option,
    interruptible,
    json_option,
    layer_option,
    output_named,
    output_option,
    position_option,
    print_files,
    print_json,
    representation_option,
    run_in,
    say,
    texts_option,
    workers_option,
)

if TYPE_CHECKING:
    from torchprobe.common.runs import RunOptions
    from torchprobe.datasets import ImageSet
    from torchprobe.encoders import Encoder
    from torchprobe.studies.compare import Comparison
    from torchprobe.studies.interpret.inputs import Inputs
    from torchprobe.studies.interpret.interpretation import Interpretation

HELP = (
    'Repeats the analysis of "Interpreting CLIP" on MODEL: outlier features, privileged directions and pruning, concepts, effective '
    "robustness. Every section that has its input is computed; images alone give the outlier features. The others are listed as left out. "
    "Writes results.json, tables (CSV, LaTeX), figures (PDF, SVG, PNG) and one page. "
    "--resume continues an interrupted run. With --suite it interprets many encoders "
    f"and compares them.\n\n{MODEL} With --embeddings, everything that needs only representations is computed from yours. Give one of "
    "MODEL, --suite and --embeddings."
)

COMPARE_HELP = (
    "Compares the results of torchprobe interpret in FOLDERS: the encoders, the differences within each backbone, rank correlations, and "
    "the concepts that they share."
)


_ABOUT = ("name", "role", "backbone", "pretraining", "modality")
"""The facts about MODEL that a comparison uses."""


class NamedFolder(click.ParamType):  # type: ignore[type-arg]
    """NAME=DIR, or NAME=FILE."""

    name = "NAME=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path | str]:
        if isinstance(value, tuple):
            return value
        name, equals, folder = str(value).partition("=")
        if not equals or not name or not folder:
            self.fail(f"{value!r} is not NAME=DIR, for example imagenet_r=data/imagenet-r", param, ctx)
        return name, Where().convert(folder, param, ctx)


@click.command(epilog=exit_codes(), short_help="Repeat the analysis of “Interpreting CLIP” on an encoder.", help=HELP)
@click.argument("model", required=False)
@images_option("One folder for each class, or just images.")
@texts_option
@representation_option
@layer_option
@position_option
@feature_dim_option
@click.option(
    "--embeddings",
    metavar="FILE",
    help="Representations, one in each row, instead of MODEL and --images: .npy, .npz, .safetensors, .parquet; or FILE:NAME.",
)
@click.option("--labels", metavar="FILE", help="With --embeddings: a whole number for each row, the row of the head; -1 if unknown.")
@click.option("--modality", metavar="NAME", help="What the rows stand for: image, text …; compare measures the gap between two.")
@click.option(
    "--head",
    default="auto",
    show_default=True,
    metavar="HEAD",
    help="zero-shot, own (the trained head), none, or a file, also of an array (classes, features). auto takes the own head if there is "
    "one, otherwise zero-shot.",
)
@click.option(
    "--shift",
    "shifts",
    multiple=True,
    type=NamedFolder(),
    help="Images under a shift: imagenet_v2, imagenet_r, imagenet_sketch, objectnet, imagenet_a, or any name; may be repeated. With "
    "--embeddings, a file that also holds the labels, called y.",
)
@click.option("--broden", "broden_folder", type=click.Path(path_type=Path), metavar="DIR", help="Concepts, in the format of Broden.")
@click.option(
    "--baseline",
    "baseline_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="CSV",
    help="Your own standard models: columns model, imagenet and one for each shift, percent.",
)
@click.option(
    "--imagenet-classes",
    "--x",
    "imagenet_classes",
    type=click.Choice(["full", "subset"]),
    default="full",
    show_default=True,
    help="Unshifted accuracy on all classes, or on the subset of the shift.",
)
@click.option(
    "--outlier-rule",
    type=click.Choice(["robust", "classical"]),
    default="robust",
    show_default=True,
    help="Standard deviations of the bulk of a vector, or of the whole vector with its outliers.",
)
@click.option("--template", "templates", multiple=True, metavar="TEXT", help="Caption with {} of a zero-shot head; may be repeated.")
@click.option("--suite", metavar="FILE", help="Many encoders: a TOML file, or paper for the built-in suite.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this encoder of the suite; may be repeated.")
@click.option("--pairs/--no-pairs", default=True, show_default=True, help="With --suite: CKA and interpolation within each backbone.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Layers to record over depth; may be repeated.  [default: the blocks]")
@click.option(
    "--layer-images", type=click.IntRange(min=0), default=1024, show_default=True, help="Number of images to record the layers on."
)
@click.option(
    "--provenance-images",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Number of images on which the origin of the outlier features is looked for: blocks, submodules, parameters.",
)
@click.option("--features", metavar="I,J…", help="Features to ablate and to compare directions with.  [default: the outlier features]")
@click.option("--same-images", is_flag=True, help="Measure importance on the images that are evaluated, not on the other half.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed, batch norms calibrated on the images.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N images of each set, chosen at random.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@device_option
@workers_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option("--name", help="Name of MODEL in a comparison.  [default: MODEL]")
@click.option(
    "--role", type=click.Choice(["zero-shot", "fine-tuned", "supervised", "imagenet-captions"]), help="Role of MODEL in a comparison."
)
@click.option("--backbone", metavar="NAME", help="Backbone of MODEL; differences are taken within one backbone.")
@click.option("--pretraining", metavar="NAME", help="The data that MODEL was trained on first.")
@output_option("interpret")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in --out.")
@json_option
def interpret(
    model: str | None,
    suite: str | None,
    only: tuple[str, ...],
    texts: Path | None,
    checkpoint: Path | None,
    random_init: bool,
    broden_folder: Path | None,
    baseline_file: Path | None,
    device: str,
    layers: tuple[str, ...],
    templates: tuple[str, ...],
    shifts: tuple[tuple[str, Path | str], ...],
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    given, source = chosen["embeddings"], chosen["folder"] or texts
    if [model is None, suite is None, given is None].count(False) != 1:
        raise click.UsageError("give either MODEL or --suite, or --embeddings")
    if given is None and (source is None or (texts is not None and chosen["folder"] is not None)):
        raise click.UsageError("Missing option '--images' or '--texts'." if source is None else "give either --images or --texts")
    if given is None and chosen["labels"] is not None:
        raise click.UsageError("--labels is for --embeddings; the labels of images are their folders")
    network = {"images": chosen["folder"], "texts": texts, "checkpoint": checkpoint, "broden": broden_folder, "layers": layers}
    network |= {"template": templates, "random-init": random_init, "representation": chosen["representation"], "layer": chosen["layer"]}
    network |= {"feature-dim": chosen["feature_dims"]}
    check_layer(chosen["layer"], chosen["position"], chosen["representation"])
    if given is not None and (unused := [f"--{key}" for key, value in network.items() if value]):
        raise click.UsageError(f"{', '.join(unused)} need a network or pictures, and with --embeddings there are none")
    if texts is not None and (suite or shifts or broden_folder):
        raise click.UsageError("--texts is for one MODEL, without --suite, --shift and --broden")
    if suite is not None and (chosen["representation"] or chosen["layer"]):
        raise click.UsageError("--representation and --layer are for one MODEL")
    if suite is not None and (checkpoint or random_init):
        raise click.UsageError("--checkpoint and --random-init are for one MODEL; the suite has its own checkpoints")
    if checkpoint and random_init:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    if only and suite is None:
        raise click.UsageError("--only needs a --suite to choose from")
    if suite is not None and (facts := [key for key in _ABOUT if chosen[key]]):
        raise click.UsageError(f"{', '.join(f'--{key}' for key in facts)} is for one MODEL; the suite has its own facts")
    if len({name for name, _ in shifts}) < len(shifts):
        raise click.UsageError("two --shift have the same name")

    import torch

    from torchprobe.analysis.baseline import Baseline
    from torchprobe.analysis.positions import at_layer
    from torchprobe.common.arrays import located
    from torchprobe.common.ranks import torchrun
    from torchprobe.common.runs import RunOptions
    from torchprobe.datasets import Broden
    from torchprobe.rendering import page
    from torchprobe.studies.calibration import recalibrate_on
    from torchprobe.studies.compare.report import SUITE
    from torchprobe.studies.interpret.inputs import Choices, Inputs
    from torchprobe.studies.interpret.results import INTERPRET

    page.require()
    subject = model or (Path(suite).stem if suite is not None else Path(located(given or "")[0]).stem)
    out = output_named(out, "interpret", subject)
    check_output(out)
    read = [source, checkpoint, broden_folder, baseline_file, chosen["labels"], chosen["head"], *(folder for _, folder in shifts)]
    read += [None if given is None else located(given)[0]]
    with torchrun() as (rank, local), run_in(out, INTERPRET if suite is None else SUITE, subject, chosen["resume"], overwrite, read):
        place = device_named(f"cuda:{local}" if device == "auto" and local is not None and torch.cuda.is_available() else device)
        choices = Choices(features_of(chosen["features"]), chosen["same_images"])
        inputs = Inputs(
            images=source or Path(),
            shifts=dict(shifts),
            broden=None if broden_folder is None else Broden(broden_folder),
            baseline=None if baseline_file is None else Baseline.from_csv(baseline_file),
            imagenet_classes=chosen["imagenet_classes"],
            templates=templates or None,
            limit=chosen["limit"],
            layers=layers or None,
            layer_images=chosen["layer_images"],
            feature_dim=feature_dim_of(chosen["feature_dims"]),
            provenance_images=chosen["provenance_images"],
            choices=choices,
            outlier_rule=chosen["outlier_rule"],
        )
        options = RunOptions(chosen["batch_size"], place, chosen["workers"], chosen["seed"], chosen["resume"])
        torch.manual_seed(options.seed)
        try:
            if suite is not None:
                _suite(suite, only, inputs, options, rank, out, chosen["pairs"], as_json)
            elif given is not None:
                known = {key: chosen[key] for key in _ABOUT if chosen[key]}
                _given(given, chosen["labels"], chosen["head"], known, inputs, options, rank, out, as_json)
            else:
                assert model is not None
                known = {key: chosen[key] for key in _ABOUT if chosen[key]}
                about = {"source": model, "checkpoint": checkpoint and str(checkpoint), "random_init": random_init, **known}

                def load(images: ImageSet) -> Encoder:
                    encoder = encoder_of(model, checkpoint, random_init, chosen["representation"], texts is not None).to(place)
                    if random_init:
                        recalibrate_on(encoder, images, options.batch_size, seed=options.seed)
                    return at_layer(encoder, chosen["layer"], chosen["position"], feature_dim=inputs.feature_dim)

                fetch = not (checkpoint or random_init)
                _one(model, load, fetch, chosen["head"], about, inputs, options, rank, out, as_json)
        except KeyboardInterrupt:
            say(f"Interrupted. The same command with --resume continues the run in {os.fspath(out)}.")
            raise click.exceptions.Exit(INTERRUPTED) from None


def _one(
    model: str,
    load: Callable[[ImageSet], Encoder],
    fetch: bool,
    head: str,
    about: dict[str, Any],
    inputs: Inputs,
    options: RunOptions,
    rank: int,
    out: Path,
    as_json: bool,
) -> None:
    from torchprobe.studies.interpret.image_sets import load_images
    from torchprobe.studies.interpret.inputs import caption_progress, kept_head
    from torchprobe.studies.interpret.run import interpret_subject

    images = load_images(inputs.images, None, inputs.limit, options.seed)  # before the weights are fetched
    with loading(model, fetch=fetch, quiet=rank > 0):
        encoder = load(images)
    with interruptible() as stop, stage_bar(quiet=rank > 0) as progress:
        options = replace(options, progress=progress, stop=stop)
        subject = inputs.subject(encoder, head, options.seed, kept_head(out, options.resume), caption_progress(options))
        known = {**about, "representation": encoder.representation, **inputs.about()}
        found = interpret_subject(replace(subject, about=known), out, options)
    if rank == 0:
        _print_interpretation(found, as_json)


def _given(
    file: str,
    labels: str | None,
    head: str,
    known: dict[str, Any],
    inputs: Inputs,
    options: RunOptions,
    rank: int,
    out: Path,
    as_json: bool,
) -> None:
    from torchprobe.studies.interpret.given import load_given
    from torchprobe.studies.interpret.run import interpret_given

    subject = load_given(file, labels, head, inputs, known, options.seed)
    with working(f"analyzing {subject.name}"):
        found = interpret_given(subject, out, options)
    if rank == 0:
        _print_interpretation(found, as_json)


def _print_interpretation(found: Interpretation, as_json: bool) -> None:
    from torchprobe.common.records import encode
    from torchprobe.studies.interpret.report import paths, print_interpretation

    files = paths(found)
    if as_json:
        print_json(encode(found.results) | {"files": {kind: str(path) for kind, path in files.items()}})
        return
    print_interpretation(found, console())
    print_files(files)


def _suite(
    suite: str, only: tuple[str, ...], inputs: Inputs, options: RunOptions, rank: int, out: Path, pairs: bool, as_json: bool
) -> None:
    from torchprobe.encoders.suite import load_suite
    from torchprobe.studies.suite import run_suite

    rows = load_suite(suite)
    if unknown := set(only) - {row.name for row in rows}:
        raise click.UsageError(f"the suite has no {sorted(unknown)[0]!r}; it has {', '.join(row.name for row in rows)}")
    chosen = [row for row in rows if not only or row.name in only]
    with stage_bar(quiet=rank > 0) as progress:
        found = run_suite(
            chosen,
            inputs,
            out,
            pairs=pairs,
            batch_size=options.batch_size,
            device=options.device,
            workers=options.workers,
            seed=options.seed,
            resume=options.resume,
            progress=progress,
            say=say if rank == 0 else lambda message: None,
        )
    if rank == 0:
        _print_comparison(found, out, as_json)


@click.command(epilog=exit_codes(), short_help="Compare encoders that were interpreted.", help=COMPARE_HELP)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDERS…")
@output_option("compare", "A-B")
@click.option("--seed", type=int, default=0, show_default=True, help="Of bootstrap and permutations.")
@json_option
def compare(folders: tuple[Path, ...], out: Path | None, overwrite: bool, seed: int, as_json: bool) -> None:
    from torchprobe.rendering import page
    from torchprobe.studies.compare import compare as study

    page.require()
    out = output_named(out, "compare", *folders)
    check_output(out)
    with run_in(out, "compare", ", ".join(folder.resolve().name for folder in folders), overwrite=overwrite, inputs=folders):
        with stage_bar() as progress:
            found = study(folders, seed=seed, progress=progress)
        _print_comparison(found, out, as_json)


def _print_comparison(found: Comparison, out: Path, as_json: bool) -> None:
    from torchprobe.studies.compare.report import print_comparison, write

    with working("figures and page"):
        files = write(found, out)
    if as_json:
        print_json(found.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_comparison(found, console())
        print_files(files)
