"""From the states of many layers to the fields of :class:`~torchprobe.Moments`, and to the histogram of their vector kurtosis.

Nothing here waits for the device, and every operation is deterministic on a GPU: ``torch.use_deterministic_algorithms(True)`` refuses none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchprobe.ops import layout

HELP = {
    "vectors": "activation vectors that were counted",
    "constant_vectors": "vectors left out because their variance is 0",
    "invalid_vectors": "vectors left out because an element is nonfinite",
    "vector_kurtosis": "kurtosis across the features of one vector, mean over vectors",
    "vector_kurtosis_std": "its standard deviation over vectors",
    "vector_kurtosis_median": "its median over vectors",
    "kurtosis_median": "kurtosis of one feature over all its values, median over features",
    "kurtosis_max": "the largest kurtosis of a feature over all its values",
    "skewness_median": "skewness of one feature over all its values, median over features",
    "std": "square root of the mean variance of the features",
    "mean_abs_max": "the largest mean |x| of a feature",
    "min": "smallest value",
    "max": "largest value",
    "nonfinite": "nan and inf values seen; left out of everything else",
    "outlier_features": "features that are outliers in at least half of the vectors",
    "abs_max": "the largest |x|",
    "rms": "root of the mean square of all values",
    "dead_features": "share of the features whose every value is 0",
}
"""The fields of one layer, each with one line of help."""

FIELDS = tuple(HELP)
"""Their names, in the order of :func:`summarize`."""

OUTLIER_SHARE = 0.5
"""``outlier_features`` counts the features that are outliers in at least this share of the vectors. We chose the value."""

BINS_PER_OCTAVE = 8
BINS = layout.BINS // layout.BINS_PER_OCTAVE * BINS_PER_OCTAVE
"""Bins of :func:`histogram`. We chose an eighth of those in the state, so that a history can keep them for every window."""

_NEGLIGIBLE = 2.0**-40  # a feature that varies less than this share of the largest value adds nothing to the root mean square


def summarize(states: Tensor, features: int, outlier_sigma: float = 6.0) -> Tensor:
    """:data:`FIELDS` of several layers of the same width at once: states (layers, slots) → (layers, len(FIELDS)).

    It does not synchronize. ``kurtosis_median``, ``skewness_median`` and ``kurtosis_max`` are over features. ``std`` is
    the root of the mean variance. ``mean_abs_max`` is the largest mean abs(x) of a feature. ``outlier_features`` counts features with
    ``outlier_frequency`` ≥ :data:`OUTLIER_SHARE`; it is nan for a layer too narrow to have any. ``rms`` is nan if the squares of the
    values do not fit the state, about abs(x) > 1e150 or < 1e-150 in float64. Fields are nan if nothing was seen.
    """
    fields = fields_of(states, features, outlier_sigma)
    return torch.stack([fields[name] for name in FIELDS], -1)


def fields_of(states: Tensor, features: int, outlier_sigma: float) -> dict[str, Tensor]:
    """As :func:`summarize`, by name: each (layers,)."""
    rows = dict(zip(layout.ROWS, layout.rows(states).unbind(-2), strict=True))
    seen = rows["count"] > 0
    nan = states.new_full((), math.nan)
    ratios = kurtosis(rows)
    any_kurtosis = ~ratios.isnan().all(-1)
    mean_variance = (rows["m2"] / rows["count"]).where(seen, 0).sum(-1) / seen.sum(-1)
    frequency = outlier_frequency(states, features, outlier_sigma)
    any_seen = seen.any(-1)
    vectors = states[..., layout.VECTORS]
    low = rows["min"].where(seen, math.inf).amin(-1).where(any_seen, nan)
    high = rows["max"].where(seen, -math.inf).amax(-1).where(any_seen, nan)
    largest = torch.maximum(low.abs(), high.abs())
    dead = seen & (rows["min"] == 0) & (rows["max"] == 0)
    return {
        "vectors": vectors,
        "constant_vectors": states[..., layout.CONSTANT],
        "invalid_vectors": states[..., layout.INVALID],
        "vector_kurtosis": states[..., layout.KURTOSIS_MEAN].where(vectors > 0, nan),
        "vector_kurtosis_std": (states[..., layout.KURTOSIS_M2] / vectors).sqrt(),
        "vector_kurtosis_median": vector_kurtosis_quantile(states, 0.5),
        "kurtosis_median": _median(ratios),
        "kurtosis_max": ratios.nan_to_num(nan=-math.inf).amax(-1).where(any_kurtosis, nan),
        "skewness_median": _median(skewness(rows)),
        "std": mean_variance.sqrt(),
        "mean_abs_max": (rows["abs_sum"] / rows["count"]).where(seen, -math.inf).amax(-1).where(any_seen, nan),
        "min": low,
        "max": high,
        "nonfinite": rows["nonfinite"].sum(-1),
        "outlier_features": (frequency >= OUTLIER_SHARE).sum(-1).to(states.dtype).where(~frequency.isnan().any(-1), nan),
        "abs_max": largest,
        "rms": _rms(rows, largest),
        "dead_features": (dead.sum(-1).to(states.dtype) / features).where(any_seen, nan),
    }


def _rms(rows: Mapping[str, Tensor], largest: Tensor) -> Tensor:
    """The root of the mean square of all values, in units of the largest |x|, so that no square under- or overflows here.

    A sum of squared deviations that has already left the range of the state gives nan.
    """
    seen = rows["count"] > 0
    unit = largest.where(largest > 0, 1)[..., None]
    mean, spread = rows["mean"] / unit, rows["max"] / unit - rows["min"] / unit
    squares = (rows["m2"] / unit / unit + rows["count"] * mean.square()).where(seen, 0).sum(-1)
    underflow = seen & (rows["m2"] < torch.finfo(mean.dtype).tiny) & (spread > _NEGLIGIBLE)
    rms: Tensor = largest * (squares / rows["count"].sum(-1)).sqrt()
    return rms.where(rms.isfinite() & ~underflow.any(-1), math.nan)


def histogram(states: Tensor) -> Tensor:
    """How many vectors have a kurtosis between the :func:`bin_edges`: states (layers, slots) → (layers, BINS). It does not synchronize."""
    counts: Tensor = layout.histogram(states).unflatten(-1, (BINS, -1)).sum(-1)
    return counts


def bin_edges() -> Tensor:
    """The edges of :func:`histogram`, float64 (BINS + 1,): every octave is divided into equal steps. The last bin is open."""
    bins = torch.arange(BINS + 1, dtype=torch.float64, device="cpu")
    return torch.exp2(bins.div(BINS_PER_OCTAVE).floor()) * (1 + bins % BINS_PER_OCTAVE / BINS_PER_OCTAVE)


def skewness(rows: Mapping[str, Tensor]) -> Tensor:
    """m3 / m2^1.5 of each feature; nan for a constant one."""
    # Divide step by step: m2 cubed would under- or overflow long before the ratio does. Those of a constant feature may be rounding.
    found = rows["m3"] / rows["m2"] / (rows["m2"] / rows["count"]).sqrt()
    return found.where(rows["min"] < rows["max"], torch.nan)


def kurtosis(rows: Mapping[str, Tensor]) -> Tensor:
    """m4 / m2² of each feature; nan for a constant one."""
    return (rows["m4"] / rows["m2"] / rows["m2"] * rows["count"]).where(rows["min"] < rows["max"], torch.nan)


def outlier_frequency(states: Tensor, features: int, outlier_sigma: float) -> Tensor:
    """Share of the vectors in which each feature is an outlier; nan if none can be."""
    frequency = layout.rows(states)[..., layout.ROWS.index("outliers"), :] / states[..., layout.VECTORS, None]
    possible = (features - 1) / math.sqrt(features) > outlier_sigma  # the largest deviation that one of d values can have
    return frequency if possible else torch.full_like(frequency, math.nan)


def vector_kurtosis_quantile(states: Tensor, q: float) -> Tensor:
    """Quantile of the vector kurtosis, linear within a bin; nan without a vector."""
    bins = layout.histogram(states)
    counts = bins.long().cumsum(-1).to(bins.dtype)  # whole numbers: their sums are exact, and the same in any order on a GPU
    total = counts[..., -1:]
    rank = q * total
    bin_ = (counts < rank).sum(-1, keepdim=True).clamp(max=layout.BINS - 1)
    if q == 0:  # the first bin that holds anything
        bin_ = (counts == 0).sum(-1, keepdim=True).clamp(max=layout.BINS - 1)
    inside = bins.gather(-1, bin_)
    part = (rank - (counts.gather(-1, bin_) - inside)) / inside
    octave = bin_ // layout.BINS_PER_OCTAVE
    step = bin_ % layout.BINS_PER_OCTAVE
    value = torch.exp2(octave.to(states.dtype)) * (1 + (step + part) / layout.BINS_PER_OCTAVE)
    return value.where(total > 0, math.nan).squeeze(-1)


def _median(x: Tensor) -> Tensor:
    """The lower median of each row, nan left out: ``torch.nanmedian``, which is deterministic only on the CPU."""
    return x.nanmedian(-1).values if x.device.type == "cpu" else sorted_median(x)


def sorted_median(x: Tensor) -> Tensor:
    """As ``torch.nanmedian`` over the last dimension, deterministic on every device; on the CPU it is slower."""
    present = (~x.isnan()).sum(-1, keepdim=True)
    return x.sort(-1).values.gather(-1, (present - 1).clamp(min=0) // 2).squeeze(-1)  # nan comes last
