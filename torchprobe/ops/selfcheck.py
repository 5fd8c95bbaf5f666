"""Compares the kernels with the reference on this machine, for ``torchprobe doctor``."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.ops import exponents, layout
from torchprobe.ops.exponents import exponents_
from torchprobe.ops.observe import DTYPES, new_state, observe_, reference

TOLERANCE = 1e-5
"""The largest relative difference from the float64 reference that passes; 1e-10 for float64 input."""

Case = tuple[Tensor, int, Tensor | None]  # x, feature_dim, mask


@dataclass(frozen=True)
class Check:
    """One comparison: ``error`` is the largest relative difference, or nan if the kernel raised; ``detail`` describes the input."""

    name: str
    passed: bool
    error: float
    tolerance: float
    detail: str


def run(device: torch.device | str = "cpu") -> list[Check]:
    """Compares ``observe_`` and ``exponents_`` on ``device`` with their references in float64, for many types, layouts, offsets and scales,
    nan and inf.

    Takes about a second on a CPU. If a kernel raises, the check fails, and this function does not raise.

    >>> from torchprobe.ops import selfcheck
    >>> all(check.passed for check in selfcheck.run())
    True
    """
    checks = [_check(name, make, torch.device(device)) for name, make in _cases()]
    return checks + [_check_exponents(f"exponents, {name}", make, torch.device(device)) for name, make in _cases()]


def _cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and functions that make (x, feature_dim, mask) on the CPU. The random generator is seeded: the values are always the same."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def outliers() -> Tensor:
        x = normal(700, 333)
        x[:, 7] += 40
        x[0] *= 1000
        return x

    def nonfinite() -> Tensor:
        x = normal(500, 130)
        x[3, 5], x[77, 129], x[100] = float("nan"), float("inf"), float("-inf")
        return x

    def rows(dtype: torch.dtype) -> Case:
        return (3 * normal(600, 203) + 1).to(dtype), -1, None

    def maps(dtype: torch.dtype) -> Case:
        return normal(3, 37, 19, 20).to(dtype), 1, None

    for dtype in DTYPES:
        yield f"rows, {str(dtype)[6:]}", functools.partial(rows, dtype)
        yield f"channel-major, {str(dtype)[6:]}", functools.partial(maps, dtype)
    yield "channels last", lambda: (normal(3, 37, 19, 20).to(memory_format=torch.channels_last), 1, None)
    yield "strided", lambda: (normal(6, 37, 19, 40)[:, ::2, 1:, ::3], 1, None)
    yield "mask", lambda: (normal(8, 50, 64), -1, torch.rand(8, 50, generator=generator) < 0.5)
    yield "mean/std 1000", lambda: (normal(2000, 96) + 1000, -1, None)
    yield "scale 1e-20", lambda: (1e-20 * normal(500, 96), -1, None)
    yield "scale 1e20", lambda: (1e20 * normal(500, 96), -1, None)
    yield "heavy tails", lambda: (normal(2000, 96).exp(), -1, None)
    yield "outliers", lambda: (outliers(), -1, None)
    yield "nan and inf", lambda: (nonfinite(), -1, None)
    yield "constant", lambda: (torch.full((100, 64), 1000.1), -1, None)
    yield "one vector", lambda: (normal(1, 768), -1, None)
    yield "one feature", lambda: (normal(1000, 1), -1, None)
    yield "wide", lambda: (normal(9, 20_000), -1, None)


def _check(name: str, make: Callable[[], Case], device: torch.device) -> Check:
    x, feature_dim, mask = make()
    tolerance = 1e-10 if x.dtype == torch.float64 else TOLERANCE
    features = x.shape[feature_dim]
    state, expected = new_state(features, device), new_state(features, "cpu")
    reference(expected, x.double(), feature_dim, mask=mask)
    begin = time.perf_counter()
    try:
        observe_(state, x.to(device), feature_dim, mask=None if mask is None else mask.to(device))
    except Exception as error:
        return Check(name, False, float("nan"), tolerance, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    difference = _difference(state.cpu().double(), expected)
    detail = f"{str(x.dtype)[6:]} {tuple(x.shape)}, {1e3 * (time.perf_counter() - begin):.1f} ms"
    return Check(name, difference <= tolerance, difference, tolerance, detail)


def _check_exponents(name: str, make: Callable[[], Case], device: torch.device) -> Check:
    x, feature_dim, mask = make()
    shapes = exponents.shapes(x.shape[feature_dim])
    state = {key: torch.zeros(shape, dtype=torch.float64, device=device) for key, shape in shapes.items()}
    expected = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    exponents.reference(**expected, x=x.double(), feature_dim=feature_dim, mask=mask)
    begin = time.perf_counter()
    try:
        exponents_(**state, x=x.to(device), feature_dim=feature_dim, mask=None if mask is None else mask.to(device))
    except Exception as error:
        return Check(name, False, float("nan"), 1e-10, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    difference = 0.0
    for key, want in expected.items():
        got = state[key].cpu()
        exact = key in ("counts", "largest")
        off = (got - want).abs() / want.abs().clamp(min=1e-300)
        difference = max(difference, float(off.max()) if not exact else 0.0 if torch.equal(got, want) else float("inf"))
    detail = f"{str(x.dtype)[6:]} {tuple(x.shape)}, {1e3 * (time.perf_counter() - begin):.1f} ms"
    return Check(name, difference <= 1e-10, difference, 1e-10, detail)


def _difference(state: Tensor, expected: Tensor) -> float:
    """The largest difference of two states. Moments are compared in units of their spread. The result is inf if counts differ."""
    counts = [layout.CALLS, layout.VECTORS, layout.CONSTANT, layout.INVALID]
    got, want = (dict(zip(layout.ROWS, layout.rows(s).unbind(0), strict=True)) for s in (state, expected))
    equal = torch.equal(state[counts], expected[counts])
    equal &= all(torch.equal(got[name], want[name]) for name in ("count", "nonfinite", "outliers", "min", "max"))
    if not equal:
        return float("inf")
    n = want["count"].clamp(min=1)
    std = (want["m2"] / n).sqrt()
    pairs = [(got["mean"] - want["mean"], std + want["mean"].abs()), (got["abs_sum"] - want["abs_sum"], want["abs_sum"])]
    pairs += [(got["m2"] - want["m2"], want["m2"]), (got["m4"] - want["m4"], want["m4"])]
    pairs += [(got["m3"] - want["m3"], (want["m3"].abs() + n * std**3))]
    pairs += [(state[index] - expected[index], expected[index]) for index in (layout.KURTOSIS_MEAN, layout.KURTOSIS_M2)]
    return max(float((error.abs() / size).nan_to_num(nan=0.0, posinf=float("inf")).max()) for error, size in pairs)
