"""Windows, history and totals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, assert_equal, batches, record
from torch import Tensor, nn

import torchprobe


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would wait for a device: reads of single numbers, and copies to the host by way of `_to_copy`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        return [call for call in self.calls if "_local_scalar" in call or "nonzero" in call or "masked_select" in call]


def test_snapshot_reset_and_metrics_do_not_wait_and_do_not_grow_with_layers() -> None:
    launches = []
    for depth in (2, 12):
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)])
        with torchprobe.record(model, "*") as rec:
            model(batches(1)[0])
            rec.snapshot(0)
            model(batches(1)[0])
            with Copies() as seen:
                rec.snapshot(1)
            assert not seen.waits
            launches.append(len(seen.calls))
            with Copies() as seen:
                rec.metrics()
                rec.reset()
                with rec.paused():
                    pass
            assert not seen.waits
            launches.append(len(seen.calls))
            model(batches(1)[0])
    assert launches[:2] == launches[2:]


def test_windows_history_and_total() -> None:
    model, data = Net(), batches(6)
    windows = []
    with torchprobe.record(model) as rec:
        for step in (10, 20, 30):
            for x in data[step // 10 * 2 - 2 : step // 10 * 2]:
                model(x)
            windows.append(rec["blocks.1"])
            rec.snapshot(step)
        assert rec["blocks.1"].vectors == 0
        for x in batches(1, seed=9):
            model(x)
    assert rec.history.steps == [10, 20, 30]
    assert rec.history.layers == rec.layers
    assert len(rec.history) == 3
    column = rec.layers.index("blocks.1")
    for index, window in enumerate(windows):
        assert rec.history["vector_kurtosis"][index, column] == window.vector_kurtosis
        assert rec.history["std"][index, column] == pytest.approx(float(window.variance.mean().sqrt()), rel=1e-12)
    whole = record(model, data + batches(1, seed=9))
    assert rec.total.layers == whole.layers
    for layer in whole:
        torch.testing.assert_close(rec.total[layer].state, whole[layer].state, rtol=1e-9, atol=1e-9)
    assert rec["blocks.1"].vectors == 15
    assert {row["step"] for row in rec.history.rows()} == {10, 20, 30}
    assert len(rec.history.rows()) == 12
    with pytest.raises(KeyError, match="'kurtosis' is no field of the history; it has vectors"):
        rec.history["kurtosis"]


def test_history_is_nan_where_a_layer_did_not_fire_and_new_layers_join() -> None:
    class Branch(Net):
        which = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[self.which](x)

    model = Branch()
    with torchprobe.record(model, "blocks.*") as rec:
        for step in range(3):
            model.which = step
            model(batches(1)[0])
            rec.snapshot(step)
    vectors = rec.history["vectors"]
    assert np.array_equal(np.isnan(vectors), ~np.eye(3, dtype=bool))
    assert np.array_equal(np.diag(vectors), [15.0] * 3)
    assert [(row["step"], row["layer"]) for row in rec.history.rows()] == [(i, f"blocks.{i}") for i in range(3)]


def test_nan_shows_at_its_step_and_layer() -> None:
    model = Net()
    with torchprobe.record(model, "blocks.*") as rec:
        for step in range(3):
            if step == 1:
                with torch.no_grad():
                    model.blocks[1].weight[2, 0] = math.nan
            model(batches(1)[0])
            rec.snapshot(step)
    assert rec.history["nonfinite"].tolist() == [[0, 0, 0], [0, 15, 90], [0, 15, 90]]


def test_every_counts_on_through_windows() -> None:
    model, data = Net(), batches(7)
    with torchprobe.record(model, "head", every=3) as rec:
        for x in data[:4]:
            model(x)
        rec.snapshot(0)
        for x in data[4:]:
            model(x)
    assert rec.history["vectors"].tolist() == [[30.0]]  # calls 0 and 3
    assert rec["head"].vectors == 15  # call 6
    assert rec.total["head"].calls == rec["head"].calls == 7
    np.testing.assert_allclose(rec.total["head"].mean, record(model, [data[0], data[3], data[6]], "head")["head"].mean)
    rec.snapshot(1)
    assert rec._entries()[0].closed.calls == 7  # not 4 + 7: the counter of the window goes on


def test_reset_forgets_everything() -> None:
    model, data = Net(), batches(3)
    with torchprobe.record(model, every=2) as rec:
        model(data[0])
        rec.snapshot(0)
        rec.reset()
        for x in data[1:]:
            model(x)
    assert len(rec.history) == 0
    assert rec.total[""].vectors == 15
    assert_equal(rec, record(model, data[1:], every=2))
