"""The statistics of ranks: quantiles, the tail that they are read from, and top inputs."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from properties import definitions
from properties.activations import Activation, activations
from properties.histories import first_position, histories, lived
from properties.tried import tried
from torchprobe.statistics import Quantile, TopInputs
from torchprobe.statistics.quantile import NETDISSECT

LEVELS = (0.005, 0.1, 0.5, 0.9, NETDISSECT, Fraction(1, 3))


@given(a=activations(most=2000), history=histories, level=st.sampled_from(LEVELS), less=st.sampled_from((1, 2, 7)))
@tried
def test_exact_quantiles(a: Activation, history: dict[str, Any], level: float | Fraction, less: int) -> None:
    q = lived(functools.partial(Quantile, a.features, level), a, history)
    fraction = level if isinstance(level, Fraction) else Fraction(str(level))
    x = a.rows().float().numpy()  # the buffers hold float32
    known = (~np.isnan(x)).sum(0)
    assert q.exact and q.positions == len(x)
    assert q.nan.tolist() == (len(x) - known).tolist()
    for share in {fraction, fraction / less}:
        value = q.value(share)
        want = definitions.upper_quantiles(x, share)
        np.testing.assert_array_equal(value.numpy(), want.astype(np.float32))
        assert q.error(share).eq(0).all()
        above, equal = (found.numpy() for found in q.shares(value))
        finite = want > -np.inf
        np.testing.assert_allclose(above[finite], ((x > want).sum(0) / known.clip(min=1))[finite], rtol=1e-12)
        np.testing.assert_allclose(equal[finite], ((x == want).sum(0) / known.clip(min=1))[finite], rtol=1e-12)
        assert (above[finite] <= float(share) + 1e-12).all()
        np.testing.assert_allclose(q.value(share, method="hazen").numpy(), definitions.hazen(x, share), rtol=1e-6, atol=1e-44)


@given(
    seed=st.integers(0, 2**32 - 1),
    features=st.sampled_from((1, 2, 5, 33)),
    positions=st.sampled_from((40, 200, 1000, 5000)),
    room=st.sampled_from((90, 150, 400, 1000)),
    level=st.sampled_from((0.01, 0.1, 0.4)),
    order=st.sampled_from(("random", "rising", "falling", "ties", "nan")),
    statistics=st.sampled_from((1, 1, 2, 5)),
)
@tried
def test_estimated_quantiles(seed: int, features: int, positions: int, room: int, level: float, order: str, statistics: int) -> None:
    """With too little memory the level of the value is within six standard deviations, which ``error`` states; counts are exact."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((positions, features)).astype(np.float32)
    if order in ("rising", "falling"):
        x = np.sort(x, 0)[:: 1 if order == "rising" else -1].copy()
    elif order == "ties":
        x = np.round(x * 2)
    elif order == "nan":
        x[rng.random(x.shape) < 0.2] = np.nan
    several = [Quantile(features, level, memory=4 * features * room, seed=seed % 1000 + i) for i in range(statistics)]
    for i, part in enumerate(torch.from_numpy(x).tensor_split(max(positions // 50, statistics))):
        several[i % statistics].update(part)
    q = several[0]
    for other in several[1:]:
        q.merge(other)
    assert q.positions == positions and q.nan.tolist() == np.isnan(x).sum(0).tolist()
    value, error = q.value().numpy(), q.error().numpy()
    if q.exact:
        np.testing.assert_array_equal(value, definitions.upper_quantiles(x, Fraction(str(level))).astype(np.float32))
    for column, v, spread in zip(x.T, value, error, strict=True):
        known = column[~np.isnan(column)]
        assert v in known or not math.isfinite(spread)
        if math.isfinite(spread):
            above, at_least = (known > v).mean(), (known >= v).mean()
            off = max(above - level, level - at_least, 0)
            assert off <= 6 * spread + 3 / len(known), (off, spread)


@given(
    a=activations(layouts=("rows", "tokens", "maps", "channels last", "sliced", "every other", "offset", "transposed"), most=2000),
    history=histories,
    k=st.sampled_from((1, 2, 5, 300)),
    score=st.sampled_from(("max", "mean")),
    repeated=st.booleans(),
)
@tried
def test_top_inputs(a: Activation, history: dict[str, Any], k: int, score: str, repeated: bool) -> None:
    dim = first_position(a)
    assert dim == 0
    inputs = a.x.shape[0]
    rng = np.random.default_rng(history["seed"])
    ids = rng.integers(0, max(inputs // 2, 1), inputs) if repeated else rng.permutation(inputs * 3)[:inputs]

    def update(top: TopInputs, x: Tensor, mask: Tensor | None, part: slice) -> None:
        top.update(x, a.feature_dim, ids=ids[part].tolist(), mask=mask)

    top = lived(functools.partial(TopInputs, a.features, k, score=score), a, history, update)
    maps = a.x.movedim(a.feature_dim, 1).double().reshape(inputs, a.features, -1).numpy().astype(np.longdouble)
    if a.mask is not None:
        maps = np.where(a.mask.reshape(inputs, 1, -1).numpy(), maps, np.nan)
    present = ~np.isnan(maps)
    counted = present.sum(2)
    with np.errstate(all="ignore"):
        if score == "max":
            scores = np.where(counted > 0, np.where(present, maps, -np.inf).max(2, initial=-np.inf), np.nan)
        else:
            scores = np.where(counted > 0, np.where(present, maps, 0).sum(2) / counted, np.nan)
    scores = scores.astype(float)
    assert top.inputs == inputs
    if score == "max":
        assert top.unscored.tolist() == np.isnan(scores).sum(0).tolist()
        values, names = definitions.top(scores, ids.tolist(), k)
        assert top.ids.tolist() == names and top.scores.tolist() == values
    else:  # sums of float64 are rounded, so equals may change places: held against one update, and their values against the definition
        once = TopInputs(a.features, k, score=score)
        once.update(a.x, a.feature_dim, ids=ids.tolist(), mask=a.mask)
        assert torch.equal(once.scores, top.scores) and torch.equal(once.ids, top.ids) and torch.equal(once.unscored, top.unscored)
        values, _ = definitions.top(scores, ids.tolist(), k)
        unit = np.abs(np.where(np.isfinite(maps), maps, 0)).max(initial=0)
        np.testing.assert_allclose(top.scores.numpy(), np.array(values), rtol=1e-12, atol=float(unit) * 1e-13)
