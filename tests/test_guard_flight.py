"""The flight recorder: what is written of an alarm, with the right numbers, and what happens when it cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from guard_models import Net, Told, batch, nan_in_row, train
from models import COMPILER_WARNINGS
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import NonfiniteWarning, flight, read_flight
from torchprobe.recording.verdicts import Report

pytestmark = COMPILER_WARNINGS
LAYERS = ["blocks.*", "head"]


def fly(folder: Path, steps: int = 70, bad: int = 68, snapshot: int = 0, compiled: bool = False) -> tuple[Report, dict[str, list[Tensor]]]:
    """Trains until a step divides row 4 by zero in block 2. Returns what plain hooks have seen, too."""
    model, told = Net(), Told()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.startswith("blocks.") and name.count(".") == 1:
            module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(out.detach().double()))
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault("into " + name, []).append(args[0].detach()))
    call = torch.compile(model, backend="aot_eager") if compiled else model

    def at(step: int) -> None:
        model.blocks[2].plant = nan_in_row(4) if step == bad else None
        if snapshot and step and step % snapshot == 0:
            rec.snapshot(step)

    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told, dump=folder)
        train(model, call, rec, steps, at)
    return told.reports[0], seen


@pytest.mark.parametrize("snapshot", [0, 7, 1])
def test_the_last_steps_against_plain_hooks(tmp_path: Path, snapshot: int) -> None:
    """The root mean square of every layer in each of the last 64 steps, in float64; windows may end in between."""
    report, seen = fly(tmp_path / "new" / "folder", snapshot=snapshot)
    values, tensors = read_flight(report.files[0])
    assert values["layers"] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"] and values["text"].startswith(
        "torchprobe guard: first"
    )
    assert values["report"]["events"][0]["layer"] == "blocks.2" and not values["left_out"]
    steps = tensors["steps"].tolist()
    assert steps == list(range(5, 69))
    for column, layer in enumerate(["blocks.0", "blocks.1"]):
        expected = torch.stack([seen[layer][step].square().mean().sqrt() for step in steps])
        torch.testing.assert_close(tensors["last"][:, column, 1], expected, rtol=1e-5, atol=0)
        assert tensors["last"][:, column, 0].tolist() == [6 * 3 * 8] * 64
        window = [step for step in range(69) if not snapshot or step // snapshot == 68 // snapshot]
        largest = max(float(seen[layer][step].abs().max()) for step in window)
        assert tensors["last"][-1, column, 2].item() == pytest.approx(largest, rel=1e-6)
    assert tensors["last"][-1, 2, 3].item() == 24 and tensors["last"][:-1, :, 3].sum() == 0


def test_the_offending_rows(tmp_path: Path) -> None:
    report, seen = fly(tmp_path, steps=4, bad=2)
    _, tensors = read_flight(report.files[0])
    assert tensors["rows"].tolist() == [4]
    assert torch.equal(tensors["input/x"], seen["into blocks.2"][2][4:5])
    assert tensors["output/"].shape == (1, 3, 8) and tensors["output/"].isnan().all()


def test_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "MOST_BYTES", 3 * 8 * 4)  # one row of the output
    report, _ = fly(tmp_path, steps=4, bad=2)
    values, tensors = read_flight(report.files[0])
    assert tensors["output/"].shape == (1, 3, 8) and "input/x" not in tensors and values["left_out"] == ["input x"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_page(tmp_path: Path, compiled: bool) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    torch.compiler.reset()
    report, _ = fly(tmp_path, steps=6, bad=4, compiled=compiled)
    page = Path(report.files[1]).read_text()
    assert "First nonfinite activation" in page and "blocks.2" in page and "up.weight" in page and "The last 5 steps" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


class _Named(nn.Module):
    """A class and a layer whose names are markup."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 0


def test_names_are_escaped(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    _Named.__name__ = "<script>alert(1)</script>"
    model, told = nn.Sequential(), Told()
    model.add_module("<b>bold</b>", _Named())
    with torchprobe.record(model, "**", feature_dim=-1) as rec:
        rec.guard(on=told, dump=tmp_path)
        model(batch(0))
    page = Path(told.reports[0].files[1]).read_text()
    assert "<b>bold" not in page and "<script>alert" not in page and "&lt;b&gt;bold" in page


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report, _ = fly(tmp_path / "file" / "folder", steps=4, bad=2)
    assert not report.files and "the flight recorder could not be written: " in report.notes[0]


def test_without_jinja_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("a page needs jinja2: pip install 'torchprobe-interp[report]'")

    monkeypatch.setattr(flight, "write_page", missing)
    report, _ = fly(tmp_path, steps=4, bad=2)
    assert len(report.files) == 1 and "the page could not be written: ModuleNotFoundError: a page needs jinja2" in report.notes[0]


def test_other_statistics_have_no_last_steps(tmp_path: Path) -> None:
    model = Net()
    model.blocks[0].plant = nan_in_row(0)
    with pytest.warns(NonfiniteWarning, match="'blocks.0'"):
        _run(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    values, tensors = read_flight(file)
    assert values["layers"] == [] and tensors["last"].shape == (0, 0, 4)


def _run(model: Net, folder: Path) -> None:
    with torchprobe.record(model, LAYERS, statistic=torchprobe.statistics.Norms) as rec:
        rec.guard(dump=folder)
        model(batch(0))
        rec.step()


def test_a_file_of_another_kind_or_a_damaged_one(tmp_path: Path) -> None:
    report, _ = fly(tmp_path, steps=4, bad=2)
    path = Path(report.files[0])
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_flight(path)
    model = Net()
    with torchprobe.record(model, LAYERS) as rec:
        model(batch(0))
    rec.save(tmp_path / "recording.safetensors")
    with pytest.raises(ValueError, match="expected 'guard report'"):
        read_flight(tmp_path / "recording.safetensors")
