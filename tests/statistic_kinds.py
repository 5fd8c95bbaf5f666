"""The statistics of the contract suite, each with its expected fields; the ranks of test_distributed.py import it too."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.statistics import (
    FEATURES,
    Exponents,
    Moments,
    Norms,
    Quantile,
    Routing,
    Saturation,
    Sparsity,
    State,
    Statistic,
    TopInputs,
)

RANGE = {"low": -0.4, "high": 0.7, "tolerance": 0.05}
"""Some activations of the tests lie on either side of its ends."""
DOCS = Path(__file__).parents[1] / "docs" / "statistics.md"


@dataclass(frozen=True)
class Kind:
    """``oracle``: all vectors of a layer, (vectors, features) in float64 → some of the fields. ``headings``: some columns of the table."""

    name: str
    statistic: Any
    classes: list[type[Statistic]]
    oracle: Callable[[np.ndarray], dict[str, float]]
    headings: list[str] = field(default_factory=list)


class Extremes(Statistic):
    """The range of every feature; it has an argument."""

    states = {"low": State((FEATURES,), "min"), "high": State((FEATURES,), "max")}
    fields = {"widest": "the largest range of a feature, times the scale"}
    arguments = ("scale",)

    def __init__(self, features: int, device: torch.device | str | None = None, scale: float = 1.0) -> None:
        super().__init__(features, device)
        self.scale = scale

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.low = torch.minimum(self.low, x.where(kept, torch.inf).amin(0))
        self.high = torch.maximum(self.high, x.where(kept, -torch.inf).amax(0))

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"widest": self.scale * (states["high"] - states["low"]).amax(-1)}


class Covariance(Statistic):
    """The covariance matrix, merged as in Chan et al. (1982)."""

    states = {"n": State((), None), "mean": State((FEATURES,), None), "m2": State((FEATURES, FEATURES), None)}
    fields = {"vectors": "vectors seen", "largest_variance": "the largest eigenvalue of the covariance matrix"}
    headline = "largest_variance"

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        x, weight = x.double(), kept.double()
        n = weight.sum()
        mean = (x * weight).sum(0) / n.clamp(min=1)
        deviation = (x - mean) * weight
        new = {"n": n, "mean": mean, "m2": deviation.T @ deviation}
        for name, merged in self.merge_states(self.tensors(), new).items():
            getattr(self, name).copy_(merged)

    def merge_states(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n = a["n"] + b["n"]
        share = (b["n"] / n.clamp(min=1))[..., None]
        delta = b["mean"] - a["mean"]
        outer = delta[..., :, None] * delta[..., None, :]
        return {
            "n": n,
            "mean": a["mean"] + delta * share,
            "m2": a["m2"] + b["m2"] + outer * (a["n"][..., None] * share)[..., None],
        }

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        covariance = states["m2"] / states["n"][:, None, None]
        return {"vectors": states["n"], "largest_variance": torch.linalg.eigvalsh(covariance.nan_to_num())[:, -1]}


@functools.cache
def of_the_docs() -> type[Statistic]:
    """``Zeros`` of docs/statistics.md; this runs its whole block of code."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class Zeros" in block]
    names: dict[str, Any] = {"__name__": __name__}
    exec(code, names)
    kind: type[Statistic] = names["Zeros"]
    globals()["Zeros"] = kind  # so that it can be pickled
    return kind


def kinds() -> dict[str, Kind]:
    zeros = of_the_docs()
    return {
        "moments": Kind("Moments", Moments, [Moments], _moments, ["vector κ", "feature κ"]),
        "zeros of the docs": Kind("Zeros", zeros, [zeros], _zeros, ["zero share", "dead features"]),
        "extremes": Kind("Extremes", functools.partial(Extremes, scale=2.0), [Extremes], _extremes, ["widest"]),
        "covariance": Kind("Covariance", Covariance, [Covariance], _covariance, ["vectors", "largest variance"]),
        "quantile": Kind("Quantile", lambda features, device: Quantile(features, 0.1, device), [Quantile], _quantile, ["quantile max"]),
        "top inputs": Kind("TopInputs", functools.partial(TopInputs, k=3), [TopInputs], _top, ["score max"]),
        "norms": Kind("Norms", Norms, [Norms], _norms, ["norm mean", "rms max"]),
        "sparsity": Kind("Sparsity", Sparsity, [Sparsity], _sparsity, ["zero share", "dead features"]),
        "saturation": Kind("Saturation", functools.partial(Saturation, **RANGE), [Saturation], _saturation, ["saturated", "saturated low"]),
        "routing": Kind(
            "Routing", functools.partial(Routing, top_k=2), [Routing], _routing, ["load max", "dead experts", "router entropy"]
        ),
        "exponents": Kind("Exponents", Exponents, [Exponents], _exponents, ["peak octaves", "zero share"]),
        "several": Kind(
            "Moments+Zeros+Quantile",
            [Moments, zeros, functools.partial(Quantile, quantile=0.1)],
            [Moments, zeros, Quantile],
            lambda x: {**_zeros(x), **_moments(x), **_quantile(x)},  # the second dead_features is called Zeros.dead_features
            ["vector κ", "zero share", "quantile max"],
        ),
    }


