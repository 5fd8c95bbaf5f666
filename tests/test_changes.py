"""Two recordings compared: distances, the false-alarm rate of the verdict, and the command."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from processes import group
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import torchprobe
from torchprobe.analysis import compare_recordings
from torchprobe.analysis.layer_distance import distance
from torchprobe.analysis.window_noise import apart, attainable, drifts
from torchprobe.cli import cli
from torchprobe.recording.matching import match_layers
from torchprobe.statistics import Norms, Sparsity
from torchprobe.studies.diff_recordings import are_recordings, changed_most, diff_recordings, print_recording_diff


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def network(blocks: int = 3, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks)))


def recorded(model, seed, windows=6, layers="**", batch=8, heavy=False, **options):
    generator = torch.Generator().manual_seed(seed)
    with torchprobe.record(model, layers, **options) as rec, torch.no_grad():
        for window in range(windows):
            x = torch.randn(batch, 5, 16, generator=generator)
            model(x / torch.rand(batch, 1, 1, generator=generator) if heavy else x)
            rec.snapshot(window)
        if not windows:
            model(torch.randn(batch, 5, 16, generator=generator))
    return rec


# -- numbers -----------------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_all_values():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 40)) * 3 + 5, rng.normal(size=(700, 40)) * 2 + 4
    a[:, 7], b[:, 7], a[:, 8], b[:, 8] = 1.0, 2.0, 3.0, 3.0  # constant
    b[:, 11] += 400  # an outlier feature
    one, other = torchprobe.Moments(40), torchprobe.Moments(40)
    one.update(torch.from_numpy(a))
    other.update(torch.from_numpy(b))
    found = distance(one, other)
    keep = [i for i in range(40) if i not in (7, 8)]
    x, y = a[:, keep], b[:, keep]
    spread = np.sqrt((x.var(0) + y.var(0)) / 2)
    shift, squeeze = (y.mean(0) - x.mean(0)) / spread, (y.std(0) - x.std(0)) / spread
    assert found.mean_shift == pytest.approx(np.sqrt((shift**2).mean()), rel=1e-9)
    assert found.wasserstein == pytest.approx(np.sqrt((shift**2 + squeeze**2).mean()), rel=1e-9)
    assert (found.mean_shift_feature, found.mean_shift_max) == (11, pytest.approx(abs(shift).max(), rel=1e-9))
    assert found.std_ratio == pytest.approx(math.sqrt(b.var(0).mean() / a.var(0).mean()), rel=1e-9)

    def kurtosis(h):
        d = h - h.mean(1, keepdims=True)
        return ((d**4).mean(1) / (d**2).mean(1) ** 2).mean()

    assert found.kurtosis_ratio == pytest.approx(kurtosis(b) / kurtosis(a), rel=1e-5)
    assert (found.outliers_gained, found.outliers_lost, found.outlier_shift_feature, found.outlier_shift) == ((11,), (), 11, 1.0)
    assert found.constant_moved == 1
    back = distance(other, one)
    assert (back.outliers_gained, back.outliers_lost, back.outlier_shift) == ((), (11,), -1.0)


def test_distance_of_nothing_is_unknown():
    found = distance(torchprobe.Moments(3), torchprobe.Moments(3))
    assert math.isnan(found.wasserstein) and found.mean_shift_feature is None and found.outliers_gained == ()
    with pytest.raises(ValueError, match="3 features wide in one recording and 4 in the other"):
        distance(torchprobe.Moments(3), torchprobe.Moments(4))


def test_p_values_are_those_of_all_divisions():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(5, 1)), rng.normal(size=(6, 1)) + 1.5
    values = np.concatenate([first, second])[:, 0]

    def t(chosen):
        a, b = values[list(chosen)], np.delete(values, list(chosen))
        return abs(b.mean() - a.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))

    seen = t(range(5))
    share = np.mean([t(chosen) >= seen * (1 - 1e-9) for chosen in combinations(range(11), 5)])
    found = apart(first, second)
    assert found.p[0] == pytest.approx(share) and abs(found.difference[0]) / found.noise[0] == pytest.approx(seen)


def test_missing_and_constant_numbers():
    first, second = np.full((5, 4), 2.0), np.full((5, 4), 2.0)
    second[:, 1] = 3.0  # without any spread
    first[:3, 2] = math.nan  # too few are left
    found = apart(first, second)
    assert found.p[0] == 1 and found.p[1] <= 0.05 and math.isnan(found.p[2])
    assert found.difference.tolist()[:2] == [0, 1]
    rounding = apart(first * (1 + 1e-15 * np.arange(5)[:, None]), second * (1 - 1e-15))
    assert rounding.p[0] == 1
    with pytest.raises(ValueError, match="same numbers"):
        apart(first, second[:, :2])


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "equal columns"])
def test_the_false_alarm_rate_of_the_test_holds(kind):
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(400):
        values = rng.standard_t(2, size=(10, 12)) if kind == "heavy" else rng.normal(size=(10, 12))
        if kind == "equal columns":
            values[:] = values[:, :1]
        alarms += bool((apart(values[:5], values[5:]).p <= 0.05).any())
    assert alarms / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert kind == "heavy" or alarms / 400 >= 0.015  # it is not so cautious that it sees nothing


def test_drift_is_seen_and_noise_is_not():
    rng = np.random.default_rng(0)
    assert sum(drifts(rng.normal(size=(10, 6)), seed) for seed in range(150)) <= 6
    trend = np.arange(10.0)[:, None] * 0.5
    assert all(drifts(rng.normal(size=(10, 6)) + trend, seed) for seed in range(10))
    walk = rng.normal(size=(20, 6)).cumsum(0)
    assert drifts(walk) and not drifts(walk[:4])
    assert not drifts(np.full((8, 2), 1.0))


# -- recordings --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow("records 300 pairs of a small network")
@pytest.mark.parametrize("heavy", [False, True])
def test_recordings_of_one_model_are_not_told_apart(heavy):
    model = network()
    alarms = sum(compare_recordings(recorded(model, 2 * i, heavy=heavy), recorded(model, 2 * i + 1, heavy=heavy)).first is not None
                 for i in range(150))  # fmt: skip
    assert alarms / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_the_first_layer_that_changed_is_named():
    model = network()
    before = recorded(model, 0, batch=64)
    with torch.no_grad():
        model[1].up.weight.mul_(1.3)
    found = compare_recordings(before, recorded(model, 1, batch=64))
    assert found.first == "1.up" and found.noise == "windows" and found.windows == (6, 6)
    verdicts = {layer.layer: layer.verdict for layer in found.layers}
    assert all(verdicts[name] == "within noise" for name in ("0.norm", "0.up", "0.down", "0", "1.norm")) and verdicts["1.up"] == "changed"
    surest = next(layer for layer in found.layers if layer.layer == "1.up").surest
    assert surest.times_noise > 5 and surest.p <= 0.05
    std = next(one for layer in found.layers if layer.layer == "1.up" for one in layer.fields if one.field == "std")
    assert math.exp(std.change) == pytest.approx(1.3, rel=0.02) and std.scale == "log"
    assert "the first in the order of the run is 1.up" in found.answer()


def test_what_the_numbers_of_a_layer_do_not_show_has_a_distance_only():
    model = nn.Sequential(nn.Linear(16, 16))
    torch.manual_seed(0)
    nn.init.normal_(model[0].bias, std=5)
    before = recorded(model, 0, batch=64)
    order = torch.randperm(16)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order])
        model[0].bias.copy_(model[0].bias[order])
    found = compare_recordings(before, recorded(model, 1, batch=64))
    assert found.first is None and found.layers[0].distance.wasserstein > 3


def test_without_windows_there_is_no_verdict():
    model = network()
    found = compare_recordings(recorded(model, 0, windows=0), recorded(model, 1))
    assert found.noise == "none" and found.first is None and {layer.verdict for layer in found.layers} == {"no noise known"}
    assert "the first has no closed windows. Call rec.snapshot(step)" in found.remarks[0] and found.answer().startswith("No verdict")
    assert all(layer.distance.wasserstein > 0 for layer in found.layers)
    assert found.answer() == "No verdict: the first has no closed windows."
    few = compare_recordings(recorded(model, 0, windows=3), recorded(model, 1, windows=3))
    assert few.answer() == "No verdict: 3 and 3 windows cannot give a verdict at a false-alarm rate of 0.05."
    assert "Record at least 4 windows of each" in few.remarks[0]
    strict = compare_recordings(recorded(model, 0, windows=4), recorded(model, 1, windows=4), alpha=0.01)
    assert "Record at least 5 windows of each" in strict.remarks[0]
    assert compare_recordings(recorded(model, 0, windows=3), recorded(model, 1, windows=4)).noise == "windows"  # 35 divisions
    assert few.noise == "none" and "3 and 3 windows cannot give a verdict" in few.remarks[0] and attainable(3, 3) > 0.05


def test_what_no_verdict_is_about_is_said():
    model = network()
    before = recorded(model, 1)
    wider = copy.deepcopy(model)
    wider[0].up, wider[0].down = nn.Linear(16, 48), nn.Linear(48, 16)
    found = compare_recordings(before, recorded(wider, 2))
    assert "1 layer has no verdict (other width)." in found.answer()
    empty = torchprobe.record(model)
    with pytest.warns(torchprobe.RecordingWarning, match="none of the .* layers fired"), empty:
        pass
    with pytest.raises(ValueError, match="the second recording has no layer: nothing was seen while it was made"):
        compare_recordings(before, empty)
    with torch.no_grad():
        model[0].norm.weight.fill_(math.nan)
    found = compare_recordings(recorded(model, 1, layers="0.norm"), recorded(model, 2, layers="0.norm"))
    assert found.remarks == ["no noise known: no layer of both has a finite number in its windows"]


def test_windows_of_a_training_run_give_no_verdict():
    model = network()
    with torchprobe.record(model, "**") as rec, torch.no_grad():
        for step in range(10):
            model(torch.randn(32, 5, 16))
            rec.snapshot(step)
            for parameter in model.parameters():
                parameter.mul_(1.05)
    found = compare_recordings(recorded(network(), 0, windows=10, batch=32), rec)
    assert found.noise == "none" and found.first is None
    assert any("the windows of the second drift" in remark for remark in found.remarks)
    assert found.answer().startswith("No verdict: the windows of the second drift, as while a model trains")
    assert found.layers[0].fields  # the numbers are there


def test_other_widths_names_layers_and_settings():
    one = recorded(network(), 0)
    renamed = torchprobe.Recording([*_named(recorded(network(), 1), "net")], one.settings)
    found = compare_recordings(one, renamed)
    assert found.remarks[0] == "names of the second are matched without their prefix 'net.'" and len(found.layers) == 12
    wide = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    narrow = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    found = compare_recordings(recorded(narrow, 0, layers="*"), recorded(wide, 0, layers="*"))
    assert [layer.verdict for layer in found.layers[:2]] == ["other width"] * 2 and found.layers[2].distance is not None
    assert found.only_before == ["3"] and "1 layer of the first only" in found.remarks[0] and found.layers[0].distance is None
    with pytest.raises(ValueError, match="positions='all' and positions='mean'"):
        compare_recordings(one, recorded(network(), 0, positions="mean"))
    with pytest.raises(ValueError, match="no layer in common.*rename="):
        compare_recordings(recorded(network(), 0, layers="0"), recorded(network(), 0, layers="1"))
    with pytest.raises(ValueError, match="alpha is a probability"):
        compare_recordings(one, one, alpha=1)
    sigma = compare_recordings(one, recorded(network(), 1, outlier_sigma=3.0))
    assert any("from 6 and from 3 standard deviations" in remark for remark in sigma.remarks)
    assert math.isnan(sigma.layers[0].distance.outlier_shift)


def test_what_was_not_compared_leads():
    narrow, wide = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24))
    wide.append(nn.Linear(24, 24)).append(nn.Linear(24, 16))
    found = compare_recordings(recorded(narrow, 0), recorded(wide, 1))
    assert found.answer().startswith("3 of 5 layers have other widths, and were not compared. ")
    assert {row["layer"] for row in changed_most(found.rows(), 2)} == {"3", ""}  # those with a verdict
    inner = compare_recordings(recorded(narrow, 0, layers=["0", "1"]), recorded(wide, 1, layers=["0", "1"]))
    assert inner.answer() == "2 of 2 layers have other widths, and were not compared. No verdict: no layer has the same width in both."
    other = nn.Sequential()
    for name in "abcd":
        other.add_module(name, nn.Linear(16, 16))
    found = compare_recordings(recorded(narrow, 0), recorded(other, 1))
    assert found.answer().startswith("4 of 5 layers have no partner in the second, and were not compared. ")


def _named(rec, prefix):
    return [replace(entry, name=f"{prefix}.{entry.name}") for entry in rec.copied_entries() if entry.name]


def test_windows_of_other_sizes():
    found = compare_recordings(recorded(network(), 0, batch=8), recorded(network(), 1, batch=16))
    assert any("hold 40 vectors, those of the second 80" in remark for remark in found.remarks) and found.first is None
    assert {one.field for layer in found.layers for one in layer.fields} == {"vector_kurtosis", "rms"}


def test_eager_and_compiled_are_not_told_apart_but_a_change_is():
    model = network()
    before = recorded(model, 0, batch=32)
    torch.compiler.reset()
    compiled = recorded(torch.compile(model, backend="eager"), 1, batch=32)
    same = compare_recordings(before, compiled)
    assert same.first is None and same.noise == "windows" and len(same.layers) == 13
    with torch.no_grad():
        model[2].down.weight.mul_(1.5)
    assert compare_recordings(before, recorded(torch.compile(model, backend="eager"), 2, batch=32)).first == "2.down"


RANKS = """
import sys, torch, torchprobe
from torch import distributed, nn
distributed.init_process_group("gloo")
torch.manual_seed(0)
model, rank = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), distributed.get_rank()
for run in range(2):
    generator = torch.Generator().manual_seed(10 * run + rank)
    with torchprobe.record(model, "*") as rec, torch.no_grad():
        for window in range(6):
            model(torch.randn(64, 8, generator=generator))
            rec.snapshot(window)
    rec.save(f"{FOLDER}/{run}/{rank}.safetensors")
    with torch.no_grad():
        model[2].weight.mul_(1.4)
