"""How far one tensor is from another, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements that are compared at a time, in float64
_EXACT = 2.0**62  # differences of int64 below this do not wrap around
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """Two tensors compared. Positions where either is nonfinite are counted, and are in no other number.

    Attributes:
        elements: their number.
        equal_share: share of the elements that are equal: bit for bit in one dtype, in value in two. Nan equals nan.
        max_abs: the largest abs(b − a).
        relative: ‖b − a‖₂ / ‖a‖₂; 0 if both are 0, inf if only a is.
        cosine: of the angle between them; nan if one is 0.
        ulps: the largest distance in units in the last place of the coarser dtype, to which both are rounded: the number of steps from one
            floating-point number to the next. Nan for whole numbers.
        first: the index of the first element that differs; None without one.
        first_values: both values there.
        nonfinite_a, nonfinite_b: nan and inf in each.
        nonfinite_differ: positions where one is nan, inf or −inf, and the other is not the same.
        rounding: the unit roundoff of the coarser dtype; relative errors of a few of these are rounding. Nan for whole numbers.
        problem: why they cannot be compared, such as different shapes; "" if they can.
        compared: False if nothing is known of the values, as of sparse tensors.
    """

    elements: int = 0
    equal_share: float = math.nan
    max_abs: float = math.nan
    relative: float = math.nan
    cosine: float = math.nan
    ulps: float = math.nan
    first: tuple[int, ...] | None = None
    first_values: tuple[float, float] | None = None
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    nonfinite_differ: int = 0
    rounding: float = math.nan
    problem: str = ""
    compared: bool = True

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.problem and self.first is None

    @property
    def whole(self) -> bool:
        """Whether they are whole numbers or bool, which have no rounding."""
        return self.elements > 0 and math.isnan(self.rounding)

    @property
    def size(self) -> float:
        """The relative error; inf where shapes or nonfinite positions differ, 0 if nothing is known."""
        if not self.compared:
            return 0.0
        return math.inf if self.problem or self.nonfinite_differ else self.relative

    def apart(self, tolerance: float = 0.0) -> bool:
        """Whether they differ: at all, or by a relative error above ``tolerance``. Other shapes, nonfinite positions and whole numbers,
        such as the token that was chosen, always count."""
        if not self.compared:
            return False
        if self.problem or self.nonfinite_differ:
            return True
        return not self.equal if tolerance == 0 or self.whole else self.relative > tolerance


def difference(a: Tensor, b: Tensor) -> Difference:
    """Compares ``b`` with the reference ``a``: floating point, integer or bool, on any devices. It works in float64, in pieces.

    >>> found = difference(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 2.5]))
    >>> round(found.relative, 4), found.max_abs, found.first, round(found.equal_share, 2)
    (0.1667, 0.5, (2,), 0.67)
    >>> difference(torch.ones(2), torch.ones(3)).problem
    'shapes (2,) and (3,)'
    """
    for x in (a, b):
        if (problem := incomparable(x)) is not None:
            return Difference(problem=problem, compared=False)
    if a.shape != b.shape:
        return Difference(problem=f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.is_floating_point() != b.is_floating_point():
        return Difference(problem=f"{a.dtype} and {b.dtype}")
    if not a.numel():
        return Difference(0, 1.0, 0.0, 0.0, math.nan, 0.0)
    coarse = _coarser(a.dtype, b.dtype)
    unit = 1.0
    if torch.float64 in (a.dtype, b.dtype):  # squares of all other dtypes fit into float64
        unit = max(_largest(x, y) for x, y in _pieces(a, b)) or 1.0
    equal = bad_a = bad_b = bad_differ = 0
    squares, dots, norms_a, norms_b, largest, ulps = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    first: int | None = None
    for start, (x, y) in zip(range(0, a.numel(), _CHUNK), _pieces(a, b), strict=True):
        same = _same(x, y)
        alike = int(same.sum())
        equal += alike
        if alike < len(x) and first is None:
            first = start + int((~same).int().argmax())
        p, q = x.double(), y.double()
        fine_a, fine_b = p.isfinite(), q.isfinite()
        finite = fine_a & fine_b
        if not bool(finite.all()):
            bad_a, bad_b = bad_a + int((~fine_a).sum()), bad_b + int((~fine_b).sum())
            bad_differ += int((~finite & ~same).sum())
            x, y, p, q = x[finite], y[finite], p[finite], q[finite]
        apart = (q - p).abs()  # before the division, which may make it 0
        p, q = (p / unit, q / unit) if unit != 1 else (p, q)
        own = float(p @ p)
        norms_a += own
        if alike == len(finite):
            norms_b, dots = norms_b + own, dots + own
            continue
        if coarse is not None:
            ulps = max(ulps, _ulps(x, y, coarse))
        gap = q - p
        if not x.is_floating_point():  # whole numbers beyond 2^53, which lose their last digits in float64
            gap = (y.long() - x.long()).double().where(apart < _EXACT, gap)
            apart = gap.abs()
        largest = max(largest, float(apart.max())) if len(gap) else largest
        squares, dots, norms_b = squares + float(gap @ gap), dots + float(p @ q), norms_b + float(q @ q)
    place = None if first is None else tuple(int(i) for i in np.unravel_index(first, tuple(a.shape)))
    return Difference(
        elements=a.numel(),
        equal_share=equal / a.numel(),
        max_abs=largest,
        relative=math.sqrt(squares / norms_a) if norms_a else (math.inf if squares else 0.0),
        cosine=max(-1.0, min(1.0, dots / math.sqrt(norms_a) / math.sqrt(norms_b))) if norms_a and norms_b else math.nan,
        ulps=ulps if coarse is not None else math.nan,
        first=place,
        first_values=None if place is None else (float(a[place]), float(b[place])),
        nonfinite_a=bad_a,
        nonfinite_b=bad_b,
        nonfinite_differ=bad_differ,
        rounding=torch.finfo(coarse).eps / 2 if coarse is not None else math.nan,
    )


def incomparable(x: Tensor) -> str | None:
    """Why the elements of a tensor cannot be compared; None if they can.

    >>> incomparable(torch.zeros(2)), incomparable(torch.zeros(2).to_sparse())
    (None, 'sparse_coo tensors are not compared')
    """
    kind = str(x.layout).removeprefix("torch.").removeprefix("_")
    if x.is_nested or kind == "jagged":
        return "nested tensors are not compared"
    if x.layout is not torch.strided:
        return f"{kind} tensors are not compared"
    if x.is_meta:
        return "it was computed without numbers"
    if x.is_complex():
        return "complex numbers are not compared"
    packed = x.is_floating_point() and "x2" in str(x.dtype)  # two numbers in a byte
    if x.is_quantized or packed or type(x).__name__ == "MaskedTensor":
        return f"{'quantized' if x.is_quantized else str(x.dtype).removeprefix('torch.') if packed else 'masked'} tensors are not compared"
    return None


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = a.detach().resolve_neg().reshape(-1), b.detach().resolve_neg().reshape(-1)
    for start in range(0, x.numel(), _CHUNK):
        yield x[start : start + _CHUNK].cpu(), y[start : start + _CHUNK].cpu()


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype | None:
    if not a.is_floating_point:
        return None
    return a if torch.finfo(a).eps >= torch.finfo(b).eps else b


def _largest(x: Tensor, y: Tensor) -> float:
    both = torch.cat([x.double(), y.double()]).abs()
    both = both[both.isfinite()]
    return float(both.max()) if both.numel() else 0.0


def _same(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x == y
    if x.dtype != y.dtype:
        return (x.double() == y.double()) | (x.isnan() & y.isnan())
    return (_bits(x) == _bits(y)) | (x.double().isnan() & y.double().isnan())


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _ulps(x: Tensor, y: Tensor, dtype: torch.dtype) -> float:
    if not x.numel():
        return 0.0
    x, y = x.to(dtype), y.to(dtype)
    fits = x.double().isfinite() & y.double().isfinite()  # the coarser dtype may have a smaller range
    a, b = _ordered(x[fits]), _ordered(y[fits])
    across = a.double().abs() + b.double().abs()  # of opposite signs: int64 could overflow
    steps = (a - b).abs().double().where((a < 0) == (b < 0), across)
    return float(steps.max()) if steps.numel() else math.inf


def _ordered(x: Tensor) -> Tensor:
    """A whole number for each float, with its sign, one apart for neighbors; int64."""
    bits = _bits(x)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits.long(), bits.long())
