"""The distribution that a history keeps of every window, and the pictures of a history."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import Net, batches, record
from torch import nn

import torchprobe
from torchprobe.recording import History
from torchprobe.statistics.moments import BINS, bin_edges, histogram

# -- what the history keeps ----------------------------------------------------------------------------------------------


def spiky(vectors: int = 300, width: int = 64, size: float = 12.0, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors, every tenth with one large feature."""
    x = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    x[::10, 3] += size
    return x


def vector_kurtosis(x: torch.Tensor) -> np.ndarray:
    d = x.double() - x.double().mean(-1, keepdim=True)
    return (d.pow(4).mean(-1) / d.square().mean(-1).square()).numpy()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_histograms_hold_the_vector_kurtosis_of_each_window(offset):
    model = nn.Sequential(nn.Identity())
    windows = [spiky(seed=0) + offset, spiky(size=40.0, seed=1) + offset]
    with torchprobe.record(model, "0") as rec:
        for step, x in enumerate(windows):
            model(x)
            rec.snapshot(step)
    edges = rec.history.bin_edges
    for step, x in enumerate(windows):
        np.testing.assert_array_equal(rec.history.histograms[step, 0], np.histogram(vector_kurtosis(x), edges)[0])
    assert rec.history.histograms.shape == (2, 1, BINS)
    assert rec.history["vectors"].tolist() == [[300.0], [300.0]]


def test_bins_are_those_of_the_state_in_eighths():
    edges = bin_edges()
    assert edges.dtype == torch.float64 and edges.shape == (BINS + 1,)
    assert edges[:9].tolist() == [1 + i / 8 for i in range(9)] and edges[-1] == 2**18
    m = torchprobe.Moments(600_000)
    x = torch.zeros(1, 600_000)
    x[0, 0] = 1  # a kurtosis of 600,000: beyond the last edge
    m.update(x)
    assert histogram(m.state[None])[0, -1] == 1


def test_constant_and_invalid_vectors_are_in_no_bin_and_silent_layers_are_nan():
    model = nn.ModuleList([nn.Identity(), nn.Identity()])
    x = spiky(10)
    x[0], x[1, 5] = 1.0, math.nan
    with torchprobe.record(model, "*") as rec:
        model[0](x)
        model[1](x)
        rec.snapshot(0)
        model[1](x)
        rec.snapshot(1)
    assert rec.history.histograms[0, 0].sum() == 8
    assert np.isnan(rec.history.histograms[1, 0]).all()
    assert rec.history.histograms[1, 1].sum() == 8


def test_histograms_are_resumed_saved_copied_and_joined(tmp_path):
    data = batches(4)
    whole = torchprobe.record(Net())
    parts = []
    for recorder, steps in ((whole, (0, 1, 2)), (None, (0, 1)), (None, (2,))):
        torch.manual_seed(0)
        model = Net()
        recorder = torchprobe.record(model)
        if steps == (2,):
            recorder.load_state_dict(parts[1].state_dict())
        with recorder:
            for step in steps:
                model(data[step])
                recorder.snapshot(step)
        parts.append(recorder)
    uninterrupted, _, resumed = parts
    np.testing.assert_array_equal(uninterrupted.history.histograms, resumed.history.histograms)
    uninterrupted.save(tmp_path / "run.safetensors")
    np.testing.assert_array_equal(torchprobe.load(tmp_path / "run.safetensors").history.histograms, uninterrupted.history.histograms)
    joined = uninterrupted.history.copy()
    other = History()
    other.load_state_dict({**uninterrupted.history.state_dict(), "steps": [3, 4, 5]})
    joined.extend(other)
    np.testing.assert_array_equal(joined.histograms, np.tile(uninterrupted.history.histograms, (2, 1, 1)))


def test_only_the_bins_in_use_are_saved():
    rec = record(Net(), batches(1))
    rec.snapshot(0)
    saved = rec.history.state_dict()["histograms"]
    assert saved.shape[:2] == (1, 4) and saved.shape[2] <= 3 * 8  # of 6 features the kurtosis is below 8
    assert History().state_dict()["histograms"].shape == (0, 0, 0)


def test_a_history_without_histograms_loads_and_a_wrong_one_is_refused(tmp_path):
    rec = record(Net(), batches(1))
    rec.snapshot(0)
    state = rec.history.state_dict()
    older = History()
    older.load_state_dict({key: value for key, value in state.items() if key != "histograms"})
    assert np.isnan(older.histograms).all()
    np.testing.assert_array_equal(older.values, rec.history.values)
    for wrong in (torch.zeros(1, 3, 3), torch.zeros(1, 4, BINS + 1), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match="histograms of shape"):
            History().load_state_dict({**state, "histograms": wrong})


def test_a_snapshot_with_histograms_does_not_wait():
    from test_history import Copies

    model = Net()
    with torchprobe.record(model) as rec:
        model(batches(1)[0])
        with Copies() as seen:
            rec.snapshot(0)
    assert not seen.waits
