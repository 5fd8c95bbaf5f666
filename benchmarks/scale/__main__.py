"""``python -m benchmarks.scale``: measures the constants, and prints what large runs cost."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.report import HELP, machine
from benchmarks.scale.constants import measure
from benchmarks.scale.page import PAGE, RESULTS, as_json, plain, read, written
from benchmarks.scale.scenarios import SCENARIOS


@click.command(context_settings=HELP)
@click.option("--keep", is_flag=True, help="Measure nothing: take the constants that are kept.")
@click.option("--write", is_flag=True, help="Write benchmarks/results/scale.json and the tables of docs/scale.md.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the constants to FILE.")
@click.option("--quick", is_flag=True, help="Small inputs; the numbers mean little.")
def main(keep: bool, write: bool, path: Path | None, quick: bool) -> None:
    """What large runs cost, from constants that are measured on this machine with one thread."""
    if keep:
        constants, _ = read()
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        constants = measure(quick)
        found = as_json(constants, machine())
    for name, one in constants.items():
        click.echo(f"{name:<14}{plain(one.value):>12} {one.unit:<28}{one.how}")
    for title, lines in SCENARIOS.items():
        click.echo(f"\n{title}")
        for line in lines({name: one.value for name, one in constants.items()}):
            click.echo(f"  {line.what:<58}{line.amount:>20}   {line.formula}")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), constants), encoding="utf-8")


if __name__ == "__main__":
    main()
