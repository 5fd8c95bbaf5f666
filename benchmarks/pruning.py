"""``python -m benchmarks.pruning``: a pruning curve of 20 points beside one product with the head and 20 passes of argmax."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from benchmarks import allocator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchmarks.report import Section
    from torchprobe.analysis.embeddings import Embeddings

POINTS = 20
LIMIT = 2.5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", default=50_000, show_default=True)
@click.option("--features", default=768, show_default=True)
@click.option("--classes", default=1000, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="For all contestants together.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure to FILE, in seconds.")
def main(images: int, features: int, classes: int, seconds: float, path: Path | None) -> None:
    """What a pruning curve costs: medians and ratio, contestants in turn within one process."""
    allocator.restart_tuned()
    from benchmarks import report

    console = Console()
    if not console.is_terminal:
        console.width = 200
    about = report.machine()
    console.print(f"{about['processor']}, {about['threads']} threads; torch {about['torch']}; load average {about['load_average']:.1f}")
    section = run(seconds, images, features, classes)
    console.print(report.table(section, console.width))
    if path is not None:
        path.write_text(json.dumps(report.as_json([section]), indent=1) + "\n")


def run(seconds: float, images: int = 50_000, features: int = 768, classes: int = 1000) -> Section:
    """The curve by importance against what no way around it can do without."""
    import torch

    from benchmarks.report import Row, Section, Target, versus
    from benchmarks.timing import Timing, race
    from torchprobe.analysis.directions import privileged_directions
    from torchprobe.analysis.evaluation import evaluate
    from torchprobe.analysis.pruning import pruning_curve

    weight, embeddings = inputs(images, features, classes)
    directions = privileged_directions(weight, embeddings.h[:1000])
    logits = torch.empty(images, classes)
    times = race(
        {
            "product": partial(torch.mm, embeddings.h, weight.T, out=logits),
            "argmax": partial(_argmax, logits),
            "evaluate": partial(evaluate, weight, embeddings),
            "curve": partial(pruning_curve, weight, directions, embeddings),
        },
        seconds,
        torch.device("cpu"),
    )
    floor = Timing(tuple(a + b for a, b in zip(times["product"].seconds, times["argmax"].seconds, strict=True)))
    ratio = versus(times["curve"], floor)
    case = f"{images:,} × {features}, {classes} classes"
    rows = [
        Row(case, "one product h Wᵀ", times["product"]),
        Row(case, f"{POINTS} passes of argmax", times["argmax"]),
        Row(case, "both together", floor, ratio=1.0),
        Row(case, f"pruning_curve, {POINTS} points", times["curve"], **ratio, target=Target("× both", ratio["ratio"], LIMIT)),
        Row(case, "evaluate, one point", times["evaluate"], **versus(times["evaluate"], floor)),
    ]
    return Section("pruning", f"accuracy at {POINTS} fractions of the directions, each decision exact", rows, unit="s", scale=1.0)


def inputs(images: int, features: int, classes: int) -> tuple[Tensor, Embeddings]:
    """A head with rows of unit length, and representations that it is right about in most cases."""
    import torch

    from torchprobe.analysis.embeddings import Embeddings

    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(classes, features, generator=generator), dim=1)
    y = torch.randint(classes, (images,), generator=generator)
    h = torch.randn(images, features, generator=generator) + 4 * weight[y]
    return weight, Embeddings(h, y, [str(i) for i in range(images)])


def _argmax(logits: torch.Tensor) -> None:
    for _ in range(POINTS):
        logits.argmax(1)


if __name__ == "__main__":
    main()
