"""What all layers together do to the output of a network: measured, by rounding them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchprobe.analysis.quantization.formats import decibels
from torchprobe.analysis.quantization.layers import simulated
from torchprobe.statistics.exponents import Exponents

FEWEST = 2
"""Outputs that are compared by what differs between them; of one nothing would be left."""


def network_db(
    model: nn.Module,
    call: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    plain: Sequence[Tensor],
    layers: Iterable[str],
    format: str,
    exponents: Mapping[str, Exponents],
) -> float:
    """The SQNR of the output of a network whose layers are rounded at once, in decibels.

    The signal is what differs between the inputs, so that a part of the output that is always the same does not hide an error:
    10 log10(Σ (y − mean of y)² / Σ (y rounded − y)²).

    Args:
        model: which holds the layers.
        call: gives the output for a batch, (batch, features); without autograd.
        inputs: batches.
        plain: the outputs of the model as it is, one for each of them.
        layers: names of linear layers and convolutions.
        format: of the activations; see :func:`~torchprobe.analysis.quantization.layers.simulated`.
        exponents: of the inputs of the layers.

    Returns:
        nan with less than :data:`FEWEST` outputs, or if all are the same or not finite.

    Raises:
        ValueError: the weight of a layer cannot be replaced.

    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
    >>> seen = {"0": Exponents(16), "2": Exponents(16)}
    >>> seen["0"].update(x)
    >>> with torch.no_grad():
    ...     seen["2"].update(model[:2](x))
    ...     found = network_db(model, model, [x], [model(x)], ["0", "2"], "int8_token", seen)
    >>> 25 < found < 45
    True
    """
    with simulated(model, layers, format, exponents):
        rounded = [call(batch) for batch in inputs]
    before, after = (torch.cat([one.detach().double().flatten(1) for one in outputs]) for outputs in (plain, rounded))
    if len(before) < FEWEST or not bool(before.isfinite().all()):
        return math.nan
    return decibels(float(((before - before.mean(0)) ** 2).sum()), float(((after - before) ** 2).sum()))
