"""Products of matrices in lower precision, as a user may have set them, in every version of PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def products_in_bfloat16() -> Iterator[None]:
    """Within the block the CPU may multiply float32 matrices in bfloat16."""
    own: Any = getattr(torch.backends.mkldnn, "matmul", None)
    before = torch.get_float32_matmul_precision() if own is None else own.fp32_precision
    try:
        if own is None:
            torch.set_float32_matmul_precision("medium")
        else:
            own.fp32_precision = "bf16"
        yield
    finally:
        if own is None:
            torch.set_float32_matmul_precision(before)
        else:
            own.fp32_precision = before
