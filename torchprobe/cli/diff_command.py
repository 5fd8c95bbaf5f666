"""``torchprobe diff``."""

from __future__ import annotations

from pathlib import Path

import click

from torchprobe.cli.tools import check_output, console, exit_codes, json_option, output_option, print_files, print_json, working

HELP = (
    "What changed between two dissections, unit by unit and concept by concept? A and B are --out folders of torchprobe dissect, or files "
    "of single layers: .safetensors, or the .csv of Network Dissection. Labels are matched by name and category, units by index. "
    "Differences of data, images and settings are said, not refused. Writes a page and tables."
)


@click.command(epilog=exit_codes(), short_help="Compare two dissections, unit by unit and concept by concept.", help=HELP)
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@output_option("torchprobe-diff")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.04, show_default=True, help="Smallest IoU of a detector.")
@click.option("--ap-threshold", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Smallest AP of an encoded concept.")
@click.option("--gain-threshold", type=click.FloatRange(max=1), metavar="G", help="Smallest gain.  [default: 2 · ap-threshold − 1]")
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Level of significance of an AP.")
@json_option
def diff(
    first: Path,
    second: Path,
    out: Path,
    threshold: float,
    ap_threshold: float,
    gain_threshold: float | None,
    alpha: float,
    as_json: bool,
) -> None:
    from torchprobe.rendering import page
    from torchprobe.studies.diff import diff as study
    from torchprobe.studies.diff import print_diff, write_diff

    page.require()
    check_output(out)
    with working("comparing"):
        found = study(first, second, threshold=threshold, ap_threshold=ap_threshold, gain_threshold=gain_threshold, alpha=alpha)
        names = [path.resolve().stem if path.is_file() else path.resolve().name for path in (first, second)]
        files = write_diff(found, out, names if names[0] != names[1] else [str(first), str(second)])
    if as_json:
        print_json({"layers": [one.summary() for one in found.values()], "files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_diff(found, console())
        print_files(files)
