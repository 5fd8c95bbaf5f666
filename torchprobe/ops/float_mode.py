"""The float mode of the thread, in which the references compute."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

LEFT_TO_ONE_THREAD = 1 << 14
"""Elements of a tensor that PyTorch does not divide among threads. Those others have a mode of their own, which cannot be set from here."""


@contextlib.contextmanager
def every_number() -> Iterator[bool]:
    """While it lasts, subnormal numbers are numbers in this thread, also under ``torch.set_flush_denormal(True)``. Gives whether they were
    not before. The kernels do the same in ``csrc/cpu/float_mode.h``.

    >>> with every_number():
    ...     bool(torch.tensor(5e-324, dtype=torch.float64) > 0)
    True
    """
    flushed = _flushed()
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield flushed
    finally:
        if flushed:
            torch.set_flush_denormal(True)


def _flushed() -> bool:
    """Whether this thread reads subnormal numbers as 0. Python computes in the mode of its thread."""
    smallest = sys.float_info.min
    return smallest * 0.5 == 0
