"""``torchprobe segment``, which is also ``torchprobe dissect --segment``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from torchprobe.cli.progress import loading, progress_bar
from torchprobe.cli.tools import (
    INTERRUPTED,
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
)

HELP = (
    "Where are the units of a finished dissection active on new pictures? DISSECTION is the --out folder of torchprobe dissect, or a "
    ".safetensors file of one layer; PICTURES are files and folders. Draws the region where each unit is above its threshold, with the "
    "concept that it overlapped in the labeled data set. Writes a page and the pictures. torchprobe dissect --segment does the same."
)

_NAME = re.compile(r"(timm|torchvision|open_clip):[\w.-]+(/[\w.-]+)?")
"""The encoders that are loaded because a file names them: those of a library. Others must be named by the user."""


@click.command(epilog=exit_codes(), short_help="Draw the units of a dissection on new pictures.", help=HELP)
@click.argument("dissection", type=click.Path(path_type=Path))
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The encoder of the dissection.  [default: as the dissection says]")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Its local weights: .safetensors, .pt, .pth, .ckpt.")
@click.option("--layers", multiple=True, metavar="NAME", help="Only this layer; may be repeated.")
@click.option("--unit", "units", multiple=True, type=click.IntRange(min=0), metavar="N", help="This unit, from 0; may be repeated.")
@click.option("--concept", "concepts", multiple=True, metavar="NAME", help="The best units for this concept; may be repeated.")
@click.option(
    "--most", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Units to draw, for each --concept if any."
)
@click.option("--maps", is_flag=True, help="Also write the number of the concept of each pixel.")
@click.option("--basis", "basis_file", type=click.Path(path_type=Path), metavar="FILE", help="As for the dissection.")
@output_option("segment", "DISSECTION")
@device_option
@json_option
def segment(
    dissection: Path,
    pictures: tuple[Path, ...],
    model: str | None,
    checkpoint: Path | None,
    layers: tuple[str, ...],
    units: tuple[int, ...],
    concepts: tuple[str, ...],
    most: int,
    maps: bool,
    basis_file: Path | None,
    out: Path | None,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    out = output_named(out, "segment", dissection)
    draw_units(dissection, pictures, model, checkpoint, layers, out, device, as_json, units, concepts, most, maps, basis_file, overwrite)


def draw_units(
    dissection: Path,
    pictures: Sequence[Path],
    model: str | None,
    checkpoint: Path | None,
    layers: Sequence[str],
    out: Path,
    device: str,
    as_json: bool,
    units: Sequence[int] = (),
    concepts: Sequence[str] = (),
    most: int = 20,
    maps: bool = False,
    basis_file: Path | None = None,
    overwrite: bool = False,
) -> None:
    """The whole command."""
    from torchprobe.dissection.sparse_file import read_basis
    from torchprobe.encoders import load_encoder
    from torchprobe.rendering import page
    from torchprobe.studies.segment import find_dissections, find_pictures, print_segments, segment_folder

    page.require()
    check_output(out)
    found = find_dissections(dissection, layers)
    if units and len(found) > 1:
        raise click.UsageError(f"--unit needs one layer, and {dissection} has {len(found)}: choose with --layers")
    find_pictures(pictures)  # before the network is loaded
    basis = None if basis_file is None else read_basis(basis_file)
    name = model or _named(str(next(iter(found.values())).metadata.get("model", "")), checkpoint)
    with loading(name, fetch=checkpoint is None):
        encoder = load_encoder(name, checkpoint).to(device_named(device))
    chosen: dict[str, Any] = {"units": units or None, "concepts": concepts or None, "most": most, "basis": basis}
    read = (dissection, checkpoint, basis_file, *pictures)
    try:
        run = run_in(out, "segment", name, overwrite=overwrite, inputs=read)
        with run, interruptible("picture") as stop, progress_bar("pictures", "pictures") as tell:
            drawn = segment_folder(found, encoder, pictures, out, maps=maps, progress=stopping(tell, stop), **chosen)
    except KeyboardInterrupt:
        say(f"Interrupted: pictures so far are in {out}, without a page of all. The same command starts again.")
        raise click.exceptions.Exit(INTERRUPTED) from None
    for _, why in next(iter(drawn.values())).unreadable:
        say(f"Note: {why}")
    files = {f"{layer or '(output)'} {kind}": path for layer, one in drawn.items() for kind, path in one.files.items()}
    if as_json:
        layers_drawn = [{"layer": layer, "units": one.rows(), "pictures": one.pictures} for layer, one in drawn.items()]
        print_json({"layers": layers_drawn, "files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_segments(drawn, console())
        print_files(files)


def _named(noted: str, checkpoint: Path | None) -> str:
    """The encoder that a dissection names; in parentheses it has the file of its weights."""
    name, _, weights = noted.partition(" (")
    if not _NAME.fullmatch(name) or (weights and checkpoint is None):
        raise click.UsageError(f"the dissection is of {noted[:200] or 'an unknown network'!r}: name it with --model and --checkpoint")
    return name
