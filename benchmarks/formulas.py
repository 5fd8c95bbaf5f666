"""What ``observe_`` replaces: the same numbers from eager PyTorch, and what other packages compute. All take x (vectors, features)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALL = "M1 … M4, min, max, |x|, vector κ"


def eager(x: Tensor) -> dict[str, Tensor]:
    """Two passes in float32 with few temporaries: the vector kurtosis has the shape (vectors,), everything else (features,).

    Central moments come from products, not from ``pow``, and in place where a value is not needed again. ``aminmax``, ``norm`` and
    ``var`` would need fewer calls, but their reductions on the CPU are several times slower.
    """
    x = x.float()
    mean = x.mean(0)
    d = x - mean
    d2 = d.square()
    m2 = d2.mean(0)
    m3 = d.mul_(d2).mean(0)
    m4 = d2.square_().mean(0)
    low, high, mean_abs = x.amin(0), x.amax(0), x.abs().mean(0)
    d2 = torch.sub(x, x.mean(1, keepdim=True)).square_()
    variance = d2.mean(1)
    kurtosis = d2.square_().mean(1) / variance.square()
    return {
        "mean": mean,
        "m2": m2,
        "m3": m3,
        "m4": m4,
        "min": low,
        "max": high,
        "mean_abs": mean_abs,
        "vector_kurtosis": kurtosis,
    }


def mean_and_variance(x: Tensor) -> dict[str, Tensor]:
    """The least that users need in practice."""
    variance, mean = torch.var_mean(x.float(), 0, correction=0)
    return {"mean": mean, "m2": variance}


@dataclass(frozen=True)
class Peer:
    """Another package with an empty state: ``update`` takes a batch, ``result`` returns the numbers over all batches."""

    name: str
    computes: str
    update: Callable[[Tensor], object]
    result: Callable[[], dict[str, Tensor]]


def welford_torch(features: int, device: torch.device) -> Peer:
    """Merges batch after batch by Welford's formulas, in float32."""
    from welford_torch import Welford

    welford = Welford(device=device)
    return Peer("welford_torch", "mean, variance", welford.add_all, lambda: {"mean": welford.mean, "m2": welford.var_p})


def torchmetrics(features: int, device: torch.device) -> Peer:
    """It has no moments. The errors against 0 are the nearest: E[x²] and E|x| of each feature."""
    from torchmetrics import MeanAbsoluteError, MeanSquaredError

    square = MeanSquaredError(num_outputs=features).to(device)
    absolute = MeanAbsoluteError(num_outputs=features).to(device)
    zero = torch.zeros(1, device=device)

    def update(x: Tensor) -> None:
        x = x.float()  # it would sum bfloat16 in bfloat16
        square.update(x, zero.expand_as(x))
        absolute.update(x, zero.expand_as(x))

    def result() -> dict[str, Tensor]:
        return {"mean_square": square.compute(), "mean_abs": absolute.compute()}

    return Peer("torchmetrics", "mean x², mean|x|", update, result)


def captum(features: int, device: torch.device) -> Peer:
    """It returns the activation of a layer; the formulas are those of :func:`eager`. The model does nothing."""
    from captum.attr import LayerActivation

    model = nn.Sequential(nn.Identity())
    layer = LayerActivation(model, model[0])
    last: dict[str, Any] = {}

    def update(x: Tensor) -> None:
        last.update(eager(layer.attribute(x)))

    return Peer("captum LayerActivation + eager", ALL, update, lambda: last)


PEERS: dict[str, Callable[[int, torch.device], Peer]] = {
    "welford_torch": welford_torch,
    "torchmetrics": torchmetrics,
    "captum": captum,
}


def installed_peers() -> dict[str, Callable[[int, torch.device], Peer]]:
    return {name: make for name, make in PEERS.items() if importlib.util.find_spec(name) is not None}
