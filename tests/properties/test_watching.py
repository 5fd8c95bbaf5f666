"""Routing, differences of tensors and changes of series with any values: held against their definitions in NumPy, float64 and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from properties.tried import tried
from torchprobe.recording.tensor_difference import difference
from torchprobe.statistics import Routing
from torchprobe.statistics.changes import find

seeds = st.integers(0, 2**32 - 1)


@given(
    seed=seeds,
    experts=st.integers(1, 9),
    tokens=st.integers(0, 30),
    kind=st.sampled_from(("logits", "probabilities", "choices")),
    capacity=st.sampled_from((None, 0.3, 1.0, 2.5)),
    scale=st.sampled_from((1e-30, 1.0, 1.0, 30.0, 1e30)),
    parts=st.integers(1, 3),
)
@tried
def test_routing(seed: int, experts: int, tokens: int, kind: str, capacity: float | None, scale: float, parts: int) -> None:
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, experts + 1))
    x = rng.standard_normal((tokens, experts)) * scale
    if kind == "probabilities":
        x = abs(x)
        x[rng.random(tokens) < 0.1] = 0
    if kind == "choices":
        x = (rng.random((tokens, experts)) < 0.4) * 1.0
    x[rng.random(tokens) < 0.1, rng.integers(experts)] = rng.choice([math.nan, math.inf, -math.inf])
    kept = rng.random(tokens) < 0.8
    routing = Routing(experts, top_k=top_k, given=kind, capacity_factor=capacity)
    load, mass, entropy, lost, wrong = np.zeros(experts), np.zeros(experts), 0.0, 0.0, 0
    for part in np.array_split(np.arange(tokens), parts):
        routing.update(torch.from_numpy(x[part]), mask=torch.from_numpy(kept[part]))
        rows = x[part][kept[part]]
        sound = np.isfinite(rows).all(1)
        if kind == "probabilities":
            sound &= (rows > 0).any(1)
        wrong += int((~sound).sum())
        rows, own = rows[sound], np.zeros(experts)
        for row in rows:
            own += row != 0 if kind == "choices" else np.isin(np.arange(experts), np.argsort(-row)[:top_k])
            if kind != "choices":
                shares = np.exp(row - row.max()) if kind == "logits" else row
                shares = shares / shares.sum()
                mass += shares
                entropy -= sum(share * math.log(share) for share in shares if share > 0)
        lost += max(top_k * len(rows) - own.sum(), 0)
        if capacity is not None:
            lost += np.maximum(own - math.ceil(capacity * top_k * len(rows) / experts), 0).sum()
        load += own
    counted = int(kept.sum()) - wrong
    assert routing.invalid_tokens == wrong and routing.assigned.tolist() == load.tolist() and routing.problem() is None
    np.testing.assert_allclose(routing.mass, mass, rtol=1e-9, atol=1e-12)
    if counted:
        assert routing.dropped == pytest.approx(lost / (counted * top_k))
        if kind != "choices" and experts > 1:
            assert routing.router_entropy == pytest.approx(entropy / counted / math.log(experts), rel=1e-9, abs=1e-12)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.uint8, torch.bool)


@given(
    seed=seeds,
    size=st.integers(0, 40),
    kinds=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)) | st.tuples(st.sampled_from(WHOLE), st.sampled_from(WHOLE)),
    power=st.integers(-1000, 1000),
)
@tried
def test_differences(seed: int, size: int, kinds: tuple[torch.dtype, torch.dtype], power: int) -> None:
    rng = np.random.default_rng(seed)
    scale = 2.0**power if kinds == (torch.float64, torch.float64) else 4.0
    a, b = (torch.from_numpy(rng.standard_normal(size) * scale).to(kind) for kind in kinds)
    if kinds == (torch.int64, torch.int64):
        a, b = (torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, size)) for _ in range(2))
    if kinds[0] == kinds[1]:
        b = torch.where(torch.from_numpy(rng.random(size) < 0.6), a, b)
        if kinds[0] == torch.int64:  # neighbors, which are one number in float64
            b = torch.where(torch.from_numpy(rng.random(size) < 0.5), a ^ 1, b)
    if kinds[0] in FLOATS and size:
        for x in (a, b):
            x[int(rng.integers(size))] = float(rng.choice([math.nan, math.inf, -0.0, 0.0]))
    found = difference(a, b)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))

    def equal(p: float, q: float) -> bool:
        signs = kinds[0] not in FLOATS or kinds[0] != kinds[1] or math.copysign(1, p) == math.copysign(1, q)
        return (p == q and signs) or (p != p and q != q)

    same = [equal(p, q) for p, q in pairs]
    assert found.elements == size and found.equal == all(same) and found.equal_share == (sum(same) / size if size else 1)
    assert found.first == (None if all(same) else (same.index(False),))
    assert found.nonfinite_a == sum(not math.isfinite(p) for p, _ in pairs)
    finite = [(Fraction(p), Fraction(q)) for p, q in pairs if math.isfinite(p) and math.isfinite(q)]
    largest = max((abs(q - p) for p, q in finite), default=Fraction(0))
    assert largest * Fraction(1 - 1e-12) <= Fraction(found.max_abs) <= largest * Fraction(1 + 1e-12)
    if norm := sum(p * p for p, _ in finite):
        square = sum((q - p) ** 2 for p, q in finite) / norm
        assert found.relative == pytest.approx(math.sqrt(square), rel=1e-6, abs=1e-150)


@given(seed=seeds, power=st.integers(-1000, 1020))
@tried
def test_jumps(seed: int, power: int) -> None:
    """The unit of a series does not matter, nor do nan."""
    rng = np.random.default_rng(seed)
    series = rng.normal(1, 0.01, (250, 2))
    series[200:, 0] *= 1.6
    series[rng.random((250, 2)) < 0.1] = math.nan
    known = [(index, change.series, change.windows) for index, change in find(series)]
    assert [(index, change.series, change.windows) for index, change in find(series * 2.0**power)] == known
    assert not any(index < 200 for index, *_ in known)
