"""What a layer would lose in an 8-bit format, forecast from its exponents, without its activations.

The values in a quarter of an octave, or in an eighth of one in units of their own scale, are taken to be spread evenly over it. Then the
error of rounding each is known: for a step that is small against the quarter it is step²/12 (Bennett 1948), for values below half a step it
is the value itself. Where most of the error comes from one such bin, the values may as well lie on one point, and the forecast says that it
is unsure.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.analysis.quantization.features import weibull_shape
from torchprobe.analysis.quantization.formats import ELEMENTS, FORMATS, Element, decibels, rounding_error
from torchprobe.analysis.quantization.spread import HOST, OFF, Spread, block_scales, channel_underflow, level_edges, spread
from torchprobe.common.messages import counted
from torchprobe.ops.exponents import BINS, LOWEST, NONFINITE, QUARTERS, SCALES
from torchprobe.statistics.exponents import Exponents

ONE_BIN = 0.3
"""A forecast is unsure if more of the error than this share comes from one bin. We chose the value."""

FEW = 50
"""A forecast is unsure if the error, or Σ x², is about fewer values than this: (Σ e)² / Σ e², the effective number. How so few round is
chance, and may move the sum by a decibel. We chose the value."""

ON_A_GRID = 0.2
"""A forecast is unsure if more than this share of Σ x² below the largest octave is in octaves with an empty quarter: the values then lie
on a grid, as whole numbers do, or those that were quantized before. We chose the value."""

FEW_VALUES = 2000
"""A forecast is unsure if the finer tables hold fewer nonzero values: their own noise is then some tenths of a decibel. We chose the
value."""

MANY = 200
"""So many values in an octave are enough to call an empty quarter a hole. We chose the value."""

AT_TOP = 0.3
"""NVFP4 is unsure if the largest values of blocks make more of the error than this share. We chose the value."""

EXACT = 0.2
"""INT8 with a scale for each token is unsure if more of the error than this share is about values of 120 to 127 steps, and with one for
each feature, if so many values are in the highest quarter. The largest has no error, so the forecast may be a decibel too low."""

SOME = 20
"""So many values at one end of an octave, and none elsewhere in it, show a grid. We chose the value."""

WIDE_STEP = 0.5
"""INT8 per channel is unsure if features whose step is more than this multiple of their mean abs(x) make a fifth of the error."""

HEAVY = 0.7
"""Features whose abs(x) has a Weibull shape below this (1: exponential) have heavy tails. We chose the value."""

STEADY = 0.98
"""A feature whose (mean abs(x))² is more than this share of its mean square hardly varies. We chose the value."""

OUTLIER_SHARE, OUTLIER_GAIN = 0.01, 6.02
"""Outlier features are at most this share of the features (but one is allowed), and without them the others gain at least so many
decibels, one bit. We chose the values."""


@dataclass(frozen=True)
class Forecast:
    """What rounding a layer to a format would do.

    Attributes:
        format: a name of :data:`torchprobe.analysis.quantization.FORMATS`.
        sqnr_db: 10 log10(Σ x² / Σ error²), in decibels; each bit is worth 6. nan if nothing but zeros was seen.
        underflow: share of the nonzero values that become 0; nan if it may be off by more than 2 points (``OFF`` of ``spread``).
        overflow: share of the nonzero values beyond the largest number of the format; nan if it may be off by more than that.
        noise: mean of error² over all finite values.
        unsure: why the number may be off by more than 1 dB; empty if it should not be.
        outliers: the features that cause it: the fewest whose absence gains the others a bit or more. Only for formats with one scale.
        without_db: the SQNR of the other features if the scale did not have to reach the outliers; nan without outliers.
        others_db: the SQNR of the other features as it is; nan without outliers.
    """

    format: str
    sqnr_db: float
    underflow: float
    overflow: float
    noise: float
    unsure: str = ""
    outliers: tuple[int, ...] = ()
    without_db: float = math.nan
    others_db: float = math.nan


def forecast(exponents: Exponents, format: str) -> Forecast:
    """What rounding the layer to a format would do.

    Args:
        exponents: of the layer. A format with one scale has it from everything that was seen (a static scale); tokens and blocks have
            scales of their own.
        format: a name of :data:`torchprobe.analysis.quantization.FORMATS`.

    Raises:
        KeyError: no format has this name.

    >>> exponents = Exponents(features=64)
    >>> exponents.update(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)))
    >>> 40 < forecast(exponents, "int8_token").sqnr_db < 46, forecast(exponents, "int8_token").unsure
    (True, '')
    """
    kind, found = FORMATS[format], spread(exponents)
    signal = found.signal
    if not 0 < signal < math.inf or not float(exponents.sizes[2].sum()) < math.inf:
        return Forecast(format, math.nan, math.nan, math.nan, math.nan, _nonfinite(exponents) or _no_signal(found))
    if kind.granularity in ("tensor", "none"):
        largest = float(exponents.largest.max())
        scale = largest / kind.element.largest if kind.granularity == "tensor" else 1.0
        error, zero, beyond = _at_scale(found, kind.element, scale)
        of_bins = found.counts * error
        noise, counts = float(of_bins.sum()), found.counts
        certain = found.high < scale * _smallest(kind.element) / 2
    elif kind.granularity == "channel":
        return _by_channel(exponents, found)
    else:
        row = SCALES.index(kind.granularity)
        counts, squares = exponents.levels.cpu()[row]
        error, zero, beyond = _of_levels(format)
        of_bins = squares * error
        # Σ over the vectors read closely → all: by the signal, in which the few vectors of a large scale weigh as much as in the error.
        close = float(exponents.sizes[2].sum())
        noise = float(of_bins.sum()) * signal / close if close > 0 else math.nan
        certain = level_edges()[1] < _smallest(kind.element) / 2
    total = float(counts.sum())
    real = counts if kind.granularity in ("tensor", "none") else counts / _weight(exponents)
    doubt = _doubt(exponents, of_bins, certain, real) or _exact_doubt(kind.granularity, of_bins)
    under, over = (float((counts * share).sum()) / total for share in (zero, beyond))
    if kind.granularity == "block16":
        tiny, one_side, exact = block_scales(exponents, found, counts, squares)
        at_top = float(of_bins[level_edges()[0] >= kind.element.largest].sum() / of_bins.sum())
        if at_top > AT_TOP or at_top * exact > EXACT:
            doubt = doubt or "much of the error is that of the scales, which are rounded too"
        under, over = (math.nan if tiny > OFF else under), (math.nan if doubt or max(tiny, one_side) > OFF else over)
    result = Forecast(format, decibels(signal, noise), under, over, noise / found.values, doubt)
    return _with_outliers(exponents, found, result) if kind.granularity == "tensor" else result


def _exact_doubt(granularity: str, errors: Tensor) -> str:
    """Whether many values may be the largest of their token, as where an activation saturates, or of few features."""
    if granularity != "token":
        return ""
    low, high = level_edges()
    top = float(errors[(low < 127) & (high > 127)].sum())
    return "much of the error is about the largest values of tokens, which have none" if top > EXACT * float(errors.sum()) else ""


def _nonfinite(exponents: Exponents) -> str:
    bad = int(exponents.counts[NONFINITE])
    return f"{counted(bad, 'value')} that {'is' if bad == 1 else 'are'} nan or inf {'was' if bad == 1 else 'were'} left out" if bad else ""


def _no_signal(found: Spread) -> str:
    if not float(found.counts.sum()):
        return "nothing but zeros was seen" if found.values else "nothing was seen"
    return "the squares of the values are beyond float64"


def forecasts(exponents: Exponents) -> dict[str, Forecast]:
    """:func:`forecast` for every format, by name."""
    return {name: forecast(exponents, name) for name in FORMATS}


def _weight(exponents: Exponents) -> float:
    """How many vectors stand behind one that was read closely."""
    return max(float(exponents.vectors) / max(float(exponents.taken), 1.0), 1.0)


def _whole_multiples(exponents: Exponents, parts: Tensor) -> bool:
    """Whether the values are whole multiples of a power of two, as pixels are: the octave of the smallest holds only its lower end, and the
    next one only twice and three times that."""
    lowest = int((exponents.counts.cpu()[:BINS] > 0).to(torch.uint8).argmax())
    if not 0 < lowest < BINS - 2 or float(parts[lowest].sum()) < SOME * _weight(exponents):
        return False
    return not bool(parts[lowest, 1:].any()) and not bool(parts[lowest + 1, 1::2].any())


def _effective(sums: Tensor, values: Tensor) -> float:
    """(Σ e)² / Σ e² of single values, from the sums of bins and the numbers of values in them."""
    below = float((sums**2 / values.clamp(min=1e-9)).where(sums > 0, 0).sum())
    return float(sums.sum()) ** 2 / below if below > 0 else math.inf


def _doubt(exponents: Exponents, errors: Tensor, certain: Tensor, values: Tensor) -> str:
    """Why a forecast is unsure.

    Args:
        exponents: of the layer.
        errors: Σ error² of each bin.
        certain: whether the error hardly depends on where in the bin a value lies, because it becomes 0.
        values: how many values each bin has.
    """
    if told := _nonfinite(exponents):
        return told
    if float(exponents.sizes[0].sum()) < FEW_VALUES:
        return "few values were seen"
    parts = exponents.quarters.cpu().view(BINS, QUARTERS)
    below = torch.ldexp(torch.ones(BINS, **HOST), torch.arange(BINS, device="cpu") + LOWEST) <= float(exponents.largest.max())
    energy = parts.sum(1) * torch.ldexp(torch.ones(BINS, **HOST), 2 * (torch.arange(BINS, device="cpu") - 1 + LOWEST)).where(below, 0)
    many = parts.sum(1) > MANY * _weight(exponents)
    holes = (parts == 0).any(1) & many & torch.cat([many[1:], many[:1] & False])  # it is no tail if the next octave has many, too
    if float(energy[holes].sum()) > ON_A_GRID * float(energy.sum()) > 0 or _whole_multiples(exponents, parts):
        return "the values lie on a grid, as whole numbers do, and a format may hit or miss it"
    total, errors = float(errors.sum()), errors.where(~certain, 0)
    if total > 0 and float(errors.max()) > ONE_BIN * total:
        return "most of the error is about values of one size, which may lie anywhere between two steps"
    found = spread(exponents)
    if total > 0 and min(_effective(errors, values), _effective(found.counts * found.squares, found.counts)) < FEW:
        return "a few values are most of the signal or of the error, and how they round is chance"
    return ""


def _smallest(element: Element) -> float:
    """The smallest positive number of a format."""
    return 1.0 if element.mantissa is None else 2.0 ** (element.lowest - element.mantissa)


def _at_scale(found: Spread, element: Element, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin: the mean of error², and the shares of values that become 0 and that are beyond the format."""
    low, high = found.low / scale, found.high / scale
    seen = found.counts > 0
    error, zero, beyond = (torch.zeros_like(low) for _ in range(3))
    error[seen] = rounding_error(element, low[seen], high[seen]) * scale * scale
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    zero[seen] = ((_smallest(element) / 2 - low) / width).clamp(0, 1)[seen]
    beyond[seen] = ((high - element.largest) / width).clamp(0, 1)[seen] * (high > element.largest * (1 + 1e-12))[seen]
    return error, zero, beyond


