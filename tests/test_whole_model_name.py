"""The names of the layer that is the model itself: "" and "(output)" everywhere; "model" is refused with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchprobe


@pytest.fixture
def rec() -> torchprobe.Recorder:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torchprobe.record(model) as rec, torch.no_grad():
        model(torch.randn(5, 4))
        rec.snapshot(1)
        model(torch.randn(6, 4))
    return rec


@pytest.mark.parametrize("name", ["", "(output)"])
def test_both_names_work_wherever_a_layer_is_named(rec: torchprobe.Recorder, name: str, tmp_path: Path) -> None:
    rec.save(tmp_path / "run.safetensors")
    read = torchprobe.load(tmp_path / "run.safetensors")
    assert name in rec and name in read
    assert rec[name].vectors == read[name].vectors == 6 and rec.total[name].vectors == 11
    assert rec.metrics(fields="vectors", layers=name) == read.metrics(fields="vectors", layers=[name]) == {"/vectors": 6.0}
    pytest.importorskip("matplotlib")
    rec.history.plot_layer(name)


def test_model_is_not_taken_for_it_because_a_layer_may_have_that_name(rec: torchprobe.Recorder) -> None:
    hint = r"did you mean '\(output\)', the model itself\?"
    with pytest.raises(KeyError, match=hint):
        rec["model"]
    with pytest.raises(ValueError, match=hint):
        rec.metrics(layers="model")
    with pytest.raises(KeyError, match=hint):
        rec.history.plot_layer("model")
    assert "model" not in rec
    outer = nn.Sequential()
    outer.add_module("model", nn.Linear(4, 2))
    outer.add_module("head", nn.Linear(2, 3))
    with torchprobe.record(outer, ["model", ""]) as both:
        outer(torch.randn(5, 4))
    assert (both["model"].features, both["(output)"].features) == (2, 3)
