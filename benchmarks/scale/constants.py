"""What one item of work costs on this machine, with one thread: processor seconds, bytes in memory, bytes in files.

Times are processor time of the process and the smallest of several repetitions, so that other processes change little.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import torchprobe
from benchmarks.synthetic_broden import LABELS, GeneratedMaps, SyntheticBroden, number
from torchprobe.analysis.embeddings import embed
from torchprobe.common.facts import file_digests
from torchprobe.datasets import open_shards
from torchprobe.dissection import dissect
from torchprobe.ops import new_state, observe_

WIDTH = 8192
"""The width of the layers of a model of 70B parameters."""

FEATURES = 768
"""The width of the representation of CLIP ViT-L/14."""


@dataclass(frozen=True)
class Constant:
    """One number. ``value`` in ``unit``; ``how``: how it was measured."""

    value: float
    unit: str
    how: str


def least(call: Callable[[], object], repetitions: int) -> float:
    """The smallest processor time of a call, seconds; the first call does not count."""
    call()
    found = []
    for _ in range(repetitions):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def measure(quick: bool = False) -> dict[str, Constant]:
    """All constants. ``quick``: small inputs, for a test."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **recording(folder, quick),
            **reading(folder, quick),
            **embedding(folder, quick),
            **dissection(folder, quick),
        }


# -- recording ---------------------------------------------------------------------------------------------------------------


def recording(folder: Path, quick: bool) -> dict[str, Constant]:
    """One read of an activation, one hook, the state of a layer, and a window of a history in its file."""
    vectors = 64 if quick else 2048
    x = torch.randn(vectors, WIDTH).bfloat16()
    state = new_state(WIDTH, torch.device("cpu"))
    seconds = least(partial(observe_, state, x), 3 if quick else 20)
    small = torch.randn(1, 64)
    modules = nn.ModuleList(nn.Identity() for _ in range(100))

    def forward() -> None:
        for module in modules:
            module(small)

    plain = least(forward, 20)
    with torchprobe.record(modules, "*"):
        recorded = least(forward, 20)
    return {
        "observe": Constant(vectors * WIDTH / seconds, "numbers a second", f"observe_ on bfloat16 ({vectors}, {WIDTH})"),
        "hook": Constant(
            (recorded - plain) / len(modules), "seconds a call", "a recorded layer of width 64 with one vector, less the same unrecorded"
        ),
        "state": Constant(state.nbytes / WIDTH, "bytes a feature", "the state of a recorded layer"),
        "window": Constant(_window(folder), "bytes a layer and window", "what one more window of a history adds to its file"),
    }


def _window(folder: Path, features: int = 4096) -> float:
    """Bytes for each window of a layer."""
    model = nn.Sequential(nn.Identity())
    sizes = []
    for windows in (2, 6):
        with torchprobe.record(model, "*") as recorder:
            for step in range(windows):
                model(torch.randn(4, features))
                recorder.snapshot(step)
        recorder.save(folder / f"{windows}.safetensors")
        sizes.append((folder / f"{windows}.safetensors").stat().st_size)
    return (sizes[1] - sizes[0]) / 4


# -- reading -----------------------------------------------------------------------------------------------------------------


def reading(folder: Path, quick: bool) -> dict[str, Constant]:
    """The index of a shard, the digest of its bytes, and a picture from its bytes to the tensor that a network takes."""
    members = 100 if quick else 10_000
    path = folder / "000.tar"
    with tarfile.open(path, "w") as shard:
        for i in range(members):
            for kind, data in ((".jpg", b"x" * 200), (".txt", b"a caption"), (".json", b"{}")):
                member = tarfile.TarInfo(f"{i:09}{kind}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    index = least(partial(open_shards, [path], labels=False), 2)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    images = open_shards([path], labels=False)
    memory = (tracemalloc.get_traced_memory()[0] - before) / len(images)
    tracemalloc.stop()
    block = folder / "bytes"
    block.write_bytes(os.urandom(1 << 20) * (2 if quick else 64))
    start = time.process_time()
    file_digests([block], workers=1)
    hashed = block.stat().st_size / (time.process_time() - start)
    return {
        "index": Constant(
            index / len(images), "seconds an image", f"open_shards on a shard of {members:,} samples with 3 members each, on this machine"
        ),
        "index_memory": Constant(memory, "bytes an image", "the index of that shard in memory"),
        "digest": Constant(hashed, "bytes a second", "SHA-256 of a file in the page cache"),
        "decode": Constant(
            _decode(2 if quick else 30),
            "seconds an image",
            "a JPEG of 384 × 384, decoded, resized and cropped to 224 × 224, and normalized",
        ),
    }


def _decode(repetitions: int) -> float:
    from torchvision.transforms import v2

    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((384, 384), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    transform = v2.Compose([
        v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.25] * 3),
    ])  # fmt: skip
    return least(lambda: transform(Image.open(io.BytesIO(file.getvalue())).convert("RGB")), repetitions)


# -- embedding ---------------------------------------------------------------------------------------------------------------


class Vectors(torch.utils.data.Dataset[torch.Tensor]):
    """Representations instead of images, so that only what surrounds the network is measured."""

    def __init__(self, count: int) -> None:
        self.rows = torch.randn(count, FEATURES)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def embedding(folder: Path, quick: bool) -> dict[str, Constant]:
    """A row in the file of embeddings, and the work of the process that writes it."""
    count = 512 if quick else 16_384
    path, batch = folder / "embeddings.safetensors", 512
    data = Vectors(count)
    start = time.process_time()
    embed(nn.Identity(), data, batch_size=batch, path=path)
    seconds = time.process_time() - start
    return {
        "row": Constant(
            path.stat().st_size / count,
            "bytes an image",
            f"a file of {count:,} representations of {FEATURES} features, with names of 1 to 5 letters",
        ),
        "write": Constant(
            seconds / count,
            "seconds an image",
            f"embed with a network that does nothing, in batches of {batch}: reading the rows and writing the file",
        ),
    }


# -- dissection --------------------------------------------------------------------------------------------------------------


def dissection(folder: Path, quick: bool) -> dict[str, Constant]:
    """Both passes of a dissection over maps of 16 × 16, without the network, and its tables."""
    units, few, many = (8, 8, 16) if quick else (1024, 16, 48)
    seconds = []
    for images in (few, many):
        start = time.process_time()
        found = dissect(
            GeneratedMaps(units, 16), "maps", SyntheticBroden(images), feature_dim=1, preprocess=number, geometry="whole", batch_size=8
        )["maps"]
        seconds.append(time.process_time() - start)
    found.save(folder / "dissection.safetensors")
    pairs = units * LABELS
    return {
        "dissect": Constant(
            max(seconds[1] - seconds[0], 1e-9) / (many - few) / units,
            "seconds an image and unit",
            f"thresholds and overlap of {units:,} units on maps of 16 × 16 and masks of 112 × 112: {many} images less {few}; the maps are "
            "generated, which is included",
        ),
        "dissect_file": Constant(
            (folder / "dissection.safetensors").stat().st_size / pairs, "bytes a unit and concept", "a saved dissection"
        ),
    }
