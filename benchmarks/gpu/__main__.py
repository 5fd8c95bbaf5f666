"""``python -m benchmarks.gpu``: arguments, and each part in turn."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch

from benchmarks.gpu import bandwidth, graph, launch, results, rivals, step
from benchmarks.gpu.device import Device, find, versions
from benchmarks.gpu.markdown import markdown
from benchmarks.gpu.results import Figure

PARTS: dict[str, tuple[str, Any]] = {
    "bandwidth": ("Bandwidth", bandwidth),
    "rivals": ("Beside eager PyTorch and inductor", rivals),
    "launch": ("One call on one vector", launch),
    "step": ("A training step", step),
    "graph": ("The training step in a CUDA graph", graph),
}
RESULTS = Path(__file__).parents[1] / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only", multiple=True, type=click.Choice(list(PARTS)), help="This part; may be repeated. The others stay as they are in the file."
)
@click.option(
    "--quick", is_flag=True, help="Small inputs, a few seconds: shows that everything runs. Writes no file unless --results is given."
)
@click.option("--device", "name", default="cuda", show_default=True, help="cpu runs the same code for tests; its figures mean nothing.")
@click.option(
    "--results", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Where the files go  [default: benchmarks/results]"
)
def main(only: tuple[str, ...], quick: bool, name: str, folder: Path | None) -> None:
    """What torchprobe costs on a GPU: all figures in DIR/<device>.json, and as tables in DIR/<device>.md and on standard output.

    Planned for about six minutes and 25 GB of device memory. Exit code 2: there is no GPU, or its kernels do not run; 1: a part failed.
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
        if folder is not None:  # after every part: what has been measured is not lost when time runs out
            results.write(folder / f"{device.slug}.json", document)
            (folder / f"{device.slug}.md").write_text(markdown(document), encoding="utf-8")
    click.echo(markdown(document))
    if failed:
        sys.exit(1)


def _measure(part: str, device: Device, quick: bool) -> dict[str, Any]:
    """Runs one part; one that fails keeps the figures it has and does not stop the others."""
    title, module = PARTS[part]
    run: Callable[..., Iterator[Figure]] = module.run
    figures: list[Figure] = []
    error, start = None, perf_counter()
    try:
        figures.extend(run(device, module.QUICK if quick else module.Plan()))
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    gc.collect()
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    return results.part(title, perf_counter() - start, figures, error)


if __name__ == "__main__":
    main()
