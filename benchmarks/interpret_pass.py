"""``python -m benchmarks.interpret_pass``: a whole interpretation with its network, against the bare forward passes over the same loader.

The contestants take turns in one process, and processor time is measured, of all threads, so that a busy machine changes little. Networks
have random weights and pictures are generated, which changes neither the work of the network nor that of the decoder. The floor is the bare
forward: the same batches, read by the same threads, through the same network. The interpretation has a head and labels: representations,
layers, hidden states, kurtosis, outlier features, accuracy, directions and pruning. What needs passes of its own, the origin of outlier
features, is in the last row, with tables, figures and page.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.report import HELP, Report, Row, Section, Target, json_option
from benchmarks.timing import Timing
from torchprobe.datasets import labeled_folder
from torchprobe.encoders import Encoder, Head
from torchprobe.studies.interpret import interpret

CLASSES = 10
LIMIT = 1.15
NETWORKS = ("vit_small_patch16_224", "resnet50")


def pictures(folder: Path, count: int, side: int) -> None:
    """Smooth pictures in class folders, as JPEG."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / f"class {i % CLASSES}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path)


def network(name: str, side: int) -> Encoder:
    """With random weights, from timm."""
    import timm
    from torchvision.transforms.functional import to_tensor

    torch.manual_seed(0)
    options = {"img_size": side} if name.startswith("vit") else {}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options).eval()
    return Encoder(model, features=int(model.num_features), preprocess=to_tensor, name=name)  # type: ignore[arg-type]


def run(name: str, images: int, side: int, rounds: int, batch_size: int, workers: int, folder: Path) -> Section:
    """The table of one network."""
    encoder = network(name, side)
    head = Head(torch.randn(CLASSES, encoder.features), names=[f"class {i}" for i in range(CLASSES)])
    data = labeled_folder(folder, names=head.names)

    def bare() -> None:
        with torch.inference_mode():
            for batch in data.batches(encoder.preprocess, batch_size, workers):
                encoder(batch.pixels)

    def whole(written: bool) -> Callable[[], None]:
        def call() -> None:
            unwritten = mock.patch("torchprobe.studies.interpret.run.write", return_value={})
            with tempfile.TemporaryDirectory() as out:
                if written:
                    interpret(encoder, data, out, head=head, batch_size=batch_size, workers=workers)
                else:
                    with unwritten:
                        interpret(encoder, data, out, head=head, batch_size=batch_size, workers=workers, provenance_images=0)

        return call

    contestants = {
        "bare forward over the loader": bare,
        "interpret: one pass for everything, and all measures": whole(False),
        "the same, with the origin of outlier features, tables, figures and page": whole(True),
    }
    seconds: dict[str, list[float]] = {title: [] for title in contestants}
    for _ in range(rounds):
        for title, call in contestants.items():
            start = time.process_time()
            call()
            seconds[title].append(time.process_time() - start)
    floor = seconds["bare forward over the loader"]
    rows = []
    for title, taken in seconds.items():
        ratio = float(np.median([a / b for a, b in zip(taken, floor, strict=True)]))
        target = Target("× the bare forward", ratio, LIMIT) if "one pass" in title else None
        rows.append(Row(f"{images} images", title, Timing(tuple(taken)), ratio, target=target))
    note = f"Processor time of all threads, {rounds} rounds in turn. Ratios are medians over the rounds."
    return Section(name, f"{name}, {images} images of {side} × {side}, batches of {batch_size}", rows, note, "s", 1.0, "× bare")


@click.command(context_settings=HELP)
@click.option("--network", "names", multiple=True, type=click.Choice(NETWORKS), help="This one; may be repeated.")
@click.option("--images", default=2000, show_default=True)
@click.option("--side", default=96, show_default=True, help="Of the pictures; a multiple of 16.")
@click.option("--rounds", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--workers", default=2, show_default=True)
@json_option
def main(names: tuple[str, ...], images: int, side: int, rounds: int, batch_size: int, workers: int, path: Path | None) -> None:
    """A whole interpretation of an encoder, against the bare forward passes over the same loader, in processor time."""
    report = Report()
    with tempfile.TemporaryDirectory() as temporary:
        pictures(Path(temporary), images, side)
        for name in names or NETWORKS:
            report.add(run(name, images, side, rounds, batch_size, workers, Path(temporary)))
    if path is not None:
        report.save(path)


if __name__ == "__main__":
    main()
