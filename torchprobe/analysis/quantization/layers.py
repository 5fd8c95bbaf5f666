"""The layers that a network would compute in 8 bits: what their inputs and weights lose, and what that does to their outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchprobe.analysis.quantization.features import feature_errors
from torchprobe.analysis.quantization.forecast import Forecast, forecast
from torchprobe.analysis.quantization.formats import decibels, measure, quantize
from torchprobe.recording.leaves import inputs_first
from torchprobe.statistics import Moments
from torchprobe.statistics.exponents import Exponents

WEIGHT_FORMATS = {"int8_tensor": "int8_token", "int8_token": "int8_token", "int8_channel": "int8_token"}
"""How weights are rounded where activations have this format: INT8 with a scale for each output. The other formats are their own."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weighted_layers(model: nn.Module) -> dict[str, int]:
    """The layers with a matrix product, which 8-bit kernels replace: name → the dimension of their input that holds the features.

    >>> weighted_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)))
    {'0': 1, '3': -1}
    """
    found = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) and not _hidden(module)) or inputs_first(module):
            found[name] = -1
        elif isinstance(module, _CONVOLUTIONS) and not _hidden(module):
            found[name] = 1
    return found


def _hidden(module: nn.Module) -> bool:
    """Whether nothing calls the module: attention of PyTorch reads the weights of its last layer itself."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _weight(module: nn.Module) -> Tensor:
    """The weight with the outputs first."""
    weight: Any = module.weight
    return cast(Tensor, weight.T if inputs_first(module) else weight)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weights as float64 (outputs, values of one output); of a convolution with the kernel positions before the input channels."""
    weight: Tensor = _weight(module)
    return weight.detach().double().flatten(2).transpose(1, 2).flatten(1) if weight.dim() > 2 else weight.detach().double()


def column_squares(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Σ w² of each input feature, float64 (features,) on the CPU. ``weight``: other weights, with the outputs first."""
    kept = _weight(module) if weight is None else weight
    squares = kept.detach().double() ** 2
    groups: int = getattr(module, "groups", 1)
    return squares.reshape(groups, squares.shape[0] // groups, squares.shape[1], -1).sum((1, 3)).flatten().cpu()


def column_largest(module: nn.Module) -> Tensor:
    """The largest abs(w) of each input feature, float64 (features,)."""
    kept = _weight(module)
    size = kept.detach().double().abs()
    groups: int = getattr(module, "groups", 1)
    return size.reshape(groups, size.shape[0] // groups, size.shape[1], -1).amax((1, 3)).flatten()


def rounded_weight(module: nn.Module, format: str) -> Tensor:
    """The weights rounded to what goes with a format of activations: float64, with the outputs first."""
    kept = _weight(module)
    rounded = quantize(weight_matrix(module), WEIGHT_FORMATS.get(format, format))
    if kept.dim() > 2:
        rounded = rounded.view(kept.shape[0], -1, kept.shape[1]).transpose(1, 2)
    return rounded.reshape(kept.shape)


@dataclass(frozen=True)
class LayerForecast:
    """What a layer loses in a format.

    Attributes:
        layer: its name.
        input: the forecast of its input.
        weight_db: SQNR of its weights, measured by rounding them.
        output_db: SQNR of its output: the error of the input and that of the weights, passed through the weights, against the output
            without the bias. The errors of different values are taken to be independent.
    """

    layer: str
    input: Forecast
    weight_db: float
    output_db: float


def layer_forecast(name: str, module: nn.Module, exponents: Exponents, outputs: Moments, format: str) -> LayerForecast:
    """What one layer loses.

    Args:
        name: of the layer.
        module: a linear layer or a convolution.
        exponents: of its input.
        outputs: the moments of its output.
        format: of the activations; see :data:`WEIGHT_FORMATS` for that of the weights.
    """
    found = forecast(exponents, format)
    columns = column_squares(module)
    share = exponents.sizes[2].cpu()
    vectors = max(float(exponents.vectors), 1.0)
    close = float(share.sum())
    values = float(exponents.counts.cpu()[:-2].sum())
    mean_square = found.noise * 10 ** (found.sqnr_db / 10) if math.isfinite(found.sqnr_db) else math.nan
    squares = share / close * mean_square * values / vectors if close > 0 else share  # the mean square of each feature
    error = feature_errors(exponents, format, found.noise)
    rounded = rounded_weight(module, format)
    original = _weight(module)
    of_weights = float((column_squares(module, rounded - original.detach().double()) * squares).sum())
    bias: Any = getattr(module, "bias", None)
    center = outputs.mean.cpu() - (0 if bias is None else bias.detach().double().cpu())
    signal = float((outputs.variance.cpu() + center**2).sum())
    matrix = weight_matrix(module)
    return LayerForecast(
        name,
        found,
        measure(matrix, WEIGHT_FORMATS.get(format, format)).sqnr_db,
        decibels(signal, float((error * columns).sum()) + of_weights),
    )


@contextlib.contextmanager
def simulated(model: nn.Module, layers: Iterable[str], format: str, exponents: Mapping[str, Exponents]) -> Iterator[None]:
    """Within the block, some layers compute as if in a format: inputs and weights are rounded by the reference quantizers, and multiplied
    in the type of the model.

    Args:
        model: any model.
        layers: names of linear layers and convolutions.
        format: of the activations; see :data:`WEIGHT_FORMATS` for that of the weights.
        exponents: of the inputs of the layers, for scales that are fixed beforehand.

    Raises:
        ValueError: the weight of a layer is computed in every call, so that it cannot be replaced.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    >>> seen = Exponents(2)
    >>> seen.update(torch.tensor([[127.0, 1.0]]))
    >>> with torch.no_grad(), simulated(model, ["0"], "int8_tensor", {"0": seen}):
    ...     model(torch.tensor([[2.4, 200.0]])).tolist()
    [[2.0, 63.5]]
    """
    dims = weighted_layers(model)
    modules: dict[str, Any] = dict(model.named_modules())
    weights: list[tuple[nn.Module, nn.Parameter]] = []
    handles = []
    try:
        for name in layers:
            module, largest = modules[name], exponents[name].largest.clamp(min=0)
            if not isinstance(module._parameters.get("weight"), nn.Parameter):
                raise ValueError(f"the weight of {name!r} is computed in every call, by a parametrization or a hook: remove it first")

            def round_input(_: nn.Module, args: Any, kwargs: Any, dim: int = dims[name], largest: Tensor = largest) -> Any:
                given = [*args, *kwargs.values()]  # of a call by keyword, as fc(input=x), the only argument
                given[0] = quantize(given[0], format, dim, largest, torch.float32).to(given[0].dtype)
                return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

            if all(module is not known for known, _ in weights):
                # A parameter of its own: others that share the weight, such as a tied embedding, are not rounded.
                kept, rounded = module._parameters["weight"], rounded_weight(module, format).to(module.weight.dtype)
                weights.append((module, kept))
                rounded = rounded.T.contiguous() if inputs_first(module) else rounded
                module._parameters["weight"] = nn.Parameter(rounded, kept.requires_grad)
            handles.append(module.register_forward_pre_hook(round_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, kept in weights:
            module._parameters["weight"] = kept
