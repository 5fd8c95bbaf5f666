"""``torchprobe quantize-check``."""

from __future__ import annotations

from pathlib import Path

import click

from torchprobe.cli.progress import loading, progress_bar
from torchprobe.cli.tools import (
    INTERRUPTED,
    MODEL,
    check_output,
    console,
    device_named,
    device_option,
    encoder_of,
    exit_codes,
    images_option,
    inputs_of,
    interruptible,
    json_option,
    output_named,
    output_option,
    print_files,
    print_json,
    run_in,
    say,
    texts_option,
    workers_option,
)
from torchprobe.common.messages import counted

_FORMATS = ("int8_tensor", "int8_token", "int8_channel", "e4m3", "e4m3_unscaled", "e5m2", "e5m2_unscaled", "mxfp8", "nvfp4")

HELP = (
    "Can MODEL be served in eight bits? One pass over inputs forecasts what each linear layer and convolution would lose in INT8, FP8, "
    "MXFP8 and NVFP4, ranks the layers to keep in 16 bits, and names the features that cause it. Writes the ranking, smoothing scales, "
    f"limits for clipping, and a page.\n\n{MODEL}"
)


@click.command("quantize-check", epilog=exit_codes(), short_help="Find out what would break in eight bits.", help=HELP)
@click.argument("model")
@images_option("Images, in subfolders too.")
@texts_option
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    default="int8_token",
    show_default=True,
    metavar="FORMAT",
    help=f"Ranks the layers: {', '.join(_FORMATS)}.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of the smoothing scales (SmoothQuant).")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--random-init", is_flag=True, help="Random weights from --seed: the baseline.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Inputs in one forward pass.")
@device_option
@workers_option
@click.option("--limit", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Only N inputs, chosen at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="For --limit and --random-init.")
@output_option("quantize-check")
@json_option
def quantize_check(
    model: str,
    folder: Path | str | None,
    texts: Path | None,
    form: str,
    alpha: float,
    checkpoint: Path | None,
    random_init: bool,
    batch_size: int,
    device: str,
    workers: int,
    limit: int,
    seed: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    import torch

    from torchprobe.rendering import page
    from torchprobe.studies import quantize_check as study
    from torchprobe.studies.calibration import recalibrate_on
    from torchprobe.studies.quantize_report import print_check, write_quantize_check

    if checkpoint and random_init:
        raise click.UsageError("--checkpoint and --random-init exclude each other")
    out = output_named(out, "quantize-check", model)
    place = device_named(device)
    page.require()
    images = inputs_of(folder, texts, limit, seed)
    torch.manual_seed(seed)
    check_output(out)
    with loading(model, fetch=not (checkpoint or random_init)):
        encoder = encoder_of(model, checkpoint, random_init, None, texts is not None).to(place)
        if random_init:
            recalibrate_on(encoder, images, batch_size, seed=seed)
    with (
        run_in(out, "quantize-check", model, overwrite=overwrite, inputs=(folder, texts, checkpoint)),
        interruptible() as stop,
        progress_bar("quantize-check", f"{encoder.inputs}s", len(images)) as progress,
    ):
        found = study.quantize_check(
            encoder, images, form, batch_size=batch_size, device=place, workers=workers, alpha=alpha, progress=progress, stop=stop
        )
        source = {"images": str(folder)} if texts is None else {"texts": str(texts)}
        found.settings.update(
            source | {"checkpoint": checkpoint and str(checkpoint), "random_init": random_init, "limit": limit, "seed": seed}
        )
        files = write_quantize_check(found, out)
    if as_json:
        print_json(found.summary() | {"files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_check(found, console())
        print_files(files)
    if found.partial:
        say(f"Interrupted: the results are about the first {found.seen:,} of {counted(found.total, encoder.inputs)}.")
        raise click.exceptions.Exit(INTERRUPTED)
