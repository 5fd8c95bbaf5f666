"""Streaming moments of an activation: per feature, and across the features of every vector."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprobe.ops import layout
from torchprobe.ops.observe import merge_states, new_state, observe_

FIELDS = (
    "vectors",
    "constant_vectors",
    "invalid_vectors",
    "vector_kurtosis",
    "vector_kurtosis_std",
    "vector_kurtosis_median",
    "kurtosis_median",
    "kurtosis_max",
    "skewness_median",
    "std",
    "mean_abs_max",
    "min",
    "max",
    "nonfinite",
    "outlier_features",
)
"""The numbers that sum up one layer, in the order of :func:`summarise`."""

OUTLIER_SHARE = 0.5
"""``outlier_features`` counts the features that are outliers in at least this share of the vectors (a choice of ours)."""

BINS_PER_OCTAVE = 8
BINS = layout.BINS // layout.BINS_PER_OCTAVE * BINS_PER_OCTAVE
"""Of :func:`histogram`: an eighth of those that the state has, so that one may be kept for every window (a choice of ours)."""


class Moments:
    """Mean, variance, skewness, kurtosis, extremes of each feature, and the kurtosis across the features of each vector.

    Args:
        features: the width of the layer.
        device: where the state lies; it must be where the activations are. Default: PyTorch's default device.
        outlier_sigma: element i of a vector is an outlier when abs(x_i − mean) > outlier_sigma · std of that vector.

    Per feature, float64, shape (features,), over all finite values seen: ``mean``, ``variance`` (population), ``std``,
    ``skewness``, ``kurtosis`` (Pearson's: Gaussian = 3, as ``scipy.stats.kurtosis(fisher=False, bias=True)``; nan for a constant feature),
    ``min``, ``max``, ``mean_abs``, ``count``, ``nonfinite``, ``outlier_frequency``. Nan where nothing was seen.

    Over vectors, plain numbers: ``vector_kurtosis`` (the mean over vectors of the kurtosis across features, the measure of "Interpreting
    CLIP", TMLR 2024), ``vector_kurtosis_std`` (its population spread), ``vector_kurtosis_quantile(q)``, ``vectors`` (counted in),
    ``constant_vectors`` and ``invalid_vectors`` (left out: variance 0; a nonfinite element).

    ``update``, ``merge`` and ``reset`` never synchronise with the device; reading a plain number does. Merging follows Chan et al.
    (1982) and Pébay (SAND2008-6212). For numerics and their limits see :func:`torchprobe.ops.observe_`.

    >>> import torch, torchprobe
    >>> m = torchprobe.Moments(features=4)
    >>> m.update(torch.tensor([[0.0, 0.0, 0.0, 8.0], [1.0, 1.0, 1.0, 9.0]]))
    >>> m.mean.tolist(), round(m.vector_kurtosis, 3)
    ([0.5, 0.5, 0.5, 8.5], 2.333)
    """

    def __init__(self, features: int, device: torch.device | str | None = None, outlier_sigma: float = 6.0) -> None:
        if not outlier_sigma > 0:
            raise ValueError(f"outlier_sigma must be positive, got {outlier_sigma}")
        self.features = int(features)
        self.outlier_sigma = float(outlier_sigma)
        self.state = new_state(self.features, device)

    # -- the verbs of a statistic ----------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, every: int = 1) -> None:
        """Adds every vector of ``x``; arguments as in :func:`torchprobe.ops.observe_`."""
        observe_(self.state, x, feature_dim, self.outlier_sigma, every, mask)

    def merge(self, other: Moments) -> Moments:
        """Adds, in place, everything ``other`` saw; returns self. ``other`` may lie on another device.

        Raises:
            TypeError: ``other`` is no :class:`Moments`.
            ValueError: another width or another ``outlier_sigma``.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"cannot merge Moments with {type(other).__name__}")
        if other.features != self.features:
            raise ValueError(f"cannot merge Moments of {self.features} and {other.features} features")
        if other.outlier_sigma != self.outlier_sigma:
            raise ValueError(f"cannot merge Moments with outlier_sigma {self.outlier_sigma:g} and {other.outlier_sigma:g}")
        self.state.copy_(merge_states(self.state, other.state.to(self.state)))
        return self

    def reset(self) -> None:
        """Forgets everything."""
        self.state.zero_()

    def state_dict(self) -> dict[str, Any]:
        """``features``, ``outlier_sigma`` and every part of the state under its name, cloned."""
        parts = {name: part.clone() for name, part in self.parts().items()}
        return {"features": self.features, "outlier_sigma": self.outlier_sigma, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: another width or ``outlier_sigma``, a part missing, unknown or of the wrong shape. Nothing is changed then.
        """
        for key in ("features", "outlier_sigma"):
            if state.get(key) != getattr(self, key):
                raise ValueError(f"the saved Moments have {key}={state.get(key)}, these have {key}={getattr(self, key)}")
        parts = self.parts()
        saved = {key: value for key, value in state.items() if key not in ("features", "outlier_sigma")}
        if saved.keys() != parts.keys():
            raise ValueError(
                f"the saved Moments lack {sorted(parts.keys() - saved.keys())} and have unknown {sorted(saved.keys() - parts.keys())}"
            )
        for name, part in parts.items():
            if not isinstance(saved[name], Tensor) or saved[name].shape != part.shape:
                shape = tuple(getattr(saved[name], "shape", ()))
                raise ValueError(f"{name} of the saved Moments has shape {shape}, expected {tuple(part.shape)}")
        for name, part in parts.items():
            part.copy_(saved[name])

    def parts(self) -> dict[str, Tensor]:
        """Views of the state under lasting names: what is saved, and what a file holds."""
        scalars = {
            "calls": layout.CALLS,
            "vectors": layout.VECTORS,
            "constant_vectors": layout.CONSTANT,
            "invalid_vectors": layout.INVALID,
            "vector_kurtosis_mean": layout.KURTOSIS_MEAN,
            "vector_kurtosis_m2": layout.KURTOSIS_M2,
        }
        views = {name: self.state[index] for name, index in scalars.items()}
        views["vector_kurtosis_histogram"] = layout.histogram(self.state)
        views.update(self._rows())
        return views

    def clone(self) -> Moments:
        """An independent copy."""
        copy = Moments(self.features, self.state.device, self.outlier_sigma)
        copy.state.copy_(self.state)
        return copy

    # -- per feature -----------------------------------------------------------------------------------------------

    def _rows(self) -> dict[str, Tensor]:
        return dict(zip(layout.ROWS, layout.rows(self.state).unbind(0), strict=True))

    @property
    def count(self) -> Tensor:
        """Finite values seen."""
        return self._rows()["count"].clone()

    @property
    def nonfinite(self) -> Tensor:
        """Nan and inf seen, left out of everything else."""
        return self._rows()["nonfinite"].clone()

    @property
    def mean(self) -> Tensor:
        return _seen(self._rows(), "mean")

    @property
    def mean_abs(self) -> Tensor:
        """Mean of abs(x)."""
        rows = self._rows()
        return rows["abs_sum"] / rows["count"]

    @property
    def min(self) -> Tensor:
        return _seen(self._rows(), "min")

    @property
    def max(self) -> Tensor:
        return _seen(self._rows(), "max")

    @property
    def variance(self) -> Tensor:
        """Population variance."""
        rows = self._rows()
        return rows["m2"] / rows["count"]

    @property
    def std(self) -> Tensor:
        return self.variance.sqrt()

    @property
    def skewness(self) -> Tensor:
        """m3 / m2^1.5 with population moments, as ``scipy.stats.skew(bias=True)``."""
        return _skewness(self._rows())

    @property
    def kurtosis(self) -> Tensor:
        """m4 / m2² with population moments (Pearson: Gaussian = 3)."""
        return _kurtosis(self._rows())

    @property
    def outlier_frequency(self) -> Tensor:
        """Share of ``vectors`` in which the feature is an outlier; nan where no feature of so few can be: (d − 1)/√d ≤ outlier_sigma."""
        return _outlier_frequency(self.state, self.features, self.outlier_sigma)

    # -- over vectors ----------------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Times :meth:`update` ran, whether the call was read or skipped by ``every``."""
        return int(self.state[layout.CALLS])

    @property
    def vectors(self) -> int:
        """Vectors whose kurtosis is counted in."""
        return int(self.state[layout.VECTORS])

    @property
    def constant_vectors(self) -> int:
        return int(self.state[layout.CONSTANT])

    @property
    def invalid_vectors(self) -> int:
        return int(self.state[layout.INVALID])

    @property
    def vector_kurtosis(self) -> float:
        """Mean over vectors of the kurtosis across features; nan when there was no vector."""
        return float(self.state[layout.KURTOSIS_MEAN]) if self.vectors else math.nan

    @property
    def vector_kurtosis_std(self) -> float:
        """Population standard deviation of the kurtosis over vectors."""
        return math.sqrt(float(self.state[layout.KURTOSIS_M2]) / self.vectors) if self.vectors else math.nan

    def vector_kurtosis_quantile(self, q: float) -> float:
        """Quantile of the vector kurtosis, from a histogram with 64 bins to the octave: within 0.8 % of the truth up to 2^18.

        Raises:
            ValueError: q outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile lies in [0, 1], got {q}")
        return float(_quantile(self.state, q))

    # -- display ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        f = dict(zip(FIELDS, summarise(self.state[None], self.features, self.outlier_sigma)[0].tolist(), strict=True))
        rows = self._rows()
        if not float(rows["count"].sum()) and not f["nonfinite"]:
            return f"Moments({self.features} features, empty)"
        notes = [f"{f['outlier_features']:.0f} outlier features"] if f["outlier_features"] > 0 else []
        notes += [f"{f[k]:.0f} {k.split('_')[0]} vectors" for k in ("constant_vectors", "invalid_vectors") if f[k]]
        notes += [f"{f['nonfinite']:.0f} nonfinite!"] if f["nonfinite"] else []
        mean = float((rows["mean"] * rows["count"]).sum() / rows["count"].sum())
        return (
            f"Moments({self.features} features, {f['vectors']:.0f} vectors: "
            f"x∈[{f['min']:.3g}, {f['max']:.3g}] μ={mean:.3g} σ={f['std']:.3g} "
            f"κ={f['kurtosis_median']:.3g} vector κ={f['vector_kurtosis']:.4g}{''.join(', ' + note for note in notes)})"
        )

    def _repr_html_(self) -> str:
        values = summarise(self.state[None], self.features, self.outlier_sigma)[0].tolist()
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:right'>{value:.6g}</td></tr>"
            for name, value in zip(FIELDS, values, strict=True)
        )
        return f"<table><caption>Moments of {self.features} features</caption>{cells}</table>"


def summarise(states: Tensor, features: int, outlier_sigma: float = 6.0) -> Tensor:
    """:data:`FIELDS` of several layers of one width at once: states (L, slots) → (L, len(FIELDS)).

    On their device, without synchronisation. ``kurtosis_median``, ``skewness_median`` and ``kurtosis_max`` are over features; ``std``
    is the root of the mean variance; ``mean_abs_max`` the largest mean abs(x) of a feature; ``outlier_features`` counts features with
    ``outlier_frequency`` ≥ :data:`OUTLIER_SHARE`, nan for a layer too narrow to have any. Nan where nothing was seen.
    """
    rows = dict(zip(layout.ROWS, layout.rows(states).unbind(-2), strict=True))
    seen = rows["count"] > 0
    nan = states.new_full((), math.nan)
    kurtosis = _kurtosis(rows)
    any_kurtosis = ~kurtosis.isnan().all(-1)
    mean_variance = (rows["m2"] / rows["count"]).where(seen, 0).sum(-1) / seen.sum(-1)
    frequency = _outlier_frequency(states, features, outlier_sigma)
    any_seen = seen.any(-1)
    vectors = states[..., layout.VECTORS]
    fields = {
        "vectors": vectors,
        "constant_vectors": states[..., layout.CONSTANT],
        "invalid_vectors": states[..., layout.INVALID],
        "vector_kurtosis": states[..., layout.KURTOSIS_MEAN].where(vectors > 0, nan),
        "vector_kurtosis_std": (states[..., layout.KURTOSIS_M2] / vectors).sqrt(),
        "vector_kurtosis_median": _quantile(states, 0.5),
        "kurtosis_median": kurtosis.nanmedian(-1).values,
        "kurtosis_max": kurtosis.nan_to_num(nan=-math.inf).amax(-1).where(any_kurtosis, nan),
        "skewness_median": _skewness(rows).nanmedian(-1).values,
        "std": mean_variance.sqrt(),
        "mean_abs_max": (rows["abs_sum"] / rows["count"]).where(seen, -math.inf).amax(-1).where(any_seen, nan),
        "min": rows["min"].where(seen, math.inf).amin(-1).where(any_seen, nan),
        "max": rows["max"].where(seen, -math.inf).amax(-1).where(any_seen, nan),
        "nonfinite": rows["nonfinite"].sum(-1),
        "outlier_features": (frequency >= OUTLIER_SHARE).sum(-1).to(states.dtype).where(~frequency.isnan().any(-1), nan),
    }
    return torch.stack([fields[name] for name in FIELDS], -1)


def histogram(states: Tensor) -> Tensor:
    """Vectors by their kurtosis: states (L, slots) → (L, BINS), between :func:`bin_edges`. Without synchronisation."""
    counts: Tensor = layout.histogram(states).unflatten(-1, (BINS, -1)).sum(-1)
    return counts


def bin_edges() -> Tensor:
    """The edges of :func:`histogram`, float64, shape (BINS + 1,): octaves in equal steps. The last bin is open."""
    octave, step = torch.arange(BINS + 1, dtype=torch.float64).div(BINS_PER_OCTAVE).floor(), torch.arange(BINS + 1) % BINS_PER_OCTAVE
    return torch.exp2(octave) * (1 + step / BINS_PER_OCTAVE)


def _seen(rows: Mapping[str, Tensor], name: str) -> Tensor:
    return rows[name].where(rows["count"] > 0, math.nan)


def _skewness(rows: Mapping[str, Tensor]) -> Tensor:
    # Divided step by step: m2 cubed alone would under- or overflow long before the ratio does. 0/0 of a constant feature is meant.
    variance = rows["m2"] / rows["count"]
    return rows["m3"] / rows["m2"] / variance.sqrt()


def _kurtosis(rows: Mapping[str, Tensor]) -> Tensor:
    return rows["m4"] / rows["m2"] / rows["m2"] * rows["count"]


def _outlier_frequency(states: Tensor, features: int, outlier_sigma: float) -> Tensor:
    frequency = layout.rows(states)[..., layout.ROWS.index("outliers"), :] / states[..., layout.VECTORS, None]
    possible = (features - 1) / math.sqrt(features) > outlier_sigma  # the largest deviation that one of so few can have
    return frequency if possible else torch.full_like(frequency, math.nan)


def _quantile(states: Tensor, q: float) -> Tensor:
    """Quantile of the vector kurtosis, linear within a bin; nan where there is no vector."""
    counts = layout.histogram(states).cumsum(-1)
    total = counts[..., -1:]
    rank = q * total
    bin_ = (counts < rank).sum(-1, keepdim=True).clamp(max=layout.BINS - 1)
    if q == 0:  # the first bin that holds anything
        bin_ = (counts == 0).sum(-1, keepdim=True).clamp(max=layout.BINS - 1)
    inside = layout.histogram(states).gather(-1, bin_)
    part = (rank - (counts.gather(-1, bin_) - inside)) / inside
    octave = bin_ // layout.BINS_PER_OCTAVE
    step = bin_ % layout.BINS_PER_OCTAVE
    value = torch.exp2(octave.to(states.dtype)) * (1 + (step + part) / layout.BINS_PER_OCTAVE)
    return value.where(total > 0, math.nan).squeeze(-1)
