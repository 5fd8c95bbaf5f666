"""The options of every long run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchprobe.common.progress import ProgressCallback


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Only ``seed`` changes what is measured.

    Args:
        batch_size: images in one forward pass.
        device: where the model runs; None: where its parameters are.
        workers: threads or processes that decode images.
        seed: of everything random.
        resume: continue an interrupted run instead of starting again.
        progress: called after every batch.
        stop: called between batches; if it returns True, the run ends early and keeps the results so far.

    >>> RunOptions(batch_size=64).workers
    2
    """

    batch_size: int = 32
    device: torch.device | str | None = None
    workers: int = 2
    seed: int = 0
    resume: bool = False
    progress: ProgressCallback | None = None
    stop: Callable[[], bool] | None = None
