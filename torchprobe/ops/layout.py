"""Where each number lives in the state of :func:`torchprobe.ops.observe_`.

One layer has one state: a 1-D tensor, float64 (float32 on a device without float64), at a fixed address for life. All zeros is the empty
state. ``csrc/layout.h`` holds the same numbers for the kernels; ``tests/test_ops.py`` checks that the two agree.

===================  ==================  ==========================================================================
slots                name                meaning
===================  ==================  ==========================================================================
0                    calls               times the operator ran, whether the call was read or skipped by ``every``
1                    vectors             vectors whose kurtosis is counted in
2                    constant_vectors    vectors left out because their variance is 0
3                    invalid_vectors     vectors left out because an element is nonfinite
4, 5                 kurtosis mean, M2   mean of the vector kurtosis and its sum of squared deviations
6, 7                                     unused: keeps what follows on a cache line
8 … 8 + BINS         histogram           vector kurtosis, 64 bins to the octave from 1 to 2**18 (the last bin is open)
then 10 × features   rows                see :data:`ROWS`
===================  ==================  ==========================================================================
"""

from __future__ import annotations

from torch import Tensor

CALLS, VECTORS, CONSTANT, INVALID, KURTOSIS_MEAN, KURTOSIS_M2 = range(6)
HISTOGRAM = 8
BINS_PER_OCTAVE = 64
BINS = 18 * BINS_PER_OCTAVE
HEADER = HISTOGRAM + BINS

ROWS = ("count", "nonfinite", "outliers", "min", "max", "abs_sum", "mean", "m2", "m3", "m4")
"""Per-feature rows, in order: finite values seen; nonfinite values seen; vectors in which the feature was an outlier; smallest and largest
finite value (meaningless while the count is 0); Σ|x|; mean; Σ(x − mean)^k for k = 2, 3, 4."""


def size(features: int) -> int:
    """Number of slots in the state of a layer that is ``features`` wide."""
    return HEADER + len(ROWS) * features


def width(slots: int) -> int | None:
    """Number of features a state of ``slots`` slots was made for; ``None`` when it is no state at all."""
    features = (slots - HEADER) // len(ROWS)  # no divmod: the compiler's symbolic sizes do not have it
    return features if features > 0 and size(features) == slots else None


def histogram(state: Tensor) -> Tensor:
    """View of the histogram: shape (..., BINS) for states of shape (..., slots)."""
    return state[..., HISTOGRAM:HEADER]


def rows(state: Tensor) -> Tensor:
    """View of the per-feature rows: shape (..., 10, features) for states of shape (..., slots)."""
    view: Tensor = state[..., HEADER:].unflatten(-1, (len(ROWS), -1))
    return view
