"""Exponents with any activation, layout, mask and history: exact counts, and forecasts that stay within what is possible."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from properties.activations import Activation, activations
from properties.histories import histories, lived
from properties.tried import tried
from torchprobe.analysis.quantization import FORMATS, forecast
from torchprobe.ops.exponents import HIGHEST, LOWEST, NONFINITE, exponents_, reference, shapes
from torchprobe.statistics import Exponents


@given(a=activations(most=2000), history=histories)
@tried
def test_exponents(a: Activation, history: dict[str, Any]) -> None:
    exponents = lived(functools.partial(Exponents, a.features), a, history)
    x = a.rows().double().numpy()
    finite = x[np.isfinite(x)]
    _, place = np.frexp(abs(finite[finite != 0]))
    places, counts = np.unique((place - 1).clip(LOWEST - 1, HIGHEST + 1), return_counts=True)
    assert exponents.exponents == dict(zip(places.tolist(), counts.tolist(), strict=True))
    assert int(exponents.zeros) == (finite == 0).sum()
    assert int(exponents.counts[NONFINITE]) == x.size - finite.size
    largest = np.where(np.isfinite(x), abs(x), -np.inf).max(0, initial=-np.inf)
    assert exponents.largest.tolist() == largest.tolist()
    assert int(exponents.vectors) == len(x)
    for form in FORMATS:
        found = forecast(exponents, form)
        if finite.any() and math.isfinite(found.sqnr_db):
            unknown = form in ("int8_channel", "nvfp4")  # of these two a share may not be known
            assert all(0 <= share <= 1 + 1e-9 or (unknown and math.isnan(share)) for share in (found.underflow, found.overflow))


@given(a=activations(most=3000), power=st.integers(-1070, 1020))
@tried
def test_the_kernel_is_the_reference(a: Activation, power: int) -> None:
    """Also of float64 anywhere in its range, where squares and inverses are beyond it."""
    x = a.x
    if x.dtype == torch.float64:
        half = power // 2
        x = x / x.abs().where(x.isfinite(), 0).amax().clamp(min=1e-300) * 2.0**half * 2.0 ** (power - half) if x.numel() else x
    mine, theirs = ({name: torch.zeros(size, dtype=torch.float64) for name, size in shapes(a.features).items()} for _ in range(2))
    for state in (mine, theirs):
        state["largest"].fill_(-math.inf)
    exponents_(**mine, x=x, feature_dim=a.feature_dim, mask=a.mask)
    reference(**theirs, x=x, feature_dim=a.feature_dim, mask=a.mask)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0 if name in ("counts", "largest") else 1e-9, atol=0, equal_nan=True)
