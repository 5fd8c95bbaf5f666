"""``python -m benchmarks.dissection_full``: time and memory of a whole dissection of Broden's size, without the network.

Labels and maps are generated. Everything else is measured: thresholds, counts, scores, average precision and its p-values.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.report import HELP
from benchmarks.synthetic_broden import IMAGES, GeneratedMaps, SyntheticBroden, number
from benchmarks.timing import peak_memory
from torchprobe.common.runs import Progress
from torchprobe.dissection import dissect


@click.command(context_settings=HELP)
@click.option("--images", default=IMAGES, show_default=True)
@click.option("--units", default=2048, show_default=True)
@click.option("--size", default=7, show_default=True, help="Rows and columns of a map.")
@click.option("--checkpoints", is_flag=True, help="With checkpoints, every minute.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE")
def main(images: int, units: int, size: int, checkpoints: bool, path: Path | None) -> None:
    """Dissects a synthetic data set of Broden's size. The peak memory includes PyTorch and the generated maps."""
    broden, model = SyntheticBroden(images), GeneratedMaps(units, size)
    before = peak_memory() / 1e9
    stages: dict[str, float] = {}
    last = [time.perf_counter()]

    def on_progress(progress: Progress) -> None:
        now = time.perf_counter()
        stages[progress.stage] = stages.get(progress.stage, 0.0) + now - last[0]
        last[0] = now
        if sys.stderr.isatty():
            print(
                f"\r{progress.stage} {progress.done:,}/{progress.total:,}, {progress.remaining or 0:.0f} s left ", end="", file=sys.stderr
            )

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint" if checkpoints else None
        result = dissect(
            model,
            "maps",
            broden,
            feature_dim=1,
            preprocess=number,
            geometry="whole",
            progress=on_progress,
            checkpoint=checkpoint,
            batch_size=32,
        )["maps"]
    seconds = time.perf_counter() - start
    found = {
        "images": images,
        "units": units,
        "size": size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "passes": stages,
        "rest": seconds - sum(stages.values()),
        "peak_gigabytes": peak_memory() / 1e9,
        "peak_gigabytes_before": before,
        "checkpoints": checkpoints,
        "detectors": result.unique_detectors("report").detectors,
        "concepts": len(result.unique_concepts()),
    }
    click.echo(json.dumps(found, indent=1))
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
