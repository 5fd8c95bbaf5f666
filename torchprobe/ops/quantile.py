"""``torchprobe::keep_largest_``: the largest values of every feature, in one read of an activation.

Schema::

    keep_largest_(Tensor(a!) values, Tensor(b!) counts, Tensor(c!) bound, Tensor x, int feature_dim, int capacity) -> ()

The buffers belong to :class:`torchprobe.statistics.Quantile`. The native kernel is in ``csrc/cpu/quantile.cpp``. This file has the schema,
the fake kernel and the reference in PyTorch, which runs on every device without a native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.ops.float_mode import every_number
from torchprobe.ops.library import define
from torchprobe.ops.memory import MOST_CALLS, MOST_ELEMENTS, check_memory
from torchprobe.ops.observe import DTYPES, check_layout

SCHEMA = "keep_largest_(Tensor(a!) values, Tensor(b!) counts, Tensor(c!) bound, Tensor x, int feature_dim, int capacity) -> ()"
BLOCK = 16
"""Values that the kernel compares at once. It needs this much room after the capacity."""


def new_buffers(features: int, slots: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty ``values``, ``counts`` and ``bound`` for :func:`keep_largest_`."""
    device = torch.device(device) if device is not None else torch.get_default_device()
    with torch.inference_mode(False):
        values = torch.full((features, slots), -torch.inf, dtype=torch.float32, device=device)
        bound = torch.full((features,), -torch.inf, dtype=torch.float32, device=device)
        return values, torch.zeros(3, features, dtype=torch.int64, device=device), bound


