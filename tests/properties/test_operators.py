"""The operators themselves, as other code calls them: with any state, and the memory around their arguments watched."""

from __future__ import annotations

from typing import Any

import dissection_oracle
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from properties import definitions
from properties.activations import Activation, activations
from properties.arguments import CATEGORIES, Ranking, arguments_of, overlaps, rankings
from properties.tried import tried
from torchprobe.ops import average_precision, layout, new_state, observe_, overlap_tally_
from torchprobe.ops.observe import merge_states, reference
from torchprobe.ops.positions import vectors_of
from torchprobe.ops.quantile import BLOCK, keep_largest_, new_buffers

GUARD = 64


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The same tensor inside a larger memory that is full of a pattern; and that memory."""
    memory = torch.full([tensor.numel() + 2 * GUARD], 77, dtype=tensor.dtype)
    inside = memory[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor), memory


def untouched(memory: Tensor) -> bool:
    return bool((memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all())


# -- observe_ ----------------------------------------------------------------------------------------------------------------


def assert_states_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Counts and extremes exactly, moments in their units; the histogram may differ by a bin."""
    counts = [layout.CALLS, layout.VECTORS, layout.CONSTANT, layout.INVALID]
    assert torch.equal(got[counts], want[counts])
    a, b = (dict(zip(layout.ROWS, layout.rows(state).unbind(0), strict=True)) for state in (got, want))
    seen = b["count"] > 0
    assert torch.equal(a["count"], b["count"]) and torch.equal(a["nonfinite"], b["nonfinite"])
    assert torch.equal(a["min"].where(seen, 0), b["min"].where(seen, 0)) and torch.equal(a["max"].where(seen, 0), b["max"].where(seen, 0))
    for state in (a, b):  # the powers of a constant feature are those of a rounded mean
        for name in ("m2", "m3", "m4"):
            state[name] = state[name].where(b["min"] < b["max"], 0)
    std = (b["m2"] / b["count"].clamp(min=1)).sqrt()
    units = {
        "mean": std + b["mean"].abs(),
        "abs_sum": b["abs_sum"],
        "m2": b["m2"],
        "m4": b["m4"],
        "m3": b["m3"].abs() + b["count"] * std**3,
    }
    # States merge by their means, which are float64: that tells at offsets that only float64 has.
    rounding = (b["mean"].abs() / std * 2.0**-48).nan_to_num(0, 0, 0)
    for name, unit in units.items():
        off = (a[name] - b[name]).abs()
        assert bool((off <= (tolerance + rounding) * unit).all()), (name, float((off / unit).nan_to_num().max()))
    for slot, unit in (
        (layout.KURTOSIS_MEAN, want[layout.KURTOSIS_MEAN]),
        (layout.KURTOSIS_M2, want[layout.VECTORS] * want[layout.KURTOSIS_MEAN] ** 2),
    ):
        assert abs(got[slot] - want[slot]) <= tolerance * unit
    bins, expected = layout.histogram(got).cumsum(0), layout.histogram(want).cumsum(0)
    assert bins[-1] == expected[-1]
    assert bool((bins[1:] >= expected[:-1]).all()) and bool((expected[1:] >= bins[:-1]).all())


@given(
    parts=st.lists(
        activations(layouts=("rows", "maps", "sliced", "channels last", "every other", "offset"), most=1500), min_size=1, max_size=3
    ),
    every=st.sampled_from((1, 1, 2, 3)),
    sigma=st.sampled_from((6.0, 2.0, 1e-3)),
)
@tried
def test_observe(parts: list[Activation], every: int, sigma: float) -> None:
    """The operator against the reference in float64, call after call into one state, and against the merge of a state for each call."""
    features = parts[0].features
    state, memory = guarded(new_state(features))
    expected, merged = new_state(features), new_state(features)
    calls = 0
    for a in parts:
        if a.features != features:  # a state is for one width: nothing happens but an error
            before = memory.clone()
            with pytest.raises(ValueError, match="features"):
                observe_(state, a.x, a.feature_dim, sigma, every, a.mask)
            assert torch.equal(memory, before)
            continue
        observe_(state, a.x, a.feature_dim, sigma, every, a.mask)
        reference(expected, a.x.double(), a.feature_dim, sigma, every, a.mask)
        if calls % every == 0:
            alone = new_state(features)
            observe_(alone, a.x, a.feature_dim, sigma, 1, a.mask)
            merged = merge_states(merged, alone)
        calls += 1
    assert untouched(memory)
    if len({a.x.dtype for a in parts}) == 1:  # one scale cannot be held to the accuracy of another
        assert_states_close(state, expected, 2e-5)
    merged[layout.CALLS] = calls
    assert_states_close(state, merged, 1e-9)


@given(
    a=activations(layouts=("rows", "maps", "sliced", "every other", "offset", "tokens", "transposed"), masks=("none",)),
    seed=st.integers(0, 2**32 - 1),
)
@tried
def test_the_order_of_vectors_and_features_changes_nothing(a: Activation, seed: int) -> None:
    """Features and vectors in another order: the same counts, the same moments to rounding."""
    rows, rng = a.rows(), np.random.default_rng(seed)
    features, vectors = torch.from_numpy(rng.permutation(rows.shape[1])), torch.from_numpy(rng.permutation(rows.shape[0]))
    state, shuffled = new_state(a.features), new_state(a.features)
    observe_(state, a.x, a.feature_dim)
    observe_(shuffled, rows[vectors][:, features].clone())
    header, own = shuffled[: layout.HEADER], layout.rows(shuffled)
    back = torch.empty_like(own)
    back[:, features] = own
    assert_states_close(torch.cat([header, back.flatten()]), state, 1e-5)


