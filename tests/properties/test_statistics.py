"""The statistics of moments, norms and counts, and one's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from properties import definitions
from properties.activations import DTYPES, Activation, activations
from properties.definitions import Wide
from properties.histories import histories, lived, same
from properties.tried import tried
from torchprobe.statistics import (
    FEATURES,
    DynamicStatistic,
    Moments,
    Norms,
    Quantile,
    Saturation,
    Several,
    Sparsity,
    State,
    Statistic,
    TopInputs,
)
from torchprobe.statistics.moments import bin_edges

TOLERANCE = 1e-5


def close(name: str, got: Any, want: Any, unit: Any, tolerance: float = TOLERANCE) -> None:
    """|got − want| ≤ tolerance · unit, nan at the same places."""
    got, want, unit = (np.atleast_1d(np.asarray(values, Wide)) for values in (got, want, unit))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=f"nan of {name}")
    known = ~np.isnan(want)
    error, unit = np.abs(got - want)[known], np.broadcast_to(unit, want.shape)[known]
    assert (error <= tolerance * unit).all(), (name, (error / np.where(unit > 0, unit, 1)).max(), got[known], want[known])


def check_moments(m: Moments, rows: Tensor) -> None:
    want = definitions.moments(rows, m.outlier_sigma)
    for name in ("vectors", "constant_vectors", "invalid_vectors"):
        assert getattr(m, name) == want[name], (name, getattr(m, name), want[name])
    for name in ("count", "nonfinite", "min", "max"):
        np.testing.assert_array_equal(getattr(m, name).numpy(), want[name].astype(float), err_msg=name)
    std = np.sqrt(want["variance"])
    with np.errstate(all="ignore"):  # states merge by their means, which are float64: that tells at offsets that only float64 has
        rounding = np.nan_to_num(np.abs(want["mean"]) / std * 2.0**-48, nan=0, posinf=0)
    looser = 1 + rounding / TOLERANCE
    close("mean", m.mean, want["mean"], std + np.abs(want["mean"]))
    close("variance", m.variance, want["variance"], want["variance"] * looser)
    close("std", m.std, std, std * looser)
    close("skewness", m.skewness, want["skewness"], np.maximum(np.abs(want["skewness"]), 1) * looser)
    close("kurtosis", m.kurtosis, want["kurtosis"], want["kurtosis"] * looser)
    close("mean_abs", m.mean_abs, want["mean_abs"], want["mean_abs"])
    assert torch.isfinite(m.state).all() and m.problem() is None

    kurtosis, vectors = want["kurtosis_of_vectors"], want["vectors"]
    mean = kurtosis.mean() if vectors else Wide(np.nan)
    close("vector_kurtosis", m.vector_kurtosis, mean, mean)
    close("vector_kurtosis_std", m.vector_kurtosis_std, kurtosis.std() if vectors else np.nan, mean)
    frequency, width = m.outlier_frequency.numpy(), rows.shape[1]
    if vectors and (width - 1) / width**0.5 > m.outlier_sigma:
        off = np.abs(frequency * vectors - want["outliers"])
        assert (off <= want["outliers_unsure"] + 1e-6).all(), "outlier_frequency"
    else:
        assert np.isnan(frequency).all()
    if vectors:  # the histogram, to one bin beside the right one
        edges, ordered = bin_edges().numpy(), np.sort(kurtosis)
        for q in (0.0, 0.3, 1.0):
            true = float(ordered[min(int(q * vectors), vectors - 1)])
            near = np.clip(np.searchsorted(edges, true * np.array([1 - 1e-4, 1 + 1e-4])), 1, len(edges) - 1)
            low, high = edges[max(near[0] - 2, 0)], edges[min(near[1] + 1, len(edges) - 1)]
            estimate = m.vector_kurtosis_quantile(q)
            lowest = float(ordered[max(int(np.ceil(q * vectors)) - 2, 0)])
            assert min(low, lowest * (1 - 0.02)) <= estimate and (estimate <= high or true > edges[-2]), (q, estimate, true)


@given(a=activations(), history=histories, sigma=st.sampled_from((6.0, 6.0, 3.0, 1.0, 0.5)))
@tried
def test_moments(a: Activation, history: dict[str, Any], sigma: float) -> None:
    memory = torch.empty(0, dtype=a.x.dtype).set_(a.x.untyped_storage()).clone()
    m = lived(functools.partial(Moments, a.features, outlier_sigma=sigma), a, history)
    check_moments(m, a.rows())
    same({"x": memory}, {"x": torch.empty(0, dtype=a.x.dtype).set_(a.x.untyped_storage())})  # an activation is only read


@given(a=activations(), history=histories)
@tried
def test_norms(a: Activation, history: dict[str, Any]) -> None:
    n = lived(functools.partial(Norms, a.features), a, history)
    norms, invalid = definitions.norms(a.rows())
    got = n.summary()
    if not len(a.rows()):
        assert all(np.isnan(value) for value in got.values())
        return
    assert got["invalid_vectors"] == invalid and int(n.vectors) == len(norms) + invalid
    mean, largest = (norms.mean(), norms.max()) if len(norms) else (np.nan, np.nan)
    root = np.sqrt(Wide(a.features))
    for name, want in (("norm_mean", mean), ("norm_max", largest), ("rms_mean", mean / root), ("rms_max", largest / root)):
        close(name, got[name], want, want, 1e-6)


@given(a=activations(), history=histories)
@tried
def test_sparsity(a: Activation, history: dict[str, Any]) -> None:
    s = lived(functools.partial(Sparsity, a.features), a, history)
    zero = (a.rows() == 0).numpy()
    assert s.zeros.tolist() == zero.sum(0).tolist() and int(s.vectors) == len(zero)
    if len(zero):
        assert s.zero_share == pytest.approx(zero.mean(), rel=1e-12)
        assert s.dead_features == pytest.approx(zero.all(0).mean(), rel=1e-12)
    else:
        assert np.isnan(s.zero_share)


@given(
    a=activations(),
    history=histories,
    ends=st.sampled_from(((-1.0, 1.0), (0.0, 1.0), (0.0, 6.0), (-2.0, 2.0), (-1e4, 30.0))),
    tolerance=st.sampled_from((0.0, 0.01, 0.1, 0.499)),
)
@tried
def test_saturation(a: Activation, history: dict[str, Any], ends: tuple[float, float], tolerance: float) -> None:
    low, high = ends
    s = lived(functools.partial(Saturation, a.features, low=low, high=high, tolerance=tolerance), a, history)
    rows = a.rows()
    kind = np.float64 if rows.dtype == torch.float64 else np.float32
    x = rows.double().numpy().astype(kind)
    margin = tolerance * (high - low)
    below, above = x <= kind(low + margin), x >= kind(high - margin)
    assert s.below.tolist() == below.sum(0).tolist() and s.above.tolist() == above.sum(0).tolist()
    if len(x):
        both = below.sum(0) + above.sum(0)
        assert s.saturated == pytest.approx(both.sum() / x.size, rel=1e-12)
        assert s.saturated_features == pytest.approx((both >= 0.95 * len(x)).mean(), rel=1e-12)


class Spread(Statistic):
    """One's own statistic with a state of every kind: a sum, a minimum, a maximum, a number."""

    states = {
        "low": State((FEATURES,), "min"),
        "high": State((FEATURES,), "max"),
        "positive": State((FEATURES,)),
        "calls": State(()),
    }
    fields = {"widest": "the largest range of a feature", "positive": "positive values"}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        finite = kept & x.isfinite()
        self.low = torch.minimum(self.low, x.double().where(finite, torch.inf).amin(0))
        self.high = torch.maximum(self.high, x.double().where(finite, -torch.inf).amax(0))
        self.positive += ((x > 0) & finite).sum(0)
        self.calls += 1

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"widest": (states["high"] - states["low"]).amax(-1), "positive": states["positive"].sum(-1)}


