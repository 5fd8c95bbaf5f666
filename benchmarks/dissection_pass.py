"""``python -m benchmarks.dissection_pass``: a whole dissection with its network, against the bare forward passes over the same loader.

The contestants take turns in one process. Networks have random weights and pictures are generated, which changes neither the work of the
network nor that of the decoder. The floor is the bare forward: the same batches, read by the same threads, through the same network.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.report import HELP, Report, Row, Section, Target, json_option
from benchmarks.timing import race
from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.datasets.geometry import WholePicture
from torchprobe.dissection import dissect
from torchprobe.dissection.batches import Batches

SIDE = 224
CONCEPTS = {"object": 60, "material": 20, "color": 11}
LIMIT = 1.15

NETWORKS = {"resnet50": "layer4", "vit_base_patch16_224": "blocks.11"}


def pictures(folder: Path, count: int) -> Broden:
    """Smooth pictures with about ten labels each, in coherent regions, on label grids of 112 × 112 as in Broden."""
    rng = np.random.default_rng(0)
    values = {category: [f"{category} {i}" for i in range(n)] for category, n in CONCEPTS.items()}
    with BrodenWriter(folder, values, size=SIDE) as writer:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            masks = {
                category: np.kron(rng.choice(rng.integers(0, n + 1, 4), (8, 8)), np.ones((SIDE // 8, SIDE // 8), int))
                for category, n in CONCEPTS.items()
            }
            writer.add(f"a/{i}", coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), masks)
    return Broden(folder)


def network(name: str) -> nn.Module:
    """With random weights, so that units differ and maps are not constant."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).eval()


class Disk:
    """The largest size of a folder during a block, looked at twenty times a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self._stop = folder, 0, threading.Event()

    def __enter__(self) -> Disk:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, sum(size(path) for path in self.folder.glob("**/maps-*")))


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def stored(model: nn.Module, layer: str, batches: Batches, folder: Path) -> None:
    """NetDissect-Lite's first step: one pass that stores every map in one file. Thresholds and counts are computed from that file later."""
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    file = None
    try:
        with torch.no_grad():
            for batch in batches.read(range(len(batches))):
                model(batch.images)
                maps = found.pop().numpy()
                if file is None:
                    file = np.memmap(folder / "maps.mmap", np.float32, "w+", shape=(len(batches.rows), *maps.shape[1:]))
                first = batch.number * batches.size
                file[first : first + len(maps)] = maps
        assert file is not None
        file.flush()
    finally:
        handle.remove()


def run(name: str, images: int, seconds: float, folder: Path) -> Section:
    """The table of one network."""
    layer, model, broden = NETWORKS[name], network(name), Broden(folder / "set")
    transform = WholePicture(SIDE, SIDE, (4.4,) * 3, (-2.0,) * 3)
    batches = Batches(broden, range(images), transform, 32)
    disk = 0.0

    def bare() -> None:
        with torch.no_grad():
            for batch in batches.read(range(len(batches))):
                model(batch.images)

    def whole(space: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal disk
            with tempfile.TemporaryDirectory(dir=folder) as out, Disk(Path(out)) as watched:
                dissect(model, layer, broden, preprocess=transform, rows=range(images), disk=space, checkpoint=Path(out) / "c")
            disk = max(disk, watched.most)

        return call

    contestants = {
        "bare forward over the loader": bare,
        "dissect: thresholds, IoU, AP, top images; one pass": whole(8.0),
        "the same, two passes": whole(0.0),
        "every map stored (NetDissect-Lite), no thresholds or counts": lambda: stored(model, layer, batches, folder),
    }
    timings = race(contestants, seconds, torch.device("cpu"))
    floor = timings["bare forward over the loader"]
    rows = []
    for title, timing in timings.items():
        ratios = [a / b for a, b in zip(timing.seconds, floor.seconds, strict=True)]
        ratio = float(np.median(ratios))
        target = Target("≤ 1.15 × the bare forward", ratio, LIMIT) if "one pass" in title else None
        megabytes = disk / 1e6 if "one pass" in title else (folder / "maps.mmap").stat().st_size / 1e6 if "stored" in title else None
        rows.append(Row(f"{images} images", title, timing, ratio, None, None, None, megabytes, target=target))
    note = "peak MB: on the disk. Ratios are medians over the rounds."
    return Section(name, f"{layer} of {name}, {images} images of {SIDE} × {SIDE}", rows, note, "s", 1.0, "× bare")


@click.command(context_settings=HELP)
@click.option("--network", "names", multiple=True, type=click.Choice(list(NETWORKS)), help="This one; may be repeated.")
@click.option("--images", default=256, show_default=True)
@click.option("--seconds", default=240.0, show_default=True, help="For each network.")
@json_option
def main(names: tuple[str, ...], images: int, seconds: float, path: Path | None) -> None:
    """A whole dissection of one late layer with its network, against the bare forward passes over the same loader."""
    report = Report()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures(folder / "set", images)
        for name in names or NETWORKS:
            report.add(run(name, images, seconds, folder))
    report.console.print(f"{time.perf_counter() - start:.0f} s in all, {os.cpu_count()} cores")
    if path is not None:
        report.save(path)


if __name__ == "__main__":
    main()