distributed.destroy_process_group()
"""


def test_recordings_of_two_ranks(tmp_path):
    for run in range(2):
        (tmp_path / str(run)).mkdir()
    for rank in group(2, RANKS.replace("{FOLDER}", str(tmp_path))):
        assert rank.returncode == 0, rank.stderr
    sides = [[torchprobe.load(tmp_path / f"{run}/{rank}.safetensors") for rank in range(2)] for run in range(2)]
    found = compare_recordings(*sides)
    assert found.first == "2" and found.windows == (12, 12) and found.layers[0].verdict == "within noise"
    assert compare_recordings(*sides[0]).first is None  # two ranks of one run
    both = sides[0][0].total.merge(sides[0][1].total)
    assert compare_recordings(both, sides[1]).layers[2].distance == found.layers[2].distance and both["2"].vectors == 2 * 6 * 64
    assert are_recordings(tmp_path / "0", tmp_path / "1") and diff_recordings(tmp_path / "0", tmp_path / "1").first == "2"
    assert not are_recordings(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no recording"):
        compare_recordings([], sides[1])


def test_nonfinite_in_one_only():
    model = network()
    before = recorded(model, 0)
    with torch.no_grad():
        model[1].up.weight[0, 0] = math.inf
    found = compare_recordings(before, recorded(model, 1))
    assert found.first_nonfinite == "1.up" and "nan or inf in only one of the two is 1.up" in found.answer()


def test_other_statistics():
    model = network()
    options = {"statistic": [Norms, Sparsity, torchprobe.Moments], "layers": "*.up"}
    before = recorded(model, 0, batch=64, **options)
    with torch.no_grad():
        model[2].up.weight.mul_(1.5)
    found = compare_recordings(before, recorded(model, 1, batch=64, **options))
    assert found.first == "2.up" and found.layers[0].distance.wasserstein < 0.5 < found.layers[2].distance.std_ratio
    only = compare_recordings(recorded(model, 0, statistic=Norms, layers="*"), recorded(model, 1, statistic=Norms, layers="*"))
    assert only.first is None and only.layers[0].distance is None


def test_matching_of_names():
    found = match_layers(["module.a", "b", "c.x", "c.y"], ["a", "b", "d.x", "d.y"], {"c.*": "d.*"})
    assert found.pairs == [("module.a", "a"), ("b", "b"), ("c.x", "d.x"), ("c.y", "d.y")] and not found.remarks
    with pytest.raises(ValueError, match="'c.z' matches no layer of the first"):
        match_layers(["c.x"], ["d.x"], {"c.z": "d.x"})
    with pytest.raises(ValueError, match="becomes 'e.x', which the second does not have"):
        match_layers(["c.x"], ["d.x"], {"c.*": "e.*"})
    with pytest.raises(ValueError, match="number of stars"):
        match_layers(["c.x"], ["d.x"], {"c.*": "d.x"})
    with pytest.raises(ValueError, match="two layers of the first become 'd'"):
        match_layers(["a", "b"], ["d"], {"a": "d", "b": "d"})
    names = [f"blocks.{i}" for i in range(3)]
    with pytest.raises(ValueError, match=r"'blok.\*' matches no layer of the first; did you mean 'blocks.\*'\?"):
        match_layers(names, names, {"blok.*": "blocks.*"})
    with pytest.raises(ValueError, match=r"becomes 'blok.0', .*; did you mean 'blocks.\*'\?"):
        match_layers(names, names, {"blocks.*": "blok.*"})
    with pytest.raises(ValueError, match=r"did you mean 'blocks.\*\*'\?"):
        match_layers([f"{name}.up" for name in names], names, {"blok.**": "x.**"})
    assert match_layers(["x.a"], ["a"]).pairs == []  # one name alone is no prefix


# -- the command -------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    model = network()
    base, tuned = tmp_path / "base.safetensors", tmp_path / "<b>tuned.safetensors"
    recorded(model, 0, batch=64).save(base)
    with torch.no_grad():
        model[1].down.weight.mul_(2)
    recorded(model, 1, batch=64).save(tuned)
    result = CliRunner().invoke(cli, ["diff", str(base), str(tuned), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "the first in the order of the run is 1.down" in result.output and "× noise" in result.output
    page = (tmp_path / "out/index.html").read_text()
    assert "&lt;b&gt;tuned" in page and "<b>tuned" not in page and "1.down" in page
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert found["first"] == "1.down" and found["alpha"] == 0.05 and len(found["layers"]) == 13
    with open(tmp_path / "out/layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows][:3] == ["0.norm", "0.up", "0.down"] and rows[0]["verdict"] == "within noise"
    assert "more layer" not in result.output  # all 13 are printed
    few = CliRunner().invoke(cli, ["diff", str(base), str(tuned), "--out", str(tmp_path / "few"), "--most", "2"], env={"COLUMNS": "200"})
    printed = [line.split()[0] for line in few.output.splitlines() if "within noise" in line or " changed  " in line]
    loudest = sorted(rows, key=lambda row: (row["verdict"] != "changed", -float(row["wasserstein"])))[:2]
    assert printed == [row["layer"] or "(output)" for row in rows if row in loudest]
    assert "These 2 changed most, in the order of the run. 11 more layers are on the page and in layers.csv" in few.output
    again = CliRunner().invoke(cli, ["diff", str(base), str(base), "--out", str(tmp_path / "same"), "--json", "--false-alarms", "0.01"])
    assert again.exit_code == 0 and json.loads(again.stdout)["first"] is None and json.loads(again.stdout)["alpha"] == 0.01
    refused = CliRunner().invoke(cli, ["diff", str(base), str(tuned), "--out", str(tmp_path / "no"), "--threshold", "0.1"])
    assert refused.exit_code == 2 and "--threshold is an option of dissections, and these are recordings" in refused.output
    named = CliRunner().invoke(cli, ["diff", str(base), str(tuned), "--out", str(tmp_path / "no"), "--rename", "0.*"])
    assert named.exit_code == 1 and "--rename takes OLD=NEW" in str(named.exception)
    other = tmp_path / "other.csv"
    other.write_text("")
    mixed = CliRunner().invoke(cli, ["diff", str(base), str(other), "--out", str(tmp_path / "no")])
    assert mixed.exit_code == 1 and "is a recording, and" in str(mixed.exception)
    assert not (tmp_path / "no").exists()


def test_a_checkpoint_is_no_recording(tmp_path):
    model, good = network(), tmp_path / "good.safetensors"
    recorded(model, 0).save(good)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        for pair in ((good, tmp_path / name), (tmp_path / name, tmp_path / name)):
            with pytest.raises(ValueError, match=rf"{name} is a checkpoint of weights, and no recording.*rec.save.*docs/compare-runs.md"):
                are_recordings(*pair)


def test_at_most_twenty_layers_are_printed():
    before, after = recorded(network(blocks=8), 0), recorded(network(blocks=8), 1)
    found = compare_recordings(before, after)
    assert len(found.layers) > 20
    console = Console(width=200, file=io.StringIO())
    print_recording_diff(found, console)
    told = console.file.getvalue()
    assert f"{len(found.layers) - 20} more layers are on the page" in told
    assert sum("within noise" in line or "  changed  " in line for line in told.partition("──")[2].splitlines()[1:]) == 20


def test_the_page_runs_as_written(tmp_path, monkeypatch, capsys):
    for package in ("jinja2", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/compare-runs.md").read_text(encoding="utf-8")
    blocks = [code for language, code in re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL) if language == "python"]
    torch.manual_seed(0)
    base, batches = network(), [torch.randn(32, 5, 16) for _ in range(24)]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[1].up.weight.mul_(1.3)
    names = {"base": base, "tuned": tuned, "model_a": base, "model_b": tuned, "batches": batches, "batch": batches[0]}
    exec(blocks[0], names)
    (command,) = re.findall(r"```\ntorchprobe (diff .*?)\n```", page)
    assert CliRunner().invoke(cli, command.split()).exit_code == 0
    for block in blocks[1:]:
        exec(block, names)
    assert names["found"].culprit == "1.up" and "1.up adds the largest error by itself" in capsys.readouterr().out
