"""What a guard writes of an alarm, what ``torchprobe watch`` shows of a recording, and two recordings compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchprobe
from fuzz.target import Target, resealed
from torchprobe.common.files import to_json
from torchprobe.recording.flight import read_flight
from torchprobe.recording.jumps import find_jumps
from torchprobe.recording.verdicts import Report
from torchprobe.studies.diff_recordings import diff_recordings, recording_page
from torchprobe.studies.watch import Watch


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def _make_flight(folder: Path) -> None:
    model = _model()
    with torchprobe.record(model) as rec:
        rec.guard("**", on=lambda report: None, dump=folder / "made")
        for _ in range(3):
            model(torch.randn(4, 3))
            rec.step()
        model(torch.randn(4, 3).index_fill(0, torch.tensor([2]), math.nan))
        rec.step()
    (written,) = (folder / "made").glob("*.safetensors")
    written.rename(folder / "alarm.safetensors")
    for page in (folder / "made").iterdir():
        page.unlink()
    (folder / "made").rmdir()


def _read_flight(folder: Path) -> Any:
    values, tensors = read_flight(folder / "alarm.safetensors")
    report = Report.from_dict(values["report"])
    return (
        values["text"],
        str(report),
        report.first.title,
        [(name, tensors[name].shape, tensors[name].tolist()) for name in sorted(tensors)],
    )


def _make_run(folder: Path) -> None:
    model = _model()
    for name in ("run", "other"):
        with torchprobe.record(model, ["0", "2"]) as rec:
            for step in range(6):
                model(torch.randn(5, 3))
                rec.snapshot(step)
        rec.save(folder / f"{name}.safetensors")


def _watch(folder: Path) -> Any:
    """A file that cannot be read is shown as such, so nothing may be raised."""
    watch = Watch([folder / "run.safetensors"])
    watch.refresh()
    shown = [to_json(watch.data(name)) for name in ("", *watch.fields()[:3])]
    watch.terminal()
    if (recording := watch.runs[0].recording) is None:
        raise ValueError(watch.runs[0].problem)
    find_jumps(recording.history)
    return [text.partition('"curves"')[2] for text in shown]


def _compare(folder: Path) -> Any:
    found = diff_recordings(folder / "run.safetensors", folder / "other.safetensors")
    recording_page(found, ["one", "other"])
    return to_json(found.summary())


FLIGHT = Target("flight", {"alarm.safetensors": "safetensors"}, _make_flight, _read_flight, (ValueError,), guarded=("alarm.safetensors",))
RUN = {"run.safetensors": "safetensors"}
WATCH = Target("watch", RUN, _make_run, _watch, (ValueError,))
COMPARED = Target("compared-recordings", RUN, _make_run, _compare, (ValueError,), weight=0.5)


def _trusted(target: Target) -> Target:
    return resealed(Target(target.name, target.files, target.make, target.read, target.errors, (*target.files,)))


TARGETS = [FLIGHT, resealed(FLIGHT), WATCH, _trusted(WATCH), COMPARED, _trusted(COMPARED)]