def _moments(x: np.ndarray) -> dict[str, float]:
    d = x - x.mean(1, keepdims=True)
    kurtosis = (d**4).mean(1) / (d**2).mean(1) ** 2
    return {
        "vectors": len(x),
        "vector_kurtosis": kurtosis.mean(),
        "std": np.sqrt(x.var(0).mean()),
        "max": x.max(),
        "abs_max": abs(x).max(),
        "rms": np.sqrt((x**2).mean()),
        "dead_features": (x == 0).all(0).mean(),
    }


def _zeros(x: np.ndarray) -> dict[str, float]:
    return {"zero_share": (x == 0).mean(), "dead_features": (x == 0).all(0).sum()}


def _routing(x: np.ndarray) -> dict[str, float]:
    shares = np.exp(x - x.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    load = np.bincount(np.argsort(-x, 1, kind="stable")[:, :2].ravel(), minlength=x.shape[1]) / (2 * len(x))
    return {
        "load_cv": load.std() / load.mean(),
        "load_max": load.max() / load.mean(),
        "dead_experts": (load == 0).sum(),
        "dropped": 0.0,
        "router_entropy": -(shares * np.log(shares)).sum(1).mean() / np.log(x.shape[1]),
        "balance_loss": x.shape[1] * (load * shares.mean(0)).sum(),
        "tokens": len(x),
    }


def _extremes(x: np.ndarray) -> dict[str, float]:
    return {"widest": 2 * np.ptp(x, 0).max()}


def _covariance(x: np.ndarray) -> dict[str, float]:
    return {"vectors": len(x), "largest_variance": np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1]}


def _norms(x: np.ndarray) -> dict[str, float]:
    norms = np.linalg.norm(x, axis=1)
    rms = np.sqrt((x**2).mean(1))
    return {"norm_mean": norms.mean(), "norm_max": norms.max(), "rms_mean": rms.mean(), "rms_max": rms.max(), "invalid_vectors": 0}


def _sparsity(x: np.ndarray) -> dict[str, float]:
    return {"zero_share": (x == 0).mean(), "dead_features": (x == 0).all(0).mean()}


def _saturation(x: np.ndarray) -> dict[str, float]:
    margin = RANGE["tolerance"] * (RANGE["high"] - RANGE["low"])
    low, high = x <= RANGE["low"] + margin, x >= RANGE["high"] - margin
    return {
        "saturated": (low | high).mean(),
        "saturated_low": low.mean(),
        "saturated_high": high.mean(),
        "saturated_features": ((low | high).mean(0) >= 0.95).mean(),
    }


def _exponents(x: np.ndarray) -> dict[str, float]:
    size = np.sort(abs(x[x != 0]))
    median = np.floor(np.log2(size[(len(size) + 1) // 2 - 1]))
    largest = abs(x).max(0)
    return {
        "peak_octaves": np.log2(size[-1]) - median,
        "abs_max": size[-1],
        "feature_ratio": largest.max() / np.sort(largest)[(len(largest) - 1) // 2],
        "zero_share": (x == 0).mean(),
        "half_subnormal": (size < 2.0**-14).mean(),
        "subnormal": 0,
        "median_exponent": median,
        "nonfinite": 0,
    }


def _quantile(x: np.ndarray) -> dict[str, float]:
    values = np.quantile(x.astype(np.float32), 0.9, axis=0, method="inverted_cdf")
    return {"quantile_max": values.max(), "values": len(x), "nan": 0}


def _top(x: np.ndarray) -> dict[str, float]:
    return {"score_max": x.max()}
