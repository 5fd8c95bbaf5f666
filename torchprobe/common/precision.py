"""Whether products of float32 matrices are computed in float32, and not in TF32 or bfloat16.

PyTorch 2.9 has settings for each backend and for all; earlier versions have one for all, and a second one for CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_FULL = ("none", "ieee")


def full_products(device: str | None = None) -> bool:
    """Whether it is so on a kind of device; None: on every one.

    >>> full_products("cpu")
    True
    """
    if parts := _parts():
        cuda, cpu = parts
        if device is not None:
            return (cuda if device == "cuda" else cpu).fp32_precision in _FULL
        settings: Any = torch.backends
        return all(part.fp32_precision in _FULL for part in (settings, settings.mkldnn, cuda, cpu))
    return torch.get_float32_matmul_precision() == "highest" and (device == "cpu" or not torch.backends.cuda.matmul.allow_tf32)


@contextlib.contextmanager
def in_full() -> Iterator[None]:
    """Within the block it is so on every device."""
    if parts := _parts():
        before = [part.fp32_precision for part in parts]
        try:
            for part in parts:
                part.fp32_precision = "ieee"
            yield
        finally:
            for part, precision in zip(parts, before, strict=True):
                part.fp32_precision = precision
    else:
        everywhere, tf32 = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(everywhere)
            torch.backends.cuda.matmul.allow_tf32 = tf32


def _parts() -> tuple[Any, ...]:
    """The products of CUDA and of the CPU, if they have settings of their own."""
    cuda, cpu = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    return (cuda, cpu) if cpu is not None and hasattr(cuda, "fp32_precision") else ()
