"""The processes that ``torchrun`` started, if it did."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torchrun() -> Iterator[tuple[int, int | None]]:
    """Joins the processes that ``torchrun`` started for the length of the block: (rank, rank on this machine); (0, None) without it.

    >>> with torchrun() as (rank, local):
    ...     rank
    0
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        yield 0, None
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        torch.distributed.destroy_process_group()
