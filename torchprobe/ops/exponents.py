"""``torchprobe::exponents_``: what an activation loses in eight bits can be told from these numbers, which one read gives.

Schema::

    exponents_(Tensor(a!) counts, Tensor(b!) largest, Tensor(c!) sizes, Tensor(d!) quarters, Tensor(e!) levels,
               Tensor x, int feature_dim, Tensor? mask) -> ()

The tensors belong to :class:`torchprobe.statistics.Exponents`. The native kernel is in ``csrc/cpu/exponents.cpp``. This file has the
schema, the fake kernel and the reference in PyTorch, which runs on every device without a native kernel, so on GPUs too.

``counts`` and ``largest`` are about every value. The other three would cost more than the read itself, so they are about some of the
vectors of each call, chosen by a fixed rule (:func:`taken`): all of a small call, and at least :data:`VECTORS_TAKEN` of a large one. The
vectors are put in strata by the octave of their largest absolute value, and some of each stratum are taken, at even distances, with the
weight (vectors in the stratum) / (vectors taken of it). So a few vectors of another scale, such as the first token of a text, are never
left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.ops.float_mode import every_number
from torchprobe.ops.library import define
from torchprobe.ops.memory import check_memory
from torchprobe.ops.observe import DTYPES, check_layout

SCHEMA = (
    "exponents_(Tensor(a!) counts, Tensor(b!) largest, Tensor(c!) sizes, Tensor(d!) quarters, Tensor(e!) levels, Tensor x, "
    "int feature_dim, Tensor? mask) -> ()"
)

LOWEST, HIGHEST = -149, 127
"""The exponents that have a bin of their own: those of every float32, bfloat16 and float16. Float64 reaches further; what is beyond
shares the first and the last bin."""

BINS = HIGHEST - LOWEST + 3
"""Bins of exponents: bin i is about 2^(i − 1 + LOWEST) ≤ abs(x) < 2^(i + LOWEST)."""

ZEROS, NONFINITE, TAKEN = BINS, BINS + 1, BINS + 2
"""Places in ``counts`` after the bins: exact zeros; nan and inf; vectors that were taken."""

COUNTS = BINS + 3

QUARTERS = 4
"""Parts of equal width of each octave in ``quarters``."""

EIGHTHS, LEVEL_LOW, LEVEL_HIGH = 8, -12, 9
"""``levels`` has 8 bins of equal width in each octave from 2^-12 to 2^9, after one bin for what is below."""

LEVELS = 1 + EIGHTHS * (LEVEL_HIGH - LEVEL_LOW)

SCALES = ("token", "block32", "block16")
"""The rows of ``levels``: values divided by a scale of their own vector or block. A token has the scale max/127, as INT8 has. 32 features
have the scale 2^(floor(log2 max) − 8), as MXFP8 E4M3 has. 16 features have max/6, as NVFP4 has before its scale is rounded."""

UPWARDS = 1 + 2.0**-40
"""So much more than 1 that the largest value of a block does not fall below its level by rounding."""

TINY, LIFT = 2.0**-900, 2.0**600
"""Vectors and blocks whose largest value is below the first are multiplied by the second before they are divided by their scale: the
inverse of such a scale is beyond float64."""

VECTORS_TAKEN, VALUES_TAKEN, STRATUM_TAKEN = 16, 1 << 13, 4
"""Of a call, at least so many vectors with so many values are taken, and so many of each stratum, if there are as many."""


def shapes(features: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the five tensors, all float64, by name."""
    return {
        "counts": (COUNTS,),
        "largest": (features,),
        "sizes": (3, features),
        "quarters": (QUARTERS * BINS,),
        "levels": (len(SCALES), 2, LEVELS),
    }


