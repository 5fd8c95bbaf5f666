"""The options that every long run has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchprobe.common.progress import ProgressCallback


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of these changes what is measured, except ``seed``.

    Args:
        batch_size: images in one forward pass.
        device: where the model runs; None: where its parameters are.
        workers: processes that decode images; 0 decodes in this process.
        seed: of everything random.
        resume: continue a run that was interrupted, instead of starting anew.
        progress: called after every batch.
        stop: called after every batch; the run ends early, and keeps what it has, when it returns True.
    """

    batch_size: int = 32
    device: torch.device | str | None = None
    workers: int = 2
    seed: int = 0
    resume: bool = False
    progress: ProgressCallback | None = None
    stop: Callable[[], bool] | None = None
