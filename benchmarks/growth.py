"""How times grow: with features, images, units, concepts, layers, threads and ranks. Slopes on log-log axes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import torchprobe
from benchmarks.synthetic_broden import GRID, SyntheticBroden
from benchmarks.timing import Timing, gaussian, race
from torchprobe.dissection import LabelBatch, Overlap, average_precision, concept_matrix
from torchprobe.ops import new_state, observe_


@dataclass(frozen=True)
class Growth:
    """The times of one work at several sizes.

    Args:
        axis: what grows.
        what: the work.
        sizes: ascending.
        timings: one for each size.
        expected: the slope if all the time were spent on what grows: 1 for work, −1 for workers.
        missing: why there are no timings; empty if there are.
    """

    axis: str
    what: str
    sizes: Sequence[int]
    timings: Sequence[Timing]
    expected: float
    missing: str = ""

    @property
    def seconds(self) -> list[float]:
        """The smallest time at each size: other processes only add."""
        return [timing.minimum for timing in self.timings]

    @property
    def slope(self) -> float | None:
        """Of the line of least squares through log time over log size; None for fewer than two sizes."""
        return slope(self.sizes, self.seconds) if len(self.timings) > 1 else None

    @property
    def last(self) -> float | None:
        """The slope between the last two sizes, where what does not grow matters least."""
        return slope(self.sizes[-2:], self.seconds[-2:]) if len(self.timings) > 1 else None

    def __str__(self) -> str:
        if self.slope is None or self.last is None:
            return f"{self.axis}: {self.missing or 'one size only, so no slope'}"
        times = ", ".join(f"{size:,}: {second * 1e3:.3g}" for size, second in zip(self.sizes, self.seconds, strict=True))
        return f"{self.axis}: slope {self.slope:.2f}, at the end {self.last:.2f} (ideal {self.expected:g}); {self.what}; ms at {times}"

    def as_json(self) -> dict[str, Any]:
        """Everything, times in seconds."""
        medians = [timing.median for timing in self.timings]
        return {
            "axis": self.axis, "what": self.what, "sizes": list(self.sizes), "minima": self.seconds, "medians": medians,
            "disturbed": [timing.disturbed for timing in self.timings], "slope": self.slope, "last_slope": self.last,
            "expected": self.expected, "missing": self.missing,
        }  # fmt: skip


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of the line of least squares through the logarithms.

    >>> round(slope([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def features(seconds: float, sizes: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192), vectors: int = 1024) -> Growth:
    """``observe_`` on wider vectors."""
    calls = {size: partial(observe_, new_state(size, _CPU), gaussian(vectors, size, device=_CPU)) for size in sizes}
    return _raced("features", f"observe_ on {vectors:,} vectors, float32", calls, seconds)


def images(seconds: float, sizes: Sequence[int] = (8, 16, 32, 64, 128), units: int = 128) -> Growth:
    """Counts of a dissection over more images."""
    calls = {size: _overlap(units, size) for size in sizes}
    return _raced("images", f"Overlap of {units} units on maps of 7 × 7", calls, seconds)


def units(seconds: float, sizes: Sequence[int] = (64, 128, 256, 512, 1024), images: int = 16) -> Growth:
    """Counts of a dissection of more units."""
    calls = {size: _overlap(size, images) for size in sizes}
    return _raced("units", f"Overlap over {images} images", calls, seconds)


def concepts(seconds: float, sizes: Sequence[int] = (75, 150, 300, 600, 1200), images: int = 4096, units: int = 64) -> Growth:
    """Average precision of more concepts; each is in every fiftieth image."""
    scores = torch.rand(units, images, generator=torch.Generator().manual_seed(0))
    calls: dict[int, Callable[[], object]] = {}
    for size in sizes:
        shown = torch.rand(images, size, generator=torch.Generator().manual_seed(1)) < 0.02
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), shown.sum(1).cumsum(0)])
        calls[size] = partial(average_precision, scores, concept_matrix(crow, shown.nonzero()[:, 1], size))
    return _raced("concepts", f"average precision of {units} units over {images:,} images", calls, seconds)


def layers(seconds: float, sizes: Sequence[int] = (4, 8, 16, 32, 64), features: int = 768) -> Growth:
    """A forward pass of identities that are recorded."""
    x, calls, recorders = gaussian(64, features, device=_CPU), dict[int, Callable[[], object]](), []
    for size in sizes:
        model = nn.Sequential(*[nn.Identity() for _ in range(size)])
        recorders.append(torchprobe.record(model, "*").start())
        calls[size] = partial(model, x)
    try:
        return _raced("layers", f"recording layers of 64 vectors of {features} features", calls, seconds)
    finally:
        for recorder in recorders:
            recorder.stop()


def threads(seconds: float, sizes: Sequence[int] | None = None, shape: tuple[int, int] = (16384, 768)) -> Growth:
    """``observe_`` with more threads."""
    sizes = sizes or [2**i for i in range(8) if 2**i <= (os.cpu_count() or 1)]
    before, x, state = torch.get_num_threads(), gaussian(*shape, device=_CPU), new_state(shape[1], _CPU)

    def call(count: int) -> None:
        torch.set_num_threads(count)
        observe_(state, x)

    try:
        found = _raced("threads", f"observe_ on {shape}", {size: partial(call, size) for size in sizes}, seconds)
    finally:
        torch.set_num_threads(before)
    return replace(found, expected=-1.0)


_RANK = """
import json, sys, time, torch
from torch import nn
from torchprobe.analysis import embed
from torchprobe.common.ranks import torchrun
torch.set_num_threads(1)
torch.manual_seed(0)
rows = torch.randn(int(sys.argv[1]), 512)
network = nn.Sequential(*[nn.Linear(512, 512) for _ in range(12)])
times = []
with torchrun() as (rank, local):
    for _ in range(4):  # the first one does not count
        start = time.perf_counter()
        embed(network, torch.utils.data.TensorDataset(rows), batch_size=256)
        times.append(time.perf_counter() - start)