# -- positions ---------------------------------------------------------------------------------------------------------------


@given(a=activations(layouts=("rows", "tokens", "maps", "channels last", "sliced"), nonfinite=("none",), masks=("none", "some")))
@tried
def test_positions(a: Activation) -> None:
    assert vectors_of(a.x, "all", a.feature_dim) is a.x
    x = a.x.movedim(a.feature_dim, -1).double()
    if a.x.dim() == 3:
        assert torch.equal(vectors_of(a.x, "class", a.feature_dim), a.x[:, :1])
        assert torch.equal(vectors_of(a.x, "patch", a.feature_dim), a.x[:, 1:])
    if a.x.dim() > 2 and a.x.isfinite().all():
        weight = torch.ones(x.shape[:-1]) if a.mask is None else a.mask
        weight = weight.double().flatten(1)[..., None]
        want = (x.flatten(1, -2) * weight).sum(1) / weight.sum(1).clamp(min=1)
        got = vectors_of(a.x, "mean", a.feature_dim, a.mask).movedim(a.feature_dim, -1).flatten(1, -2)[:, 0].double()
        if got.isfinite().all():  # a sum may overflow float32
            unit = (x.flatten(1, -2).abs() * weight).sum(1) / weight.sum(1).clamp(min=1)
            assert bool(((got - want).abs() <= 2e-5 * unit + 1e-44).all())


# -- keep_largest_ -----------------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(
        activations(layouts=("rows", "maps", "sliced", "channels last", "every other", "offset", "features first", "expanded"), most=1500),
        min_size=1,
        max_size=3,
    ),
    capacity=st.sampled_from((1, 2, 3, 15, 16, 17, 40)),
    more=st.sampled_from((0, 1, 13)),
)
@tried
def test_keep_largest(parts: list[Activation], capacity: int, more: int) -> None:
    """What is kept, the counts, the ties and the bound, against sorting all that was seen."""
    features = parts[0].features
    (values, room), (counts, _), (bound, _) = map(guarded, new_buffers(features, capacity + BLOCK + more))
    seen: list[np.ndarray] = []
    for a in parts:
        if a.features == features:
            keep_largest_(values, counts, bound, a.x, a.feature_dim, capacity)
            seen.append(a.x.movedim(a.feature_dim, -1).reshape(-1, features).float().numpy())
    everything = np.concatenate(seen)
    assert untouched(room)
    for column, kept, fill, nans, ties, limit in zip(everything.T, values.numpy(), *counts.numpy(), bound.numpy(), strict=True):
        assert nans == np.isnan(column).sum()
        known = np.sort(column[~np.isnan(column)])[::-1]
        known = known[known > -np.inf]
        mine = np.sort(kept[:fill])[::-1]
        assert (kept[fill:] == -np.inf).all() and fill <= len(known)
        assert np.array_equal(mine[:capacity], known[: min(capacity, fill)])  # the largest
        assert fill >= min(capacity, len(known))
        assert np.array_equal(mine[mine > limit], known[known > limit])  # nothing above the bound is lost
        if limit > -np.inf:
            assert ties + (mine == limit).sum() == (known == limit).sum()
        else:
            assert np.array_equal(mine, known)


# -- overlap_tally_ ----------------------------------------------------------------------------------------------------------


@given(a=overlaps())
@tried
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_overlap_tally(a: dict[str, Any]) -> None:
    units, labels = a["maps"].shape[1], len(a["category"])
    (intersection, m1), (activation, m2), (truth, m3) = (
        guarded(torch.full(shape, 3, dtype=torch.int64)) for shape in ((units, labels), (units, CATEGORIES + 1), (labels,))
    )
    category = a["category"]
    overlap_tally_(intersection, activation, truth, *arguments_of(a))
    assert untouched(m1) and untouched(m2) and untouched(m3)
    pictures, annotated = [picture[:3] for picture in a["pictures"]], [picture[3] for picture in a["pictures"]]
    boxes = a["boxes"].tolist() if a["mode"] == "boxes" else ()
    want = dissection_oracle.overlap(
        a["maps"], a["thresholds"], pictures, category, CATEGORIES, a["mode"] if a["per_plane"] else "default", a["given"], annotated, boxes
    )
    shown = activation[:, torch.from_numpy(np.where(category < 0, CATEGORIES, category))] - 3
    assert (intersection - 3).tolist() == want[0].tolist() and (truth - 3).tolist() == want[2].tolist()
    assert shown.masked_fill(torch.from_numpy(category < 0), 0).tolist() == want[1].tolist()
    if not a["per_plane"]:  # the last column counts every image
        bare = [([], [], picture[2]) for picture in pictures]
        every = dissection_oracle.overlap(a["maps"], a["thresholds"], bare, [0], CATEGORIES, "global", boxes=boxes)
        assert (activation[:, -1:] - 3).tolist() == every[1].tolist()


# -- average_precision -------------------------------------------------------------------------------------------------------


@given(a=rankings())
@tried
def test_average_precision(a: Ranking) -> None:
    got = average_precision(a.scores, a.crow, a.col, a.shows.shape[1], a.eligible, a.group, a.both)
    values, concepts = a.scores.double().numpy(), range(a.shows.shape[1])
    want = [
        [[definitions.average_precision(sign * unit, a.shows[:, c].tolist(), a.counts[:, c].tolist()) for c in concepts] for unit in values]
        for sign in ((1, -1) if a.both else (1,))
    ]
    np.testing.assert_allclose(got.numpy(), np.array(want).reshape(got.shape), rtol=1e-13, atol=0)
