"""``python -m benchmarks``: arguments and output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from benchmarks import allocator

if TYPE_CHECKING:
    import torch

    from benchmarks.report import Section

SECTIONS = ("read", "rivals", "hook", "model", "dissection")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="This part; may be repeated.")
@click.option("--quick", is_flag=True, help="Half a minute, less precise; inductor for float32 only.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure to FILE, in seconds.")
@click.option("--default-malloc", is_flag=True, help="Leave malloc as it is; see benchmarks/allocator.py.")
def main(only: tuple[str, ...], quick: bool, device: str, path: Path | None, default_malloc: bool) -> None:
    """What torchprobe costs, beside the alternatives: medians and ratios, contestants in turn within one process."""
    if not default_malloc:
        allocator.restart_tuned()
    import torch

    from benchmarks import report

    console = Console()
    if not console.is_terminal:
        console.width = 200
    about = report.machine()
    console.print(
        f"{about['processor']}, {about['threads']} threads; torch {about['torch']}; CPU kernels {about['kernels']['cpu']}; "
        f"malloc {about['allocator']}; load average {about['load_average']:.1f}",
        highlight=False,
    )
    sections = []
    for name in only or SECTIONS:
        with console.status(f"{name} …"):
            section = _run(name, torch.device(device), quick)
        console.print(report.table(section, console.width), "")
        sections.append(section)
    if path is not None:
        path.write_text(json.dumps({**report.as_json(sections), "machine": about}, indent=1) + "\n")


def _run(name: str, device: torch.device, quick: bool) -> Section:
    from benchmarks import dissection, hook, model, read_once, rivals

    if name == "read":
        return read_once.run(device, 5 if quick else 60)
    if name == "rivals":
        return rivals.run(device, 3, dtypes=("float32",)) if quick else rivals.run(device, 40)
    if name == "hook":
        return hook.run(device, 1 if quick else 10)
    if name == "dissection":
        return dissection.run(device, 1, units=256, images=8, quick=True) if quick else dissection.run(device, 30)
    return model.run(device, 4, batch=2) if quick else model.run(device, 80)


if __name__ == "__main__":
    main()