if rank == 0:
    open(sys.argv[2], "w").write(json.dumps(times[1:]))
"""


def ranks(seconds: float, sizes: Sequence[int] | None = None, rows: int = 4096) -> Growth:
    """``embed`` with more processes of one thread each. The start of the processes is not included."""
    sizes = sizes or [2**i for i in range(6) if 2**i <= (os.cpu_count() or 1)]
    what = f"embed {rows:,} rows through 12 layers of 512"
    timings = []
    for size in sizes:
        found = _processes(size, rows)
        if isinstance(found, str):
            return Growth("ranks", what, (), (), -1.0, f"with {size} processes: {found}")
        timings.append(Timing(tuple(found)))
    return Growth("ranks", what, tuple(sizes), tuple(timings), -1.0)


def _processes(size: int, rows: int) -> list[float] | str:
    """The times of the first rank, or why there are none."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        free.close()
        path = Path(folder) / "times.json"
        command = [sys.executable, "-c", _RANK, str(rows), str(path)]
        started = [
            subprocess.Popen(
                command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
            )
            for rank in range(size)
        ]
        end = perf_counter() + 300
        try:
            errors = [process.communicate(timeout=max(1.0, end - perf_counter()))[1] for process in started]
        except subprocess.TimeoutExpired:
            return "no end after 5 minutes"
        finally:
            for process in started:
                process.kill()
                process.wait()
        if not path.exists():
            return next(filter(None, errors), "no result").strip().splitlines()[-1]
        times: list[float] = json.loads(path.read_text())
        return times


GROWTHS: Mapping[str, Callable[[float], Growth]] = {
    "features": features, "images": images, "units": units, "concepts": concepts, "layers": layers, "threads": threads, "ranks": ranks,
}  # fmt: skip
"""Axis → the measurement. Each call says for about how many seconds it measures."""

_CPU = torch.device("cpu")


def _overlap(units: int, images: int) -> Callable[[], object]:
    broden = SyntheticBroden(images)
    maps = torch.randn(images, units, 7, 7, generator=torch.Generator().manual_seed(0)).relu_()
    labels = LabelBatch.pack([broden.image_labels(i) for i in range(images)], [(GRID, GRID)] * images)
    overlap = Overlap(torch.full((units,), 2.5), broden.primary, len(broden.categories))
    return partial(overlap.update, maps, labels)


def _raced(axis: str, what: str, calls: Mapping[int, Callable[[], object]], seconds: float) -> Growth:
    times = race({str(size): call for size, call in calls.items()}, seconds, _CPU)
    return Growth(axis, what, tuple(calls), tuple(times.values()), 1.0)
