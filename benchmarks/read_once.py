"""``observe_`` against ``x.sum()``: what reads a tensor cannot be faster than what reads it and adds it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES, gaussian
from benchmarks.report import Row, Section, Target, versus
from benchmarks.timing import race
from torchprobe.ops import new_state, observe_


@dataclass(frozen=True)
class Case:
    """One shape in one layout, with the target and the hard limit for the ratio in float32."""

    shape: tuple[int, ...]
    layout: str = ""
    feature_dim: int = -1
    target: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        return f"{self.shape} {self.layout}".rstrip()

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = gaussian(*self.shape, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


CASES = (
    Case((12608, 768), target=1.3, limit=1.9),
    Case((78800, 768), target=1.3, limit=1.5),
    Case((64, 256, 28, 28), "channel-major", feature_dim=1, target=2),
    Case((64, 256, 28, 28), "channels_last", feature_dim=1),
    Case((4096, 768), "in cache"),
)


def run(device: torch.device, seconds: float, cases: Sequence[Case] = CASES) -> Section:
    """``seconds`` for all cases together."""
    rows = [row for case in cases for row in _rows(case, device, seconds / len(cases))]
    return Section(
        name="read",
        title="observe_ against x.sum()",
        rows=rows,
        ratio="× x.sum()",
        note="GB/s: the bytes of x over the median. In cache: x stays in the last-level cache, so what is left is mostly the arithmetic.",
    )


def _rows(case: Case, device: torch.device, seconds: float) -> list[Row]:
    bytes_of: dict[str, int] = {}
    contestants: dict[str, Callable[[], object]] = {}
    for name, dtype in DTYPES.items():
        x = case.tensor(dtype, device)
        state = new_state(x.shape[case.feature_dim], device)
        bytes_of[name] = x.nbytes
        contestants[f"x.sum(), {name}"] = x.sum
        contestants[f"observe_, {name}"] = partial(observe_, state, x, case.feature_dim)
    times = race(contestants, seconds, device)
    rows = []
    for name in DTYPES:
        for what in ("x.sum()", "observe_"):
            timing, baseline = times[f"{what}, {name}"], times[f"x.sum(), {name}"]
            target = None
            if what == "observe_" and name == "float32" and case.target:
                target = Target("× x.sum()", timing.median / baseline.median, case.target, case.limit)
            elif what == "observe_" and name == "bfloat16":
                target = Target("× float32", timing.median / times["observe_, float32"].median, 1)
            ratios = versus(timing, baseline) if what == "observe_" else {}
            rate = bytes_of[name] / timing.median / 1e9
            rows.append(Row(str(case), f"{what}, {name}", timing, **ratios, gigabytes_per_second=rate, target=target))
    return rows
