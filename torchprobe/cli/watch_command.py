"""``torchprobe watch``."""

from __future__ import annotations

import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from torchprobe.cli.tools import INTERRUPTED, console, exit_codes, json_option, print_json, say

if TYPE_CHECKING:
    from torchprobe.studies.watch import Watch

HELP = (
    "Follow a run while it trains: every window of each layer, on one page of this machine, or in the terminal. FILE is what "
    "rec.save() or Monitor(save=) writes, a recording in safetensors; it is read again when it changes, and need not exist yet. "
    "Several files are compared, with their curves over each other. Ctrl-C ends it."
)


@click.command(epilog=exit_codes(), short_help="Follow runs while they train.", help=HELP)
@click.argument("files", type=click.Path(path_type=Path), metavar="FILE…", nargs=-1, required=True)
@click.option("--terminal", is_flag=True, help="A table in the terminal instead of a page; printed once if that is not a terminal.")
@click.option("--field", default="", metavar="NAME", help="What to show, such as vector_kurtosis, std or abs_max.  [default: the headline]")
@click.option("--layers", "pattern", default="", metavar="PATTERN", help="Only layers that match a glob, or whose name contains this.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="Of the page; 0 takes one that is free.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, help="Seconds between two looks at the files.")
@json_option
def watch(
    files: tuple[Path, ...], terminal: bool, field: str, pattern: str, port: int, no_browser: bool, interval: float, as_json: bool
) -> None:
    from torchprobe.studies.watch import Watch

    runs = Watch(files)
    try:
        show(runs, terminal, field, pattern, port, no_browser, interval, as_json)
    except KeyboardInterrupt:
        say("Stopped watching. The runs go on.")
        raise click.exceptions.Exit(INTERRUPTED) from None


def show(runs: Watch, terminal: bool, field: str, pattern: str, port: int, no_browser: bool, interval: float, as_json: bool) -> None:
    """The table, the page or the numbers; the first two until Ctrl-C.

    Raises:
        ValueError: a run has been read, and has no such field or layer.
        FileNotFoundError: the table would be printed once, and there is no run yet.
    """
    runs.refresh()
    if problem := runs.unmatched(pattern):
        raise ValueError(problem)
    if as_json:
        print_json(runs.data(field, pattern))
    elif terminal:
        follow_in_terminal(runs, field, pattern, interval)
    else:
        from torchprobe.studies.watch_server import serving

        runs.data(field, pattern)  # a field that is unknown is told before the page opens
        with serving(runs, port) as address:
            choices = "&".join(f"{key}={quote(value)}" for key, value in (("field", field), ("layers", pattern)) if value)
            address += f"#{choices}" if choices else ""
            click.echo(address)
            say("Ctrl-C ends it.")
            if not no_browser:
                webbrowser.open(address)
            while True:
                time.sleep(3600)


def follow_in_terminal(runs: Watch, field: str, pattern: str, interval: float) -> None:
    """Prints the table, and again whenever there is something new."""
    from rich.live import Live

    printer = console()
    if not printer.is_terminal:
        if unread := runs.unread():
            raise FileNotFoundError(unread)
        printer.print(runs.terminal(field, pattern))
        return
    with Live(runs.terminal(field, pattern), console=printer, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(interval)
            runs.refresh()
            live.update(runs.terminal(field, pattern), refresh=True)
