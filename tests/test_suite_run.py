"""Several encoders, one after the other, and what takes two networks at hand."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import interpret_sets as sets
import pytest
import torch
from click.testing import CliRunner
from drawing import stop_drawing

from torchprobe.analysis.baseline import Baseline
from torchprobe.cli import cli
from torchprobe.common.checked import write_checked
from torchprobe.common.runs import RunOptions, RunWarning
from torchprobe.datasets import Broden, DatasetError
from torchprobe.encoders import EncoderError, Head, load_encoder
from torchprobe.encoders.suite import load_suite
from torchprobe.studies.compare import Comparison, load_results, write
from torchprobe.studies.interpret.inputs import Inputs, kept_head
from torchprobe.studies.shared_start import no_start_by_facts, no_start_by_weights, weight_cosine
from torchprobe.studies.suite import ALPHAS, run_pair, run_suite

CONFIG = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, concepts, and three tiny encoders of one backbone; a fourth whose checkpoint is to be filled in."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("suite")
    sets.write_classes(root / "images", each=8)
    sets.write_classes(root / "noisy", each=4, strength=5.0, seed=3)
    sets.write_concepts(root / "concepts", 30)
    sets.write_baseline(root / "baseline.csv")
    (root / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    source = f"open_clip:local-dir:{root}"
    texts = []
    start: dict[str, torch.Tensor] = {}
    for seed, (name, role) in enumerate((("zero", "zero-shot"), ("tuned", "fine-tuned"), ("scratch", "supervised"))):
        torch.manual_seed(seed)
        encoder = load_encoder(source, pretrained=False)
        weights = {f"visual.{key}": value for key, value in encoder.visual.state_dict().items()}
        if name == "tuned":  # from the start of "zero", a little away from it
            weights = {key: start[key] + 0.2 * start[key].std() * torch.randn_like(value) for key, value in weights.items()}
        start = start or dict(weights)
        if seed == 0:
            weights |= dict(encoder.text.state_dict())  # type: ignore[union-attr]
        save_file({key: value.contiguous() for key, value in weights.items()}, root / f"{name}.safetensors")
        Head(torch.randn(3, 48), torch.zeros(3), normalize=True, names=sets.CLASSES[::-1]).save(root / f"{name}-head.safetensors")
        head = "zero-shot" if role == "zero-shot" else f"{name}-head.safetensors"
        texts.append(entry(name, role, source, f"{name}.safetensors", head))
    texts.append(entry("absent", "imagenet-captions", source, "", "zero-shot"))
    (root / "suite.toml").write_text("\n".join(texts))
    return root


def entry(name: str, role: str, source: str, checkpoint: str, head: str) -> str:
    return f"""
