"""Batch norms of networks at random initialization."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.datasets import ImageSet
from torchprobe.datasets.sampling import sample, taken

CALIBRATION = 512
"""Images on which the statistics of the batch norms of an untrained network are measured (we chose the number)."""


def recalibrate_on(encoder: nn.Module, images: ImageSet, batch_size: int = 32, limit: int = CALIBRATION, seed: int = 0) -> int:
    """Measures the statistics of all batch norms anew, in place, on a random sample of the images; returns the number of batch norms.

    With its initial statistics, 0 and 1, the layers of an untrained network have very different scales, and its kurtosis is that of no
    network in use. All batches have one size, since each counts as much.
    """
    size = min(batch_size, len(images))
    first = sample(images, min(limit, len(images)), seed)
    whole = taken(first, range(len(first) // size * size or len(first)))
    preprocess: Any = encoder.preprocess
    return recalibrate_batch_norms(encoder, (batch.pixels for batch in whole.batches(preprocess, size) if batch.names))
