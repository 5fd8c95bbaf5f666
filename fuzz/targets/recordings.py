"""Recordings, and the state of a recorder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchprobe
from fuzz.target import Target, has_checksums, resealed


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def _make(folder: Path) -> None:
    model = _model()
    with torchprobe.record(model, ["0", "2"]) as recorder:
        for step in range(2):
            model(torch.randn(5, 3))
            recorder.snapshot(step)
    recorder.save(folder / "run.safetensors")


def _read(folder: Path) -> Any:
    found = torchprobe.load(folder / "run.safetensors")
    if not has_checksums(folder / "run.safetensors"):
        raise ValueError("as an earlier version wrote it")
    fields = [(layer, found[layer].mean, found[layer].kurtosis, found[layer].vector_kurtosis_quantile(0.5)) for layer in found]
    return fields, [dict(row) for row in found.rows()], found.metrics(), found.history.rows()


def _make_state(folder: Path) -> None:
    model = _model()
    with torchprobe.record(model, ["0", "2"]) as recorder:
        model(torch.randn(5, 3))
        recorder.snapshot(1)
        model(torch.randn(5, 3))
    torch.save(recorder.state_dict(), folder / "state.pt")
    (folder / "change.txt").write_text("0")


def _load_state(folder: Path) -> Any:
    """The state is changed as an object, since a changed file of it is read by PyTorch and not by us."""
    state = torch.load(folder / "state.pt", weights_only=True)
    rng = random.Random((folder / "change.txt").read_bytes())
    if (folder / "change.txt").read_bytes() != b"0":
        state = _changed(state, rng)
    recorder = torchprobe.record(_model(), ["0", "2"])
    recorder.load_state_dict(state)
    return (
        [(layer, recorder[layer].mean, recorder[layer].kurtosis) for layer in recorder.layers],
        recorder.metrics(),
        recorder.history.rows(),
    )


def _changed(value: Any, rng: random.Random) -> Any:
    from fuzz.mutation import ABSURD

    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return type(value)([*value[:at], _changed(value[at], rng), *value[at + 1 :]])
    if isinstance(value, torch.Tensor) and rng.random() < 0.85:
        changed = value.clone()
        match rng.randrange(6):
            case 0 if changed.numel():
                changed.view(-1)[rng.randrange(changed.numel())] = (
                    rng.choice((-1, 0, 1e9)) if not changed.is_floating_point() else float("nan")
                )
            case 1:
                changed = changed.unsqueeze(0)
            case 2:
                changed = changed[..., :1] if changed.dim() else changed
            case 3:
                changed = changed.to(rng.choice((torch.float32, torch.int32, torch.bool, torch.complex64)))
            case 4:
                changed = -changed if changed.dtype != torch.bool else changed
            case _:
                changed = changed * 10**9 if changed.dtype != torch.bool else changed
        return changed
    return rng.choice(ABSURD)


RECORDINGS = Target("recordings", {"run.safetensors": "safetensors"}, _make, _read, (ValueError,), guarded=("run.safetensors",))

TARGETS = [
    RECORDINGS,
    resealed(RECORDINGS),
    Target("recorder-state", {"change.txt": "raw"}, _make_state, _load_state, (ValueError, TypeError)),
]