def exponents_(
    counts: Tensor,
    largest: Tensor,
    sizes: Tensor,
    quarters: Tensor,
    levels: Tensor,
    x: Tensor,
    feature_dim: int = -1,
    mask: Tensor | None = None,
) -> None:
    """Adds an activation, in place. All tensors but ``x`` and ``mask`` are float64, with the shapes of :func:`shapes`.

    Args:
        counts: exact counts of the values with each exponent, of zeros, of nan and inf, and of the vectors taken.
        largest: the largest finite abs(x) of each feature. −inf: none was seen.
        sizes: of each feature, the number of nonzero values, Σ abs(x) and Σ x² of the vectors taken, weighted.
        quarters: the number of values in each quarter of each octave, of the vectors taken, weighted.
        levels: for every scale of :data:`SCALES`, the number of nonzero values in each bin of abs(x)/scale, and Σ scale² of the same;
            of the vectors taken, weighted.
        x: floating point (float64, float32, bfloat16, float16), any strides.
        feature_dim: the dimension that holds the features. Blocks lie along it.
        mask: bool, the shape of ``x`` without ``feature_dim``. Vectors where it is False are left out.

    Raises:
        ValueError: the tensors do not fit together, one reaches beyond its storage, or shares memory with one that is written to.

    >>> state = {name: torch.zeros(size, dtype=torch.float64) for name, size in shapes(features=2).items()}
    >>> exponents_(**state, x=torch.tensor([[1.0, -3.0], [0.0, 1.5]]))
    >>> [(int(i) - 1 + LOWEST, int(state["counts"][i])) for i in state["counts"][:BINS].nonzero()]
    [(0, 2), (1, 1)]
    >>> int(state["counts"][ZEROS]), state["largest"].tolist()
    (1, [1.0, 3.0])
    """
    try:
        torch.ops.torchprobe.exponents_(counts, largest, sizes, quarters, levels, x, feature_dim, mask)
    except (RuntimeError, TypeError, AttributeError):
        check(counts, largest, sizes, quarters, levels, x, feature_dim, mask)  # a clear message, if an argument was the cause
        written = {"counts": counts, "largest": largest, "sizes": sizes, "quarters": quarters, "levels": levels}
        check_memory(written, {"x": x, "mask": mask})
        raise


def check(
    counts: Tensor, largest: Tensor, sizes: Tensor, quarters: Tensor, levels: Tensor, x: Tensor, feature_dim: int, mask: Tensor | None
) -> None:
    """Raises ``ValueError`` that names the arguments that do not fit."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise ValueError(f"expected float64, float32, bfloat16 or float16, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if not -x.dim() <= feature_dim < x.dim():
        raise ValueError(f"feature_dim={feature_dim} is outside a tensor of shape {tuple(x.shape)}")
    given = {"counts": counts, "largest": largest, "sizes": sizes, "quarters": quarters, "levels": levels}
    number = torch.float32 if x.device.type == "mps" else torch.float64
    for name, wanted in shapes(x.shape[feature_dim]).items():
        state = given[name]
        if tuple(state.shape) != wanted or state.dtype != number or not state.is_contiguous() or state.device != x.device:
            raise ValueError(
                f"{name} must be contiguous {number} of shape {wanted} on {x.device}, got {state.dtype} of shape {tuple(state.shape)} on "
                f"{state.device}"
            )
    if mask is not None:
        lead = list(x.shape)
        del lead[feature_dim]
        if mask.dtype != torch.bool or list(mask.shape) != lead or mask.device != x.device:
            raise ValueError(f"mask must be bool of shape {tuple(lead)} on {x.device}, got {mask.dtype} of shape {tuple(mask.shape)}")


@every_number()
def reference(
    counts: Tensor, largest: Tensor, sizes: Tensor, quarters: Tensor, levels: Tensor, x: Tensor, feature_dim: int, mask: Tensor | None
) -> None:
    """The meaning of :func:`exponents_`, in PyTorch on any device, without synchronization."""
    check(counts, largest, sizes, quarters, levels, x, feature_dim, mask)
    check_layout(x)
    written = {"counts": counts, "largest": largest, "sizes": sizes, "quarters": quarters, "levels": levels}
    check_memory(written, {"x": x, "mask": mask})
    check_memory({}, {"mask": mask}, copied=True)
    if not x.numel():
        return
    rows = x.detach().movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim])
    kept = torch.ones(len(rows), dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1)
    finite = rows.isfinite()
    size = rows.to(counts.dtype).abs().where(finite & kept[:, None], 0)
    nonzero = size > 0

    bins = octave(size)
    counts[:BINS] += _tally(bins.where(nonzero, BINS), None, BINS + 1)[:BINS].to(counts.dtype)
    counts[ZEROS] += ((size == 0) & finite & kept[:, None]).sum()
    counts[NONFINITE] += (~finite & kept[:, None]).sum()
    torch.maximum(largest, size.amax(0).where((finite & kept[:, None]).any(0), -torch.inf), out=largest)

    peak = size.amax(1)
    weight = taken(peak, rows.shape[1])
    counts[TAKEN] += (weight > 0).sum()
    most = min(len(rows), max(VECTORS_TAKEN, -(-VALUES_TAKEN // rows.shape[1])) + STRATUM_TAKEN * BINS)  # a fixed size: nothing is awaited
    weight, chosen = weight.topk(most, sorted=False)
    size, nonzero, bins = size[chosen], nonzero[chosen], bins[chosen]
    weights = weight[:, None] * nonzero
    sizes += torch.stack([weights.sum(0), (weights * size).sum(0), (weights * size * size).sum(0)])
    low = torch.ldexp(torch.ones_like(size), bins - 1 + LOWEST)
    quarter = ((size / low - 1) * QUARTERS).long().clamp(0, QUARTERS - 1)
    quarter = quarter.where((bins > 0) & (bins < BINS - 1), 0)  # the first and the last bin are no octave
    quarters += _tally(bins * QUARTERS + quarter, weights, len(quarters))
    for row, (scale, ratio) in enumerate(scaled(size)):
        level = level_of(ratio)
        levels[row, 0] += _tally(level, weights, LEVELS)
        levels[row, 1] += _tally(level, weights * scale * scale, LEVELS)


def octave(size: Tensor) -> Tensor:
    """The bin of each absolute value, which is finite: int64. A zero has bin 0."""
    _, exponent = torch.frexp(size.to(torch.float64) if size.device.type != "mps" else size)
    return (exponent.long() - 1 - LOWEST + 1).clamp(0, BINS - 1).where(size > 0, 0)


def scaled(size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each of :data:`SCALES`, the scale of every value of some vectors, and every value divided by it and multiplied by
    :data:`UPWARDS`: float64 (vectors, features) each."""
    largest = [size.amax(1, keepdim=True).expand_as(size)]
    for block in (32, 16):
        padded = torch.nn.functional.pad(size, (0, -size.shape[1] % block))
        of_blocks = padded.unflatten(1, (-1, block)).amax(2)
        largest.append(of_blocks.repeat_interleave(block, 1)[:, : size.shape[1]])
    found = []
    for most, scale_of in zip(largest, (_token_scale, _power_scale, _sixth), strict=True):
        lift = torch.ones_like(most).where(most >= TINY, LIFT)
        found.append((scale_of(most), size * lift * (UPWARDS / scale_of(most * lift).where(most > 0, 1))))
    return found


