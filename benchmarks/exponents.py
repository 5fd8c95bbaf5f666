"""The operator ``exponents_`` against one read of the tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.report import Row, Section, Target, versus
from benchmarks.timing import Timing, gaussian, race
from torchprobe.statistics import Exponents

TARGET, LIMIT = 1.5, 2.5
"""× ``x.sum()``, for Gaussian values in float32."""


def run(device: torch.device, seconds: float, shape: tuple[int, int] = (12608, 768)) -> Section:
    """One call of :class:`Exponents`, of values of several kinds."""
    x = gaussian(*shape, device=device)
    spread = x * (3 * gaussian(shape[1], device=device)).exp()
    inputs = {"Gaussian": x, "rectified": x.relu(), "features of many scales": spread, "bfloat16": x.bfloat16()}
    contestants: dict[str, Callable[[], object]] = {}
    for name, values in inputs.items():
        contestants[f"x.sum(), {name}"] = values.sum
        contestants[f"Exponents, {name}"] = partial(Exponents(shape[1], device=device).update, values)
    times = race(contestants, seconds, device)
    rows = []
    for name, values in inputs.items():
        rows += _rows(name, values, {what: times[f"{what}, {name}"] for what in ("x.sum()", "Exponents")})
    return Section(
        name="exponents", title="exponents_ against x.sum()", rows=rows, ratio="× x.sum()", note=f"{shape[0]} vectors of {shape[1]}."
    )


def _rows(name: str, values: Tensor, times: dict[str, Timing]) -> list[Row]:
    baseline, ours = times["x.sum()"], times["Exponents"]
    target = Target("× x.sum()", ours.median / baseline.median, TARGET, LIMIT) if name == "Gaussian" else None
    rows = [Row(name, what, timing, gigabytes_per_second=values.nbytes / timing.median / 1e9) for what, timing in times.items()]
    return [rows[0], replace(rows[1], target=target, **versus(ours, baseline))]
