"""``python -m benchmarks.gpu``: arguments, and each part in turn."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
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
    """What is measured together. Its fields say how large and how long; without arguments it is the full measurement."""

    @classmethod
    def quick(cls) -> Part:
        """Small inputs, a few seconds."""

    def run(self, device: Device) -> Iterator[Figure]: ...


PARTS: dict[str, tuple[str, type[Part]]] = {
    "bandwidth": ("Bandwidth", observe.Bandwidth),
    "rivals": ("Compared with eager PyTorch and inductor", observe.Rivals),
    "launch": ("One call on one vector", observe.Launch),
    "step": ("A training step", training.Step),
    "graph": ("The training step in a CUDA graph", training.Graph),
}
RESULTS = Path(__file__).parents[1] / "results"


@click.command(context_settings=HELP)
@click.option(
    "--only", multiple=True, type=click.Choice(list(PARTS)), help="This part; may be repeated. The file keeps the figures of the others."
)
@click.option(
    "--quick", is_flag=True, help="Small inputs, a few seconds: only shows that everything runs. Writes files only with --results."
)
@click.option("--device", "name", default="cuda", show_default=True, help="cpu runs the same code for tests; the figures mean nothing.")
@click.option(
    "--results", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Where the files go  [default: benchmarks/results]"
)
def main(only: tuple[str, ...], quick: bool, name: str, folder: Path | None) -> None:
    """What torchprobe costs on a GPU. Figures go to DIR/<device>.json; tables go to DIR/<device>.md and to standard output.

    Planned for about six minutes and 25 GB of device memory. Exit code 2: there is no GPU, or its kernels do not run. 1: a part failed.
    """
    device = find(name)
    folder = folder or (None if quick or device.torch_device.type == "cpu" else RESULTS)
    document = results.document(device.as_json(), versions(), quick)
    if folder is not None:
        document = results.resume(folder / f"{device.slug}.json", document)
    failed = False
    for part in only or PARTS:
        click.echo(f"{part} …", err=True)
        document["parts"][part] = _measure(part, device, quick)
        failed |= document["parts"][part]["error"] is not None
        click.echo(f"{part}: {document['parts'][part]['seconds']:.0f} s", err=True)
        if folder is not None:  # after every part, so that an interruption loses little
            results.write(folder / f"{device.slug}.json", document)
            (folder / f"{device.slug}.md").write_text(markdown(document), encoding="utf-8")
    click.echo(markdown(document))
    if failed:
        sys.exit(1)


def _measure(part: str, device: Device, quick: bool) -> dict[str, Any]:
    """Runs one part. If it fails, its figures so far are kept, and the other parts still run."""
    title, kind = PARTS[part]
    figures: list[Figure] = []
    error, start = None, perf_counter()
    try:
        figures.extend((kind.quick() if quick else kind()).run(device))
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    gc.collect()
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    return results.part(title, perf_counter() - start, figures, error)


if __name__ == "__main__":
    main()
