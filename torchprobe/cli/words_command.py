"""``torchprobe words``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchprobe.cli.progress import loading, stage, stage_bar
from torchprobe.cli.tools import (
    INTERRUPTED,
    MODEL,
    check_output,
    console,
    device_named,
    device_option,
    exit_codes,
    images_option,
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

if TYPE_CHECKING:
    from torchprobe.dissection.words import WordDissection
    from torchprobe.encoders import Encoder

HELP = (
    "Which words do the units of MODEL agree with, over images without labels? Another model, a CLIP encoder, says how much each image "
    "shows each word, and every unit is compared with every word (CLIP-Dissect), and with chance. The labeler may be wrong. Writes tables, "
    f"results and a page for each layer. --resume continues an interrupted run.\n\n{MODEL}"
)


@click.command(epilog=exit_codes(), short_help="Find words for the units of an encoder, without labels.", help=HELP)
@click.argument("model")
@click.option("--layers", multiple=True, required=True, metavar="PATTERN", help="Name or glob of layers; may be repeated.")
@images_option("A folder of images.", required=True)
@click.option("--labeler", metavar="CLIP", help="The CLIP encoder that labels the images, such as open_clip:ViT-B-16/openai.")
@click.option("--labeler-checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights of the labeler.")
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Soft labels instead of a labeler: those of an earlier --out, or a .npy matrix of images and concepts.",
)
@click.option(
    "--concepts", "concepts_file", type=click.Path(path_type=Path), metavar="FILE", help="One a line.  [default: a built-in list]"
)
@click.option("--kind", "kinds", multiple=True, metavar="NAME", help="Only concepts of this kind; may be repeated.")
@click.option(
    "--measure",
    type=click.Choice(["soft_wpmi", "wpmi", "cosine_cubed", "rank_reorder", "average_precision"]),
    default="soft_wpmi",
    show_default=True,
)
@click.option("--permutations", type=click.IntRange(min=1), default=99, show_default=True, help="For the p-values.")
@click.option("--basis", "basis_file", type=click.Path(path_type=Path), metavar="FILE", help="A sparse autoencoder, or directions.")
@click.option("--rotate", is_flag=True, help="A random rotation of each layer (--seed): the control for its axes.")
@click.option("--pooling", type=click.Choice(["mean", "max"]), default="mean", show_default=True, help="How a map becomes one number.")
@click.option("--positions", type=click.Choice(["patch", "class", "all"]), default="patch", show_default=True, help="Which tokens.")
@output_option("words")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in --out.")
@click.option("--null", "nulls", multiple=True, type=click.Path(path_type=Path), metavar="DIR", help="An earlier --out to compare with.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed, batch norms calibrated on the images: a null.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N of the images, chosen at random.")
@click.option("--pictures", type=click.IntRange(min=0), default=5, show_default=True, help="Top images of each unit on the page.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@device_option
@workers_option
@click.option("--seed", type=int, default=0, show_default=True, help="For permutations, --limit, --random-init and --rotate.")
@json_option
def words(
    model: str,
    layers: tuple[str, ...],
    folder: Path | str,
    labeler: str | None,
    labeler_checkpoint: Path | None,
    labels_file: Path | None,
    concepts_file: Path | None,
    kinds: tuple[str, ...],
    basis_file: Path | None,
    rotate: bool,
    out: Path | None,
    overwrite: bool,
    nulls: tuple[Path, ...],
    checkpoint: Path | None,
    random_init: bool,
    limit: int | None,
    pictures: int,
    device: str,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    import torch

    from torchprobe.common.ranks import Ranks, torchrun
    from torchprobe.datasets import open_images
    from torchprobe.dissection.sparse_file import read_basis
    from torchprobe.dissection.words import builtin_concepts, read_concepts, read_soft_labels
    from torchprobe.encoders import load_encoder
    from torchprobe.rendering import page
    from torchprobe.studies.calibration import recalibrate_on
    from torchprobe.studies.words import WORDS, earlier_words, print_words, words_folder, write_word_pages

    if (labeler is None) == (labels_file is None):
        raise click.UsageError("give either --labeler, a CLIP encoder, or --labels, soft labels")
    if checkpoint and random_init:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    if rotate and basis_file:
        raise click.UsageError("--rotate and --basis exclude each other")
    page.require()
    out = output_named(out, "words", model)
    check_output(out)
    concepts = builtin_concepts() if concepts_file is None else read_concepts(concepts_file)
    for remark in concepts.remarks:
        say(f"Note: {concepts.source}: {remark}")
    if kinds:
        concepts = concepts.of_kinds(kinds)
    against = earlier_words(nulls)
    given: Any = None if labels_file is None else read_soft_labels(labels_file, concepts)
    options["basis"] = "rotation" if rotate else None if basis_file is None else read_basis(basis_file)
    read = (folder, checkpoint, labeler_checkpoint, labels_file, concepts_file, basis_file, *nulls)
    with torchrun() as (rank, local), run_in(out, WORDS, model, options["resume"], overwrite, read):
        place = device_named(f"cuda:{local}" if device == "auto" and local is not None and torch.cuda.is_available() else device)
        with Ranks() as ranks:
            images = open_images(folder, limit, seed, labels=False, ranks=ranks)
        if labeler is not None:
            with loading(labeler, fetch=not labeler_checkpoint, quiet=rank > 0):
                given = _labeler(labeler, labeler_checkpoint).to(place)
        torch.manual_seed(seed)
        with loading(model, fetch=not (checkpoint or random_init), quiet=rank > 0):
            encoder = load_encoder(model, checkpoint, pretrained=not random_init).to(place)
            if random_init:
                recalibrate_on(encoder, images, options["batch_size"])
        files: dict[str, Path] = {}
        try:
            with interruptible() as stop, stage_bar(quiet=rank > 0) as progress:

                def pages(results: dict[str, WordDissection]) -> None:
                    step = stopping(stage(progress, "pages", "pages"), stop)
                    files.update(write_word_pages(out, results, images, against, pictures, step))

                results = words_folder(
                    encoder, images, layers, out, given, concepts, seed=seed, progress=progress, stop=stop, pages=pages, **options
                )
        except KeyboardInterrupt:
            say(f"Interrupted. To continue from {os.fspath(out)}, run the same command with --resume.")
            raise click.exceptions.Exit(INTERRUPTED) from None
        if rank > 0:
            return
    if as_json:
        summaries = [result.summary() for result in results.values()]
        print_json({"layers": summaries, "files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_words(results, console(), against, random_init or rotate)
        print_files(files)


def _labeler(name: str, checkpoint: Path | None) -> Encoder:
    """The labeler; if its weights are missing, the error names the option for them."""
    from torchprobe.encoders import EncoderError, load_encoder

    try:
        return load_encoder(name, checkpoint)
    except EncoderError as error:
        message = str(error).replace("--checkpoint FILE (checkpoint= in Python)", "--labeler-checkpoint FILE")
        raise EncoderError(f"the labeler: {message}") from error
