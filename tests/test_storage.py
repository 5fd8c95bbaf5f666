"""Merging recordings, resuming, and files."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, assert_equal, batches, record
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import FEATURES, State, Statistic


def test_merge_equals_one_recording_of_everything() -> None:
    model, data = Net(), batches(6)
    whole = record(model, data)
    first, second = record(model, data[:2]), record(model, data[2:])
    assert first.merge(second) is first
    assert_equal(first, whole, rtol=1e-9)
    again = second.total.merge(record(model, data[:2]))
    assert_equal(again, whole, rtol=1e-9)


def test_merge_brings_windows_and_histories_together() -> None:
    model, data = Net(), batches(3)
    recorders = []
    for step in (1, 2):
        with torchprobe.record(model) as rec:
            model(data[step])
            rec.snapshot(step)
            model(data[0])
        recorders.append(rec)
    first, second = recorders
    first.merge(second)
    assert first.history.steps == [1, 2]
    assert first["blocks.0"].vectors == 30
    assert first.total["blocks.0"].vectors == 60
    with pytest.raises(ValueError, match="both histories hold step 2, .*first.total.merge"):
        first.merge(second)
    assert first["blocks.0"].vectors == 30  # nothing was changed


def test_merge_into_a_recorder_before_its_first_run() -> None:
    model, data = Net(), batches(2)
    rec = torchprobe.record(model)
    rec.merge(record(model, data[:1]))
    with rec:
        model(data[1])
    assert_equal(rec, record(model, data), rtol=1e-9)


def test_merge_refuses_recordings_that_do_not_fit() -> None:
    model, data = Net(), batches(1)
    rec = record(model, data, "blocks.*")
    with pytest.raises(ValueError, match="other recording has layers that this one does not have: 'head'"):
        rec.merge(record(model, data, "head"))
    with pytest.raises(ValueError, match="made with different settings"):
        rec.merge(record(model, data, "blocks.*", outlier_sigma=3.0))
    with pytest.raises(ValueError, match="layer 'blocks.0' is 6 features wide here and 8 there"):
        rec.merge(record(Net(8), batches(1, width=8), "blocks.*"))
    with pytest.raises(TypeError, match="cannot merge a recording with Moments"):
        rec.merge(rec["blocks.0"])  # type: ignore[arg-type]


def recorded_windows(model: nn.Module) -> torchprobe.Recorder:
    data = batches(4)
    with torchprobe.record(model, every=2) as rec:
        for step, x in enumerate(data):
            model(x)
            if step % 2:
                rec.snapshot(step)
        model(data[0])
        model(data[1])
        model(data[2])
    return rec


def test_resume_through_torch_save(tmp_path: Path) -> None:
    model, data = Net(), batches(4)
    uninterrupted = torchprobe.record(model, every=2)
    with uninterrupted:
        for step, x in enumerate(data):
            model(x)
            if step == 2:
                uninterrupted.snapshot(step)
    first = torchprobe.record(model, every=2)
    with first:
        for x in data[:3]:
            model(x)
        first.snapshot(2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = torchprobe.record(model, every=2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.layers == first.layers
    assert second.rows()[0]["feature_dim"] == -1
    with second:
        model(data[3])
    assert_equal(second, uninterrupted)
    assert_equal(second.total, uninterrupted.total)
    assert second.history.steps == [2]
    assert np.array_equal(second.history.values, uninterrupted.history.values, equal_nan=True)


def test_resume_refuses_another_recorder() -> None:
    model = Net()
    state = record(model, batches(1)).state_dict()
    with pytest.raises(ValueError, match="recorded with .*'outlier_sigma': 6.0"):
        torchprobe.record(model, outlier_sigma=3.0).load_state_dict(state)
    with pytest.raises(ValueError, match="layers that this recorder does not watch: 'blocks.0', 'blocks.1'"):
        torchprobe.record(model, "head").load_state_dict(state)
    with pytest.raises(ValueError, match="format 1; got format None"):
        torchprobe.record(model).load_state_dict({})


def test_save_and_load(tmp_path: Path) -> None:
    rec = recorded_windows(Net())
    path = tmp_path / "run.safetensors"
    rec.save(path)
    rec.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    loaded = torchprobe.load(path)
    assert type(loaded) is torchprobe.Recording
    assert_equal(loaded, rec)
    assert_equal(loaded.total, rec.total)
    assert repr(loaded.rows()) == repr(rec.rows())  # nan included
    assert loaded.settings == rec.settings
    assert loaded.history.steps == [1, 3]
    assert np.array_equal(loaded.history.values, rec.history.values, equal_nan=True)
    loaded.merge(torchprobe.load(path).total)
    assert loaded["blocks.0"].vectors == 30 + 60
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "1"
        assert torch.equal(file.get_tensor("blocks.1/mean"), rec["blocks.1"].mean)
        assert torch.equal(file.get_tensor("/max"), rec[""].max)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o000])
def test_the_mode_of_a_file_is_that_of_any_file(tmp_path: Path, umask: int) -> None:
    rec, path = record(Net(), batches(1)), tmp_path / "run.safetensors"
    before = os.umask(umask)
    try:
        for _ in range(2):
            rec.save(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)


def test_aliases_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.add_module("again", model[0])
    rec = record(model, batches(1), "*")
    rec.save(tmp_path / "a.safetensors")
    loaded = torchprobe.load(tmp_path / "a.safetensors")
    assert loaded.layers == ["0", "1"]
    assert loaded["again"].vectors == rec["again"].vectors == 30


def tampered(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """The file with another content, without checksums, as earlier versions wrote it: what it says is checked by what it means."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    del metadata["checksums"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def edit(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        target: dict[str, Any] = metadata if key in metadata else tensors
        if value is None:
            del target[key]
        else:
            target[key] = value(target[key]) if callable(value) else value

    return change