def keep_largest_(values: Tensor, counts: Tensor, bound: Tensor, x: Tensor, feature_dim: int, capacity: int) -> None:
    """Adds the values of ``x`` to the buffers of their features, in place. Only the ``capacity`` largest of each feature are sure to stay.

    Args:
        values: float32 (features, slots): the kept values in no order, and −inf after the first ``counts[0]``. Either slots ≥ capacity +
            16, or there is room for every value of ``x`` and 16 more.
        counts: int64 (3, features): the numbers of kept values, of nan, and of values equal to ``bound`` that were not kept (meaningless
            while the bound is −inf).
        bound: float32 (features,): the upper bound of all values that were not kept. −inf itself is never kept.
        x: floating point (float64, float32, bfloat16, float16), any strides, at most 2³⁶ elements; float64 is rounded to float32, the
            others are exact.
        feature_dim: the dimension that holds the features.
        capacity: at least 1, at most 2³⁶.

    Raises:
        ValueError: the tensors do not fit together, one reaches beyond its storage, or a buffer shares memory with another argument; or the
            buffers are damaged: ``counts`` that no call leaves, nan in ``bound`` or among the kept ``values``. The message says which.

    Where many values are kept, the kernel finds nan among them only when it sorts them; the buffers may have changed then. A device other
    than the CPU would have to wait to look, so there nan among kept values is dropped instead.

    >>> import torch
    >>> from torchprobe.ops.quantile import keep_largest_, new_buffers
    >>> values, counts, bound = new_buffers(features=1, slots=2 + 16)
    >>> keep_largest_(values, counts, bound, torch.arange(100.0).view(100, 1), feature_dim=-1, capacity=2)
    >>> values.topk(2).values.tolist()
    [[99.0, 98.0]]
    """
    try:
        torch.ops.torchprobe.keep_largest_(values, counts, bound, x, feature_dim, capacity)
    except (RuntimeError, TypeError, AttributeError):
        check(values, counts, bound, x, feature_dim, capacity)  # a clear message, if an argument was the cause
        check_memory({"values": values, "counts": counts, "bound": bound}, {"x": x})
        check_contents(values, counts, bound, x.numel() // x.shape[feature_dim] if x.numel() else 0, capacity)
        raise


def check(values: Tensor, counts: Tensor, bound: Tensor, x: Tensor, feature_dim: int, capacity: int) -> None:
    """Raises ``ValueError`` that names the arguments that do not fit."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise ValueError(f"expected float64, float32, bfloat16 or float16, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if not -x.dim() <= feature_dim < x.dim():
        raise ValueError(f"feature_dim={feature_dim} is outside a tensor of shape {tuple(x.shape)}")
    features = x.shape[feature_dim]
    buffers = {"values": (values, torch.float32, 2), "counts": (counts, torch.int64, 2), "bound": (bound, torch.float32, 1)}
    for name, (buffer, dtype, dims) in buffers.items():
        if buffer.dtype != dtype or buffer.dim() != dims or not buffer.is_contiguous() or buffer.device != x.device:
            raise ValueError(
                f"{name} must be a contiguous {dims}-D {dtype} on {x.device}, got {buffer.dim()}-D {buffer.dtype} on {buffer.device}"
            )
    if not values.shape[0] == counts.shape[1] == bound.shape[0] == features or counts.shape[0] != 3:
        raise ValueError(
            f"the buffers were made for {values.shape[0]} features, x of shape {tuple(x.shape)} has {features} along {feature_dim}"
        )
    if not 1 <= capacity <= MOST_ELEMENTS:
        raise ValueError(f"capacity must be at least 1, and at most 2**36; got {capacity}")


def check_contents(values: Tensor, counts: Tensor, bound: Tensor, positions: int, capacity: int) -> None:
    """Raises ``ValueError`` for buffers that no call leaves, or without room. On another device than the CPU it would wait, and does
    nothing."""
    if values.device.type != "cpu" or not positions:
        return
    slots = values.shape[1]
    fill = counts[0]
    if bool((counts < 0).any() | (counts > MOST_CALLS).any() | (fill > slots).any()):
        raise ValueError(f"counts is damaged: it holds negative or absurd numbers, or more than the {slots} values there is room for")
    if bool(bound.isnan().any()):
        raise ValueError("bound is damaged: it holds nan")
    if slots < capacity + BLOCK and int(fill.max()) + positions + BLOCK > slots:
        raise ValueError(f"values has {slots} slots for each feature, which has no room for {positions} positions more")
    kept = torch.arange(slots, device="cpu") < fill[:, None]
    if bool((values.isnan() & kept).any()):
        raise ValueError("values is damaged: it keeps nan")


@every_number()
def reference(values: Tensor, counts: Tensor, bound: Tensor, x: Tensor, feature_dim: int, capacity: int) -> None:
    """The meaning of :func:`keep_largest_`, in PyTorch on any device, without synchronization."""
    check(values, counts, bound, x, feature_dim, capacity)
    check_layout(x)
    check_memory({"values": values, "counts": counts, "bound": bound}, {"x": x})
    if not x.numel():
        return
    check_contents(values, counts, bound, x.numel() // x.shape[feature_dim], capacity)
    rows = x.detach().movedim(feature_dim, 0).reshape(x.shape[feature_dim], -1).to(values.dtype)
    nan = rows.isnan()
    values = values.masked_fill_(values.isnan(), -torch.inf)  # where nobody has looked
    ties = counts[2] + (rows == bound[:, None]).sum(1)
    pool = torch.cat([values, rows.masked_fill(nan | (rows <= bound[:, None]), -torch.inf)], 1)
    kept = pool.topk(min(capacity, values.shape[1]), 1).values  # there may be fewer slots than the capacity
    values.fill_(-torch.inf)
    values[:, : kept.shape[1]] = kept
    if kept.shape[1] == capacity:
        raised = torch.maximum(bound, kept[:, -1])
        dropped = (pool == raised[:, None]).sum(1) - (kept == raised[:, None]).sum(1)
        ties = ties.where(raised == bound, 0) + dropped
        bound.copy_(raised)
    counts.copy_(torch.stack([(kept > -torch.inf).sum(1), counts[1] + nan.sum(1), ties.where(bound > -torch.inf, 0)]))


def register(library: torch.library.Library) -> None:
    """Defines the operator, except for native kernels."""
    define(library, SCHEMA, reference, fake=check)
