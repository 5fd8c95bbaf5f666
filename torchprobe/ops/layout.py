"""The places of the numbers in the state of :func:`torchprobe.ops.observe_`.

Each layer has one state: a 1-D tensor, float64 (float32 on a device without float64), whose address never changes. All zeros is the empty
state. ``csrc/layout.h`` has the same numbers for the kernels; ``tests/test_ops.py`` checks that both files agree.

===================  ==================  ==========================================================================
slots                name                meaning
===================  ==================  ==========================================================================
0                    calls               calls of the operator, including those that ``every`` skipped
1                    vectors             vectors whose kurtosis is included
2                    constant_vectors    vectors that are left out because their variance is 0
3                    invalid_vectors     vectors that are left out because an element is nonfinite
4, 5                 kurtosis mean, M2   mean of the vector kurtosis and its sum of squared deviations
6, 7                                     unused: the histogram starts on a cache line
8 … 8 + BINS         histogram           vector kurtosis, 64 bins in each octave from 1 to 2**18 (the last bin is open)
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
"""The per-feature rows, in order. The first three are the numbers of finite values, of nonfinite values, and of vectors in which the
feature was an outlier. Then follow the smallest and the largest finite value, which mean nothing while the count is 0. The last five are
Σ|x|, the mean, and Σ(x − mean)^k for k = 2, 3, 4."""


def size(features: int) -> int:
    """The number of slots in the state of a layer with ``features`` features."""
    return HEADER + len(ROWS) * features


def width(slots: int) -> int | None:
    """The number of features in a state of ``slots`` slots; ``None`` if no state has this size."""
    features = (slots - HEADER) // len(ROWS)  # the compiler's symbolic sizes have no divmod
    return features if features > 0 and size(features) == slots else None


def histogram(state: Tensor) -> Tensor:
    """A view of the histogram: shape (..., BINS) for states of shape (..., slots)."""
    return state[..., HISTOGRAM:HEADER]


def rows(state: Tensor) -> Tensor:
    """A view of the per-feature rows: shape (..., 10, features) for states of shape (..., slots)."""
    view: Tensor = state[..., HEADER:].unflatten(-1, (len(ROWS), -1))
    return view
