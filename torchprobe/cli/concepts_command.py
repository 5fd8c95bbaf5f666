"""``torchprobe concepts``: a group; each of its commands has a file of its own."""

from __future__ import annotations

import click

from torchprobe.cli.import_command import import_
from torchprobe.cli.tools import exit_codes

HELP = (
    "Concepts to compare units with. import writes a segmentation data set in the format that torchprobe dissect reads with --broden; "
    "torchprobe dissect --check --broden DIR checks the result."
)


@click.group(epilog=exit_codes(), short_help="Get concepts from segmentation data sets.", help=HELP)
def concepts() -> None:
    pass


for command in (import_,):
    concepts.add_command(command)
