"""Tar shards: their headers, extended headers, labels and pictures."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.target import Target
from torchprobe.datasets import DatasetError, open_shards
from torchprobe.datasets.readers.tar import BLOCK, Tape, entries

_FORMATS = {"ustar.tar": tarfile.USTAR_FORMAT, "gnu.tar": tarfile.GNU_FORMAT, "pax.tar": tarfile.PAX_FORMAT}


def _picture(number: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def _make(folder: Path) -> None:
    for name, format in _FORMATS.items():
        with tarfile.open(folder / name, "w", format=format) as shard:
            long = "" if name == "ustar.tar" else "x" * 120
            for number in range(3):
                for kind, data in ((".png", _picture(number)), (".cls", b"%d" % number), (".json", b'{"label": 2}')):
                    member = tarfile.TarInfo(f"ü/{long}{number:03}{kind}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            shard.addfile(link)


def _tensor(image: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(image.resize((4, 4))))


def _read(folder: Path) -> Any:
    found = []
    for path in sorted(folder.glob("*.tar")):
        images = open_shards([path])
        batches = [*images.batches(_tensor, 4, workers=1)]
        found.append((images.digest(), list(images.labels), [(batch.pixels, batch.names, batch.unreadable) for batch in batches]))
    return found


def _headers(folder: Path) -> None:
    """A shard that is nearly all headers, so that most changes meet one."""
    with tarfile.open(folder / "pax.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        for number in range(4):
            member = tarfile.TarInfo(f"{'y' * 110}{number}.cls")
            member.size = 1
            member.pax_headers = {"comment": "c" * number}
            shard.addfile(member, io.BytesIO(b"1"))
        picture = tarfile.TarInfo("z.png")
        picture.size = len(_picture(0))
        shard.addfile(picture, io.BytesIO(_picture(0)))


def _resealed(data: bytes) -> bytes:
    """With checksums that fit every header, so that what comes behind them is reached."""
    found = bytearray(data)
    for at in range(0, len(found) - BLOCK + 1, BLOCK):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + BLOCK])
    return bytes(found)


def _walk(folder: Path) -> Any:
    """The members by seeking and by reading through, which must be the same, inside of the archive."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        data = _resealed(path.read_bytes())
        sought, streamed = ([*entries(Tape(io.BytesIO(data), size), lambda name: name.endswith(".cls"))] for size in (len(data), None))
        if sought != streamed:
            raise AssertionError("seeking and streaming find different members")
        if any(one.offset < 0 or one.size < 0 or one.offset + one.size > len(data) for one in sought if not one.problem):
            raise AssertionError("a member is outside of the archive")
        found.append([(one.name, one.offset, one.size, one.problem) for one in sought])
    return found


TARGETS = [
    Target("shards-resealed", dict.fromkeys(_FORMATS, "raw"), _make, _walk, ()),
    Target("shard-headers-resealed", {"pax.tar": "raw"}, _headers, _walk, ()),
    Target("shards", dict.fromkeys(_FORMATS, "raw"), _make, _read, (DatasetError,), weight=0.5),
    Target("shard-headers", {"pax.tar": "raw"}, _headers, _read, (DatasetError,), weight=0.5),
]
