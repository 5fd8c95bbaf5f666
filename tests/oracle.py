"""The float64 two-pass that every number is held against, in NumPy and independent of the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def moments(x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, outlier_sigma: float = 6.0) -> dict[str, Any]:
    """Every number that ``Moments`` promises, from the values of ``x`` widened to float64."""
    rows = x.detach().double().movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim]).numpy()
    if mask is not None:
        rows = rows[mask.reshape(-1).numpy()]
    with np.errstate(all="ignore"):
        return {**_features(rows), **_vectors(rows, outlier_sigma)}


def _features(rows: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(rows)
    whole = finite.all(0) & (len(rows) > 0)
    out = {name: np.full(rows.shape[1], np.nan) for name in ("mean", "variance", "skewness", "kurtosis", "min", "max", "mean_abs")}
    groups = [(whole, rows.T[whole])]  # all columns without a gap at once
    groups += [(np.array([j]), rows[finite[:, j], j][None]) for j in np.flatnonzero(~whole)]
    for where, columns in groups:
        if columns.size:
            for name, values in _columns(np.ascontiguousarray(columns)).items():
                out[name][where] = values
    return {**out, "count": finite.sum(0), "nonfinite": (~finite).sum(0)}


def _columns(columns: np.ndarray) -> dict[str, np.ndarray]:
    """One feature in each row."""
    mean = columns[:, :1] + (columns - columns[:, :1]).mean(1, keepdims=True)
    unit = np.abs(columns - mean).max(1, keepdims=True)
    d = (columns - mean) / np.where(unit > 0, unit, 1)
    m2, m3, m4 = (d**2).mean(1), (d**2 * d).mean(1), ((d**2) ** 2).mean(1)
    constant = (columns == columns[:, :1]).all(1)
    return {
        "mean": mean[:, 0],
        "variance": np.where(constant, 0.0, m2 * unit[:, 0] ** 2),
        "skewness": np.where(constant, np.nan, m3 / m2**1.5),
        "kurtosis": np.where(constant, np.nan, m4 / m2**2),
        "min": columns.min(1),
        "max": columns.max(1),
        "mean_abs": np.abs(columns).mean(1),
    }


def _vectors(rows: np.ndarray, outlier_sigma: float) -> dict[str, Any]:
    features = rows.shape[1]
    valid = np.isfinite(rows).all(1)
    varies = valid & (rows != rows[:, :1]).any(1)
    x = rows[varies]
    d = x - (x[:, :1] + (x - x[:, :1]).mean(1, keepdims=True))
    d = d / np.abs(d).max(1, keepdims=True, initial=0)
    m2 = (d**2).mean(1)
    kurtosis = (d**4).mean(1) / m2**2
    outliers = (np.abs(d) > outlier_sigma * np.sqrt(m2)[:, None]).sum(0)
    possible = (features - 1) / np.sqrt(features) > outlier_sigma
    return {
        "vectors": len(x),
        "constant_vectors": int((valid & ~varies).sum()),
        "invalid_vectors": int((~valid).sum()),
        "vector_kurtosis": kurtosis.mean() if len(x) else np.nan,
        "vector_kurtosis_std": kurtosis.std() if len(x) else np.nan,
        "kurtosis_of_vectors": kurtosis,
        "outlier_frequency": outliers / len(x) if possible and len(x) else np.full(features, np.nan),
    }


def assert_close(got: Any, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, rtol: float = 1e-5) -> None:
    """Holds a ``Moments`` against the oracle: counts and extremes exactly, moments to ``rtol``.

    Ratios are measured against themselves; what may cancel to nothing against its natural unit: the mean against the spread and its own
    rounding, skewness against 1, the spread of the vector kurtosis against the kurtosis.
    """
    want = moments(x, feature_dim, mask, got.outlier_sigma)
    for name in ("vectors", "constant_vectors", "invalid_vectors"):
        assert getattr(got, name) == want[name], (name, getattr(got, name), want[name])
    for name in ("count", "nonfinite", "min", "max", "outlier_frequency"):
        np.testing.assert_array_equal(getattr(got, name).numpy(), want[name], err_msg=name)
    units = {
        "mean": np.sqrt(want["variance"]) + np.abs(want["mean"]),
        "variance": want["variance"],
        "skewness": np.maximum(np.abs(want["skewness"]), 1),
        "kurtosis": want["kurtosis"],
        "mean_abs": want["mean_abs"],
    }
    for name, unit in units.items():
        value = getattr(got, name).numpy()
        np.testing.assert_array_equal(np.isnan(value), np.isnan(want[name]), err_msg=f"nan of {name}")
        error = np.abs(value - want[name])
        assert (error[~np.isnan(error)] <= rtol * unit[~np.isnan(error)]).all(), (name, np.nanmax(error / unit))
    for name, unit in (("vector_kurtosis", want["vector_kurtosis"]), ("vector_kurtosis_std", want["vector_kurtosis"])):
        value = getattr(got, name)
        assert np.isnan(value) == np.isnan(want[name]), name
        assert np.isnan(value) or abs(value - want[name]) <= rtol * unit, (name, value, want[name])
    assert torch.isfinite(got.state).all()