@given(a=activations(), history=histories)
@tried
def test_ones_own_statistic(a: Activation, history: dict[str, Any]) -> None:
    s = lived(functools.partial(Spread, a.features), a, history)
    x = a.rows().double().numpy()
    finite = np.isfinite(x)
    assert s.low.tolist() == np.where(finite, x, np.inf).min(0, initial=np.inf).tolist()
    assert s.high.tolist() == np.where(finite, x, -np.inf).max(0, initial=-np.inf).tolist()
    assert s.positive.tolist() == ((x > 0) & finite).sum(0).tolist()
    assert int(s.vectors) == len(x)


class Sums(DynamicStatistic):
    """One's own statistic without a fixed shape: the sum of the finite elements of each vector, in order of size."""

    fields = {"seen": "vectors seen", "largest": "the largest sum"}

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.features, self.sums = features, torch.empty(0, dtype=torch.float64)

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        rows = x.detach().movedim(feature_dim, -1)
        rows = rows.reshape(-1, self.features) if mask is None else rows[mask]
        self.sums = torch.cat([self.sums, rows.double().nan_to_num(0, 0, 0).clamp(-1, 1).sum(1)]).sort().values

    def merge(self, other: Sums) -> Sums:
        self.sums = torch.cat([self.sums, other.sums]).sort().values
        return self

    def reset(self) -> None:
        self.sums = self.sums[:0]

    def state_dict(self) -> dict[str, Any]:
        return {"features": self.features, "sums": self.sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = state["sums"].clone()

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Sums:
        new = cls(state["features"], device)
        new.load_state_dict(state)
        return new

    def summary(self) -> dict[str, float]:
        return {"seen": len(self.sums), "largest": float(self.sums[-1]) if len(self.sums) else float("nan")}

    @property
    def empty(self) -> bool:
        return len(self.sums) == 0


@given(a=activations(), history=histories)
@tried
def test_a_dynamic_statistic(a: Activation, history: dict[str, Any]) -> None:
    s = lived(functools.partial(Sums, a.features), a, history)
    whole = Sums(a.features)
    whole.update(a.x, a.feature_dim, mask=a.mask)
    assert s.summary()["seen"] == len(a.rows())
    torch.testing.assert_close(s.sums, whole.sums, rtol=0, atol=1e-9)


KINDS = {
    "Moments": Moments,
    "Norms": Norms,
    "Sparsity": Sparsity,
    "Saturation": Saturation,
    "Quantile": functools.partial(Quantile, quantile=0.1),
    "TopInputs": functools.partial(TopInputs, k=2),
    "Spread": Spread,
    "Sums": Sums,
}


@given(
    a=activations(dtypes=DTYPES, layouts=("rows", "maps", "tokens", "channels last", "sliced")),
    history=histories,
    names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4, unique=True),
)
@tried
def test_several_are_what_each_is_alone(a: Activation, history: dict[str, Any], names: list[str]) -> None:
    kinds = [KINDS[name] for name in names]
    classes = [getattr(kind, "func", kind) for kind in kinds]
    several = Several([kind(a.features) for kind in kinds])
    alone = [kind(a.features) for kind in kinds]
    rng = np.random.default_rng(history["seed"])
    for part in a.x.tensor_split(history["parts"]) if a.mask is None else [a.x]:
        several.update(part, a.feature_dim, mask=a.mask)
        for statistic in alone:
            statistic.update(part, a.feature_dim, mask=a.mask)
        if rng.random() < 0.5:
            several = Several.from_states(classes, several.state_dict())
    several.merge(Several([kind(a.features) for kind in kinds]))
    for name, kind, statistic in zip(names, kinds, alone, strict=True):
        statistic.merge(kind(a.features))
        np.testing.assert_equal(several[name].summary(), statistic.summary())  # nan is equal to nan
        if name != "Quantile":  # its buffers may hold the same in another order
            same(several[name].state_dict(), statistic.state_dict())
