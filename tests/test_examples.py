"""The examples run as their docstrings say, with shorter settings."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import torchrun

import torchprobe

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name: str, *arguments: object, run_name: str = "__main__") -> dict:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))  # where a script finds the modules next to it
    return runpy.run_path(str(EXAMPLES / name), run_name=run_name)


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit: history, its histograms, everything recorded, the log, the weights."""
    a, b = (torchprobe.load(folder / "recording.safetensors") for folder in (first, second))
    assert a.history.steps == b.history.steps and a.layers == b.layers
    np.testing.assert_array_equal(a.history.values, b.history.values)
    np.testing.assert_array_equal(a.history.histograms, b.history.histograms)
    for layer in a:
        assert torch.equal(a.total[layer].state, b.total[layer].state)
    assert (first / "log.jsonl").read_text() == (second / "log.jsonl").read_text()
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


# -- fine-tuning -----------------------------------------------------------------------------------------------------------


FINETUNE = ("finetune.py", "--digits", "--epochs", 2, "--window", 5, "--save", 10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of fine-tuning."""
    needs("sklearn", "open_clip", "torchvision", "jinja2", "matplotlib")
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, *FINETUNE, "--output", folder)
    return folder


@pytest.mark.slow("trains on digits")
def test_finetune_records_every_block_and_ends_with_the_map(whole):
    recording = torchprobe.load(whole / "recording.safetensors")
    assert recording.layers == [*(f"visual.transformer.resblocks.{i}" for i in range(4)), ""]
    assert recording.history.steps == [5, 10, 15, 20, 25, 30]
    assert recording.history["vectors"][:, -1].tolist() == [500.0] * 6  # 5 batches of 100, and no validation
    assert (whole / "kurtosis.png").read_bytes().startswith(b"\x89PNG")
    page = (whole / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 8 and "Layers over steps" in page
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    windows = [line for line in log if "loss" in line]
    assert [line["step"] for line in windows] == recording.history.steps
    assert windows[-1]["loss"] < windows[0]["loss"]
    assert windows[2]["act//vector_kurtosis"] == recording.history["vector_kurtosis"][2, -1]
    assert [line["step"] for line in log if "accuracy" in line] == [15, 30]


@pytest.mark.slow("starts the training as a process, then resumes it")
def test_finetune_killed_and_resumed_equals_an_uninterrupted_run(monkeypatch, whole, tmp_path):
    command = [sys.executable, str(EXAMPLES / FINETUNE[0]), *map(str, FINETUNE[1:]), "--output", str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 15 "):  # after the last checkpoint, so the log has lines that must be removed
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "recording.safetensors").exists()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] in (10, 20)
    run(monkeypatch, *FINETUNE, "--output", tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


@pytest.mark.slow("trains on digits")
def test_finetune_resumed_when_finished_reports_again(monkeypatch, whole, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    (tmp_path / "log.jsonl").write_bytes((whole / "log.jsonl").read_bytes())
    run(monkeypatch, *FINETUNE, "--output", tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


@pytest.mark.slow("trains on digits")
def test_a_different_recipe_is_not_resumed(monkeypatch, whole):
    with pytest.raises(SystemExit, match=r"has a different recipe: epochs 3 instead of 2, lr 0.1 instead of 0.002\. Resume with"):
        run(monkeypatch, *FINETUNE, "--epochs", 3, "--lr", 0.1, "--output", whole, "--resume")


@pytest.mark.slow("starts torchrun")
def test_finetune_on_two_processes_gives_the_history_of_one(whole, tmp_path):
    torchrun(2, EXAMPLES / FINETUNE[0], *FINETUNE[1:], "--output", tmp_path)
    one, two = (torchprobe.load(folder / "recording.safetensors") for folder in (whole, tmp_path))
    assert one.history.steps == two.history.steps and one.layers == two.layers
    np.testing.assert_array_equal(one.history["vectors"], two.history["vectors"])
    # Gradients are summed in another order, and training amplifies the difference.
    np.testing.assert_allclose(two.history["vector_kurtosis"][0], one.history["vector_kurtosis"][0], rtol=1e-5)
    np.testing.assert_allclose(two.history["vector_kurtosis"], one.history["vector_kurtosis"], rtol=0.05)


def test_finetune_a_clip_model_on_folders_starts_from_its_zero_shot_head(monkeypatch, tmp_path, capsys):
    needs("open_clip", "torchvision", "jinja2", "matplotlib", "PIL")
    import open_clip
    from PIL import Image

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-finetuned.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-finetuned.json")
    clip = open_clip.create_model("tiny-finetuned", pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    rng = np.random.default_rng(0)
    for name, value in (("dark_gray", 60), ("light_gray", 190)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            pixels = (value + rng.integers(-20, 20, (20, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    arguments = ("--encoder", "open_clip:tiny-finetuned", "--checkpoint", tmp_path / "clip.pt", "--train", tmp_path / "train")
    more = ("--test", tmp_path / "train", "--batch", 4, "--epochs", 1, "--window", 1, "--save", 1, "--lr", 0, "--output", tmp_path / "out")
    board = ("--tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    run(monkeypatch, "finetune.py", *arguments, *more, *board)
    assert len(list((tmp_path / "out").glob("events.out.tfevents.*"))) == len(board)
    recording = torchprobe.load(tmp_path / "out" / "recording.safetensors")
    assert recording.history.steps == [1, 2, 3]
    from safetensors.torch import load_file

    encoder = torchprobe.load_encoder("open_clip:tiny-finetuned", checkpoint=tmp_path / "clip.pt")
    head = encoder.zero_shot_head(["dark gray", "light gray"])  # the learning rate was 0
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")["head.weight"], 100 * head.weight, rtol=1e-5, atol=1e-6)
    tuned = torchprobe.load_encoder("open_clip:tiny-finetuned", checkpoint=tmp_path / "out" / "model.safetensors")
    assert torch.equal(tuned.visual.proj, encoder.visual.proj)


def test_the_recipe_of_fine_tuning(monkeypatch, tmp_path):
    needs("open_clip", "torchvision")
    module = run(monkeypatch, "finetune.py", "--encoder", "timm:vit", "--train", tmp_path, run_name="recipe")
    options = module["arguments"]()
    recipe = ("epochs", "batch", "lr", "warmup", "weight_decay")
    assert [getattr(options, name) for name in recipe] == [10, 256, 3e-5, 500, 0.1]
    rates = [module["learning_rate"](step, 10_500, options) for step in (1, 250, 500, 5500, 10_500)]
    np.testing.assert_allclose(rates, [3e-5 / 500, 1.5e-5, 3e-5, 1.5e-5, 0], atol=1e-18)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --train or --digits"),
        (("--train", "x"), "give --encoder or --digits"),
        (("--digits", "--save", 7), "--save 7 is not a multiple of --window 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(monkeypatch, capsys, arguments, message):
    needs("open_clip", "torchvision")
    with pytest.raises(SystemExit):
        run(monkeypatch, "finetune.py", *arguments)
    assert message in capsys.readouterr().err


# -- supervised training -----------------------------------------------------------------------------------------------


@pytest.mark.slow("trains on digits")
def test_train_supervised(monkeypatch, tmp_path):
    needs("sklearn", "open_clip", "torchvision", "jinja2", "matplotlib")
    run(monkeypatch, "train_supervised.py", "--digits", "--epochs", 1, "--output", tmp_path)
    recording = torchprobe.load(tmp_path / "recording.safetensors")
    assert recording.layers == [*(f"visual.layer{i}.{j}" for i in range(1, 5) for j in range(2)), ""]
    assert recording.history.steps == [5, 10, 15]
    assert recording.history["vectors"][:, 0].tolist() == [500.0 * 8 * 8] * 3  # each position of a map
    assert (tmp_path / "kurtosis.png").exists() and (tmp_path / "index.html").exists()


def test_the_recipe_of_supervised_training(monkeypatch, tmp_path):
    needs("open_clip", "torchvision")
    module = run(monkeypatch, "train_supervised.py", "--train", tmp_path, run_name="recipe")
    options = module["arguments"]()
    recipe = ("epochs", "batch", "lr", "warmup", "weight_decay", "label_smoothing")
    assert [getattr(options, name) for name in recipe] == [90, 1024, 1e-3, 5000, 1e-2, 0.1]
    epoch = 1251  # steps
    steps = (1, 5000, 30 * epoch, 30 * epoch + 1, 60 * epoch, 60 * epoch + 1, 90 * epoch)
    rates = [module["learning_rate"](step, 90 * epoch, options) for step in steps]
    np.testing.assert_allclose(rates, [2e-7, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


# -- the others --------------------------------------------------------------------------------------------------------


def test_train_with_kurtosis_resumed_equals_an_uninterrupted_run(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn provides the digits")
    run(monkeypatch, "train_with_kurtosis.py", "--epochs", 3, "--output", tmp_path / "whole")
    run(monkeypatch, "train_with_kurtosis.py", "--epochs", 2, "--output", tmp_path / "parts")
    run(monkeypatch, "train_with_kurtosis.py", "--epochs", 3, "--output", tmp_path / "parts", "--resume")
    whole, parts = (torchprobe.load(tmp_path / name / "recording.safetensors") for name in ("whole", "parts"))
    assert whole.layers == parts.layers and whole["0"].vectors == 4500
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["recorder"]["history"] for name in ("whole", "parts")]
    assert list(saved[0]) == list(saved[1])
    for layer in whole.layers:
        np.testing.assert_array_equal(whole[layer].kurtosis, parts[layer].kurtosis)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:layer .* never active")
def test_dissect_writes_a_page(monkeypatch, tmp_path, capsys):
    for package in ("PIL", "jinja2", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    run(monkeypatch, "dissect.py", "--images", 40, "--epochs", 1, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert "labels shuffled" in printed
    assert printed.strip().endswith(str(tmp_path / "index.html"))
    assert "shapes/" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert len((tmp_path / "units.csv").read_text().splitlines()) == 33
