"""Tar shards that tests make on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from torchprobe.datasets import ImageSet

SIDE = 4


def pixels(number: int) -> np.ndarray:
    """The picture of a number: its first value tells the number."""
    found = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    found[0, 0, 0] = number
    return found


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def samples(numbers: Sequence[int], more: Mapping[str, bytes] | None = None) -> list[tuple[str, bytes]]:
    """Each number as a sample: its picture, its label (the number), and further members."""
    found = []
    for number in numbers:
        found += [(f"{number:05}.png", png(number)), (f"{number:05}.cls", str(number).encode())]
        found += [(f"{number:05}.{kind}", data) for kind, data in (more or {}).items()]
    return found


def shards(folder: Path, counts: Sequence[int] = (3, 5, 1)) -> list[Path]:
    """Uneven shards of numbered pictures."""
    ends = np.cumsum(counts).tolist()
    spans = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [tar(folder / f"{i:03}.tar", samples(span)) for i, span in enumerate(spans)]


def to_tensor(image) -> torch.Tensor:
    """A transform without state."""
    return torch.from_numpy(np.array(image)).movedim(2, 0).float()


def numbers(images: ImageSet, size: int = 4, **options) -> list[int]:
    """The numbers that the pictures tell, after a check of every value."""
    found = []
    for batch in images.batches(to_tensor, size, **options):
        assert batch.files == len(batch.names) and not batch.unreadable
        for picture in batch.pixels:
            found.append(int(picture[0, 0, 0]))
            assert torch.equal(picture, to_tensor(pixels(found[-1])))
    return found