def layers(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps([{**layer, **values} for layer in json.loads(text)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "2", "'format': expected '1', got '2'"),
        ("settings", None, "'settings': missing from the metadata"),
        ("settings", "{", "'settings': the metadata is not JSON"),
        ("settings", "[" * 100_000, "'settings': the metadata is not JSON"),
        ("settings", "{}", "'settings': expected of, positions"),
        ("layers", "{}", "'layers': expected a JSON list, got dict"),
        ("layers", '[{"name": 3}]', "'layers': each layer has name, module"),
        ("layers", layers(features=10**15), "'layers': layer .* cannot have 10{15} features"),
        ("layers", layers(features=7), "'blocks.0/closed/count': expected F64 of shape \\(7,\\), got F64 of \\(6,\\)"),
        ("layers", layers(features="6"), "'layers': a value is of the wrong kind"),
        ("layers", layers(name="x"), "'x/closed/calls': missing"),
        ("layers", lambda text: json.dumps(json.loads(text)[1:]), "'blocks.0/.*': belongs to no layer"),
        ("layers", lambda text: json.dumps([json.loads(text)[0]] * 2), "'blocks.0/closed/calls': missing"),
        ("layers", layers(outlier_sigma=-1.0), "'layers': outlier_sigma of layer 'blocks.0' must be positive, got -1.0"),
        ("layers", layers(calls=3), "'layers': each layer has name, module"),
        ("settings", lambda text: text.replace("6.0", "1" + 400 * "0"), "'settings': outlier_sigma must be positive"),
        ("settings", lambda text: text.replace("Moments", "Zeros"), "'statistics': expected the names in 'Zeros'"),
        ("aliases", '{"a": 1}', "'aliases': an alias is not text"),
        ("history", lambda text: text.replace("[1, 3]", "[1, NaN]"), "'history': steps are finite numbers"),
        ("history", lambda text: text.replace("[1, 3]", f"[1, 1{400 * '0'}]"), "'history': steps are finite numbers"),
        ("history", lambda text: text.replace('"dropped": 0', '"dropped": -1'), "'history': dropped counts windows, got -1"),
        ("history", '{"steps": 1}', "'history': expected the lists"),
        ("history", lambda text: text.replace("[1, 3]", "[1, 3, 5]"), "'history': expected F64 of shape \\(3, 4, 18\\)"),
        ("history", lambda text: text.replace("[1, 3]", '["x"]'), "'history': steps are finite numbers"),
        ("blocks.0/m2", None, "'blocks.0/m2': missing"),
        ("blocks.0/m2", torch.ones(5, dtype=torch.float64), r"'blocks.0/m2': expected F64 of shape \(6,\), got F64 of \(5,\)"),
        ("blocks.0/m2", torch.ones(6), "'blocks.0/m2': expected F64 of .*, got F32"),
        ("blocks.0/count", lambda t: -t, "'blocks.0/count': holds .*which is negative, nan, not whole"),
        ("blocks.0/count", lambda t: t * math.nan, "'blocks.0/count': holds .*which is negative, nan, not whole"),
        ("blocks.0/vector_kurtosis_histogram", lambda t: t + 1, "does not add up to the 30 vectors"),
        ("blocks.0/vector_kurtosis_histogram", lambda t: t[:10].clone(), r"expected F64 of shape \(1152,\)"),
        ("surprise", torch.ones(1), "'surprise': belongs to no layer"),
        ("history", lambda text: text.replace("[1, 3]", "[3, 3]"), "'history': steps of the history hold 3 twice"),
        ("blocks.0/mean", lambda t: t * math.nan, "'blocks.0/mean': is not between the minimum and the maximum"),
        ("blocks.0/min", lambda t: t + 1e3, "'blocks.0/min': is above the maximum"),
        ("blocks.0/max", lambda t: t * math.inf, "'blocks.0/max': is not finite"),
        ("blocks.0/outliers", lambda t: t + 1e9, "'blocks.0/outliers': holds .*more than there can be"),
        ("blocks.0/calls", lambda t: t * math.inf, "'blocks.0/calls': holds inf"),
        ("blocks.0/vectors", lambda t: t * math.inf, "'blocks.0/vectors': holds inf"),
        ("blocks.0/m4", lambda t: t * math.nan, "'blocks.0/m4': is negative or nan"),
        ("blocks.0/vector_kurtosis_mean", lambda t: t * 1e6, "'blocks.0/vector_kurtosis_mean': is .*no vectors of 6 features"),
    ],
)
def test_damaged_files(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "run.safetensors"
    recorded_windows(Net()).save(path)
    with pytest.raises(ValueError, match=message) as caught:
        torchprobe.load(tampered(path, edit(key, value)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", layers(calls=-1), "layer 'blocks.0' cannot have -1 calls"),
        ("layers", layers(calls=10**400), "cannot have 10{400} calls"),
        ("layers", layers(window_state={"values": [], "tensors": []}), "expected values and the names of tensors for 'blocks.0/'"),
        ("layers", layers(window_state={"values": {"features": 6}, "tensors": ["no"]}), "'blocks.0/no': missing"),
        (
            "layers",
            layers(window_state={"values": {"features": 10**9}, "tensors": []}),
            "'blocks.0': features in the saved state of Wide must be at most",
        ),
        (
            "layers",
            layers(window_state={"values": {"features": [6]}, "tensors": []}),
            "'blocks.0': features in the saved state of Wide must be a whole number",
        ),
        ("layers", layers(window_state={"values": {}, "tensors": []}), r"'blocks.0': the saved state of Wide lacks \['features'\]"),
        ("blocks.0/matrix", torch.ones(6, 7, dtype=torch.float64), r"'blocks.0': matrix in .* \(6, 7\), expected .* \(6, 6\)"),
        ("blocks.0/matrix", torch.ones(6, 6, dtype=torch.int64), "'blocks.0': matrix in the saved state of Wide is torch.int64"),
        ("statistics", '"Statistic"', "'statistics': expected the names in 'Wide'"),
        ("statistics", "[]", "'statistics': expected the names in 'Wide'"),
        ("statistics", "3", "'statistics': expected a JSON str, got int"),
    ],
)
def test_damaged_files_of_any_statistic(tmp_path: Path, key: str, value: Any, message: str) -> None:
    class Wide(Statistic):
        states = {"matrix": State((FEATURES, FEATURES))}

        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            self.matrix += x.T @ x

    path = tmp_path / "run.safetensors"
    record(Net(), batches(1), "blocks.0", statistic=Wide).save(path)
    with pytest.raises(ValueError, match=message) as caught:
        torchprobe.load(tampered(path, edit(key, value)), statistic=Wide)
    assert str(path) in str(caught.value)


def test_a_changed_byte_is_an_error_that_names_the_file_and_the_part(tmp_path: Path) -> None:
    path, changed = tmp_path / "run.safetensors", tmp_path / "changed.safetensors"
    recorded_windows(Net()).save(path)
    content, found = path.read_bytes(), list[str]()
    size = 8 + int.from_bytes(content[:8], "little")
    positions = [*range(0, size, 7), *(content.index(f'"{key}"'.encode()) + 2 for key in ("checksums", "format", "settings", "history"))]
    for at in [*positions, *range(size, len(content), 97)]:
        mutant = bytearray(content)
        mutant[at] ^= 1
        changed.write_bytes(mutant)
        with pytest.raises(ValueError, match="changed.safetensors") as caught:
            torchprobe.load(changed)
        found.append(str(caught.value))
    assert any("the checksum of 'blocks.0/m4' does not fit its content" in message for message in found)
    assert any("the checksum of its metadata does not fit" in message for message in found)
    assert any("it has no checksums, but 'ciecksums' in its metadata" in message for message in found)


def test_a_recording_without_checksums_loads(tmp_path: Path) -> None:
    rec, path = recorded_windows(Net()), tmp_path / "run.safetensors"
    rec.save(path)
    assert_equal(torchprobe.load(tampered(path, lambda *_: None)), rec)


def test_loading_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        torchprobe.load(tmp_path / "none")
    (tmp_path / "text").write_bytes(b"no recording at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        torchprobe.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="'format': expected '1', got None"):
        torchprobe.load(tmp_path / "weights")


def test_saving_to_a_missing_folder(tmp_path):
    model = torch.nn.Linear(2, 2)
    with torchprobe.record(model) as rec:
        model(torch.randn(3, 2))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        rec.save(tmp_path / "missing" / "run.safetensors")


def test_files_of_the_previous_version_load() -> None:
    """A development version of 0.1.0 wrote them, before statistics had a contract; tests/data/recording.json holds its own results."""
    data = Path(__file__).parent / "data"
    expected = json.loads((data / "recording.json").read_text())
    loaded = torchprobe.load(data / "recording.safetensors")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    resumed = torchprobe.record(model, every=2)
    resumed.load_state_dict(torch.load(data / "recorder.pt", weights_only=True))
    for rec in (loaded, resumed):
        for rows, before in ((rec.rows(), expected["rows"]), (rec.total.rows(), expected["total"])):
            for mine, theirs in zip(rows, before, strict=True):
                numbers = {key: value for key, value in theirs.items() if not isinstance(value, str)}
                assert [mine[key] for key in numbers] == pytest.approx(list(numbers.values()), rel=1e-12, nan_ok=True)
        assert {name: rec.total[name].calls for name in rec} == expected["calls"]
        assert rec.history.steps == expected["steps"]
        assert rec.history["vector_kurtosis"].tolist() == expected["kurtosis"]
        assert all(np.isnan(rec.history[field]).all() for field in ("abs_max", "rms", "dead_features"))  # those of later versions
        assert all(row["abs_max"] == max(-row["min"], row["max"]) >= row["rms"] > 0 for row in rec.total.rows())  # the states have them
        assert rec.history.histograms.sum((0, 1)).tolist()[:30] == expected["histogram"]
    with resumed:
        model(torch.zeros(2, 3))
    assert resumed.total["0"].calls == expected["calls"]["0"] + 1
