"""What the contestants read."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gaussian(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent Gaussian values, the same in every run."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
