"""``torchprobe diff``."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from torchprobe.cli.progress import working
from torchprobe.cli.tools import (
    check_output,
    console,
    exit_codes,
    json_option,
    output_named,
    output_option,
    print_files,
    print_json,
    run_in,
)

HELP = (
    "What changed between two recordings, layer by layer, or between two dissections, unit by unit and concept by concept? "
    "Recordings are files of rec.save(), or folders with those of all ranks: of two checkpoints, precisions, eager and compiled. A layer "
    "is called changed if it differs by more than the windows of the recordings do among themselves. Dissections are --out folders of "
    "torchprobe dissect, or files of single layers: .safetensors, or the .csv of Network Dissection. Labels are matched by name and "
    "category, units by index. Differences of data, images and settings are said, not refused. Writes a page and tables."
)

RECORDINGS, DISSECTIONS = ("false_alarms", "renames", "most"), ("threshold", "ap_threshold", "gain_threshold", "alpha")


@click.command(epilog=exit_codes(), short_help="Compare two recordings layer by layer, or two dissections.", help=HELP)
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@output_option("diff", "A-B")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.04, show_default=True, help="Of dissections: smallest IoU of a detector."
)
@click.option(
    "--ap-threshold", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Of dissections: smallest AP of an encoded concept."
)
@click.option(
    "--gain-threshold", type=click.FloatRange(max=1), metavar="G", help="Of dissections: smallest gain.  [default: 2 · ap-threshold − 1]"
)
@click.option(
    "--alpha", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Of dissections: level of significance of an AP."
)
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Of recordings: the probability that any layer is called changed if nothing changed.",
)
@click.option(
    "--rename",
    "renames",
    multiple=True,
    metavar="OLD=NEW",
    help="Of recordings: the name of a layer of A in B, such as 'blocks.*=layers.*'; may be repeated.",
)
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Of recordings: print the N layers that changed most. The page and the CSV table have all.",
)
@json_option
@click.pass_context
def diff(
    context: click.Context,
    first: Path,
    second: Path,
    out: Path | None,
    overwrite: bool,
    threshold: float,
    ap_threshold: float,
    gain_threshold: float | None,
    alpha: float,
    false_alarms: float,
    renames: tuple[str, ...],
    most: int,
    as_json: bool,
) -> None:
    from torchprobe.rendering import page
    from torchprobe.studies.diff import diff as study
    from torchprobe.studies.diff import print_diff, write_diff
    from torchprobe.studies.diff_recordings import (
        are_recordings,
        diff_recordings,
        print_recording_diff,
        renaming,
        write_recording_diff,
    )

    page.require()
    recordings = are_recordings(first, second)
    _check_options(context, recordings)
    out = output_named(out, "diff", first, second)
    check_output(out)
    names = [path.resolve().stem if path.is_file() else path.resolve().name for path in (first, second)]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    run = run_in(out, "diff", " and ".join(names), overwrite=overwrite, inputs=(first, second))
    if recordings:
        with run, working("comparing"):
            changes = diff_recordings(first, second, alpha=false_alarms, rename=renaming(renames))
            files = write_recording_diff(changes, out, names)
        if as_json:
            print_json({**changes.summary(), "files": {kind: str(path) for kind, path in files.items()}})
        else:
            print_recording_diff(changes, console(), most)
            print_files(files)
        return
    with run, working("comparing"):
        found = study(first, second, threshold=threshold, ap_threshold=ap_threshold, gain_threshold=gain_threshold, alpha=alpha)
        files = write_diff(found, out, names)
    if as_json:
        print_json({"layers": [one.summary() for one in found.values()], "files": {kind: str(path) for kind, path in files.items()}})
    else:
        print_diff(found, console())
        print_files(files)


def _check_options(context: click.Context, recordings: bool) -> None:
    """Refuses options that do not apply to what is compared."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in (DISSECTIONS if recordings else RECORDINGS) and context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            what = "dissections, and these are recordings" if recordings else "recordings, and these are none"
            raise click.UsageError(f"{parameter.opts[0]} is an option of {what}")
