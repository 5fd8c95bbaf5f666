"""The examples in examples/logging, with the real packages, and the keys that every logger gets."""

from __future__ import annotations

import json
import math
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import Moments

EXAMPLES = Path(__file__).parents[1] / "examples" / "logging"
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def example(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / name)))


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def keys(layers: list[str]) -> set[str]:
    return {f"act/{layer}/{field}" for layer in layers for field in Moments.metric_fields}


def test_jsonl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "to_jsonl.py", "--steps", 6, "--window", 2, "--output", tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(line) == {"step"} | keys(["0", "1", "2", "3", "4"])
        assert line["act/2/nonfinite"] == 0
        assert line["act/2/vector_kurtosis"] > 1
    example("to_jsonl.py").write(tmp_path / "run.jsonl", {"a": math.nan, "b": math.inf, "c": 1.5}, 7)
    assert (tmp_path / "run.jsonl").read_text().endswith('\n{"step": 7, "a": null, "b": null, "c": 1.5}\n')  # JSON has no nan


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(monkeypatch, "to_tensorboard.py", "--steps", 6, "--window", 3, "--output", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == keys(["0", "1", "2", "3", "4"])
    assert [(e.step, e.value) for e in events.Scalars("act/2/nonfinite")] == [(3, 0.0), (6, 0.0)]
    assert all(e.value > 1 for e in events.Scalars("act/4/vector_kurtosis"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "package"), [("lightning_callback.py", "lightning"), ("trainer_callback.py", "transformers")])
def test_callbacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    run(monkeypatch, name, "--steps", 6, "--window", 2, "--output", tmp_path / "new" / "folder")
    found = torchprobe.load(tmp_path / "new" / "folder" / "run.safetensors")
    assert found.history.steps == [2, 4, 6]
    assert len(found.layers) >= 4
    assert (found.history["vector_kurtosis"][:, :3] > 1).all()


# -- for every logger -------------------------------------------------------------------------------------------------------------


def test_keys_are_the_same_before_and_after_a_layer_fires_for_the_first_time() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.which = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[self.which](x)

    model = Branch()
    seen = []
    with torchprobe.record(model, "blocks.*") as rec:
        seen.append(rec.metrics())
        for step in range(3):
            model.which = step
            model(X)
            seen.append(rec.metrics())
            rec.snapshot(step)
    assert {frozenset(numbers) for numbers in seen} == {frozenset(key[4:] for key in keys(["blocks.0", "blocks.1", "blocks.2"]))}
    assert all(type(value) is float for numbers in seen for value in numbers.values())
    assert [numbers["blocks.1/nonfinite"] for numbers in seen[1:]] == pytest.approx([math.nan, 0.0, math.nan], nan_ok=True)


def test_a_layer_without_recorded_values_has_no_keys() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0).long()

    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), Counts())
    with pytest.warns(torchprobe.RecordingWarning), torchprobe.record(model) as rec:
        model(X)
    assert {name.rpartition("/")[0] for name in rec.metrics()} == {"0.0", "0.1"}
