"""8-bit formats, and reference quantizers in float64: what rounding a tensor does to it, measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchprobe.common.messages import did_you_mean

Granularity = Literal["tensor", "token", "channel", "block32", "block16", "none"]


@dataclass(frozen=True)
class Element:
    """What one value is rounded to: the nearest, ties to even, values beyond ``largest`` to ``largest``.

    Attributes:
        mantissa: bits after the leading one; None: whole numbers.
        lowest: exponent of the smallest normal number.
        largest: the largest number.
    """

    name: str
    mantissa: int | None
    lowest: int
    largest: float

    def round(self, x: Tensor) -> Tensor:
        """The nearest number of the format: float64 of any shape → the same.

        >>> ELEMENTS["e4m3"].round(torch.tensor([0.3, 17.5, 1e4, 2.0**-10], dtype=torch.float64)).tolist()
        [0.3125, 18.0, 448.0, 0.0]
        """
        return (x / (step := self.step(x))).round().mul(step).clamp(-self.largest, self.largest)

    def step(self, x: Tensor) -> Tensor:
        """The distance between neighbors of the format at each value."""
        if self.mantissa is None:
            return torch.ones_like(x)
        _, exponent = torch.frexp(x)
        return torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=self.lowest) - self.mantissa)


ELEMENTS = {
    one.name: one
    for one in (
        Element("int8", None, 0, 127.0),
        Element("e4m3", 3, -6, 448.0),
        Element("e5m2", 2, -14, 57344.0),
        Element("e2m1", 1, 0, 6.0),
    )
}
"""INT8, symmetric; E4M3 (without infinities) and E5M2 of Micikevicius et al. 2022 (arXiv 2209.05433); E2M1 of the OCP Microscaling
specification 1.0."""


@dataclass(frozen=True)
class Format:
    """An element, and over which values it shares a scale.

    Attributes:
        name: of the format.
        element: what a value becomes after it was divided by its scale.
        granularity: over which values the scale is taken: those of the whole tensor, of a token (one vector), of a channel (one feature
            of all vectors), of 32 or 16 neighboring features of a vector; "none": there is no scale.
        meaning: one line.
    """

    name: str
    element: Element
    granularity: Granularity
    meaning: str


_FORMATS: tuple[tuple[str, str, Granularity, str], ...] = (
    ("int8_tensor", "int8", "tensor", "INT8, one scale max/127 for the layer, fixed beforehand"),
    ("int8_token", "int8", "token", "INT8, a scale max/127 for each vector (token)"),
    ("int8_channel", "int8", "channel", "INT8, a scale max/127 for each feature; no matrix product takes activations so: a bound"),
    ("e4m3", "e4m3", "tensor", "FP8 E4M3, one scale max/448 for the layer"),
    ("e4m3_unscaled", "e4m3", "none", "FP8 E4M3, values as they are"),
    ("e5m2", "e5m2", "tensor", "FP8 E5M2, one scale max/57344 for the layer"),
    ("e5m2_unscaled", "e5m2", "none", "FP8 E5M2, values as they are"),
    ("mxfp8", "e4m3", "block32", "MXFP8: E4M3, a power of two 2^(floor(log2 max) − 8) for 32 features (OCP MX 1.0)"),
    ("nvfp4", "e2m1", "block16", "NVFP4: E2M1, an E4M3 scale for 16 features, and one float32 scale for the layer (4 bits)"),
)


class _Formats(dict[str, Format]):
    def __missing__(self, name: str) -> Format:
        raise KeyError(f"{name!r} is not one of the formats {', '.join(self)}{did_you_mean(name, self)}")


FORMATS = _Formats({name: Format(name, ELEMENTS[element], granularity, meaning) for name, element, granularity, meaning in _FORMATS})
"""The formats that are forecast and measured, by name."""


@dataclass(frozen=True)
class Measured:
    """What rounding did to a tensor. Nan and inf are left out.

    Attributes:
        sqnr_db: 10 log10(Σ x² / Σ (x − rounded x)²); inf if nothing changed, nan if all values are 0 or there are none.
        underflow: share of the nonzero values that became 0.
        overflow: share of the nonzero values beyond the largest number of the format.
    """

    format: str
    sqnr_db: float
    underflow: float
    overflow: float


def scale_of(x: Tensor, format: Format, largest: Tensor | None = None) -> Tensor:
    """The scale of every value, as the formats define it: float64 (vectors, features) → a tensor that broadcasts with it.

    Args:
        x: finite.
        format: one of :data:`FORMATS`.
        largest: of a scale that was fixed beforehand: the largest abs(x) of each feature, float64 (features,). None: those of ``x``.
    """
    size = x.abs()
    per_feature = (size.amax(0) if len(size) else size.new_zeros(size.shape[1])) if largest is None else largest
    top = format.element.largest
    if format.granularity == "none":
        scale = torch.ones((), dtype=x.dtype, device=x.device)
    elif format.granularity == "tensor":
        scale = per_feature.amax() / top
    elif format.granularity == "channel":
        scale = per_feature / top
    elif format.granularity == "token":
        scale = size.amax(1, keepdim=True) / top
    else:
        block = int(format.granularity.removeprefix("block"))
        padded = torch.nn.functional.pad(size, (0, -size.shape[1] % block)).unflatten(1, (-1, block)).amax(2)
        if format.element.name == "e4m3":
            _, exponent = torch.frexp(padded)
            block_scale = torch.ldexp(torch.ones_like(padded), exponent - 1 - 8)
        else:  # an E4M3 scale, itself scaled so that the largest is 448
            whole = (per_feature.amax() / (top * ELEMENTS["e4m3"].largest)).clamp(min=torch.finfo(x.dtype).tiny)
            block_scale = ELEMENTS["e4m3"].round(padded / top / whole) * whole
        scale = block_scale.repeat_interleave(block, 1)[:, : x.shape[1]]
    return scale


def quantize(x: Tensor, format: str, feature_dim: int = -1, largest: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor rounded to a format and back: the shape of ``x``. Nan and inf stay.

    Args:
        x: floating point, of any shape.
        format: a name of :data:`FORMATS`.
        feature_dim: the dimension of the features, along which blocks lie. All others number vectors.
        largest: the largest abs(x) of each feature, if the scale of "tensor" and "channel" formats was fixed beforehand.
        dtype: of the computation and of the result. float32 is faster, and may round a value in the middle to the other side.

    Raises:
        KeyError: no format has this name.

    >>> quantize(torch.tensor([[0.0, 1.0, 63.4, -127.0]]), "int8_tensor").tolist()
    [[0.0, 1.0, 63.0, -127.0]]
    """
    rows = x.detach().movedim(feature_dim, -1).to(dtype)
    kind = FORMATS[format]
    if not rows.numel():
        return rows.movedim(-1, feature_dim)
    flat = rows.reshape(-1, rows.shape[-1])
    finite = flat.isfinite()
    scale = scale_of(flat.where(finite, 0), kind, None if largest is None else largest.to(dtype))
    safe = scale.where(scale > 0, 1)
    rounded = (kind.element.round(flat / safe) * safe).where(scale > 0, 0).where(finite, flat)
    return rounded.reshape(rows.shape).movedim(-1, feature_dim)


