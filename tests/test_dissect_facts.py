"""What a dissection depends on: whatever of it changes between a stop and a resume is named, and nothing is mixed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, preprocess
from PIL import Image
from torch import Tensor, nn

from torchprobe.common.facts import ChangedError
from torchprobe.datasets import Broden
from torchprobe.dissection import dissect

OPTIONS: dict[str, Any] = {"preprocess": preprocess, "batch_size": 4, "top": 3, "quantile": 0.05}


class Scaled:
    """A preprocessing whose repr does not say what it does."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __repr__(self) -> str:
        return "Scaled"

    def __call__(self, image: Image.Image) -> Tensor:
        return preprocess(image) * self.by


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_trap_set(tmp_path / "set", images=16).root


def stopped(root: Path, folder: Path, model: nn.Module | None = None, **options: Any) -> None:
    """A run that ends while it counts pixels."""
    told: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        dissect(
            model or Net(), "conv", Broden(root), **OPTIONS | options, checkpoint=folder, checkpoint_every=0.0, progress=told.append,
            stop=lambda: bool(told) and told[-1].stage == "overlap",
        )  # fmt: skip


def resumed(root: Path, folder: Path, model: nn.Module | None = None, **options: Any) -> Any:
    return dissect(model or Net(), "conv", Broden(root), **OPTIONS | options, checkpoint=folder, resume=True)


def first_map(root: Path) -> str:
    rows = Broden(root).rows
    return next(entry for entries in rows[0].entries for entry in entries if isinstance(entry, str))


def paint(path: Path, color: tuple[int, int, int]) -> None:
    with Image.open(path) as picture:
        changed = picture.convert("RGB")
    changed.putpixel((0, 0), color)
    changed.save(path)


def replace(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def label_name(root: Path) -> str:
    return Broden(root).labels[0].name


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a picture": (lambda root: paint(root / "images" / Broden(root).rows[0].image, (255, 255, 255)), "data: pictures"),
    "a mask": (lambda root: paint(root / "images" / first_map(root), (1, 0, 0)), "data: label maps"),
    "a renamed label": (lambda root: replace(root / "label.csv", label_name(root), "renamed"), "data: label.csv"),
    "the index": (lambda root: replace(root / "index.csv", "train", "val"), "data: index.csv"),
}


@pytest.mark.parametrize("what", FILES)
def test_changed_files(root: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(root, tmp_path / "kept")
    stopped(root, tmp_path / "c")
    change, named = FILES[what]
    change(root)
    with pytest.raises(ChangedError, match=f"made with another {named}: .*, now it is .*; delete the folder and start again"):
        resumed(root, tmp_path / "c")
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "kept", root)  # the same bytes with other dates
    assert resumed(root, tmp_path / "c") == dissect(Net(), "conv", Broden(root), **OPTIONS)


def other_weights() -> nn.Module:
    net = Net()
    with torch.no_grad():
        net.conv.bias[3] += 1e-3
    return net


def other_modules() -> nn.Module:
    net = Net()
    net.norm.eps = 0.1  # the weights are the same
    return net


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a preprocessing with the same repr": ({"preprocess": Scaled(1.0)}, {"preprocess": Scaled(0.5)}, "preprocessing: fingerprint"),
    "weights": ({}, {"model": other_weights()}, "weights"),
    "modules": ({}, {"model": other_modules()}, "modules"),
    "a basis": ({"basis": torch.eye(12)}, {"basis": torch.eye(12).flip(0)}, "sites: conv: basis"),
    "latents": ({"basis": nn.Linear(12, 5)}, {"basis": nn.Linear(12, 5)}, "sites: conv: basis: digest"),
    "given thresholds": ({"thresholds": {"conv": torch.zeros(12)}}, {"thresholds": {"conv": torch.ones(12)}}, "sites: conv: thresholds"),
    "rows": ({}, {"rows": range(12)}, "data: chosen rows"),
    "an option": ({}, {"pooling": "mean"}, "pooling"),
    "a geometry": ({"geometry": lambda width, height: box(0.5)}, {"geometry": lambda width, height: box(0.5 + (width > 40) / 4)}, "."),
}


def box(share: float) -> Any:
    from torchprobe.datasets.geometry import Box

    return Box(0.0, 0.0, share, share)


@pytest.mark.parametrize("what", ARGUMENTS)
def test_changed_arguments(root: Path, tmp_path: Path, what: str) -> None:
    before, after, named = ARGUMENTS[what]
    stopped(root, tmp_path / "c", **before)
    with pytest.raises(ChangedError, match=f"made with another {named}"):
        resumed(root, tmp_path / "c", **before | after)
    assert resumed(root, tmp_path / "c", **before) == dissect(before.get("model", Net()), "conv", Broden(root), **OPTIONS | before)


def test_what_cannot_be_identified_is_not_resumed_unless_it_says_what_it_is(root: Path, tmp_path: Path) -> None:
    class Counts:
        """It may do anything with a picture that it has not seen."""

        def __init__(self, identity: str | None = None) -> None:
            if identity is not None:
                self.identity = identity

        def __call__(self, image: Image.Image) -> Tensor:
            if image.tobytes() not in known:
                raise ValueError("not one of my pictures")
            return preprocess(image)

    known = {Broden(root).image(row).tobytes() for row in range(len(Broden(root)))}
    whole = {"geometry": "whole"}
    stopped(root, tmp_path / "a", preprocess=Counts(), **whole)
    with pytest.raises(
        ChangedError, match="nothing tells whether its transform is still the same: give the object an attribute `identity`"
    ):
        resumed(root, tmp_path / "a", preprocess=Counts(), **whole)
    stopped(root, tmp_path / "b", preprocess=Counts("first"), **whole)
    with pytest.raises(ChangedError, match="made with another transform"):
        resumed(root, tmp_path / "b", preprocess=Counts("second"), **whole)
    anew = dissect(Net(), "conv", Broden(root), **OPTIONS | {"preprocess": Counts("first"), **whole})
    assert resumed(root, tmp_path / "b", preprocess=Counts("first"), **whole) == anew


def test_without_a_checkpoint_no_file_is_read_for_its_digest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(sys.modules["torchprobe.dissection.dissect"], "broden_facts", refuse)
    dissect(Net(), "conv", Broden(root), **OPTIONS)


def test_one_process_at_a_time(root: Path, tmp_path: Path) -> None:
    """A second run of the same checkpoint is refused while the first one runs, and nothing of the first is lost."""
    refused: list[str] = []

    def second(progress: object) -> None:
        if not refused:
            with pytest.raises(ValueError, match="is in use by process") as caught:
                resumed(root, tmp_path / "c")
            refused.append(str(caught.value))

    found = dissect(Net(), "conv", Broden(root), **OPTIONS, checkpoint=tmp_path / "c", progress=second)
    assert refused and found == dissect(Net(), "conv", Broden(root), **OPTIONS)
