"""How the error of a layer is divided among its features, from their sizes alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchprobe.analysis.quantization.formats import quantize
from torchprobe.statistics.exponents import Exponents

DRAWN = 128
"""So many vectors are drawn and rounded. We chose the number."""


def feature_errors(exponents: Exponents, format: str, noise: float) -> Tensor:
    """The mean of error² of each feature, float64 (features,), whose mean is ``noise``.

    Where features share a step, a small one may lose all of itself, which is less than the step, and a feature of zeros loses nothing;
    a large neighbor coarsens the step of a whole block or token. So vectors are drawn and rounded: the abs(x) of a feature follow the
    Weibull distribution that has their mean and mean square, up to the largest, and features are independent. This only divides the
    error; how much it is, the forecast says.

    Args:
        exponents: of the layer.
        format: a name of :data:`torchprobe.analysis.quantization.FORMATS`.
        noise: the mean of error² over all values.

    >>> exponents = Exponents(features=2)
    >>> exponents.update(torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0]))
    >>> first, second = feature_errors(exponents, "int8_tensor", noise=1.0).tolist()
    >>> first < 1e-3, round(first + second, 6)
    (True, 2.0)
    """
    numbers, sums, squares = exponents.sizes.cpu()
    largest = exponents.largest.cpu().clamp(min=0)
    seen = (numbers > 0) & (largest > 0) & squares.isfinite()
    numbers = numbers.where(seen, 1)
    mean, square = (sums / numbers).where(seen, 1), (squares / numbers).where(seen, 1)
    shape = weibull_shape((mean**2 / square).clamp(max=1))
    width = mean / torch.lgamma(1 + 1 / shape).exp()
    zeros = 1 - (numbers / max(float(exponents.vectors), 1.0)).where(seen, 0).clamp(max=1)
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.rand(DRAWN, len(mean), generator=generator, dtype=torch.float64, device="cpu")
    places = drawn.argsort(0)  # each feature in an order of its own
    chance = ((places + 0.5) / DRAWN - zeros) / (1 - zeros).clamp(min=torch.finfo(torch.float64).tiny)
    size = width * (-torch.log1p(-chance.clamp(0, 1 - 1e-9))) ** (1 / shape)
    size = torch.minimum(size, largest).where((chance > 0) & seen, 0)
    errors = ((size - quantize(size, format, largest=largest)) ** 2).mean(0)
    total = float(errors.sum())
    return errors * (noise * len(errors) / total) if total > 0 else torch.full_like(errors, noise)


@functools.cache
def _weibull_table() -> tuple[Tensor, Tensor]:
    shape = torch.logspace(-0.7, 2, 400, dtype=torch.float64, device="cpu")
    return (2 * torch.lgamma(1 + 1 / shape) - torch.lgamma(1 + 2 / shape)).exp(), shape


def weibull_shape(ratio: Tensor) -> Tensor:
    """The shape of the Weibull distribution with this mean² / mean square.

    >>> weibull_shape(torch.tensor([0.5], dtype=torch.float64)).round(decimals=1).tolist()
    [1.0]
    """
    ratios, shapes = _weibull_table()
    return shapes[torch.searchsorted(ratios, ratio).clamp(max=len(shapes) - 1)]
