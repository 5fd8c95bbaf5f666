"""``torchprobe::observe_``: all moments of an activation, in one read.

Schema::

    observe_(Tensor(a!) state, Tensor x, int feature_dim=-1, float outlier_sigma=6.0, int every=1, Tensor? mask=None) -> ()

The native kernels are in ``csrc/``. This file has the schema, the fake kernel and the reference in PyTorch, which runs on every device
without a native kernel. None of them synchronizes with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.common.numbers import whole
from torchprobe.common.threads import lock
from torchprobe.ops import layout
from torchprobe.ops.float_mode import LEFT_TO_ONE_THREAD, every_number
from torchprobe.ops.library import define, warn_unavailable
from torchprobe.ops.memory import MOST_CALLS, check_memory

SCHEMA = "observe_(Tensor(a!) state, Tensor x, int feature_dim=-1, float outlier_sigma=6.0, int every=1, Tensor? mask=None) -> ()"
FALLBACK = SCHEMA.replace("observe_", "observe_reference_")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_FEATURES = 1 << 26
"""The largest width of a layer: its state takes 5 GB."""
NO_MEMORY = "torchprobe: no memory for"
"""The beginning of what csrc/cuda/binding.cpp says when its workspace cannot be allocated."""
_BLOCK = 1 << 20  # elements that the reference converts to float64 at a time


def new_state(features: int, device: torch.device | str | None = None) -> Tensor:
    """An empty state for a layer with ``features`` features: zeros, float64, or float32 on a device without float64.

    Raises:
        ValueError: ``features`` is not a whole number between 1 and :data:`MOST_FEATURES`.
    """
    features = whole("features", features, 1, MOST_FEATURES)
    device = torch.device(device) if device is not None else torch.get_default_device()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    with torch.inference_mode(False):  # a tensor from inference mode could not be updated outside it
        return torch.zeros(layout.size(features), dtype=dtype, device=device)


def observe_(
    state: Tensor,
    x: Tensor,
    feature_dim: int = -1,
    outlier_sigma: float = 6.0,
    every: int = 1,
    mask: Tensor | None = None,
) -> None:
    """Adds one activation to a state, in place.

    Args:
        state: a state from :func:`new_state` for this number of features; see :mod:`torchprobe.ops.layout`. Threads may share it.
        x: floating point (float64, float32, bfloat16, float16), any strides, at least one dimension, at most 2³⁶ elements. The slices along
            ``feature_dim`` are its *vectors*; the other dimensions are positions. There may be zero positions, but not zero features.
        feature_dim: the dimension that holds the features.
        outlier_sigma: element i of a vector is an outlier when abs(x_i − mean) > outlier_sigma · std of that vector. It is positive.
        every: read only calls 0, every, 2·every, …; the counter is slot 0 of the state, so the host need not know it. At most 2⁵³.
        mask: bool, the shape of ``x`` without ``feature_dim``; vectors where it is False are ignored.

    Raises:
        ValueError: state, x and mask do not fit together, one reaches beyond its storage, or the state shares memory with another; the
            message says how.
        torch.OutOfMemoryError: a GPU has no memory for the few numbers that a call needs for its duration.

    Numerics: tiles are computed in float32 (float64 for float64 input), each shifted by a value of the tile and scaled by a power of two.
    The formulas of Chan et al. (1982) and Pébay (SAND2008-6212) merge them into the float64 state. The relative error of kurtosis is at
    most 1e-5 compared with two passes in float64, at any offset and scale of float32. For float64 input the fourth powers must fit into
    float64, so abs(x) must lie within about 1e±75. Subnormal numbers of every type count, also under ``torch.set_flush_denormal(True)``.

    >>> import torch
    >>> from torchprobe.ops import new_state, observe_
    >>> state = new_state(features=3)
    >>> observe_(state, torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, 7.0]]))
    >>> int(state[1])  # vectors seen
    2
    """
    try:
        torch.ops.torchprobe.observe_(state, x, feature_dim, outlier_sigma, every, mask)
    except (RuntimeError, TypeError, AttributeError) as error:
        check(state, x, feature_dim, every, mask, outlier_sigma)  # a clear message, if an argument was the cause
        check_memory({"state": state}, {"x": x, "mask": mask})
        if NO_MEMORY in str(error):  # a kernel on the stable ABI cannot raise it itself
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def check_state(name: str, state: Tensor, rows: bool = False) -> None:
    """Raises ``ValueError`` for a tensor that cannot be a state, or with ``rows`` several of them as the rows of a matrix."""
    dims = (1, 2) if rows else (1,)
    if not isinstance(state, Tensor) or state.dim() not in dims or not state.is_contiguous() or layout.width(state.shape[-1]) is None:
        what = f"a tensor of shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"{name}: {what} is not a state of observe_; make one with torchprobe.ops.new_state(features)")
    if state.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"{name} must be float64 (float32 on a device without float64), got {state.dtype}")


def check(state: Tensor, x: Tensor, feature_dim: int, every: int, mask: Tensor | None, outlier_sigma: float = 6.0) -> None:
    """Raises ``ValueError`` that names the arguments that do not fit. Reads neither numbers nor memory."""
    if not isinstance(x, Tensor):
        raise ValueError(f"observe_ reads a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ValueError(f"observe_ reads float64, float32, bfloat16 and float16; got {x.dtype}: convert it, or select another tensor")
    if not -x.dim() <= feature_dim < x.dim():
        raise ValueError(f"feature_dim={feature_dim} is outside a tensor of shape {tuple(x.shape)}")
    features = x.shape[feature_dim]
    if features == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no features along feature_dim={feature_dim}")
    check_state("state", state)
    if state.shape[0] != layout.size(features):
        raise ValueError(
            f"the state was made for {layout.width(state.shape[0])} features, but x has shape {tuple(x.shape)}: "
            f"{features} along feature_dim={feature_dim}"
        )
    if state.device != x.device:
        raise ValueError(f"the state is on {state.device} and x on {x.device}")
    if not 1 <= every <= MOST_CALLS:
        raise ValueError(f"every must be at least 1, got {every}" if every < 1 else f"every must be at most {MOST_CALLS}, got {every}")
    if not outlier_sigma > 0:
        raise ValueError(f"outlier_sigma must be positive, got {outlier_sigma}")
    if mask is not None:
        positions = list(x.shape)
        del positions[feature_dim]
        if mask.dtype != torch.bool or list(mask.shape) != positions or mask.device != x.device:
            raise ValueError(
                f"mask must be bool of shape {tuple(positions)} on {x.device} for x of shape {tuple(x.shape)} with "
                f"feature_dim={feature_dim}; got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
            )


def reference(
    state: Tensor,
    x: Tensor,
    feature_dim: int = -1,
    outlier_sigma: float = 6.0,
    every: int = 1,
    mask: Tensor | None = None,
) -> None:
    """The meaning of :func:`observe_`, in PyTorch on any device: two passes in the precision of the state, without synchronization."""
    with lock:  # threads may share a state
        _add(state, x, feature_dim, outlier_sigma, every, mask)


def _add(state: Tensor, x: Tensor, feature_dim: int, outlier_sigma: float, every: int, mask: Tensor | None) -> None:
    """In the order of the caller."""
    check(state, x, feature_dim, every, mask, outlier_sigma)
    check_layout(x)
    check_memory({"state": state}, {"x": x, "mask": mask})
    vectors = x.detach().movedim(feature_dim, -1)
    keep = torch.ones(vectors.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    vectors, keep = vectors.flatten(0, -2) if vectors.dim() > 1 else vectors[None], keep.flatten()
    with every_number() as flushed:
        rows = max(1, (LEFT_TO_ONE_THREAD if flushed else _BLOCK) // vectors.shape[-1])
        if state.device.type == "cpu" and not 0 <= float(state[layout.CALLS]) < MOST_CALLS:
            raise ValueError(f"the state is damaged: it has counted {float(state[layout.CALLS])} calls")
        total = state
        for block, kept in zip(vectors.split(rows), keep.split(rows), strict=True):
            if block.shape[0]:
                total = merge_states(total, _observe_block(block.to(state.dtype), kept, outlier_sigma))
        calls = state[layout.CALLS].clone()
        state.copy_(torch.where(calls.remainder(every) == 0, total, state))
        state[layout.CALLS] = calls + 1


def _fallback(
    state: Tensor,
    x: Tensor,
    feature_dim: int = -1,
    outlier_sigma: float = 6.0,
    every: int = 1,
    mask: Tensor | None = None,
) -> None:
    """A native kernel calls this if it cannot run on the device, and in the turn of a launch: nothing here waits for another thread."""
    warn_unavailable(x.get_device())
    _add(state, x, feature_dim, outlier_sigma, every, mask)


def _observe_block(x: Tensor, keep: Tensor, outlier_sigma: float) -> Tensor:
    """The state of one block of vectors, shape (n, features), n ≥ 1; vectors where ``keep`` is False are ignored."""
    features = x.shape[1]
    state = x.new_zeros(layout.size(features))
    finite = x.isfinite()
    used = finite & keep[:, None]
    inf = float("inf")

    # Features. The shift by the minimum keeps a constant feature exactly constant, and deviations as exact as the values: at a large offset
    # the rounding of a mean is larger than theirs.
    count = used.sum(0)
    low, high = x.where(used, inf).amin(0), x.where(used, -inf).amax(0)
    low, high = low.where(count > 0, 0), high.where(count > 0, 0)
    shifted = (x - low).where(used, 0)
    shift = shifted.sum(0) / count.clamp(min=1)
    mean, d = low + shift, (shifted - shift).where(used, 0)

    # Vectors: the kurtosis of each, in units of its largest deviation, so that nothing underflows or overflows.
    valid = finite.all(1) & keep
    rows = x.where(valid[:, None], 0)
    first, last = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    deviation = rows - first
    deviation = deviation - deviation.mean(1, keepdim=True)
    deviation = deviation / deviation.abs().amax(1, keepdim=True).where(last > first, 1)
    m2 = deviation.square().mean(1)
    varies = (last > first).squeeze(1)
    kurtosis = (deviation.pow(4).mean(1) / m2.square()).where(varies, 1)
    counted = valid & varies
    outliers = ((deviation.abs() > outlier_sigma * m2.sqrt()[:, None]) & counted[:, None]).sum(0)
    vectors = counted.sum()
    kurtosis_mean = kurtosis.where(counted, 0).sum() / vectors.clamp(min=1)

    state[layout.VECTORS] = vectors
    state[layout.CONSTANT] = (valid & ~varies).sum()
    state[layout.INVALID] = (keep & ~valid).sum()
    state[layout.KURTOSIS_MEAN] = kurtosis_mean
    state[layout.KURTOSIS_M2] = (kurtosis - kurtosis_mean).where(counted, 0).square().sum()
    layout.histogram(state).index_add_(0, histogram_bin(kurtosis), counted.to(state.dtype))
    columns = (count, (~finite & keep[:, None]).sum(0), outliers, low, high, x.abs().where(used, 0).sum(0), mean)
    powers = tuple(d.pow(k).sum(0) for k in (2, 3, 4))
    layout.rows(state).copy_(torch.stack([column.to(state.dtype) for column in columns + powers]))
    return state


def check_layout(x: Tensor) -> None:
    """Raises ``ValueError`` for a tensor whose elements are not in one piece of memory."""
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"x has the layout {x.layout}{', nested' if x.is_nested else ''}: pass a strided tensor, such as x.to_dense()")


def histogram_bin(kurtosis: Tensor) -> Tensor:
    """The bin of each value: 64 equal steps in each octave, starting at 1; values above 2**18 are in the last bin."""
    mantissa, exponent = torch.frexp(kurtosis)  # kurtosis = mantissa · 2**exponent, mantissa in [0.5, 1)
    step = ((2 * mantissa - 1) * layout.BINS_PER_OCTAVE).floor().long()
    return ((exponent.long() - 1) * layout.BINS_PER_OCTAVE + step).clamp(0, layout.BINS - 1)


def merge_states(a: Tensor, b: Tensor) -> Tensor:
    """The state of the union of what both states have seen; leading dimensions broadcast. Calls add up.

    Chan, Golub & LeVeque (1982) for the second moment, Pébay (SAND2008-6212) for the third and fourth.
    """
    out = a + b  # calls, counts, histogram and Σ|x| are sums; the rest is overwritten below
    na, nb = a[..., layout.VECTORS], b[..., layout.VECTORS]
    n = (na + nb).clamp(min=1)
    delta = b[..., layout.KURTOSIS_MEAN] - a[..., layout.KURTOSIS_MEAN]
    out[..., layout.KURTOSIS_MEAN] = a[..., layout.KURTOSIS_MEAN] + delta * (nb / n)
    out[..., layout.KURTOSIS_M2] += delta * delta * (na * nb / n)

    fa, fb = (dict(zip(layout.ROWS, layout.rows(s).unbind(-2), strict=True)) for s in (a, b))
    merged = dict(zip(layout.ROWS, layout.rows(out).unbind(-2), strict=True))
    na, nb = fa["count"], fb["count"]
    n = (na + nb).clamp(min=1)
    wa, wb = na / n, nb / n
    delta = fb["mean"] - fa["mean"]
    delta2 = delta * delta
    merged["min"].copy_(torch.where(na == 0, fb["min"], torch.where(nb == 0, fa["min"], torch.minimum(fa["min"], fb["min"]))))
    merged["max"].copy_(torch.where(na == 0, fb["max"], torch.where(nb == 0, fa["max"], torch.maximum(fa["max"], fb["max"]))))
    merged["mean"].copy_(fa["mean"] + delta * wb)
    merged["m2"].add_(delta2 * na * wb)
    merged["m3"].add_(delta * (delta2 * na * wb * (wa - wb) + 3 * (wa * fb["m2"] - wb * fa["m2"])))
    merged["m4"].add_(
        delta2 * (delta2 * na * wb * (wa * wa - wa * wb + wb * wb) + 6 * (wa * wa * fb["m2"] + wb * wb * fa["m2"]))
        + 4 * delta * (wa * fb["m3"] - wb * fa["m3"])
    )
    return out


def _fake(
    state: Tensor,
    x: Tensor,
    feature_dim: int = -1,
    outlier_sigma: float = 6.0,
    every: int = 1,
    mask: Tensor | None = None,
) -> None:
    check(state, x, feature_dim, every, mask, outlier_sigma)


def _vmap(*_: object) -> None:
    raise RuntimeError(
        "torchprobe::observe_ was called inside torch.func.vmap, which hides the batch dimension, so the statistics would mix positions. "
        "Record outside vmap, or call the model on the batch directly."
    )


def register(library: torch.library.Library) -> None:
    """Defines the operator, except for native kernels."""
    define(library, SCHEMA, reference, _fake)
    define(library, FALLBACK, _fallback)
    torch.library.register_vmap("torchprobe::observe_", _vmap, lib=library)
