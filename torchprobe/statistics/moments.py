"""Streaming moments of an activation: of each feature, and across the features of each vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from torchprobe.common.deprecation import renamed
from torchprobe.common.numbers import positive
from torchprobe.ops import layout, states
from torchprobe.ops.observe import merge_states, new_state, observe_
from torchprobe.statistics.moment_checks import problem
from torchprobe.statistics.moment_fields import (
    BINS,
    BINS_PER_OCTAVE,
    FIELDS,
    HELP,
    OUTLIER_SHARE,
    bin_edges,
    fields_of,
    histogram,
    kurtosis,
    outlier_frequency,
    skewness,
    summarize,
    vector_kurtosis_quantile,
)
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import State

__all__ = [
    "Moments",
    "HELP",
    "FIELDS",
    "OUTLIER_SHARE",
    "BINS_PER_OCTAVE",
    "BINS",
    "summarize",
    "histogram",
    "bin_edges",
    "gaussian_kurtosis",
    "gaussian_kurtosis_std",
    "kurtosis_ceiling",
]


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

    Over everything, also plain numbers: ``abs_max`` is the largest abs(x), ``rms`` the root of the mean square, ``dead_features`` the share
    of the features whose every value is 0. For the other fields of a layer see :data:`FIELDS`.

    Threads may share it: they may update it, merge it and read it at the same time, and nothing is lost.

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
    table_fields = tuple(name for name in FIELDS if name not in ("skewness_median", "min", "max", "abs_max", "rms", "dead_features"))
    metric_fields = ("vector_kurtosis", "nonfinite", "abs_max", "std", "kurtosis_max")  # what shows that a training run breaks
    fused = True
    histogram_bins = BINS

    def __init__(self, features: int, device: torch.device | str | None = None, outlier_sigma: float = 6.0) -> None:
        self.outlier_sigma = positive("outlier_sigma", outlier_sigma)
        self.state = new_state(features, device)
        self.features = int(features)

    # -- the contract of a statistic -------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, every: int = 1) -> None:
        """Adds every vector of ``x``; arguments as in :func:`torchprobe.ops.observe_`."""
        observe_(self.state, x, feature_dim, self.outlier_sigma, every, mask)

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fields_of(states["state"], self.features, self.outlier_sigma)

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
    def device(self) -> torch.device:
        return self.state.device

    @property
    def call_counter(self) -> Tensor:
        return self.state[layout.CALLS]

    # The state changes inside of an operator, so whatever reads or replaces it is an operator, too: see torchprobe.ops.states.

    @classmethod
    def read(cls, statistics: Sequence[Moments]) -> dict[str, Tensor]:
        return {"state": states.read([statistic.state for statistic in statistics])}

    def add_states(self, contents: Mapping[str, Tensor]) -> None:
        states.merge(self.state, contents["state"].to(self.state))

    def replace_states(self, contents: Mapping[str, Tensor]) -> None:
        states.write(self.state, contents["state"].to(self.state))

    @classmethod
    def take_windows(cls, windows: Sequence[Moments], into: list[Moments]) -> None:
        """All but the counter of calls, which ``every`` needs in later windows."""
        out = windows[0].state.new_zeros(len(windows), windows[0].state.shape[0])
        into += [window.with_states({"state": row}) for window, row in zip(windows, out.unbind(0), strict=True)]
        states.take([window.state for window in windows], out)

    def restore_window(self, taken: Moments) -> None:
        """Others may have observed since."""
        taken.state[layout.CALLS] = 0
        states.merge(self.state, taken.state)

    @classmethod
    def reset_all(cls, statistics: Sequence[Moments]) -> None:
        out = statistics[0].state.new_empty(len(statistics), statistics[0].state.shape[0])
        states.take([statistic.state for statistic in statistics], out, calls=True)

    def merge_windows(self, closed: Mapping[str, Tensor], window: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The counter of the window was never reset, so it holds the calls of all windows."""
        merged = closed["state"].clone()
        states.merge(merged, window["state"])
        merged[..., layout.CALLS] = window["state"][..., layout.CALLS]
        return {"state": merged}

    def problem(self) -> tuple[str, str] | None:
        return problem(self.parts())

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
        views.update(_named_rows(self.state))
        return views

    # -- per feature -----------------------------------------------------------------------------------------------

    def _now(self) -> Tensor:
        """The state at this moment: a copy."""
        return self.contents()["state"]

    def _rows(self) -> dict[str, Tensor]:
        return _named_rows(self._now())

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
        """Population variance; exactly 0 for a constant feature, however its state was merged."""
        rows = self._rows()
        return (rows["m2"] / rows["count"]).where((rows["min"] < rows["max"]) | (rows["count"] == 0), 0)

    @property
    def std(self) -> Tensor:
        return self.variance.sqrt()

    @property
    def skewness(self) -> Tensor:
        """m3 / m2^1.5 with population moments, as ``scipy.stats.skew(bias=True)``."""
        return skewness(self._rows())

    @property
    def kurtosis(self) -> Tensor:
        """m4 / m2² with population moments (Pearson: Gaussian = 3)."""
        return kurtosis(self._rows())

    @property
    def outlier_frequency(self) -> Tensor:
        """Share of ``vectors`` in which the feature is an outlier; nan if no feature can be one: (d − 1)/√d ≤ outlier_sigma."""
        return outlier_frequency(self._now(), self.features, self.outlier_sigma)

    # -- over vectors ----------------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """How often :meth:`update` was called, including calls that ``every`` skipped."""
        return int(self._now()[layout.CALLS])

    @property
    def vectors(self) -> int:
        """Vectors whose kurtosis was counted."""
        return int(self._now()[layout.VECTORS])

    @property
    def constant_vectors(self) -> int:
        return int(self._now()[layout.CONSTANT])

    @property
    def invalid_vectors(self) -> int:
        return int(self._now()[layout.INVALID])

    @property
    def vector_kurtosis(self) -> float:
        """Mean over vectors of the kurtosis across features; nan without a vector."""
        state = self._now()
        return float(state[layout.KURTOSIS_MEAN]) if state[layout.VECTORS] else math.nan

    @property
    def vector_kurtosis_std(self) -> float:
        """Population standard deviation of the kurtosis over vectors."""
        state = self._now()
        return math.sqrt(float(state[layout.KURTOSIS_M2] / state[layout.VECTORS])) if state[layout.VECTORS] else math.nan

    def vector_kurtosis_quantile(self, q: float) -> float:
        """Quantile of the vector kurtosis, from a histogram with 64 bins per octave: within 0.8 % of the truth up to 2^18.

        Raises:
            ValueError: q outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        return float(vector_kurtosis_quantile(self._now(), q))

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


def _named_rows(state: Tensor) -> dict[str, Tensor]:
    return dict(zip(layout.ROWS, layout.rows(state).unbind(0), strict=True))


def _seen(rows: Mapping[str, Tensor], name: str) -> Tensor:
    return rows[name].where(rows["count"] > 0, math.nan)


__getattr__ = renamed(__name__, {"summarise": "summarize"})


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
