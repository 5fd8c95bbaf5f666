"""``python -m benchmarks.pruning``: a pruning curve of 20 points, compared with one product with the head and 20 passes of argmax."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.report import HELP, Report, Row, Section, Target, json_option, versus
from benchmarks.timing import race, total
from torchprobe.analysis.directions import privileged_directions
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.pruning import pruning_curve

POINTS = 20
LIMIT = 2.5


@click.command(context_settings=HELP)
@click.option("--images", default=50_000, show_default=True)
@click.option("--features", default=768, show_default=True)
@click.option("--classes", default=1000, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="For all contestants together.")
@json_option
def main(images: int, features: int, classes: int, seconds: float, path: Path | None) -> None:
    """What a pruning curve costs: medians and ratio, contestants in turn within one process."""
    report = Report()
    report.add(run(seconds, images, features, classes))
    report.save(path)


def run(seconds: float, images: int = 50_000, features: int = 768, classes: int = 1000) -> Section:
    """The curve by importance, compared with the work that any method has to do."""
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
    floor = total([times["product"], times["argmax"]])
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
    """A head with rows of unit length, and representations that it classifies correctly in most cases."""
    generator = torch.Generator().manual_seed(0)
    weight = functional.normalize(torch.randn(classes, features, generator=generator), dim=1)
    y = torch.randint(classes, (images,), generator=generator)
    h = torch.randn(images, features, generator=generator) + 4 * weight[y]
    return weight, Embeddings(h, y, [str(i) for i in range(images)])


def _argmax(logits: Tensor) -> None:
    for _ in range(POINTS):
        logits.argmax(1)


if __name__ == "__main__":
    main()