def measure(x: Tensor, format: str, feature_dim: int = -1, largest: Tensor | None = None) -> Measured:
    """What rounding to a format does to a tensor; see :func:`quantize` for the arguments.

    >>> measure(torch.tensor([[127.0, 0.6, 0.4]]), "int8_tensor").underflow == 1 / 3
    True
    """
    kind = FORMATS[format]
    if not x.numel():
        return Measured(format, math.nan, 0.0, 0.0)
    flat = x.detach().movedim(feature_dim, -1).double().reshape(-1, x.shape[feature_dim])
    finite = flat.isfinite()
    flat = flat.where(finite, 0)
    scale = scale_of(flat, kind, largest)
    rounded = quantize(flat, format, -1, largest)
    nonzero = flat != 0
    count = max(int(nonzero.sum()), 1)
    beyond = flat.abs() > kind.element.largest * scale * (1 + 1e-12)
    exponent = math.frexp(float(flat.abs().amax()))[1]
    unit = 2.0 ** -max(exponent, -1000)  # squares may be beyond float64
    return Measured(
        format,
        decibels(float(((flat * unit) ** 2).sum()), float((((flat - rounded) * unit) ** 2).sum())),
        int((nonzero & (rounded == 0)).sum()) / count,
        int((nonzero & beyond).sum()) / count,
    )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise).

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 0.0)
    (20.0, inf, nan)
    """
    if not signal > 0 or math.isnan(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def rounding_error(element: Element, low: Tensor, high: Tensor, points: int = 127, scales: Callable[[], Tensor] | None = None) -> Tensor:
    """The mean of (u − rounded u)² for u uniform between ``low`` and ``high``, in units of the scale, by the midpoint rule.

    Args:
        element: what u is rounded to.
        low, high: float64 of one shape.
        points: per interval. Intervals much wider than a step have step²/12 instead.
        scales: factors by which a rounded scale differs from the one u is in units of; the mean over them.

    >>> interval = torch.tensor([2.0, 0.0, 64.0], dtype=torch.float64), torch.tensor([3.0, 0.5, 80.0], dtype=torch.float64)
    >>> [round(float(error), 4) for error in rounding_error(ELEMENTS["int8"], *interval)]
    [0.0833, 0.0833, 0.0833]
    """
    place = (torch.arange(points, dtype=torch.float64, device=low.device) + 0.5) / points
    u = low[..., None] + (high - low)[..., None] * place
    factors = torch.ones(1, dtype=torch.float64, device=low.device) if scales is None else scales()
    errors = torch.stack([((u - f * element.round(u / f)) ** 2).mean(-1) for f in factors]).mean(0)
    step = element.step(low)
    wide = ((high - low) > 8 * step) & (high <= element.largest) & (element.step(high * (1 - 1e-12)) == step)
    return errors.where(~wide, step**2 / 12)