[[encoder]]
name = "{name}"
role = "{role}"
backbone = "tiny"
pretraining = "none"
source = "{source}"
checkpoint = "{checkpoint}"
head = "{head}"
"""


def inputs(folder: Path) -> Inputs:
    return Inputs(
        images=folder / "images",
        shifts={"noisy": folder / "noisy"},
        broden=Broden(folder / "concepts"),
        baseline=Baseline.from_csv(folder / "baseline.csv"),
        templates=["a {} picture"],
    )


OPTIONS = RunOptions(batch_size=12)


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        stop_drawing(patch)  # test_interpret.py looks at the plots
        comparison = run_suite(load_suite(folder / "suite.toml"), inputs(folder), out, batch_size=12)
    write(comparison, out)
    return comparison, out


def test_all_that_are_there_are_run(found: tuple[Comparison, Path]) -> None:
    comparison, out = found
    assert [row["model"] for row in comparison.models] == ["zero", "tuned", "scratch"]
    assert comparison.skipped == [{"model": "absent", "why": "it needs your checkpoint: fill in its path"}]
    assert all((out / name / "index.html").is_file() for name in ("zero", "tuned", "scratch"))
    assert all(row["robustness"] is not None and row["accuracy"] is not None for row in comparison.models)


def test_pairs(found: tuple[Comparison, Path]) -> None:
    comparison, out = found
    assert set(comparison.extras) == {"zero → tuned", "zero → scratch"}
    extra = comparison.extras["zero → tuned"]
    cka = extra["cka"]
    assert len(cka["values"]) == len(cka["layers_a"]) and len(cka["values"][0]) == len(cka["layers_b"]) and cka["images"] == 24
    along = extra["interpolation"]
    assert along["alphas"] == list(ALPHAS) and set(along["accuracy"]) == {"imagenet", "noisy"}
    # The ends are the two encoders themselves.
    for i, row in ((0, comparison.models[0]), (-1, comparison.models[1])):
        assert along["accuracy"]["imagenet"][i] == row["accuracy"]
        assert along["kurtosis"][i] == pytest.approx(row["kurtosis"], rel=1e-5)
    scratch = comparison.extras["zero → scratch"]
    assert scratch["skipped"] == {"interpolation": "they share no start: the role supervised is trained from random weights"}
    assert scratch["cka"] is not None and scratch.get("interpolation") is None
    page = (out / "index.html").read_text()
    assert "CKA of the layers: zero → tuned" in page and "Left out" in page
    assert "they share no start" in page and "Accuracy along the interpolation: zero → scratch" not in page


def test_how_a_shared_start_is_known() -> None:
    def network(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Flatten(), torch.nn.Linear(16, 40))

    start, alone = network(0), network(1)
    torch.manual_seed(2)
    tuned = network(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.5 * weight.std().nan_to_num() * torch.randn_like(weight)  # far: half of their size
    zero, fine = {"role": "zero-shot", "pretraining": "LAION"}, {"role": "fine-tuned", "pretraining": "LAION"}
    assert no_start_by_facts(zero, fine) is None and no_start_by_weights(start, tuned) is None
    assert weight_cosine(start, tuned) > 0.8 and abs(weight_cosine(start, alone)) < 0.2  # type: ignore[operator, arg-type]
    assert "median cosine" in str(no_start_by_weights(start, alone))
    assert no_start_by_facts({}, {}) is None
    assert "trained from random weights" in str(no_start_by_facts(zero, {"role": "supervised"}))
    assert "one was pretrained on LAION, the other on OpenAI" in str(no_start_by_facts(zero, fine | {"pretraining": "OpenAI"}))


@pytest.mark.usefixtures("undrawn")
def test_resumed(found: tuple[Comparison, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, out = found

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    for name in ("layer_similarity", "along_interpolation"):
        monkeypatch.setattr(f"torchprobe.studies.suite.{name}", refuse)
    again = run_suite(load_suite(folder / "suite.toml"), inputs(folder), out, batch_size=12, resume=True)
    assert again.models == comparison.models and again.extras == comparison.extras


def test_a_pair_is_computed_anew_when_one_of_them_changed(found: tuple[Comparison, Path], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(found[1], out)
    results = json.loads((out / "tuned" / "results.json").read_text())
    results["head"]["digest"] = "another head"
    write_checked(out / "tuned" / "results.json", results)
    rows = {row.name: row for row in load_suite(folder / "suite.toml")}
    pair = [(rows[name], load_results(out / name)) for name in ("zero", "tuned")]
    before = {path.name: path.stat().st_mtime_ns for path in (out / "pairs" / "stages").glob("zero--tuned-*")}
    with pytest.warns(RunWarning, match="zero--tuned-cka, and what .* is computed again, because of another b: head: digest"):
        run_pair(pair[0], pair[1], inputs(folder), out / "pairs", replace(OPTIONS, resume=True))
    after = {path.name: path.stat().st_mtime_ns for path in (out / "pairs" / "stages").glob("zero--tuned-*")}
    assert len(before) == 13 and all(after[name] > before[name] for name in before)  # CKA, 11 steps and what they give


def test_zero_shot_heads_are_kept(found: tuple[Comparison, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    row = next(row for row in load_suite(folder / "suite.toml") if row.name == "zero")
    monkeypatch.setattr("torchprobe.encoders.ClipEncoder.zero_shot_head", refuse)
    kept = inputs(folder).load(row, OPTIONS, kept_head(found[1] / "zero", True)).head
    assert kept is not None and kept.names == sets.CLASSES
    with pytest.raises(AssertionError, match="made again"):
        inputs(folder).load(row, OPTIONS, kept_head(found[1] / "tuned", True))


@pytest.mark.usefixtures("undrawn")
def test_an_encoder_that_does_not_fit_the_images_is_skipped(folder: Path, tmp_path: Path) -> None:
    Head(torch.randn(2, 48), names=("cat", "dog")).save(folder / "animals.safetensors")
    rows = {row.name: row for row in load_suite(folder / "suite.toml")}
    strange = replace(rows["tuned"], name="strange", head=str(folder / "animals.safetensors"))
    chosen = [rows["zero"], strange, rows["scratch"]]
    shown = replace(inputs(folder), shifts={}, broden=None, layer_images=0)
    comparison = run_suite(chosen, shown, tmp_path, pairs=False)
    assert [row["model"] for row in comparison.models] == ["zero", "scratch"]
    assert comparison.skipped[0]["model"] == "strange" and "not one of the 2 classes" in comparison.skipped[0]["why"]


def test_the_folders_are_looked_at_before_any_encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchprobe.encoders.suite.SuiteRow.load", lambda self: pytest.fail("fetched"))
    with pytest.raises(DatasetError, match="does not exist"):
        run_suite(load_suite(folder / "suite.toml"), replace(inputs(folder), images=tmp_path / "absent"), tmp_path / "out")
    with pytest.raises(DatasetError, match="does not exist"):
        run_suite(load_suite(folder / "suite.toml"), replace(inputs(folder), shifts={"noisy": tmp_path / "absent"}), tmp_path / "out")


def test_a_hub_that_does_not_answer_is_asked_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    def unreachable(self: object) -> None:
        seen.append(constants.HF_HUB_OFFLINE)
        try:
            raise socket.gaierror("no name server")
        except OSError as error:
            raise EncoderError("could not be fetched") from error

    monkeypatch.setattr("torchprobe.encoders.suite.SuiteRow.load", unreachable)
    with pytest.raises(EncoderError, match="0 of 4"):
        run_suite(load_suite(folder / "suite.toml"), inputs(folder), tmp_path)
    assert seen == [False, True, True] and constants.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("undrawn")
def test_too_few(folder: Path, tmp_path: Path) -> None:
    rows = [row for row in load_suite(folder / "suite.toml") if row.name in ("zero", "absent")]
    with pytest.raises(EncoderError, match="1 of 2 encoders .* absent: it needs your checkpoint"):
        run_suite(rows, inputs(folder), tmp_path)


# -- the commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_interpret_one(folder: Path, tmp_path: Path) -> None:
    options = ["--images", str(folder / "images"), "--shift", f"noisy={folder / 'noisy'}", "--baseline", str(folder / "baseline.csv"),
               "--broden", str(folder / "concepts"), "--checkpoint", str(folder / "zero.safetensors"), "--device", "cpu",
               "--template", "a {} picture", "--batch-size", "12"]  # fmt: skip
    model = f"open_clip:local-dir:{folder}"
    result = CliRunner().invoke(cli, ["interpret", model, *options, "--out", str(tmp_path / "json"), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["skipped"] == {"ablation": "there are no outlier features to ablate", "provenance": "there are no outlier features"}
    assert found["accuracy"]["imagenet"]["images"] == 24 and Path(found["files"]["page"]).is_file()
    result = CliRunner().invoke(cli, ["interpret", model, *options, "--out", str(tmp_path / "text")], catch_exceptions=False)
    assert result.exit_code == 0 and "Vector kurtosis" in result.stdout and result.stdout.rstrip().endswith("index.html")


@pytest.mark.usefixtures("undrawn")
def test_interpret_a_suite_and_compare(folder: Path, tmp_path: Path, found: tuple[Comparison, Path]) -> None:
    options = ["--suite", str(folder / "suite.toml"), "--only", "zero", "--only", "tuned", "--no-pairs", "--images", str(folder / "images"),
               "--device", "cpu", "--layer-images", "0"]  # fmt: skip
    result = CliRunner().invoke(cli, ["interpret", *options, "--out", str(tmp_path / "suite"), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [row["model"] for row in json.loads(result.stdout)["models"]] == ["zero", "tuned"]
    out = found[1]
    result = CliRunner().invoke(
        cli, ["compare", str(out / "zero"), str(out / "scratch"), "--out", str(tmp_path / "two")], catch_exceptions=False
    )
    assert result.exit_code == 0 and "zero − scratch" in result.stdout
    assert (tmp_path / "two" / "index.html").is_file()


def test_a_comparison_is_no_work_for_several_ranks(found: tuple[Comparison, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as torchrun sets them
    monkeypatch.setenv("WORLD_SIZE", "2")
    folders = [str(found[1] / name) for name in ("zero", "tuned")]
    result = CliRunner().invoke(cli, ["compare", *folders, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "torchprobe compare is one process: run it without torchrun" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "x"], "give either MODEL or --suite"),
        (["timm:x", "--suite", "paper", "--images", "x"], "give either MODEL or --suite"),
        (["--suite", "paper", "--checkpoint", "x", "--images", "x"], "the suite has its own"),
        (["timm:x", "--only", "a", "--images", "x"], "--only needs a --suite to choose from"),
        (["timm:x", "--shift", "imagenet_r", "--images", "x"], "is not NAME=DIR"),
        (["timm:x", "--shift", "a=b", "--shift", "a=c", "--images", "x"], "two --shift have the same name"),
        (["--suite", "paper", "--only", "nobody", "--images", "x"], "the suite has no 'nobody'"),
    ],
)
def test_command_lines_that_are_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["interpret", *arguments])
    assert result.exit_code == 2 and message in result.stderr
