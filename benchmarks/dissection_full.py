"""``python -m benchmarks.dissection_full``: all of Broden's size, end to end without a network; time and memory.

Labels and maps are generated, so what is measured is everything else: thresholds, counts, scores, average precision and its p-values.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.synthetic_broden import IMAGES, GeneratedMaps, SyntheticBroden, number
from torchprobe.dissection import Progress, dissect


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", default=IMAGES, show_default=True)
@click.option("--units", default=2048, show_default=True)
@click.option("--size", default=7, show_default=True, help="Rows and columns of a map.")
@click.option("--checkpoints", is_flag=True, help="With checkpoints, every minute.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE")
def main(images: int, units: int, size: int, checkpoints: bool, path: Path | None) -> None:
    """Dissects a synthetic data set of Broden's size; peak memory includes PyTorch and the generated maps."""
    broden, model = SyntheticBroden(images), GeneratedMaps(units, size)
    before = _peak()
    stages: dict[str, float] = {}
    last = [time.perf_counter()]

    def told(progress: Progress) -> None:
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
        result = dissect(model, "maps", broden, preprocess=number, progress=told, checkpoint=checkpoint, batch_size=32)["maps"]
    seconds = time.perf_counter() - start
    found = {
        "images": images,
        "units": units,
        "size": size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "passes": stages,
        "rest": seconds - sum(stages.values()),
        "peak_gigabytes": _peak(),
        "peak_gigabytes_before": before,
        "checkpoints": checkpoints,
        "detectors": result.unique_detectors("report").detectors,
        "concepts": len(result.unique_concepts()),
    }
    click.echo(json.dumps(found, indent=1))
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def _peak() -> float:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


if __name__ == "__main__":
    main()
