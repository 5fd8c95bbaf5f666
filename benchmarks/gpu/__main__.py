"""``python -m benchmarks.gpu``: arguments, and each part in turn."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import click
import torch

from benchmarks.gpu import observe, results, training
from benchmarks.gpu.device import Device, find, versions
from benchmarks.gpu.results import Figure, markdown
from benchmarks.report import HELP


class Part(Protocol):
    """What is measured together. Its fields say how large and how long."""

    def run(self, device: Device) -> Iterator[Figure]: ...


PARTS: dict[str, tuple[str, Callable[[], Part]]] = {
    "bandwidth": ("Bandwidth", observe.Bandwidth),
    "launch": ("One call on one vector", observe.Launch),
    "step": ("A training step", training.Step),
    "graph": ("The training step in a CUDA graph", training.Graph),
    "rivals": ("Compared with eager PyTorch and inductor", observe.Rivals),
}
"""The most important first, in case time runs out; ``rivals`` compiles, which takes longest to begin."""
RESULTS = Path(__file__).parents[1] / "results"


@click.command(context_settings=HELP)
@click.option(
    "--only", multiple=True, type=click.Choice(list(PARTS)), help="This part; may be repeated. The file keeps the figures of the others."
)
@click.option("--device", "name", default="cuda", show_default=True)
@click.option("--results", "folder", type=click.Path(path_type=Path), default=RESULTS, metavar="DIR", help="Where the files go.")
@click.option(
    "--budget", default=540, show_default=True, metavar="SECONDS", help="Parts that would start later are left out, and the exit code is 1."
)
def main(only: tuple[str, ...], name: str, folder: Path, budget: float) -> None:
    """What torchprobe costs on a GPU. Figures go to DIR/<device>.json; tables go to DIR/<device>.md and to standard output.

    Planned for about six minutes and 25 GB of device memory. Exit code 2: there is no GPU, or its kernels do not run. 1: a part failed.
    """
    device = find(name)
    path = folder / f"{device.slug}.json"
    document = results.resume(path, results.document(device.as_json(), versions()))
    failed, start = False, perf_counter()
    for part in only or PARTS:
        if perf_counter() - start > budget:
            click.echo(f"{part}: left out, as {budget:g} s are over; --only {part} measures it", err=True)
            failed = True
            continue
        click.echo(f"{part} …", err=True)
        document["parts"][part] = _measure(part, device)
        failed |= document["parts"][part]["error"] is not None
        click.echo(f"{part}: {document['parts'][part]['seconds']:.0f} s", err=True)
        results.write(path, document)  # after every part, so that an interruption loses little
    click.echo(markdown(document))
    sys.exit(failed)


def _measure(part: str, device: Device) -> dict[str, Any]:
    """Runs one part. If it fails, its figures so far are kept, and the other parts still run."""
    title, kind = PARTS[part]
    figures: list[Figure] = []
    error, start = None, perf_counter()
    try:
        figures.extend(kind().run(device))
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    gc.collect()
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    return results.part(title, perf_counter() - start, figures, error)


if __name__ == "__main__":
    main()
