"""The examples run as their own docstrings say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchprobe

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_train_with_kurtosis_resumes_as_if_never_interrupted(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
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


def test_dissect_writes_a_page(monkeypatch, tmp_path, capsys):
    for package in ("PIL", "jinja2", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    run(monkeypatch, "dissect.py", "--images", 40, "--epochs", 1, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert "labels shuffled" in printed
    assert printed.strip().endswith(str(tmp_path / "index.html"))
    assert "shapes/" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert len((tmp_path / "units.csv").read_text().splitlines()) == 33
