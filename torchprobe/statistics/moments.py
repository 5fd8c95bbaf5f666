"""Streaming moments of an activation: of each feature, and across the features of each vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from torchprobe.common.deprecation import renamed
from torchprobe.ops import layout
from torchprobe.ops.observe import merge_states, new_state, observe_
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import State

HELP = {
    "vectors": "activation vectors that were counted",
    "constant_vectors": "vectors left out because their variance is 0",
    "invalid_vectors": "vectors left out because an element is nonfinite",
    "vector_kurtosis": "kurtosis across the features of one vector, mean over vectors",
    "vector_kurtosis_std": "its standard deviation over vectors",
    "vector_kurtosis_median": "its median over vectors",
    "kurtosis_median": "kurtosis of one feature over all its values, median over features",
    "kurtosis_max": "the largest kurtosis of a feature over all its values",
    "skewness_median": "skewness of one feature over all its values, median over features",
    "std": "square root of the mean variance of the features",
    "mean_abs_max": "the largest mean |x| of a feature",
    "min": "smallest value",
    "max": "largest value",
    "nonfinite": "nan and inf values seen; left out of everything else",
    "outlier_features": "features that are outliers in at least half of the vectors",
}
"""The fields of one layer, each with one line of help."""

FIELDS = tuple(HELP)
"""Their names, in the order of :func:`summarize`."""

OUTLIER_SHARE = 0.5
"""``outlier_features`` counts the features that are outliers in at least this share of the vectors. We chose the value."""

_SIGNED = ("min", "max", "mean", "m3")  # the parts of a state that may be negative

BINS_PER_OCTAVE = 8
BINS = layout.BINS // layout.BINS_PER_OCTAVE * BINS_PER_OCTAVE
"""Bins of :func:`histogram`. We chose an eighth of those in the state, so that a history can keep them for every window."""


class Moments(Statistic):
    """Mean, variance, skewness, kurtosis and extremes of each feature, and the kurtosis across the features of each vector.

    Args:
        features: the width of the layer.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.
        outlier_sigma: element i of a vector is an outlier when abs(x_i − mean) > outlier_sigma · std of that vector.

    Per feature, float64, shape (features,), over all finite values seen: ``mean``, ``variance`` (population), ``std``,
    ``skewness``, ``kurtosis`` (Pearson's: Gaussian = 3, as ``scipy.stats.kurtosis(fisher=False, bias=True)``; nan for a constant feature),
    ``min``, ``max``, ``mean_abs``, ``count``, ``nonfinite``, ``outlier_frequency``. Nan where nothing was seen.

    Over vectors, plain numbers: ``vector_kurtosis`` is the mean over vectors of the kurtosis across features, the measure of "Interpreting
    CLIP" (TMLR 2024). ``vector_kurtosis_std`` is its population standard deviation, and ``vector_kurtosis_quantile(q)`` a quantile.
    ``vectors`` counts these vectors. ``constant_vectors`` (variance 0) and ``invalid_vectors`` (a nonfinite element) are left out.

    ``update``, ``merge`` and ``reset`` never synchronize with the device; reading a plain number does. Merging follows Chan et al.
    (1982) and Pébay (SAND2008-6212). For the numerics and their limits see :func:`torchprobe.ops.observe_`.

    Raises:
        ValueError: ``features`` or ``outlier_sigma`` is not positive.

    >>> import torch, torchprobe
    >>> m = torchprobe.Moments(features=4)
    >>> m.update(torch.tensor([[0.0, 0.0, 0.0, 8.0], [1.0, 1.0, 1.0, 9.0]]))
    >>> m.mean.tolist(), round(m.vector_kurtosis, 3)
    ([0.5, 0.5, 0.5, 8.5], 2.333)
    """

    states = MappingProxyType({"state": State((), None)})
    fields = MappingProxyType(HELP)
    arguments = ("outlier_sigma",)
    headline = "vector_kurtosis"
    table_fields = tuple(name for name in FIELDS if name not in ("skewness_median", "min", "max"))
    fused = True
    histogram_bins = BINS

    def __init__(self, features: int, device: torch.device | str | None = None, outlier_sigma: float = 6.0) -> None:
        if not outlier_sigma > 0:
            raise ValueError(f"outlier_sigma must be positive, got {outlier_sigma}")
        self.features = int(features)
        self.outlier_sigma = float(outlier_sigma)
        self.state = new_state(self.features, device)
        self._window_of: Tensor | None = None  # the state that `_window` is a view of

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_window_of": None, "_window": None}  # pickle would separate the view from its state

    # -- the contract of a statistic -------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, every: int = 1) -> None:
        """Adds every vector of ``x``; arguments as in :func:`torchprobe.ops.observe_`."""
        observe_(self.state, x, feature_dim, self.outlier_sigma, every, mask)

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _fields(states["state"], self.features, self.outlier_sigma)

    def merge_states(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"state": merge_states(a["state"], b["state"])}

    def window_histogram(self, states: Mapping[str, Tensor]) -> Tensor:
        return histogram(states["state"])

    def histogram_edges(self) -> Tensor:
        return bin_edges()

    def nonempty(self, states: Mapping[str, Tensor]) -> Tensor:
        """Which layers have seen a value; calls alone do not count."""
        rows = layout.rows(states["state"])
        return (rows[..., layout.ROWS.index("count"), :] + rows[..., layout.ROWS.index("nonfinite"), :]).sum(-1) > 0

    @property
    def call_counter(self) -> Tensor:
        return self.state[layout.CALLS]

    def window_tensors(self) -> dict[str, Tensor]:
        """All but the counter of calls, which ``every`` needs in later windows."""
        if self._window_of is not self.state:  # keep the view: slicing costs a call of the dispatcher
            self._window, self._window_of = self.state[layout.CALLS + 1 :], self.state
        return {"state": self._window}

    def merge_windows(self, closed: Mapping[str, Tensor], window: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The counter of the window was never reset, so it holds the calls of all windows."""
        merged = merge_states(closed["state"], window["state"])
        merged[..., layout.CALLS] = window["state"][..., layout.CALLS]
        return {"state": merged}

    def problem(self) -> tuple[str, str] | None:
        parts = self.parts()
        for name, part in parts.items():
            if name not in _SIGNED and not bool((part >= 0).all()):
                return name, "holds negative numbers or nan"
        if float(parts["vector_kurtosis_histogram"].sum()) != self.vectors:
            return "vector_kurtosis_histogram", f"does not add up to the {self.vectors} vectors counted"
        return None

    def parts(self) -> dict[str, Tensor]:
        """Views of the state under the names that files keep."""
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
        """Share of ``vectors`` in which the feature is an outlier; nan if no feature can be one: (d − 1)/√d ≤ outlier_sigma."""
        return _outlier_frequency(self.state, self.features, self.outlier_sigma)

    # -- over vectors ----------------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """How often :meth:`update` was called, including calls that ``every`` skipped."""
        return int(self.state[layout.CALLS])

    @property
    def vectors(self) -> int:
        """Vectors whose kurtosis was counted."""
        return int(self.state[layout.VECTORS])

    @property
    def constant_vectors(self) -> int:
        return int(self.state[layout.CONSTANT])

    @property
    def invalid_vectors(self) -> int:
        return int(self.state[layout.INVALID])

    @property
    def vector_kurtosis(self) -> float:
        """Mean over vectors of the kurtosis across features; nan without a vector."""
        return float(self.state[layout.KURTOSIS_MEAN]) if self.vectors else math.nan

    @property
    def vector_kurtosis_std(self) -> float:
        """Population standard deviation of the kurtosis over vectors."""
        return math.sqrt(float(self.state[layout.KURTOSIS_M2]) / self.vectors) if self.vectors else math.nan

    def vector_kurtosis_quantile(self, q: float) -> float:
        """Quantile of the vector kurtosis, from a histogram with 64 bins per octave: within 0.8 % of the truth up to 2^18.

        Raises:
            ValueError: q outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        return float(_quantile(self.state, q))

    # -- display ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        f = self.summary()
        rows = self._rows()
        if not self.saw_anything():
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


def summarize(states: Tensor, features: int, outlier_sigma: float = 6.0) -> Tensor:
    """:data:`FIELDS` of several layers of the same width at once: states (layers, slots) → (layers, len(FIELDS)).

    It does not synchronize. ``kurtosis_median``, ``skewness_median`` and ``kurtosis_max`` are over features. ``std`` is
    the root of the mean variance. ``mean_abs_max`` is the largest mean abs(x) of a feature. ``outlier_features`` counts features with
    ``outlier_frequency`` ≥ :data:`OUTLIER_SHARE`; it is nan for a layer too narrow to have any. Fields are nan if nothing was seen.
    """
    fields = _fields(states, features, outlier_sigma)
    return torch.stack([fields[name] for name in FIELDS], -1)


def _fields(states: Tensor, features: int, outlier_sigma: float) -> dict[str, Tensor]:
    rows = dict(zip(layout.ROWS, layout.rows(states).unbind(-2), strict=True))
    seen = rows["count"] > 0
    nan = states.new_full((), math.nan)
    kurtosis = _kurtosis(rows)
    any_kurtosis = ~kurtosis.isnan().all(-1)
    mean_variance = (rows["m2"] / rows["count"]).where(seen, 0).sum(-1) / seen.sum(-1)
    frequency = _outlier_frequency(states, features, outlier_sigma)
    any_seen = seen.any(-1)
    vectors = states[..., layout.VECTORS]
    return {
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


__getattr__ = renamed(__name__, {"summarise": "summarize"})


def histogram(states: Tensor) -> Tensor:
    """How many vectors have a kurtosis between the :func:`bin_edges`: states (layers, slots) → (layers, BINS). It does not synchronize."""
    counts: Tensor = layout.histogram(states).unflatten(-1, (BINS, -1)).sum(-1)
    return counts


def bin_edges() -> Tensor:
    """The edges of :func:`histogram`, float64 (BINS + 1,): every octave is divided into equal steps. The last bin is open."""
    bins = torch.arange(BINS + 1, dtype=torch.float64, device="cpu")
    return torch.exp2(bins.div(BINS_PER_OCTAVE).floor()) * (1 + bins % BINS_PER_OCTAVE / BINS_PER_OCTAVE)


def _seen(rows: Mapping[str, Tensor], name: str) -> Tensor:
    return rows[name].where(rows["count"] > 0, math.nan)


def _skewness(rows: Mapping[str, Tensor]) -> Tensor:
    # Divide step by step: m2 cubed would under- or overflow long before the ratio does. A constant feature gives 0/0 = nan, as intended.
    return rows["m3"] / rows["m2"] / (rows["m2"] / rows["count"]).sqrt()


def _kurtosis(rows: Mapping[str, Tensor]) -> Tensor:
    return rows["m4"] / rows["m2"] / rows["m2"] * rows["count"]


def _outlier_frequency(states: Tensor, features: int, outlier_sigma: float) -> Tensor:
    frequency = layout.rows(states)[..., layout.ROWS.index("outliers"), :] / states[..., layout.VECTORS, None]
    possible = (features - 1) / math.sqrt(features) > outlier_sigma  # the largest deviation that one of d values can have
    return frequency if possible else torch.full_like(frequency, math.nan)


def _quantile(states: Tensor, q: float) -> Tensor:
    """Quantile of the vector kurtosis, linear within a bin; nan without a vector."""
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


# -- what a vector kurtosis is compared with ------------------------------------------------------------------


def gaussian_kurtosis(features: int) -> float:
    """Expected Pearson kurtosis (biased) of one vector of ``features`` independent Gaussian values: 3(d − 1)/(d + 1).

    >>> round(gaussian_kurtosis(768), 3)
    2.992
    """
    return 3 * (features - 1) / (features + 1)


def gaussian_kurtosis_std(features: int) -> float:
    """Standard deviation of that kurtosis from vector to vector; about √(24/d) (Fisher 1930).

    >>> round(gaussian_kurtosis_std(768), 3)
    0.175
    """
    d = features  # two values always have kurtosis 1, three always 1.5
    return math.sqrt(24 * d * (d - 2) * (d - 3) / ((d + 1) ** 2 * (d + 3) * (d + 5))) if d > 3 else math.nan


def kurtosis_ceiling(features: int) -> float:
    """The largest kurtosis ``features`` values can have, reached when all but one are equal: (d² − 3d + 3)/(d − 1).

    >>> kurtosis_ceiling(2)
    1.0
    """
    return (features**2 - 3 * features + 3) / (features - 1) if features > 1 else math.nan
