"""The memory of the arguments of an operator, checked before anything is read; ``csrc/memory.h`` does the same for the native kernels.

A tensor may lie about its memory. Its storage may have been freed or shortened, as FSDP and ``resize_`` do, and then reading it ends the
process. If two arguments share memory and one of them is written to, the other one changes while it is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MOST_ELEMENTS = 1 << 36
"""The most elements of an argument."""

MOST_COPIED = 1 << 26
"""The most bytes of a copy that is larger than the memory it is made of, as that of an expanded tensor is."""

MOST_CALLS = 1 << 53
"""The largest count: float64 holds every whole number up to it."""


def check_memory(written: Mapping[str, Tensor], read: Mapping[str, Tensor | None], copied: bool = False) -> None:
    """Raises ``ValueError`` unless every argument, by name, is within its storage and apart from those that are written to.

    With ``copied`` what is read will be copied if it is not contiguous; then a small tensor that was expanded beyond :data:`MOST_COPIED`
    is refused, too.

    It reads no elements. Tensors without memory, such as fake ones, and those of other layouts pass; operators refuse those themselves.

    >>> freed = torch.zeros(3)
    >>> _ = freed.untyped_storage().resize_(4)
    >>> check_memory({}, {"x": freed})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: x of shape (3,) reaches beyond its storage of 4 bytes: it was freed or shortened, as FSDP ...
    """
    ranges = list[tuple[str, bool, int, int]]()
    for name, tensor in {**written, **read}.items():
        if not isinstance(tensor, Tensor) or not _has_memory(tensor):
            continue
        stored, size = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        if copied and name in read and size > max(stored, MOST_COPIED):
            raise ValueError(f"{name} repeats its memory, and a copy would take {size} bytes: pass fewer elements, or a contiguous tensor")
        begin, end = _range(name, tensor)
        if name in written and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} is written to, but was made in inference mode, and this call is outside of it: pass {name}.clone()")
        for other, other_written, first, last in ranges:
            if (name in written or other_written) and begin < last and first < end:
                changed, kept = (name, other) if name in written else (other, name)
                raise ValueError(f"{changed} is written to and shares memory with {kept}: pass a clone of one of them")
        ranges.append((name, name in written, begin, end))


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.numel() == 0:
        return False
    try:
        tensor.untyped_storage()
    except RuntimeError:  # a tensor inside torch.func.vmap
        return False
    return True


def _range(name: str, tensor: Tensor) -> tuple[int, int]:
    """Where the elements begin and end in memory."""
    shape, item = tuple(tensor.shape), tensor.element_size()
    if tensor.numel() > MOST_ELEMENTS:
        raise ValueError(f"{name} of shape {shape} has more than {MOST_ELEMENTS} elements")
    end = sum((size - 1) * stride for size, stride in zip(shape, tensor.stride(), strict=True)) + 1
    stored = tensor.untyped_storage().nbytes()
    if (tensor.storage_offset() + end) * item > stored or tensor.data_ptr() == 0:
        raise ValueError(
            f"{name} of shape {shape} reaches beyond its storage of {stored} bytes: it was freed or shortened, as FSDP and resize_ do; "
            f"pass a tensor that owns its memory"
        )
    return tensor.data_ptr(), tensor.data_ptr() + end * item
