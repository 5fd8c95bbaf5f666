"""Several encoders, one after the other, and what takes two networks at hand."""

from __future__ import annotations

import json
from pathlib import Path

import interpret_sets as sets
import pytest
import torch
from click.testing import CliRunner

from torchprobe.analysis.baseline import Baseline
from torchprobe.cli import cli
from torchprobe.datasets import Broden
from torchprobe.encoders import EncoderError, Head, load_encoder
from torchprobe.encoders.suite import load_suite
from torchprobe.studies.compare import Comparison, write
from torchprobe.studies.suite import Inputs, run_suite
from torchprobe.studies.suite_pairs import ALPHAS

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
    for seed, (name, role) in enumerate((("zero", "zero-shot"), ("tuned", "fine-tuned"), ("scratch", "supervised"))):
        torch.manual_seed(seed)
        encoder = load_encoder(source, pretrained=False)
        weights = {f"visual.{key}": value for key, value in encoder.visual.state_dict().items()}
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
        batch_size=12,
    )


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchprobe.studies.interpret.write.write_plots", lambda *_: None)  # test_interpret.py looks at those
        comparison = run_suite(load_suite(folder / "suite.toml"), inputs(folder), out)
    write(comparison, out)
    return comparison, out


def test_all_that_are_there_are_run(found: tuple[Comparison, Path]) -> None:
    comparison, out = found
    assert [row["model"] for row in comparison.models] == ["zero", "tuned", "scratch"]
    assert comparison.skipped == [{"model": "absent", "why": "it needs a checkpoint of yours: fill in its path"}]
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
    page = (out / "index.html").read_text()
    assert "CKA of the layers: zero → tuned" in page and "Left out" in page


def test_resumed(found: tuple[Comparison, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, out = found

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    for name in ("_cka", "_along"):
        monkeypatch.setattr(f"torchprobe.studies.suite_pairs.{name}", refuse)
    again = run_suite(load_suite(folder / "suite.toml"), inputs(folder), out, resume=True)
    assert again.models == comparison.models and again.extras == comparison.extras


def test_too_few(folder: Path, tmp_path: Path) -> None:
    rows = [row for row in load_suite(folder / "suite.toml") if row.name in ("zero", "absent")]
    with pytest.raises(EncoderError, match="1 of 2 encoders .* absent: it needs a checkpoint"):
        run_suite(rows, inputs(folder), tmp_path)


# -- the commands ----------------------------------------------------------------------------------------------------------


def test_interpret_one(folder: Path, tmp_path: Path) -> None:
    options = ["--images", str(folder / "images"), "--shift", f"noisy={folder / 'noisy'}", "--baseline", str(folder / "baseline.csv"),
               "--broden", str(folder / "concepts"), "--checkpoint", str(folder / "zero.safetensors"), "--device", "cpu",
               "--template", "a {} picture", "--batch-size", "12"]  # fmt: skip
    model = f"open_clip:local-dir:{folder}"
    result = CliRunner().invoke(cli, ["interpret", model, *options, "--out", str(tmp_path / "json"), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["skipped"] == {"ablation": "there are no outlier features to ablate"}
    assert found["accuracy"]["imagenet"]["images"] == 24 and Path(found["files"]["page"]).is_file()
    result = CliRunner().invoke(cli, ["interpret", model, *options, "--out", str(tmp_path / "text")], catch_exceptions=False)
    assert result.exit_code == 0 and "Vector kurtosis" in result.stdout and result.stdout.rstrip().endswith("index.html")


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "x"], "give either MODEL or --suite"),
        (["timm:x", "--suite", "paper", "--images", "x"], "give either MODEL or --suite"),
        (["--suite", "paper", "--checkpoint", "x", "--images", "x"], "the suite has its own"),
        (["timm:x", "--only", "a", "--images", "x"], "--only chooses from a --suite"),
        (["timm:x", "--shift", "imagenet_r", "--images", "x"], "is not NAME=DIR"),
        (["timm:x", "--shift", "a=b", "--shift", "a=c", "--images", "x"], "two --shift have the same name"),
        (["--suite", "paper", "--only", "nobody", "--images", "x"], "the suite has no 'nobody'"),
    ],
)
def test_command_lines_that_are_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["interpret", *arguments])
    assert result.exit_code == 2 and message in result.stderr
