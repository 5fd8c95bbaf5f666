"""``python -m benchmarks``: the sections of the CPU benchmark, one after the other, and how times grow; as tables, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks import dissection, exponents, growth, model, observe, page
from benchmarks.quiet import look, sentence, verdict
from benchmarks.report import HELP, Report, Section, json_option
from torchprobe.rendering.page import require

SECTIONS: dict[str, tuple[Callable[[torch.device], Section], Callable[[torch.device], Section]]] = {
    "read": (lambda device: observe.read(device, 60), lambda device: observe.read(device, 5)),
    "wide": (lambda device: observe.wide(device, 20), lambda device: observe.wide(device, 2)),
    "rivals": (lambda device: observe.rivals(device, 40), lambda device: observe.rivals(device, 3, dtypes=("float32",))),
    "hook": (lambda device: observe.hook(device, 10), lambda device: observe.hook(device, 1)),
    "exponents": (lambda device: exponents.run(device, 20), lambda device: exponents.run(device, 2)),
    "model": (lambda device: model.run(device, 80), lambda device: model.run(device, 4, batch=2)),
    "dissection": (
        lambda device: dissection.run(device, 30),
        lambda device: dissection.run(device, 1, units=256, images=8, quick=True),
    ),
}
"""Name → the full measurement, and the quick one. Each call says for about how many seconds it measures."""


@click.command(context_settings=HELP)
@click.option("--only", multiple=True, type=click.Choice([*SECTIONS, "growth"]), help="This section; may be repeated.")
@click.option("--axis", "axes", multiple=True, type=click.Choice([*growth.GROWTHS]), help="Of growth, only with this; may be repeated.")
@click.option("--quick", is_flag=True, help="A minute or two, less precise; inductor for float32 only.")
@click.option("--device", default="cpu", show_default=True, help="Growth is always measured on the CPU.")
@click.option("--default-malloc", is_flag=True, help="Leave malloc as it is; see benchmarks/timing.py.")
@click.option("--page", "html", type=click.Path(path_type=Path), metavar="FILE", help="Write one page with plots to FILE.")
@json_option
def main(
    only: tuple[str, ...], axes: tuple[str, ...], quick: bool, device: str, path: Path | None, html: Path | None, default_malloc: bool
) -> None:
    """What torchprobe costs, compared with the alternatives: medians and ratios, contestants in turn within one process. Then how times
    grow with features, images, units, concepts, layers, threads and ranks."""
    if html is not None:
        require()
    report = Report(tune_malloc=not default_malloc)
    before = look(0.3 if quick else 2)
    if before.problems():
        report.console.print(f"Note: {'; '.join(before.problems())}.", highlight=False)
    for name in only or SECTIONS:
        if name == "growth":
            continue
        full, shortened = SECTIONS[name]
        with report.console.status(f"{name} …"):
            section = (shortened if quick else full)(torch.device(device))
        report.add(section)
    found = []
    if not only or "growth" in only:
        for name in axes or growth.GROWTHS:
            with report.console.status(f"growth with {name} …"):
                found.append(growth.GROWTHS[name](0.5 if quick else 5))
            report.console.print(str(found[-1]), highlight=False)
    quiet = verdict(before, look(0.3 if quick else 2))
    report.console.print(sentence(quiet), highlight=False)
    more = {"growth": [one.as_json() for one in found], "quiet": quiet}
    report.save(path, **more)
    if html is not None:
        page.write(json.loads(report.text(**more)), html)


if __name__ == "__main__":
    main()
