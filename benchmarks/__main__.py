"""``python -m benchmarks``: the sections of the CPU benchmark, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks import dissection, model, observe
from benchmarks.report import HELP, Report, Section, json_option

SECTIONS: dict[str, tuple[Callable[[torch.device], Section], Callable[[torch.device], Section]]] = {
    "read": (lambda device: observe.read(device, 60), lambda device: observe.read(device, 5)),
    "wide": (lambda device: observe.wide(device, 20), lambda device: observe.wide(device, 2)),
    "rivals": (lambda device: observe.rivals(device, 40), lambda device: observe.rivals(device, 3, dtypes=("float32",))),
    "hook": (lambda device: observe.hook(device, 10), lambda device: observe.hook(device, 1)),
    "model": (lambda device: model.run(device, 80), lambda device: model.run(device, 4, batch=2)),
    "dissection": (
        lambda device: dissection.run(device, 30),
        lambda device: dissection.run(device, 1, units=256, images=8, quick=True),
    ),
}
"""Name → the full measurement, and the quick one. Each call says for about how many seconds it measures."""


@click.command(context_settings=HELP)
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="This section; may be repeated.")
@click.option("--quick", is_flag=True, help="Half a minute, less precise; inductor for float32 only.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--default-malloc", is_flag=True, help="Leave malloc as it is; see benchmarks/timing.py.")
@json_option
def main(only: tuple[str, ...], quick: bool, device: str, path: Path | None, default_malloc: bool) -> None:
    """What torchprobe costs, compared with the alternatives: medians and ratios, contestants in turn within one process."""
    report = Report(tune_malloc=not default_malloc)
    for name in only or SECTIONS:
        full, shortened = SECTIONS[name]
        with report.console.status(f"{name} …"):
            section = (shortened if quick else full)(torch.device(device))
        report.add(section)
    report.save(path)


if __name__ == "__main__":
    main()
