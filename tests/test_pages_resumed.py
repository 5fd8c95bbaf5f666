"""Runs that are interrupted while they write their pages: a resume writes the pages that are missing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broden_sets import write_trap_set
from words_sets import write_images

from torchprobe import cli
from torchprobe.dissection.words import SoftLabels

for package in ("timm", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; gives exit code and standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        return int(caught.value.code or 0), capsys.readouterr().err

    return call


def dissecting(folder: Path, out: Path) -> list[object]:
    if not (folder / "broden").exists():
        write_trap_set(folder / "broden", images=24)
    layers = ["--layers", "visual.blocks.0", "--layers", "visual.blocks.1"]
    options = ["--broden", folder / "broden", "--out", out, "--device", "cpu", "--batch-size", 4, "--pictures", 2]
    return ["dissect", "timm:test_vit", "--random-init", *layers, *options]


def finding_words(folder: Path, out: Path) -> list[object]:
    labels = folder / "labels.safetensors"
    if not labels.exists():
        write_images(folder / "photos", 24)
        values = torch.rand(24, 3, generator=torch.Generator().manual_seed(0))
        SoftLabels(values, ["cat", "dog", "sea"], [f"{i:04}.png" for i in range(24)]).save(labels)
    layers = ["--layers", "visual.blocks.0", "--layers", "visual.blocks.1"]
    options = ["--images", folder / "photos", "--labels", labels, "--permutations", 3, "--out", out, "--device", "cpu"]
    return ["words", "timm:test_vit", "--random-init", *layers, *options]


COMMANDS = {
    "dissect": (dissecting, "torchprobe.studies.dissect.write_report"),
    "words": (finding_words, "torchprobe.dissection.words.result.write_words_report"),
}


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_pages_are_completed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, presses: int) -> None:
    arguments, writer = COMMANDS[command]
    assert run(*arguments(tmp_path, tmp_path / "whole"))[0] == 0
    module, _, name = writer.rpartition(".")
    write = getattr(__import__(module, fromlist=[name]), name)

    def interrupted(*given: Any, **options: Any) -> Path:
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        page: Path = write(*given, **options)
        return page

    with monkeypatch.context() as patch:
        patch.setattr(writer, interrupted)
        code, err = run(*arguments(tmp_path, tmp_path / "out"))
    assert code == 130
    assert "run the same command with --resume" in err and "nothing was written" not in err
    assert not (tmp_path / "out" / "visual.blocks.1.html").exists()
    code, err = run(*arguments(tmp_path, tmp_path / "out"))
    assert code == 1 and "--resume" in err
    assert run(*arguments(tmp_path, tmp_path / "out"), "--resume")[0] == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.is_file())
    assert "visual.blocks.1.html" in names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    code, err = run(*arguments(tmp_path, tmp_path / "out"), "--resume")
    assert code == 1 and "there is nothing to resume" in err