def _token_scale(largest: Tensor) -> Tensor:
    return largest / 127


def _power_scale(largest: Tensor) -> Tensor:
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - 9).where(largest > 0, 0)


def _sixth(largest: Tensor) -> Tensor:
    return largest / 6


def level_of(ratio: Tensor) -> Tensor:
    """The bin of ``levels`` for abs(x)/scale: int64."""
    mantissa, exponent = torch.frexp(ratio)
    part = ((2 * mantissa - 1) * EIGHTHS).long().clamp(0, EIGHTHS - 1)
    bins = 1 + (exponent.long() - 1 - LEVEL_LOW) * EIGHTHS + part
    return bins.where(ratio > 0, 0).clamp(0, LEVELS - 1)


def taken(peak: Tensor, features: int) -> Tensor:
    """The weights of the vectors of a call, from the largest absolute value of each: (vectors,). 0: not taken.

    >>> taken(torch.ones(3, dtype=torch.float64), features=8).tolist()
    [1.0, 1.0, 1.0]
    >>> weight = taken(torch.ones(100_000, dtype=torch.float64), features=1024)
    >>> int((weight > 0).sum()), float(weight.sum())
    (16, 100000.0)
    """
    wanted = max(VECTORS_TAKEN, -(-VALUES_TAKEN // features))
    stratum = octave(peak)
    here = peak > 0
    members = _tally(stratum.where(here, BINS), None, BINS + 1)[:BINS]
    total = members.sum().clamp(min=1)
    take = torch.maximum(members * wanted // total, torch.full_like(members, STRATUM_TAKEN)).minimum(members)
    order = stratum.where(here, BINS).argsort(stable=True)
    start = before(members)
    sorted_stratum = stratum[order]
    rank = torch.empty_like(stratum)
    rank[order] = torch.arange(len(peak), device=peak.device) - start[sorted_stratum]
    n, t = members[stratum].clamp(min=1), take[stratum]
    chosen = here & ((rank + 1) * t // n > rank * t // n)
    return (n.to(peak.dtype) / t.clamp(min=1).to(peak.dtype)).where(chosen, 0)


def before(counts: Tensor) -> Tensor:
    """The sum of the counts before each place, in any of the last dimensions: not ``cumsum``, which has no deterministic kernel on a GPU.

    >>> before(torch.tensor([2, 3, 4])).tolist()
    [0, 2, 5]
    """
    n = counts.shape[-1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=counts.device).tril(-1)
    return counts.unsqueeze(-2).where(earlier, 0).sum(-1)


def _tally(index: Tensor, weights: Tensor | None, size: int) -> Tensor:
    """Sums of weights, or counts, at each index."""
    flat = index.reshape(-1)
    kind = torch.int64 if weights is None else weights.dtype
    ones = torch.ones_like(flat) if weights is None else weights.reshape(-1)
    return torch.zeros(size, dtype=kind, device=index.device).scatter_add_(0, flat, ones)


def register(library: torch.library.Library) -> None:
    """Defines the operator, except for native kernels."""
    define(library, SCHEMA, reference, fake=check)