@functools.cache
def _of_levels(format: str) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_at_scale`, of the bins of ``levels``, in units of the scale of the token or block."""
    kind = FORMATS[format]
    low, high = level_edges()
    top = {"token": 127.0, "block32": math.inf, "block16": 6.0}[kind.granularity]
    low, high = low.clamp(max=top), high.clamp(max=top)  # the largest of a token is 127, and of a block of NVFP4 6, exactly
    factors = _scale_factors if kind.granularity == "block16" else None
    error = rounding_error(kind.element, low, high, scales=factors)
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    zero = ((_smallest(kind.element) / 2 - low) / width).clamp(0, 1)
    beyond = ((high - kind.element.largest) / width).clamp(0, 1) * (low >= kind.element.largest * (1 - 1e-9))
    if factors is not None:  # of the block scales that are rounded down, the largest values are beyond the format
        beyond = (low >= top).to(low.dtype) * float((factors() < 1).double().mean())
    return error, zero, beyond


def _scale_factors() -> Tensor:
    """By what the rounded E4M3 scale of a block differs from the exact one: scales are spread evenly over the logarithm of an octave, and
    count by their square, as their errors do."""
    exact = (1 + 3 * (torch.arange(64, **HOST) + 0.5) / 64).sqrt()
    return ELEMENTS["e4m3"].round(exact) / exact


# -- one scale for each feature ------------------------------------------------------------------------------------------


def _by_channel(exponents: Exponents, found: Spread) -> Forecast:
    """INT8 with a scale for each feature. The abs(x) of a feature are taken to follow the Weibull distribution that has their mean and mean
    square, up to the largest."""
    numbers, sums, squares = exponents.sizes.cpu()
    largest = exponents.largest.cpu().clamp(min=0)
    seen = (numbers > 0) & (largest > 0)
    count, scale = numbers[seen], largest[seen] / 127
    mean, square = sums[seen] / count, squares[seen] / count
    shape = weibull_shape((mean**2 / square).clamp(max=1))
    width = mean / torch.lgamma(1 + 1 / shape).exp()
    chance = (torch.arange(400, **HOST) + 0.5) / 400
    size = torch.minimum(width[:, None] * (-torch.log1p(-chance)) ** (1 / shape[:, None]), largest[seen][:, None])
    units = size / scale[:, None]
    error = ((units - units.round()) ** 2).mean(1) * scale**2
    of_features = count * error
    weight = float(found.counts.sum() / numbers.sum())
    noise = float(of_features.sum()) * weight
    wide = of_features[scale > WIDE_STEP * mean].sum()
    unsure = "the steps of some features are wider than most of their values" if float(wide) > 0.2 * float(of_features.sum()) else ""
    heavy = of_features[shape < HEAVY].sum()
    if float(heavy) > 0.2 * float(of_features.sum()):
        unsure = unsure or "some features have heavy tails, and their distribution is not known"
    steady = of_features[(mean**2 > STEADY * square)].sum()
    if float(steady) > 0.2 * float(of_features.sum()):
        unsure = "some features hardly vary, and may lie anywhere between two steps"
    if not unsure and float(of_features.max()) > ONE_BIN * float(of_features.sum()) and len(of_features) > 1:
        unsure = "most of the error is about one feature, whose distribution is not known"
    if not unsure and float(found.counts[found.counts > 0][-1]) > EXACT * float(found.counts.sum()):
        unsure = "many values are about as large as the largest, and if they are just that, they have no error"
    return Forecast(
        "int8_channel",
        decibels(found.signal, noise),
        channel_underflow(found, units, scale, count),
        0.0,
        noise / found.values,
        _doubt(exponents, torch.zeros(1, **HOST), torch.ones(1, **HOST) > 0, torch.ones(1, **HOST)) or unsure,
    )


# -- outlier features ----------------------------------------------------------------------------------------------------


def _with_outliers(exponents: Exponents, found: Spread, whole: Forecast) -> Forecast:
    """The forecast with the features that cause it."""
    element = FORMATS[whole.format].element
    largest = exponents.largest.cpu().clamp(min=0)
    features = len(largest)
    most = min(max(1, int(OUTLIER_SHARE * features)), features - 1)
    order = largest.argsort(descending=True)[: most + 1]
    if most < 1 or element.mantissa is not None:  # a floating-point format has its error at every size: outliers cost it little
        return whole
    squares = exponents.sizes[2].cpu()
    close = float(squares.sum())
    best: tuple[float, int, float, float] | None = None
    for count in range(1, most + 1):
        limit = float(largest[order[count]])
        if limit <= 0 or float(largest[order[0]]) < 2 * limit:
            continue
        signal = found.signal * (1 - float(squares[order[:count]].sum()) / close)
        rest = Spread(found.low, found.high.clamp(max=limit).maximum(found.low), found.counts, found.values)
        inside = Spread(rest.low, rest.high, rest.counts.where(rest.low < limit, 0), found.values)
        errors = [_at_scale(inside, element, float(top) / element.largest)[0] for top in (limit, largest[order[0]])]
        without, now = (decibels(signal, float((inside.counts * error).sum()) * (1 - count / features)) for error in errors)
        if without - now >= OUTLIER_GAIN and (best is None or without - now > best[0] / 0.9):
            best = without - now, count, without, now
    if best is None:
        return whole
    _, count, without, now = best
    return Forecast(**{**whole.__dict__, "outliers": tuple(sorted(order[:count].tolist())), "without_db": without, "others_db": now})
